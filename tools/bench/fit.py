"""tools/bench.py fit: the memory and time that a recipe needs, before anyone rents a GPU for it.

    python tools/bench.py fit config/sft.py                            # on the GPUs that its docstring names
    python tools/bench.py fit config/sft.py --gpu=24 --gpus=1 --batch_size=1
    python tools/bench.py fit mine.py --windows=3 --tokens=128 --answers=60 --tflops=312 --mfu=0.3

Memory is counted in closed form from the shapes: weights, gradients, Adam's moments, and the activations that
autograd keeps for the backward pass. tests/test_fit.py compares it with the peak of real steps on a CPU. The
sizes of Qwen2.5-0.5B, -1.5B, -3B and SmolLM2-135M are known here, those of another language model are read
from its local folder; nothing is downloaded. What is not counted is kept free: 1 GB for CUDA's context and
libraries, 5 % for fragmentation.
"""
import ast
import bisect
import os
import re
import sys
from types import SimpleNamespace

import torch

import checkpoint
import config
from model import matrix_sizes
from tools.bench.common import SMOLLM2, ByteTokenizer, print_table
from tools.checkpoint.clap import clap_state
from tools.checkpoint.devices import pick_precision
from tools.checkpoint.language_models import load_lm_config_and_tokenizer
from tools.common import UserError
from tools.train.log import flops_per_step

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
PARTS = {  # in the order of the backward pass
    "head": "head and loss", "lm": "language model", "xattn": "gated cross-attention",
    "audio_transformer": "audio transformer", "clap": "audio encoder"}
HEAD_ROWS = 1024  # AudioFlamingo.summed_loss forms the logits of as many tokens at once

# ------------------------------------------------------------------------------------------------------------
# The model of a config, on the meta device


def is_local(path):
    return bool(path) and os.path.exists(config.resolve_path(path))


def sizes_and_tokenizer(c):
    """load_lm_config_and_tokenizer of a local folder; for the language models known here, without one."""
    name = os.path.basename(c.lang_encoder_path)
    release = re.search(r"audio-flamingo-2(-\d\.5B)?", c.pretrained_path or "")
    if release and "lang_encoder_path" not in c.user_set:  # a release implies its language model
        name = "Qwen2.5" + (release[1] or "-3B")
    elif is_local(c.lang_encoder_path):
        return load_lm_config_and_tokenizer(c)
    if name not in LANGUAGE_MODELS:
        known = ", ".join(LANGUAGE_MODELS)
        raise UserError(f"lang_encoder_path = {c.lang_encoder_path!r}: no such folder; known by name are "
                        f"{known}")
    sizes = SimpleNamespace(**vars(SMOLLM2) | LANGUAGE_MODELS[name])
    return None, sizes, ByteTokenizer(sizes.vocab)


def build_sized_model(c):
    """The model of the settings c without weights; what trains is set as train.py does."""
    overrides, encoder = config.overrides(c), {}
    if is_local(c.pretrained_path):
        model, _ = checkpoint.open_pretrained(c, overrides)
    else:
        if is_local(c.clap_checkpoint):
            encoder = clap_state(c.clap_checkpoint)
        text = sizes_and_tokenizer(c)
        model = checkpoint.build_meta_model(c, encoder, text, c.clap_checkpoint, overrides)
    model.set_trainable(c)
    model.gradient_checkpointing = c.gradient_checkpointing
    model.clap.gradient_checkpointing = c.clap_gradient_checkpointing
    return model


def count_parameters(model):
    """{part: [frozen, trained]}."""
    counts = {part: [0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        counts[part][parameter.requires_grad] += parameter.numel()
    return counts


def trains(module):
    return any(p.requires_grad for p in module.parameters())


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
    L, C = (clap.htsat.spec_size // 4) ** 2, clap.htsat.embed_dim
    total, peak = L * (16 * p + 4 * C), 0  # patches of 4 x 4, their norm
    for stage in clap.htsat.layers:
        for block in stage.blocks:
            heads, seen = block.attn.num_heads, block.window_size ** 2
            products = 10 * C  # qkv (1), fc1 (1), GELU (4), fc2 (4)
            if block.shift_size:  # its bias differs from window to window
                products += heads * seen
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
    c, gated = model.lm.config, list(model.xattn.values())
    heads, d, D = gated[0].heads, gated[0].d, c.width
    blocks = c.layers
    if not trains(model.lm):
        blocks -= min(map(int, model.xattn))
    products = 3 * c.inner  # gate, silu(gate), up
    if trains(model.lm.layers):  # the inputs of q, k, v, gate, up; of down
        products += copies(p, 5) * D + c.inner
    block = block_activations(p, T, D, products, c.heads, c.d, T, c.kv_heads)
    products = heads * d + 11 * D  # to_out; to_q (1), ff.1 (1), GELU (4), ff.3 (4), the gate (1)
    gated_block = block_activations(p, T, D, products, heads, d, keys=0)
    largest = 0
    if model.gradient_checkpointing:
        largest = max(block, gated_block)
        block = gated_block = 4 * D * T
    inputs = copies(p, len(gated)) * model.clap.width
    keys_and_values = 2 * heads * d * len(gated)
    to_kv = p * S * (inputs + keys_and_values)
    return blocks * block, len(gated) * gated_block + to_kv, largest


# ------------------------------------------------------------------------------------------------------------
# A step


def step_memory(model, B, W, T, A, p, accumulates=False, shards=1):
    """-> {what: bytes} at the peak of an optimizer step: micro-batches of B clips with W windows and texts of
    T tokens, A of them with labels, one at a time on the device. accumulates: gradients are there before the
    backward pass, those of an earlier micro-batch or the buckets in which ranks reduce them; shards: in which
    the optimizer's state is."""
    S = W * model.clap.tokens_per_window
    table = model.lm.embed_tokens
    counts = count_parameters(model).values()
    gradients = [4 * trained for _, trained in counts]
    matrices = sum(x.numel() for x in model.parameters() if x.requires_grad and x.ndim > 1)
    window = 2 * model.config.window_length * model.audio_config["sample_rate"]  # int16
    always = {
        "frozen weights": p * sum(frozen for frozen, _ in counts),
        "trained weights": sum(gradients),
        "Adam's moments": 2 * sum(gradients) / shards,
        "bf16 copies of trained weights": p * matrices if p < 4 else 0,
        "batch": B * W * window}

    text, gated, text_block = text_activations(model, p, T, S)
    encoder, encoder_peak = encoder_activations(model.clap, p) if trains(model.clap) else (0, 0)
    logits = 4 * (len(table.weight) + len(table.added)) * min(B * A, HEAD_ROWS)
    activations = {
        "head": 3 * logits,  # log-probabilities and two gradients
        "lm": B * text, "xattn": B * gated,
        "audio_transformer": B * audio_activations(model, p, S),
        "clap": B * W * encoder}

    # The backward pass frees activations and makes gradients, part after part. The head's gradient of a tied
    # table waits for that of the embeddings.
    waiting = sum(4 * x.numel() for x in table.parameters() if x.requires_grad)
    work = {"lm": B * text_block + waiting, "audio_transformer": (1 + accumulates) * waiting,
            "end": B * W * encoder_peak}  # an encoder's first blocks are its widest, and recomputed last
    moments = []
    for i, part in enumerate([*PARTS, "end"]):
        moment = {PARTS[name]: activations[name] for name in list(PARTS)[i:]}
        made = gradients if accumulates else gradients[:i]
        moment["gradients"] = sum(made)
        moment["backward pass"] = work.get(part, 0)
        moments.append(always | moment)
    return max(moments, key=lambda moment: sum(moment.values()))


def forward_operations(model, W, T, A):
    """{part: operations of a clip's forward pass}: 2 per weight and use."""
    S = W * model.clap.tokens_per_window
    to_kv = sum(block.attn.to_kv.weight.numel() for block in model.xattn.values())
    gated = matrix_sizes(model.xattn) - to_kv
    return {
        "head": 2 * A * matrix_sizes(model.lm.embed_tokens),
        "lm": 2 * T * matrix_sizes(model.lm.layers),
        "xattn": 2 * T * gated + 2 * S * to_kv,
        "audio_transformer": 2 * S * matrix_sizes(model.audio_transformer),
        "clap": model.clap.flops(W)}


# ------------------------------------------------------------------------------------------------------------
# A recipe


def hardware(c, path):
    """-> number and GB of the cards: as given, as the config's docstring says ("Hardware: 8 x 80 GB"), or one
    of 80 GB."""
    source = open(path).read() if path else ""
    text = ast.get_docstring(ast.parse(source)) or ""
    found = re.search(r"Hardware: (?:(\d+) x )?[^.]*?(\d+) GB", text)
    number, size = found.groups() if found else (1, 80)
    return c.gpus or int(number or 1), c.gpu or float(size)


def fit(c):
    if c.answers > c.tokens or c.mfu > 1:
        raise UserError(f"answers = {c.answers}, mfu = {c.mfu}: expected at most tokens = {c.tokens}, and 1")
    files = [arg for arg in sys.argv[1:] if arg.endswith(".py")]
    path = files[0] if files else None
    ranks, size = hardware(c, path)
    model = build_sized_model(c)
    B, micro_batches = c.batch_size, c.gradient_accumulation_steps
    W = c.windows or model.config.max_num_window
    dtype, _ = pick_precision(c.precision, torch.device("cuda"))

    def memory(B, T=c.tokens, A=c.answers):
        shards = ranks if c.shard_optimizer else 1
        sizes = step_memory(model, B, W, T, A, dtype.itemsize, micro_batches * ranks > 1, shards)
        return {what: number / 1e9 for what, number in sizes.items()}

    def peak(*shapes):
        return sum(memory(*shapes).values())

    counts, room = count_parameters(model), 0.95 * (size * 2 ** 30 / 1e9 - 1)
    frozen, trained = map(sum, zip(*counts.values()))
    forward = forward_operations(model, W, c.tokens, c.answers)
    forward = {PARTS[part]: operations / 1e9 for part, operations in forward.items()}
    operations = flops_per_step(model, B * c.tokens, B * W, B * c.answers)  # of a micro-batch
    tflops = c.tflops or (790.0 if size > 24 else 165.0)
    seconds = operations * micro_batches / (1e12 * tflops * c.mfu)
    clips = B * micro_batches * ranks / seconds
    epoch = c.items and c.items * c.dataset_blending_global_weight
    window_mb = 2e-6 * model.config.window_length * model.audio_config["sample_rate"]
    figures = {
        "config": path, "gpus": ranks, "gpu_gb": size, "batch_size": B, "windows": W,
        "tokens": c.tokens, "answers": c.answers, "trained": trained, "frozen": frozen,
        "memory_gb": memory(B), "peak_gb": peak(B), "room_gb": room,
        "longest_texts_gb": peak(B, c.max_tokens, c.max_tokens // 2),
        "largest_batch": bisect.bisect(range(1, 10 ** 5), room, key=peak),
        "forward_gflop": forward, "flops_per_sample": operations / B,
        "flops_per_step": operations * micro_batches * ranks, "tflops": tflops, "mfu": c.mfu,
        "step_s": seconds, "samples_per_s": clips, "windows_per_s": clips * W,
        "host_to_device_mb_s": clips * W * window_mb,
        "all_reduce_gb": 4e-9 * trained if ranks > 1 else 0.0,
        "epoch_items": epoch, "epoch_hours": epoch and epoch / clips / 3600}
    rows = [[name, *counts[part], forward[name]] for part, name in PARTS.items()]
    print_table(["part", "frozen", "trained", "forward GFLOP a clip"], rows)
    print_table(["memory of a card at the peak", "GB (10^9 bytes)"], figures["memory_gb"].items())
    return figures
