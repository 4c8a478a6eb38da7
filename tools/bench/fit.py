"""tools/bench.py fit: the memory and time that a recipe needs, before anyone rents a GPU for it.

    python tools/bench.py fit config/sft.py                            # on the GPUs that its docstring names
    python tools/bench.py fit config/sft.py --gpu=24 --gpus=1 --batch_size=1
    python tools/bench.py fit mine.py --windows=3 --tokens=128 --answers=60 --tflops=312 --mfu=0.3

Memory is counted in closed form from the shapes: weights, gradients, Adam's moments, and the activations that
autograd keeps for the backward pass. tests/test_fit.py compares it with the peak of real steps on a CPU. The
sizes of Qwen2.5-0.5B, -1.5B, -3B and SmolLM2-135M are known here, those of another language model are read from
its local folder; nothing is downloaded. What is not counted is kept free: 1 GB for CUDA's context and libraries,
5 % for fragmentation.
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
from data import open_manifests
from model import matrix_sizes
from tools.bench.common import SMOLLM2, ByteTokenizer, print_figures, print_table
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
items: int | None = None  # of a pass over the blend; None: counted where all its manifests are
mfu: float = 0.4  # share of tflops that the products reach
tflops: float | None = None  # of the card; None: 790 (H100, bf16, measured), up to 24 GB 165 (RTX 4090)

QWEN = vars(SMOLLM2) | {"vocab": 151665, "kv_heads": 2, "qkv_bias": True}  # rows before <audio>
KNOWN = {
    "Qwen2.5-0.5B": QWEN | {"width": 896, "layers": 24, "inner": 4864, "heads": 14},
    "Qwen2.5-1.5B": QWEN | {"width": 1536, "layers": 28, "inner": 8960, "heads": 12, "d": 128},
    "Qwen2.5-3B": QWEN | {"width": 2048, "layers": 36, "inner": 11008, "heads": 16, "d": 128},
    "SmolLM2-135M": vars(SMOLLM2)}
RELEASED = r"audio-flamingo-2(-\d\.5B)?"
PARTS = {"head": "head and loss", "lm": "language model", "xattn": "gated cross-attention",
         "audio_transformer": "audio transformer", "clap": "audio encoder"}  # in the order of the backward pass
HEAD_ROWS = 1024  # AudioFlamingo.summed_loss forms the logits of as many tokens at once

# ------------------------------------------------------------------------------------------------------------
# The model of a config, on the meta device


def sizes_and_tokenizer(c):
    """load_lm_config_and_tokenizer of a local folder; for the language models known here, without one."""
    name = os.path.basename(c.lang_encoder_path)
    released = re.search(RELEASED, c.pretrained_path or "")
    if released and "lang_encoder_path" not in c.user_set:  # a release implies its language model
        name = "Qwen2.5" + (released[1] or "-3B")
    elif is_local(c.lang_encoder_path):
        return load_lm_config_and_tokenizer(c)
    if name not in KNOWN:
        raise UserError(f"lang_encoder_path = {c.lang_encoder_path!r}: no such folder; known by name are "
                        f"{', '.join(KNOWN)}")
    sizes = SimpleNamespace(**KNOWN[name])
    return None, sizes, ByteTokenizer(sizes.vocab)


def is_local(path):
    return bool(path) and os.path.exists(config.resolve_path(path))


def build_sized_model(c):
    """The model of the settings c without weights; what trains is set as train.py does."""
    overrides = config.overrides(c)
    if is_local(c.pretrained_path):
        model, _ = checkpoint.open_pretrained(c, overrides)
    else:
        encoder = clap_state(c.clap_checkpoint) if is_local(c.clap_checkpoint) else {}
        text = sizes_and_tokenizer(c)
        model = checkpoint.build_meta_model(c, encoder, text, c.clap_checkpoint, overrides, fresh=False)
    model.set_trainable(c)
    model.gradient_checkpointing = c.gradient_checkpointing
    model.clap.gradient_checkpointing = c.clap_gradient_checkpointing
    return model


def count_parameters(model):
    """{part: [frozen, trained]}."""
    counts = {part: [0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():
        counts[name.split(".")[0]][parameter.requires_grad] += parameter.numel()
    return counts


# ------------------------------------------------------------------------------------------------------------
# Activations that autograd keeps, in bytes. p: bytes of a number in a matrix product (2 or 4)


def block_activations(p, T, D, products, heads, d, keys=None, kv_heads=None):
    """T tokens of width D in any of our blocks: the float32 inputs of two norms and of the residual sums are the
    same tensors; `products`: numbers a token of what products, gates and activation functions take; attention
    keeps q and its output, k and v, a float32 per row, and no scores."""
    keys, kv_heads = T if keys is None else keys, kv_heads or heads
    norms = 2 * T * 4 * D
    attention = p * d * 2 * (T * heads + keys * kv_heads) + 4 * T * heads
    return norms + attention + p * T * products


def casts(p, products):
    """Copies that are kept of a float32 input which several products share: autocast makes one for each."""
    return products if p < 4 else 1


def encoder_activations(clap, p):
    """-> bytes that a window keeps, and those of its largest block if blocks are recomputed."""
    L, C = (clap.htsat.spec_size // 4) ** 2, clap.htsat.embed_dim
    total, largest = L * (16 * p + 4 * C), 0  # the patch embedding: 4 x 4 pixels, its norm
    for stage in clap.htsat.layers:
        for block in stage.blocks:
            heads, patches = block.attn.num_heads, block.window_size ** 2
            products = 10 * C  # qkv; fc1, GELU and fc2
            if block.shift_size:
                products += heads * patches  # its bias differs from window to window
            inside = block_activations(p, L, C, products, heads, C // heads)
            total += 4 * L * C if clap.gradient_checkpointing else inside
            largest = max(largest, inside + 4 * p * L * C)  # with the gradient of its widest tensor
        if stage.downsample is not None:
            total += L * C * (4 + p)
            L, C = L // 4, 2 * C
    return total, largest if clap.gradient_checkpointing else 0


def audio_activations(model, p, S):
    """Of S audio tokens: the audio transformer."""
    C, total = model.clap.width, 4 * S * model.clap.width
    for layer in model.audio_transformer.layer_stack:
        heads, inner = layer.slf_attn.n_head, layer.pos_ffn.w_1.out_features
        products = (casts(p, 3) + 1) * C + inner
        total += block_activations(p, S, C, products, heads, C // heads)
    return total


def text_activations(model, p, T, S):
    """Of T text and S audio tokens -> bytes kept by the language model and by the gated blocks, and those of the
    largest block if blocks are recomputed."""
    c, gated = model.lm.config, list(model.xattn.values())
    first, inner = min(map(int, model.xattn)), gated[0].heads * gated[0].d
    trains = next(model.lm.layers.parameters()).requires_grad
    table_trains = any(p.requires_grad for p in model.lm.embed_tokens.parameters())
    products = 3 * c.inner + trains * (casts(p, 5) * c.width + c.inner)
    block = block_activations(p, T, c.width, products, c.heads, c.d, kv_heads=c.kv_heads)
    products = 11 * c.width + inner  # to_q, ff.1, GELU (4), ff.3 (4), the gates
    gated_block = block_activations(p, T, c.width, products, gated[0].heads, gated[0].d, keys=0)
    largest = max(block, gated_block)
    if model.gradient_checkpointing:
        block = gated_block = 4 * T * c.width
    audio = S * p * (casts(p, len(gated)) * model.clap.width + 2 * inner * len(gated))  # keys and values
    blocks = c.layers if trains or table_trains else c.layers - first
    return blocks * block, len(gated) * gated_block + audio, largest if model.gradient_checkpointing else 0


# ------------------------------------------------------------------------------------------------------------
# A step


def step_memory(model, B, W, T, A, p, micro_batches=1, ranks=1, optimizer_shards=1):
    """-> {what: bytes} at the peak of an optimizer step: micro-batches of B clips with W windows and texts of T
    tokens, A of them with labels."""
    S, table = W * model.clap.tokens_per_window, model.lm.embed_tokens
    parameters = count_parameters(model)
    gradients = [4 * trained for _, trained in parameters.values()]
    copied = sum(x.numel() for x in model.parameters() if x.requires_grad and x.ndim > 1)
    window = 2 * model.config.window_length * model.audio_config["sample_rate"]  # int16
    always = {
        "frozen weights": p * sum(frozen for frozen, _ in parameters.values()),
        "trained weights": sum(gradients), "Adam's moments": 2 * sum(gradients) / optimizer_shards,
        "bf16 copies of trained weights": p * copied if p < 4 else 0,
        "batch": micro_batches * B * W * window}
    text, gated, text_block = text_activations(model, p, T, S)
    encoder, encoder_block = encoder_activations(model.clap, p) if model.clap_trains() else (0, 0)
    head = 3 * 4 * (len(table.weight) + len(table.added)) * min(B * A, HEAD_ROWS)  # log-probabilities, gradients
    activations = {"head": head, "lm": B * text, "xattn": B * gated,
                   "audio_transformer": B * audio_activations(model, p, S), "clap": B * W * encoder}

    # The backward pass frees activations and makes gradients, part after part. Those of an earlier micro-batch,
    # or the buckets in which ranks reduce them, are there from the start. The head's gradient of a tied table
    # waits for that of the embeddings.
    kept = micro_batches * ranks > 1
    waiting = sum(4 * x.numel() for x in table.parameters() if x.requires_grad)
    work = {"lm": B * text_block + waiting, "audio_transformer": (1 + kept) * waiting,
            "clap": B * W * encoder_block}
    moments = []
    for i, part in enumerate([*PARTS, "optimizer"]):
        made = {"gradients": sum(gradients if kept else gradients[:i]), "backward pass": work.get(part, 0)}
        left = {PARTS[name]: activations[name] for name in list(PARTS)[i:]}
        moments.append(always | made | left)
    return max(moments, key=lambda moment: sum(moment.values()))


def forward_operations(model, W, T, A):
    """{part: operations of a clip's forward pass}: 2 per weight and use, and those of attention."""
    c, S, table = model.lm.config, W * model.clap.tokens_per_window, model.lm.embed_tokens
    audio, gated = model.audio_transformer, list(model.xattn.values())
    to_kv = sum(block.attn.to_kv.weight.numel() for block in gated)
    inner = gated[0].heads * gated[0].d * len(gated)
    return {
        "clap": model.clap.flops(W),
        "audio_transformer": 2 * S * matrix_sizes(audio) + 4 * S * S * model.clap.width * len(audio.layer_stack),
        "xattn": 2 * T * (matrix_sizes(model.xattn) - to_kv) + 2 * S * to_kv + 4 * T * S * inner,
        "lm": 2 * T * matrix_sizes(model.lm.layers) + 4 * T * T * c.heads * c.d * c.layers,
        "head": 2 * A * matrix_sizes(table)}


# ------------------------------------------------------------------------------------------------------------
# A recipe


def hardware(c, path):
    """-> number and GB of the cards: as given, as the config's docstring says ("Hardware: 8 x 80 GB"), or one
    of 80 GB."""
    source = open(path).read() if path else ""
    text = ast.get_docstring(ast.parse(source)) or ""
    found = re.search(r"Hardware: (?:(\d+) x )?[^.]*?(\d+) GB", text)
    number, size = (found[1] or 1, found[2]) if found else (1, 80)
    return c.gpus or int(number), c.gpu or float(size)


def epoch_clips(c):
    """Clips of an epoch: of --items, or of the manifests if all are there, else None."""
    root, blend, total = config.resolve_path(c.dataset_file_root), c.dataset_blending_config, c.items
    if not total:
        if not all(os.path.isfile(f"{root}/{name}.json") for name in blend):
            return None
        manifests = open_manifests(c, blend)
        total = sum(len(manifests[name]) * weight for name, weight in blend.items())
    return total * c.dataset_blending_global_weight


def fit(c):
    if c.answers > c.tokens or c.mfu > 1:
        raise UserError(f"answers = {c.answers}, mfu = {c.mfu}: expected at most tokens = {c.tokens}, and 1")
    path = next((arg for arg in sys.argv[1:] if arg.endswith(".py")), None)
    ranks, size = hardware(c, path)
    model = build_sized_model(c)
    B, W, micro_batches = c.batch_size, c.windows or model.config.max_num_window, c.gradient_accumulation_steps
    p = pick_precision(c.precision, torch.device("cuda"))[0].itemsize
    shards = ranks if c.shard_optimizer else 1

    def memory(B, T=c.tokens, A=c.answers):
        sizes = step_memory(model, B, W, T, A, p, micro_batches, ranks, shards)
        return {what: number / 1e9 for what, number in sizes.items()}

    def peak(*shapes):
        return sum(memory(*shapes).values())

    parameters, room = count_parameters(model), 0.95 * (size * 2 ** 30 / 1e9 - 1)
    frozen, trained = map(sum, zip(*parameters.values()))
    forward = {PARTS[part]: n / 1e9 for part, n in forward_operations(model, W, c.tokens, c.answers).items()}
    operations = flops_per_step(model, B * c.tokens, B * W, B * c.answers)  # of a micro-batch
    tflops = c.tflops or (790.0 if size > 24 else 165.0)
    seconds = operations * micro_batches / (1e12 * tflops * c.mfu)
    clips, epoch = B * micro_batches * ranks / seconds, epoch_clips(c)
    figures = {
        "mode": "fit", "config": path, "gpus": ranks, "gpu_gb": size, "batch_size": B, "windows": W,
        "tokens": c.tokens, "answers": c.answers, "trained": trained, "frozen": frozen,
        "memory_gb": memory(B), "peak_gb": peak(B), "room_gb": room,
        "longest_texts_gb": peak(B, c.max_tokens, c.max_tokens // 2),
        "largest_batch": bisect.bisect(range(1, 10 ** 5), room, key=peak), "forward_gflop": forward,
        "flops_per_sample": operations / B, "flops_per_step": operations * micro_batches * ranks,
        "tflops": tflops, "mfu": c.mfu, "step_s": seconds, "samples_per_s": clips, "windows_per_s": clips * W,
        "host_to_device_mb_s": clips * W * 2e-6 * model.config.window_length * model.audio_config["sample_rate"],
        "all_reduce_gb": 4e-9 * trained if ranks > 1 else 0.0,
        "epoch_items": epoch, "epoch_hours": epoch and epoch / clips / 3600}
    for name in ("pretrained_path", "clap_checkpoint"):
        value = getattr(c, name)
        if value and not is_local(value) and not re.search(RELEASED, value):
            print(f"{name} = {value} is not here: sizes are taken from the settings")
    rows = [[name, *parameters[part], forward[name]] for part, name in PARTS.items()]
    print_table(["part", "frozen", "trained", "forward GFLOP a clip"], rows)
    print_table(["memory of a card at the peak", "GB (10^9 bytes)"], figures["memory_gb"].items())
    print_figures(figures)
    return figures
