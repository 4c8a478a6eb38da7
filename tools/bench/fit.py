"""tools/bench.py fit: the memory and time that a recipe needs, before anyone rents a GPU for it.

    python tools/bench.py fit config/sft.py                            # on the GPUs that its docstring names
    python tools/bench.py fit config/sft.py --gpu=24 --gpus=1 --batch_size=1
    python tools/bench.py fit mine.py --windows=3 --tokens=128 --answers=60 --tflops=312 --mfu=0.3

Memory is counted in closed form from the shapes: weights, gradients, Adam's moments, and the activations that
autograd keeps for the backward pass. tests/test_fit.py compares it with the peak of real steps on a CPU. The
sizes of Qwen2.5-0.5B, -1.5B, -3B and SmolLM2-135M are known here, those of another language model come
from its config and tokenizer. What is not counted is kept free: 1 GB for CUDA's context and libraries, 5 %
for fragmentation.
"""
import bisect
import os
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

import checkpoint
import config
from tools.bench.common import SMOLLM2, byte_tokenizer
from tools.checkpoint.clap import clap_state
from tools.checkpoint.devices import pick_precision
from tools.checkpoint.language_models import load_lm_config_and_tokenizer
from tools.common import UserError
from tools.train.log import flops_per_step, forward_flops, parameter_table
from tools.train.optim import set_up_training

gpu: float | None = None  # GB of the card, as its maker counts (GiB); None: the config's docstring, else 80
gpus: int | None = None  # cards; None: the config's docstring, else 1
windows: int | None = None  # of a clip; None: max_num_window, the most there can be
tokens: int = 64  # of a text, with padding
answers: int = 20  # of them with a label
items: int | None = None  # of a pass over the blend, for the time of an epoch
mfu: float = 0.4  # share of tflops that the products reach
tflops: float | None = None  # of the card; None: 790 (H100, bf16, measured), up to 24 GB 165 (RTX 4090)

QWEN = {"vocab": 151665, "kv_heads": 2, "qkv_bias": True}  # rows before <audio>
LANGUAGE_MODELS = {
    "Qwen2.5-0.5B": QWEN | {"width": 896, "layers": 24, "inner": 4864, "heads": 14},
    "Qwen2.5-1.5B": QWEN | {"width": 1536, "layers": 28, "inner": 8960, "heads": 12, "d": 128},
    "Qwen2.5-3B": QWEN | {"width": 2048, "layers": 36, "inner": 11008, "heads": 16, "d": 128},
    "SmolLM2-135M": {}}
HEAD_ROWS = 1024  # AudioFlamingo.summed_loss forms the logits of as many tokens at once

# ------------------------------------------------------------------------------------------------------------
# The model of a config, on the meta device


def is_local(path):
    return bool(path) and os.path.exists(config.resolve_path(path))


def sizes_and_tokenizer(c):
    """What load_lm_config_and_tokenizer returns, without a folder for the language models known here."""
    name = os.path.basename(c.lang_encoder_path)
    release = re.search(r"audio-flamingo-2(-\d\.5B)?", c.pretrained_path or "")
    if release and "lang_encoder_path" not in c.user_set:  # a release implies its language model
        name = "Qwen2.5" + (release[1] or "-3B")
    if name not in LANGUAGE_MODELS:
        return load_lm_config_and_tokenizer(c, weights=False)
    sizes = SimpleNamespace(**vars(SMOLLM2) | LANGUAGE_MODELS[name])
    return None, sizes, byte_tokenizer(sizes.vocab)


def build_sized_model(c):
    """The model of the settings c without weights; what trains is set as train.py does."""
    overrides = config.overrides(c)
    if is_local(c.pretrained_path):
        model, _ = checkpoint.open_pretrained(c, overrides)
    else:
        encoder = clap_state(c.clap_checkpoint) if is_local(c.clap_checkpoint) else {}
        text = sizes_and_tokenizer(c)
        model = checkpoint.build_meta_model(c, encoder, text, c.clap_checkpoint, overrides)
    set_up_training(model, c)
    return model


def count(module, trained):
    """Number of parameters that train, or of those that are frozen."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad == trained)


# ------------------------------------------------------------------------------------------------------------
# Activations that autograd keeps, in bytes. p: bytes of a number in a matrix product (2 or 4)


def block_activations(p, T, D, products, heads, d, keys, kv_heads=None):
    """T tokens of width D in any of our blocks: float32 inputs of two norms; `products` numbers a token, the
    inputs of matrix products, gates and activation functions; of attention to `keys` keys q and its output, k
    and v, and a float32 per row and head, but no scores."""
    norms = 2 * 4 * D * T
    queries = 2 * p * d * heads + 4 * heads
    keys_and_values = 2 * p * d * (kv_heads or heads) * keys
    return norms + T * (queries + p * products) + keys_and_values


def copies(p, products):
    """Kept copies of a float32 input that several products share: autocast makes one for each."""
    return products if p < 4 else 1


def encoder_activations(clap, p):
    """-> bytes that a window keeps, and those while its widest block is recomputed, after all others."""
    L = (clap.htsat.spec_size // 4) ** 2  # patches of 4 x 4
    C = clap.htsat.embed_dim
    total = L * (16 * p + 4 * C)  # patches, their norm
    peak = 0
    for stage in clap.htsat.layers:
        for block in stage.blocks:
            heads = block.attn.num_heads
            products = 10 * C  # qkv (1), fc1 (1), GELU (4), fc2 (4)
            if block.shift_size:  # its bias differs from window to window
                products += heads * block.window_size ** 2
            inside = block_activations(p, L, C, products, heads, C // heads, keys=L)
            total += 4 * C * L if clap.gradient_checkpointing else inside
            peak = max(peak, total + inside + 4 * C * L * p)  # with the gradient of the widest tensor
        if stage.downsample is not None:
            total += C * L * (4 + p)
            L, C = L // 4, 2 * C
    return total, peak if clap.gradient_checkpointing else 0


def audio_activations(model, p, S):
    """Bytes that the audio transformer keeps of S tokens."""
    C = model.clap.width
    total = 4 * C * S
    for layer in model.audio_transformer.layer_stack:
        heads = layer.slf_attn.n_head
        products = copies(p, 3) * C + C + layer.pos_ffn.w_1.out_features  # w_qs, w_ks, w_vs; w_1; w_2
        total += block_activations(p, S, C, products, heads, C // heads, keys=S)
    return total


def text_activations(model, p, T, S):
    """T text and S audio tokens -> bytes kept by the language model and by the gated blocks, and those of the
    largest block if blocks are recomputed."""
    c = model.lm.config
    D, gated = c.width, len(model.xattn)
    first = min(map(int, model.xattn))
    heads = model.xattn[str(first)].heads
    d = model.xattn[str(first)].d
    blocks = c.layers
    if not count(model.lm, trained=True):
        blocks -= first
    products = 3 * c.inner  # gate, silu(gate), up
    if count(model.lm.layers, trained=True):  # the inputs of q, k, v, gate, up; of down
        products += copies(p, 5) * D + c.inner
    block = block_activations(p, T, D, products, c.heads, c.d, T, c.kv_heads)
    products = heads * d + 11 * D  # to_out; to_q (1), ff.1 (1), GELU (4), ff.3 (4), the gate (1)
    gated_block = block_activations(p, T, D, products, heads, d, keys=0)
    largest = 0
    if model.gradient_checkpointing:
        largest = max(block, gated_block)
        block = gated_block = 4 * D * T
    inputs = copies(p, gated) * model.clap.width
    keys_and_values = 2 * heads * d * gated
    to_kv = p * S * (inputs + keys_and_values)
    return blocks * block, gated * gated_block + to_kv, largest


# ------------------------------------------------------------------------------------------------------------
# A step


def step_memory(model, B, W, T, A, p, accumulates=False, shards=1):
    """-> {what: bytes} at the peak of an optimizer step: micro-batches of B clips with W windows and texts of
    T tokens, A of them with labels, one at a time on the device. accumulates: gradients are there before the
    backward pass, those of an earlier micro-batch or the buckets in which ranks reduce them; shards: in which
    the optimizer's state is."""
    S = W * model.clap.tokens_per_window
    table = model.lm.embed_tokens
    parts = [model.lm, model.xattn, model.audio_transformer, model.clap]  # in the order of the backward pass
    gradients = [0, *(4 * count(part, trained=True) for part in parts)]
    always = {
        "frozen weights": p * count(model, trained=False),
        "trained weights": sum(gradients),
        "Adam's moments": 2 * sum(gradients) / shards,
        "bf16 copies of trained weights": sum(gradients) / 2 if p < 4 else 0,
        "batch": B * W * 2 * model.config.window_length * model.audio_config["sample_rate"]}  # int16

    text, gated, text_block = text_activations(model, p, T, S)
    encoder, encoder_peak = 0, 0
    if model.clap_trains():
        encoder, encoder_peak = encoder_activations(model.clap, p)
    logits = 4 * len(model.tokenizer) * min(B * A, HEAD_ROWS)
    activations = {
        "head and loss": 3 * logits,  # log-probabilities and two gradients
        "language model": B * text,
        "gated cross-attention": B * gated,
        "audio transformer": B * audio_activations(model, p, S),
        "audio encoder": B * W * encoder}

    # The backward pass frees activations and makes gradients, part after part. The head's gradient of a tied
    # table waits for that of the embeddings.
    waiting = 4 * count(table, trained=True)
    work = [0, B * text_block + waiting, 0, (1 + accumulates) * waiting, 0,
            B * W * encoder_peak]  # an encoder's first blocks are its widest, and recomputed last
    moments = []
    for i, extra in enumerate(work):
        kept = dict(list(activations.items())[i:])
        made = gradients if accumulates else gradients[:i]
        moments.append(always | kept | {"gradients": sum(made), "backward pass": extra})
    return max(moments, key=lambda moment: sum(moment.values()))


# ------------------------------------------------------------------------------------------------------------
# A recipe


def hardware(c):
    """-> number and GB of the cards: those that were asked for, those that the config file names ("Hardware:
    8 x 80 GB"), or one of 80 GB."""
    text = ""
    for argument in sys.argv[1:]:
        if argument.endswith(".py"):
            text = Path(argument).read_text()
    found = re.search(r"Hardware: (?:(\d+) x )?[^.]*?(\d+) GB", text + "Hardware: 1 x 80 GB")
    return c.gpus or int(found[1] or 1), c.gpu or float(found[2])


def fit(c):
    if c.answers > c.tokens or c.mfu > 1:
        raise UserError(f"answers = {c.answers}, mfu = {c.mfu}: expected at most tokens = {c.tokens}, and 1")
    ranks, size = hardware(c)
    model = build_sized_model(c)
    print(parameter_table(model))
    B, micro_batches = c.batch_size, c.gradient_accumulation_steps
    W = c.windows or model.config.max_num_window
    dtype, _ = pick_precision(c.precision, torch.device("cuda"))
    step = partial(step_memory, model, W=W, p=dtype.itemsize, accumulates=micro_batches * ranks > 1,
                   shards=ranks if c.shard_optimizer else 1)

    def peak_gb(B, T=c.tokens, A=c.answers):
        return sum(step(B, T=T, A=A).values()) / 1e9

    memory = step(B, T=c.tokens, A=c.answers)
    room = 0.95 * (size * 2 ** 30 / 1e9 - 1)
    forward = forward_flops(model, c.tokens, W, c.answers)
    operations = flops_per_step(model, B * c.tokens, B * W, B * c.answers)  # of a micro-batch
    tflops = c.tflops or (790.0 if size > 24 else 165.0)
    seconds = operations * micro_batches / (1e12 * tflops * c.mfu)
    clips = B * micro_batches * ranks / seconds
    epoch = c.items and c.items * c.dataset_blending_global_weight
    trained = count(model, trained=True)
    return {
        "gpus": ranks,
        "gpu_gb": size,
        "batch_size": B,
        "windows": W,
        "trained": trained,
        "frozen": count(model, trained=False),
        "memory_gb": {what: number / 1e9 for what, number in memory.items()},
        "peak_gb": peak_gb(B),
        "room_gb": room,
        "longest_texts_gb": peak_gb(B, c.max_tokens, c.max_tokens // 2),
        "largest_batch": bisect.bisect(range(1, 10 ** 5), room, key=peak_gb),
        "forward_gflop": {part: number / 1e9 for part, number in forward.items()},
        "flops_per_sample": operations / B,
        "tflops": tflops,
        "step_s": seconds,
        "samples_per_s": clips,
        "windows_per_s": clips * W,
        "host_to_device_mb_s": clips * memory["batch"] / B / 1e6,
        "all_reduce_gb": 4e-9 * trained if ranks > 1 else 0.0,
        "epoch_items": epoch,
        "epoch_hours": epoch and epoch / clips / 3600}
