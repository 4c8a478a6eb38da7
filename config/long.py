"""Stage 3 of Audio Flamingo 2, 3B: 5-minute clips. Trains the same parts as stage 1, with a frozen encoder.

Hardware: 8 x 80 GB. Wall time reported by the authors: about 12 hours on 128 A100; not measured here.
Launch: torchrun --nproc_per_node=8 train.py config/long.py
"""
run_name = "long"
pretrained_path = "exp/sft"
pretrained_ckpt = "checkpoint_199.pt"
clap_checkpoint = "clap_ckpt/epoch_16.pt"
max_num_window = 30  # 5 min

num_epochs = 200
dataset_blending_global_weight = 0.005
batch_size = 2
gradient_accumulation_steps = 64
learning_rate = 2e-5
lr_scheduler = "constant"
warmup_steps = 1875
gradient_checkpointing = True
save_epochs = valid_epochs = 10  # published: 1; an epoch of the blend may take about a minute
save_minutes = 20.0

dataset_blending_config = {"LongAudio-AQA/train": 1.0}
valid_dataset_config = {"LongAudio-AQA/val": 1.0}
