"""Every setting, its default and its reason. Published names where they exist; the values are those of
pretraining. Relative paths start at the project's folder."""

# where things go and come from
expdir: str = "exp"  # runs are written to expdir/run_name/
run_name: str = "pretrain"  # folder of this run
delete_previous_checkpoint: bool = False  # keep only the newest checkpoint of a run: keep_last = 1
keep_last: int = 0  # of the epochs' checkpoints, so many of the newest; 0: all
keep_every: int = 0  # with keep_last: those of every so many epochs stay as well; 0: none does
pretrained_path: str | None = None  # run, checkpoint, release directory or hub id to start from
pretrained_ckpt: str | None = None  # checkpoint file inside pretrained_path, e.g. checkpoint_99.pt
lang_encoder_path: str = "Qwen/Qwen2.5-3B"  # Hugging Face directory or hub id of the language model
tokenizer_path: str | None = None  # None: the language model's own
cache_dir: str | None = None  # where hub downloads go; None: the hub's default
clap_checkpoint: str | None = None  # audio encoder (as epoch_16.pt); None: random, or that of pretrained_path

# optimisation
batch_size: int = 8  # clips per process and micro-step
gradient_accumulation_steps: int = 1  # micro-steps per optimizer step
num_epochs: int = 200  # times dataset_blending_global_weight = passes over the weighted blend
seed: int = 42  # of weights, order and augmentation
learning_rate: float = 1e-4  # peak; audio transformer, gated cross-attention, embeddings
clap_learning_rate: float | None = None  # audio encoder; None: learning_rate
gate_learning_rate: float | None = None  # the tanh gates, which start at 0; None: learning_rate
lr_scheduler: str = "constant"  # after warm-up: constant, cosine or linear (to 0 at the last step)
warmup_steps: int = 1875  # optimizer steps of linear warm-up
weight_decay: float = 0.1  # on the gated cross-attention matrices alone
grad_clip: float = 1.0  # global gradient norm, once per optimizer step; 0: off
max_bad_steps: int = 5  # in a row without a finite loss and gradient, or a labelled token, before it stops
shard_optimizer: bool = False  # each rank keeps and updates a share of the optimizer's state
precision: str = "amp_bf16"  # amp_bf16: bf16 products, float32 trained weights, bf16 frozen ones; fp32
compile: bool = False  # torch.compile for the blocks; texts are padded to multiples of 64 tokens then
gradient_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, about 30 % slower
clap_gradient_checkpointing: bool = False  # the same in the encoder: 2 min keep 3.3 GB of HTS-AT large
freeze_lm_embeddings: bool | str = False  # False: the table trains (published); "added": the added rows alone
unfreeze_full_lm: bool = False  # train the language model's blocks too
clap_finetune: bool = False  # train the audio encoder too (sft)
logging_steps: int = 10  # optimizer steps between log lines
save_steps: int = 0  # also save an interim checkpoint every so many steps; 0: none
save_epochs: int = 1  # epochs between checkpoints (published: 1); the last epoch always has one
save_minutes: float = 0.0  # also save an interim checkpoint after so many minutes without one; 0: none
valid_epochs: int = 1  # epochs between validations; after the last there always is one
profile: bool = False  # trace two of the first steps: trace.json in the run's folder, and a table
max_steps: int = 0  # stop after so many optimizer steps (schedule length too); 0: num_epochs decide
device: str = "auto"  # auto: cuda where there is one, else cpu

# data
dataset_file_root: str = "data/manifests"  # folder of <Name-Task>/<split>.json
data_root: str = "data"  # audio of an item: data_root/split_path/name
dataset_blending_global_weight: float = 0.005  # share of the blend that one epoch takes
dataset_blending_config: dict = {}  # {"Name-Task/split": epochs over the set}
dataset_blending_output: str | None = None  # JSONL of what each epoch selected; None: not written
valid_dataset_config: dict = {}  # {"Name-Task/split": weight}; validation loss after every epoch
max_windows_per_batch: int | None = None  # per process and micro-step, padded; None: batch_size alone decides
bucket_batches: int = 64  # global batches among which items are sorted by size: less padding; 1: no sorting
max_tokens: int = 512  # text tokens per clip
num_workers: int = 4  # data loading processes per rank
cache_audio: bool = False  # keep decoded windows in memory (16 kHz, 16 bits: 1.9 MB a minute); for small sets
max_bad_fraction: float = 0.01  # of unreadable audio files before training stops

# the model and what it hears: saved in checkpoints, but for attention_backend (config.MODEL_SETTINGS)
window_length: float = 10.0  # seconds
window_overlap: float = 0.0  # seconds
max_num_window: int = 3  # windows per clip: 3 = 30 s (pretrain), 12 = 2 min (sft), 30 = 5 min (long)
clap_spec_size: int = 256  # 256: windows up to 10.24 s, 64 tokens; 128: 2.56 s, 16 tokens
clap_embed_dim: int = 256  # of a new encoder, as the next two: large; base 128, tiny 96. C = 8 x this
clap_depths: list = [2, 2, 12, 2]  # HTS-AT blocks per stage
clap_num_heads: list = [4, 8, 16, 32]  # HTS-AT heads per stage
audio_transformer_n_head: int = 8  # heads of the audio transformer
audio_transformer_n_layers: int = 3  # its layers
audio_transformer_d_inner: int = 2048  # its feed-forward width
cross_attn_every_n_layers: int | list = 1  # stride of the gated blocks, or the list of block indices
attention_backend: str = "auto"  # of the gated cross-attention: auto, triton, sdpa, naive

# What a model is and what it hears: saved with its weights, and taken from there by whoever starts from them.
MODEL_SETTINGS = ("lang_encoder_path", "tokenizer_path", "clap_spec_size", "clap_embed_dim", "clap_depths",
                  "clap_num_heads", "audio_transformer_n_head", "audio_transformer_n_layers",
                  "audio_transformer_d_inner", "cross_attn_every_n_layers", "window_length", "window_overlap",
                  "max_num_window")
# What a script that loads a model hands on: those, where the parts of a run lie, and what belongs to the
# machine.
LOADING = (*MODEL_SETTINGS, "pretrained_path", "clap_checkpoint", "cache_dir", "attention_backend")
PATHS = ("lang_encoder_path", "tokenizer_path", "pretrained_path", "clap_checkpoint", "dataset_file_root",
         "data_root")
ORIGINS = ("expdir", "run_name", "pretrained_ckpt", *PATHS[2:])  # where a run was, and what it was made of

# Bounds of numbers, also of scripts' own settings.
AT_LEAST_1 = """batch_size gradient_accumulation_steps num_epochs logging_steps save_epochs valid_epochs bucket_batches
    max_tokens max_windows_per_batch max_num_window clap_spec_size clap_embed_dim audio_transformer_n_head
    audio_transformer_d_inner cross_attn_every_n_layers clap_steps clap_batch_size eval_batch_size"""
NOT_NEGATIVE = """seed learning_rate clap_learning_rate gate_learning_rate warmup_steps weight_decay grad_clip
    max_bad_steps save_steps save_minutes max_steps keep_last keep_every num_workers max_bad_fraction window_overlap
    audio_transformer_n_layers clap_text_bank clap_text_layers workers examples"""
MINIMUM = dict.fromkeys(AT_LEAST_1.split(), 1) | dict.fromkeys(NOT_NEGATIVE.split(), 0)
POSITIVE = ("window_length", "dataset_blending_global_weight", "clap_peak_lr", "clap_muon_lr", "clap_temperature")
