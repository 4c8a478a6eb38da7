"""Stage 2 of Audio Flamingo 2, 3B: skills and tasks, with 2-minute clips; the encoder trains, too.

Hardware: 8 x 80 GB; one GPU with a smaller model or batch. Wall time reported by the authors: about 5 days on
128 A100; not measured here.
Launch: torchrun --nproc_per_node=8 train.py config/sft.py   or, on one GPU,   python train.py config/sft.py
Your own sounds: put your manifests into dataset_blending_config, pretrained_path = "nvidia/audio-flamingo-2".
"""
run_name = "sft"
pretrained_path = "exp/pretrain"
pretrained_ckpt = "checkpoint_199.pt"
clap_checkpoint = "clap_ckpt/epoch_16.pt"
clap_finetune = True
max_num_window = 12  # 2 min, as the released configs; the paper says 9

num_epochs = 200
dataset_blending_global_weight = 0.005
batch_size = 4
gradient_accumulation_steps = 32
learning_rate = 2e-5
lr_scheduler = "constant"
warmup_steps = 1875
gradient_checkpointing = True
save_epochs = valid_epochs = 10  # published: 1; an epoch of the blend may take about a minute
save_minutes = 20.0

# Table 21 of the paper: passes over each set
dataset_blending_config = {
    "AudioSkills-AQA/train": 2.0,
    "CompA-R-AQA/train": 2.0,
    "MusicBenchQA/train": 2.0,
    "MU-LLAMA-AQA/train": 2.0,
    "SalmonnQA/train": 1.0,
    "Clotho-AQA-AQA/train": 1.0,
    "OpenAQA-AQA/train": 1.0,
    "Clotho-v2-AudioCaptioning/train": 1.0,
    "MACS-AudioCaptioning/train": 1.0,
    "FSD50k-EventClassification/train": 1.0,
    "CochlScene-SceneClassification/train": 1.0,
    "NonSpeech7k-EventClassification/train": 1.0,
    "chime-home-EventClassification/train": 1.0,
    "SONYC-UST-EventClassification/train": 1.0,
    "emov-db-EmotionClassification/train": 1.0,
    "jl-corpus-EmotionClassification/train": 6.0,
    "tess-EmotionClassification/train": 2.5,
    "OMGEmotion-EmotionClassification/train": 3.0,
    "Music-AVQA-AQA_All/train": 3.0,
    "LP-MusicCaps-MSD-AudioCaptioning/train": 0.026,
    "LP-MusicCaps-MTT-AudioCaptioning/train": 1.0,
    "LP-MusicCaps-MC-AudioCaptioning/train": 2.0,
    "MusicCaps-AudioCaptioning/train": 6.0,
    "NSynth-MIR/train": 1.5,
    "mtg-jamendo-MusicTagging/train": 1.0,
    "musdbhq-InstrClassification/train": 2.0,
    "FMA-GenreClassification/train": 1.0,
}
valid_dataset_config = {
    "Clotho-AQA-AQA/val": 1.0,
    "Clotho-v2-AudioCaptioning/val": 1.0,
    "CochlScene-SceneClassification/val": 1.0,
}
