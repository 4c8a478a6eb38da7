"""Every setting, its default and its reason. Published names where they exist; the values are those of
pretraining. Relative paths start at the project's folder."""

# where things go and come from
expdir: str = "exp"  # runs are written to expdir/run_name/
run_name: str = "pretrain"  # folder of this run
delete_previous_checkpoint: bool = False  # published name of keep_last = 1
keep_last: int = 0  # number of epoch checkpoints to keep, the newest; 0: all
pretrained_path: str | None = None  # run, checkpoint, release directory or hub id to start from
pretrained_ckpt: str | None = None  # checkpoint file inside pretrained_path, e.g. checkpoint_99.pt
lang_encoder_path: str = "Qwen/Qwen2.5-3B"  # Hugging Face directory or hub id of the language model
tokenizer_path: str | None = None  # None: the language model's own
cache_dir: str | None = None  # where hub downloads go; None: the hub's default
clap_checkpoint: str | None = None  # audio encoder (as epoch_16.pt); None: random, or that of pretrained_path

# optimisation
batch_size: int = 8  # clips per process and micro-step
gradient_accumulation_steps: int = 1  # micro-steps per optimizer step
num_epochs: int = 200  # num_epochs * dataset_blending_global_weight = passes over the weighted blend
seed: int = 42  # of weights, order and augmentation
learning_rate: float = 1e-4  # peak; audio transformer, gated cross-attention, embeddings
clap_learning_rate: float | None = None  # audio encoder; None: learning_rate
gate_learning_rate: float | None = None  # the tanh gates, which start at 0; None: learning_rate
lr_scheduler: str = "constant"  # after warm-up: constant, cosine or linear (to 0 at the last step)
warmup_steps: int = 1875  # optimizer steps of linear warm-up
weight_decay: float = 0.1  # of the gated cross-attention matrices; 0 elsewhere
grad_clip: float = 1.0  # global gradient norm, once per optimizer step; 0: off
max_bad_steps: int = 5  # stop after more consecutive skipped (non-finite or label-free) steps than this
shard_optimizer: bool = False  # each rank keeps and updates a shard of the optimizer state (ZeRO-1)
precision: str = "amp_bf16"  # amp_bf16: bf16 products and frozen weights, float32 trained ones; fp32: no TF32
compile: bool = False  # torch.compile the blocks; pads texts to multiples of 64 tokens
gradient_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, about 30 % slower
clap_gradient_checkpointing: bool = False  # the same in the encoder: 2 min keep 3.3 GB in HTS-AT large
freeze_lm_embeddings: bool | str = False  # False: embeddings train (published); "added": special tokens only
unfreeze_full_lm: bool = False  # train the language model's blocks too
clap_finetune: bool = False  # train the audio encoder too (sft)
logging_steps: int = 10  # optimizer steps between log lines
save_epochs: int = 1  # epochs between checkpoints (published: 1); the last epoch always saves one
save_minutes: float = 0.0  # also save an interim checkpoint when the last one is this old; 0: never
valid_epochs: int = 1  # epochs between validations; the last epoch always validates
max_steps: int = 0  # stop after this many optimizer steps, also the length of the schedule; 0: num_epochs
device: str = "auto"  # auto: cuda where there is one, else cpu

# data
dataset_file_root: str = "data/manifests"  # folder of <Name-Task>/<split>.json
data_root: str = "data"  # audio of an item: data_root/split_path/name
dataset_blending_global_weight: float = 0.005  # fraction of the weighted blend that one epoch takes
dataset_blending_config: dict = {}  # {"Name-Task/split": epochs over the set}
dataset_blending_output: str | None = None  # JSONL of what each epoch selected; None: not written
valid_dataset_config: dict = {}  # {"Name-Task/split": weight}; validation loss after every epoch
max_windows_per_batch: int | None = None  # per process and micro-step, with padding; None: no limit
bucket_batches: int = 64  # batches per bucket, within which items are sorted by size; 1: no sorting
max_tokens: int = 512  # text tokens per clip
num_workers: int = 4  # data loading processes per rank
cache_audio: bool = False  # keep decoded windows in memory (1.9 MB a minute at 16 kHz); for small sets
max_bad_fraction: float = 0.01  # stop when more than this fraction of audio files is unreadable

# the model and its audio windows: saved in checkpoints, except attention_backend (MODEL_SETTINGS)
window_length: float = 10.0  # seconds
window_overlap: float = 0.0  # seconds
max_num_window: int = 3  # windows per clip: 3 = 30 s (pretrain), 12 = 2 min (sft), 30 = 5 min (long)
clap_spec_size: int = 256  # 256: windows up to 10.24 s, 64 tokens; 128: 2.56 s, 16 tokens
clap_embed_dim: int = 256  # of a new encoder, as the next two; large 256, base 128, tiny 96; C = 8 x this
clap_depths: list = [2, 2, 12, 2]  # HTS-AT blocks per stage
clap_num_heads: list = [4, 8, 16, 32]  # HTS-AT heads per stage
audio_transformer_n_head: int = 8  # heads of the audio transformer
audio_transformer_n_layers: int = 3  # its layers
audio_transformer_d_inner: int = 2048  # its feed-forward width
cross_attn_every_n_layers: int | list = 1  # stride of the gated blocks, or the list of block indices
attention_backend: str = "auto"  # of the gated cross-attention: auto, triton, sdpa, naive

# Saved with the weights of a model, and taken from there by whoever loads it.
MODEL_SETTINGS = ("lang_encoder_path", "tokenizer_path", "clap_spec_size", "clap_embed_dim", "clap_depths",
                  "clap_num_heads", "audio_transformer_n_head", "audio_transformer_n_layers",
                  "audio_transformer_d_inner", "cross_attn_every_n_layers", "window_length", "window_overlap",
                  "max_num_window")
# What sample.py and eval.py pass to checkpoint.load: also where a run's parts are, and the machine's own.
LOADING = (*MODEL_SETTINGS, "pretrained_path", "clap_checkpoint", "cache_dir", "attention_backend")
PATHS = ("lang_encoder_path", "tokenizer_path", "pretrained_path", "clap_checkpoint", "dataset_file_root",
         "data_root")
ORIGINS = ("expdir", "run_name", "pretrained_ckpt", *PATHS[2:])  # folder and parts of a run

# Bounds of numbers, also of scripts' own settings.
AT_LEAST_1 = """
    batch_size gradient_accumulation_steps num_epochs logging_steps save_epochs valid_epochs bucket_batches
    max_tokens max_windows_per_batch max_num_window clap_spec_size clap_embed_dim audio_transformer_n_head
    audio_transformer_d_inner cross_attn_every_n_layers clap_steps clap_batch_size eval_batch_size"""
NOT_NEGATIVE = """
    seed learning_rate clap_learning_rate gate_learning_rate warmup_steps weight_decay grad_clip max_bad_steps
    save_minutes max_steps keep_last num_workers max_bad_fraction window_overlap
    audio_transformer_n_layers clap_text_bank clap_text_layers workers
    train val test test_programs train_questions questions"""  # the last: clips of prepare/gm_notes.py
MINIMUM = dict.fromkeys(AT_LEAST_1.split(), 1) | dict.fromkeys(NOT_NEGATIVE.split(), 0)
POSITIVE = ("window_length", "dataset_blending_global_weight", "clap_peak_lr", "clap_muon_lr",
            "clap_temperature", "gpu", "gpus", "windows", "tokens", "answers", "items", "mfu", "tflops")
