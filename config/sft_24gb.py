"""Fine-tune a published model on your own sounds, on one GPU: frozen weights in bf16, trained ones in
float32, of the token tables the new rows alone, blocks computed again in the backward pass.

Hardware: 1 x 24 GB; 1 x 80 GB for 3B. By tools/bench.py fit, not measured: 2-minute clips, 64 tokens; GB
where all texts have 512; clips/s at 40 % of the peak of an RTX 4090, of an H100 for 3B.

    model   encoder   batch   GB     512    clips/s
    0.5B    trained   2       19.2   19.5   13
    1.5B    frozen    4       19.0   19.9   25        --clap_finetune=False --batch_size=4
    3B      trained   4       53.3   54.6   51        --batch_size=4

and with --pretrained_path=nvidia/audio-flamingo-2-1.5B or nvidia/audio-flamingo-2 for the last two. 1.5B
with its encoder trained takes 25.7 GB at batch 1. The 9,700 questions of the example, of 30 s at most, take
some minutes a pass.
Launch: python train.py config/sft_24gb.py
"""
run_name = "sft_24gb"
pretrained_path = "nvidia/audio-flamingo-2-0.5B"  # its width tells its language model
clap_finetune = True
max_num_window = 12  # 2 min, as released

num_epochs = 3
dataset_blending_global_weight = 1.0
batch_size = 2
gradient_accumulation_steps = 16
learning_rate = 2e-5
lr_scheduler = "cosine"
warmup_steps = 50
freeze_lm_embeddings = "added"  # the table would cost 2 GB (0.5B) to 5 GB (3B) more for four new rows
gradient_checkpointing = True

dataset_blending_config = {"Clotho-AQA-AQA/train": 1.0}  # yours here
valid_dataset_config = {"Clotho-AQA-AQA/val": 1.0}
