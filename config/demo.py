"""The embedded default: real sampled instruments, SmolLM2-135M, everything on a CPU.

Hardware: 2 cores, 6 GB. `make demo` runs it whole: render, CLAP, pretrain, answer, evaluate.
Launch: python train.py config/demo.py   (after prepare/gm_notes.py, prepare/smollm2.py and prepare/clap.py)
"""
run_name = "demo"
expdir = "out"
lang_encoder_path = "data/smollm2"
dataset_file_root = "data/gm/manifests"
data_root = "data/gm"

window_length = 2.5  # s; a clip is one window
max_num_window = 1
clap_checkpoint = "out/demo/clap/epoch_16.pt"  # config/demo_clap.py; sizes are inferred from its weights
audio_transformer_n_layers = 1
audio_transformer_d_inner = 512
cross_attn_every_n_layers = [22, 25, 28]  # of 30; the backward pass ends at the first

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
batch_size = 8  # small: the demo is limited by its number of steps
num_workers = 0  # clips are small and cached
cache_audio = True
bucket_batches = 8  # keeps padding small; larger buckets would fill a batch with one task
max_tokens = 64

learning_rate = 5e-4
gate_learning_rate = 0.1  # the gates start at 0; until they open, the model learns nothing from the audio
lr_scheduler = "cosine"
warmup_steps = 10
freeze_lm_embeddings = True
logging_steps = 20
