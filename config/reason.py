"""A small model of your own, whole: SmolLM2-135M and HTS-AT-tiny learn to answer and reason on ReasonAQA.

Hardware: one 24 GB GPU, an evening.
Data: ReasonAQA's train/val/test.json (zenodo.org/records/15036628, Mellow's, arXiv 2503.08540: 968,071 training
items on 155 h of AudioCaps and Clotho), converted by prepare/datasets.py.
Launch: python train.py config/reason.py
"""
run_name = "reason"
lang_encoder_path = "HuggingFaceTB/SmolLM2-135M"
clap_checkpoint = "clap_ckpt/630k-audioset-best.pt"
clap_embed_dim = 96
clap_depths = [2, 2, 6, 2]
max_num_window = 3
unfreeze_full_lm = True
num_epochs = 3
dataset_blending_global_weight = 1.0
batch_size = 64
gradient_accumulation_steps = 2
max_tokens = 384
learning_rate = 3e-4
gate_learning_rate = 1e-2
lr_scheduler = "cosine"
warmup_steps = 500
dataset_blending_config = {"ReasonAQA-AQA/train": 1.0}
valid_dataset_config = {"ReasonAQA-AQA/val": 1.0}
