"""Stage 1 of Audio Flamingo 2, 3B: trains audio transformer, gated cross-attention and embeddings.

Hardware: 8 x 80 GB. Global batch 1024 = 16 clips x 8 accumulation x 8 GPUs. Wall time reported by the
authors: about 4 days on 128 A100; not measured here. Expect the gates to open from 0 within the first
thousand steps. Launch: torchrun --nproc_per_node=8 train.py config/pretrain.py
"""
run_name = "pretrain"
lang_encoder_path = "Qwen/Qwen2.5-3B"
clap_checkpoint = "clap_ckpt/epoch_16.pt"  # from the release, or your own by prepare/clap.py
max_num_window = 3  # 30 s

num_epochs = 200
dataset_blending_global_weight = 0.005
batch_size = 16
gradient_accumulation_steps = 8
learning_rate = 1e-4
lr_scheduler = "constant"
warmup_steps = 1875
gradient_checkpointing = True
save_epochs = valid_epochs = 10  # published: 1; an epoch of the blend may take less than a minute
save_minutes = 20.0

# Passes over each set, table 21 of the paper; AudioSet, LP-MusicCaps-MSD and NSynth (1.0) are not legible.
dataset_blending_config = {
    "OpenAQA-AQA/train": 1.0,
    "BBCSoundEffects-AudioDescription/train": 5.0,
    "CLAP_freesound-AudioCaptioning/train": 1.0,
    "SoundDescs-AudioDescription/train": 1.0,
    "WavCaps-AudioSet_SL-AudioCaptioning/train": 1.0,
    "WavCaps-BBC_Sound_Effects-AudioCaptioning/train": 1.0,
    "WavCaps-FreeSound-AudioCaptioning/train": 1.0,
    "WavCaps-SoundBible-AudioCaptioning/train": 1.0,
    "AudioSet-Temporal-Speech-Audio-QA/train": 1.0,
    "WavText5K-Tagging/train": 3.0,
    "MSP-PODCAST-Publish-1.9-EmotionClassification/train": 3.0,
    "MELD-EmotionClassification/train": 3.0,
    "MELD-SentimentClassification/train": 3.0,
    "Music-AVQA-AVQA_All/train": 3.0,
    "MU-LLAMA-AQA/train": 1.2,
    "LP-MusicCaps-MSD-AudioCaptioning/train": 1.0,
    "NSynth-MIR/train": 1.0,
    "mtg-jamendo-MusicTagging/train": 1.0,
}
valid_dataset_config = {
    "Clotho-AQA-AQA/val": 1.0,
    "Clotho-v2-AudioCaptioning/val": 1.0,
    "audiocaps-AudioCaptioning/val": 1.0,
}
