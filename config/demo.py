"""The embedded default: real sampled instruments, SmolLM2-135M, everything on a CPU.

Hardware: 2 cores, 6 GB. `make demo` runs it whole: render, CLAP, pretrain, answer, evaluate.
Launch: python train.py config/demo.py   (after python prepare/gm_notes.py, prepare/smollm2.py and prepare/clap.py)
"""
run_name = "demo"
expdir = "out"
lang_encoder_path = "data/smollm2"
dataset_file_root = "data/gm/manifests"
data_root = "data/gm"

window_length = 2.5  # s; a clip is one window
max_num_window = 1
clap_spec_size = 128  # 2.56 s at most, 16 tokens
clap_embed_dim = 32
clap_depths = [0, 1, 2, 1]  # no block on the finest grid: a third less of a step, and notes are told apart no worse
clap_num_heads = [2, 4, 8, 16]
clap_position = True  # early and late sounds differ from the first step on; without, order stays at chance
clap_checkpoint = "out/demo/clap/epoch_16.pt"
audio_transformer_n_layers = 1
audio_transformer_d_inner = 512
cross_attn_every_n_layers = [22, 25, 28]  # of 30 blocks; nothing below the first trains, so the backward pass ends there

dataset_blending_config = {  # passes over each set
    "GM-Family-AQA/train": 0.8,
    "GM-FamilyMC-AQA/train": 0.2,
    "GM-Instrument-AQA/train": 0.4,
    "GM-Register-AQA/train": 0.2,
    "GM-Loudness-AQA/train": 0.2,
    "GM-Count-AQA/train": 0.2,
    "GM-Order-AQA/train": 0.35,
    "GM-Note-AudioCaptioning/train": 0.02,
}
valid_dataset_config = {"GM-Family-AQA/val": 1, "GM-Order-AQA/val": 1}
dataset_blending_global_weight = 1
num_epochs = 1
batch_size = 8  # many small steps: what limits the demo is their number
num_workers = 0  # clips are small and cached
cache_audio = True
cache_text = True  # half of the questions and answers recur: their first 22 blocks run once
bucket_batches = 8  # enough to keep padding small; over more, texts of like length would be one task's
max_tokens = 64

learning_rate = 5e-4
gate_learning_rate = 0.1  # the gates start at 0, and a residual stream of size 10 hears nothing until they are open
lr_scheduler = "cosine"
warmup_steps = 10
freeze_lm_embeddings = True
logging_steps = 20
