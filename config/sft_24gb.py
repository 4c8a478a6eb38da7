"""Fine-tune a published model on your own sounds on one GPU: frozen weights in bf16, trained ones in float32,
gradient checkpointing, of the embeddings only the special tokens; the encoder trains.

Hardware: 1 x 24 GB; 1 x 80 GB for 3B. By tools/bench.py fit, not measured: 2-minute clips, 64 tokens; GB
where all texts have 512; clips/s at 40 % of the peak of an RTX 4090, of an H100 for 3B.

    model   batch   GB     512    clips/s
    0.5B    8       17.6   19.8   13
    1.5B    2       22.3   23.5   12        --batch_size=2 --gradient_accumulation_steps=16
    3B      8       43.9   47.6   51

with --pretrained_path=nvidia/audio-flamingo-2-1.5B or nvidia/audio-flamingo-2 for the last two. The 9,700
questions of the example, of 30 s at most, take some minutes a pass.
Launch: python train.py config/sft_24gb.py
"""
run_name = "sft_24gb"
pretrained_path = "nvidia/audio-flamingo-2-0.5B"  # its width determines its language model
clap_finetune = True
max_num_window = 12  # 2 min, as released

num_epochs = 3
dataset_blending_global_weight = 1.0
batch_size = 8
gradient_accumulation_steps = 4
learning_rate = 2e-5
lr_scheduler = "cosine"
warmup_steps = 50
freeze_lm_embeddings = "added"  # the table would cost 2 GB (0.5B) to 5 GB (3B) more for four new rows
gradient_checkpointing = True
clap_gradient_checkpointing = True  # without it 1.5B does not fit, 0.5B at batch 3

dataset_blending_config = {"Clotho-AQA-AQA/train": 1.0}  # yours here
valid_dataset_config = {"Clotho-AQA-AQA/val": 1.0}
