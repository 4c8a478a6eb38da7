"""tools/bench.py fit: what a recipe needs and costs, before anyone rents a GPU for it.

    python tools/bench.py fit config/sft.py                            # on the GPUs that its docstring names
    python tools/bench.py fit config/sft.py --gpu=24 --gpus=1 --batch_size=1
    python tools/bench.py fit mine.py --windows=3 --tokens=128 --answers=60 --tflops=312 --mfu=0.3

A micro-step runs on tensors with shapes and no numbers (torch's FakeTensorMode), forward and backward, under
autocast and with recomputation as in training, and every byte is counted from its birth to its death. Nothing
is downloaded: the sizes of Qwen2.5-0.5B, -1.5B, -3B and SmolLM2-135M are known here, those of another
language model are read from its local folder. What is not counted is kept free: 1 GB for CUDA's context and
libraries, 5 % for the allocator's gaps.
"""
import ast
import json
import math
import os
import re
import sys
import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import checkpoint
import config
import model as modeling
from data import SPECIAL_TOKENS, open_manifests
from tools.bench.decode import SMOLLM2
from tools.checkpoint import language_models
from tools.checkpoint.devices import pick_precision
from tools.checkpoint.clap import clap_state
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

aten = torch.ops.aten
QWEN = dict(vocab=151665, eps=1e-6, rope_theta=1e6, rope_stretch=None, qkv_bias=True, out_bias=False,
            mlp_bias=False, qk_norm=False, tied=True, positions=32768)  # rows before <audio>
KNOWN = {
    "Qwen2.5-0.5B": SimpleNamespace(width=896, layers=24, inner=4864, heads=14, kv_heads=2, d=64, **QWEN),
    "Qwen2.5-1.5B": SimpleNamespace(width=1536, layers=28, inner=8960, heads=12, kv_heads=2, d=128, **QWEN),
    "Qwen2.5-3B": SimpleNamespace(width=2048, layers=36, inner=11008, heads=16, kv_heads=2, d=128, **QWEN),
    "SmolLM2-135M": SMOLLM2}

RELEASED = r"audio-flamingo-2(-\d\.5B)?"

# ------------------------------------------------------------------------------------------------------------
# The model of a config, without numbers


class Marks:
    """The tokenizer, as far as a model is made of it: how many tokens, and where its marks stand."""

    def __init__(self, vocab):
        self.vocab = vocab
        self.eos_token_id, self.pad_token_id, self.sep_token_id = 0, vocab + 2, vocab + 3

    def __len__(self):
        return self.vocab + len(SPECIAL_TOKENS)

    def convert_tokens_to_ids(self, names):
        return [self.vocab + SPECIAL_TOKENS.index(name) for name in names]


def load_lm_config_and_tokenizer(c):
    """language_models.load_lm_config_and_tokenizer of a local folder; of the language models known here, without one."""
    name = os.path.basename(c.lang_encoder_path)
    released = re.search(RELEASED, c.pretrained_path or "")
    if released and "lang_encoder_path" not in c.user_set:  # the release tells its language model
        name = "Qwen2.5" + (released[1] or "-3B")
    elif os.path.isdir(config.resolve_path(c.lang_encoder_path)):
        return language_models.load_lm_config_and_tokenizer(c)
    if name not in KNOWN:
        raise UserError(f"lang_encoder_path = {c.lang_encoder_path!r}: no such folder; known by name are "
                         f"{', '.join(KNOWN)}")
    return None, KNOWN[name], Marks(KNOWN[name].vocab)


def build(c):
    """-> the model of the settings c on the meta device, what trains set as train.py does."""
    state, given = {}, config.overrides(c)
    if c.pretrained_path and os.path.exists(config.resolve_path(c.pretrained_path)):  # it tells all of its sizes
        model, _ = checkpoint.open_pretrained(c, given)
    else:
        if c.clap_checkpoint and os.path.isfile(config.resolve_path(c.clap_checkpoint)):  # it tells the encoder's
            state = clap_state(c.clap_checkpoint)
        model = checkpoint.build_meta_model(c, state, load_lm_config_and_tokenizer(c), c.clap_checkpoint, given, fresh=False)
    model.recompute, model.clap.recompute = c.gradient_checkpointing, c.clap_gradient_checkpointing
    model.set_trainable(c)
    model.clap.augment = False  # SpecAugment draws numbers; it keeps nothing
    return model.train()


def without_numbers(model, frozen):
    """In a FakeTensorMode: every weight in the dtype that training gives it, on the "CPU"."""
    state = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in model.state_dict().items()}
    checkpoint.place_weights(model, state, torch.device("cpu"), frozen, "fit")


# ------------------------------------------------------------------------------------------------------------
# A step, byte by byte

FROZEN, TRAINED, GRADIENTS, ADAM = "frozen weights", "trained weights", "gradients", "Adam's moments"
COPIES, BACKWARD = "bf16 copies of trained weights", "backward pass"  # with a recomputed block's insides
PARTS = {"clap": "audio encoder", "audio_transformer": "audio transformer", "xattn": "gated cross-attention",
         "lm": "language model", "head": "head and loss"}  # whose activations are kept


class Ledger(TorchDispatchMode):
    """Bytes alive, by what they are for, and what was alive at the peak; operations of the products, forward.
    A tensor belongs to the part of the model that is running when its memory first shows."""

    def __init__(self):
        super().__init__()
        self.alive, self.at_peak, self.flops, self.tags = Counter(), Counter(), Counter(), {}
        self.total, self.peak, self.part = 0, 0, "batch"

    def hold(self, tensor, tag):
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self.tags:
            self.release(key, size)
        else:
            weakref.finalize(storage, self.release, key, size)
        self.tags[key] = tag
        self.alive[tag] += size
        self.total += size

    def release(self, key, size):
        self.alive[self.tags.pop(key)] -= size
        self.total -= size

    def enter(self, part):
        if self.part != BACKWARD:
            self.part = PARTS.get(part, part)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        tag = self.part
        if op is aten._to_copy.default and self.tags.get(id(args[0].untyped_storage())) == TRAINED:
            tag = COPIES
        for tensor in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in self.tags:
                self.hold(tensor, tag)
        sums = op is aten.add.Tensor and self.part == BACKWARD  # of gradients: without a mode, in place
        if self.total > self.peak and not sums:
            self.peak, self.at_peak = self.total, self.alive.copy()
        if self.part != BACKWARD:
            self.flops[self.part] += operations(op, args, kwargs or {}, out)
        return out


def operations(op, args, kwargs, out):
    if op in (aten._scaled_dot_product_flash_attention_for_cpu.default, modeling.attend_op._opoverload):
        q, k = args[:2]  # (B, H, T, d) with (B, H, N, d), or (B, T, H, d) with (B, N, H, d)
        return 4 * q.numel() * k.shape[1 if op is modeling.attend_op._opoverload else 2]
    count = flop_registry.get(op.overloadpacket)
    return count(*args, **kwargs, out_val=out) if count else 0


class FusedAttention(torch.autograd.Function):
    """What CUDA's attention keeps for the backward pass and what it returns then; CPUs fuse less of it."""

    @staticmethod
    def forward(ctx, q, k, v, mask, causal):
        many = q.shape[1] != k.shape[1]
        o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=many)
        ctx.save_for_backward(q, k, v, mask, o, o.new_empty(o.shape[:3], dtype=torch.float32))
        return o

    @staticmethod
    def backward(ctx, dy):
        inputs = zip(ctx.saved_tensors[:4], ctx.needs_input_grad)
        return *(torch.empty_like(x) if needed else None for x, needed in inputs), None


@contextmanager
def as_on_gpu():
    """CUDA's autocast norms in float32, the CPU's does not; CUDA's RMSNorm is one operation that keeps its
    input and a number per row, as LayerNorm does; its attentions keep no scores."""
    widen = lambda x: x.float() if isinstance(x, torch.Tensor) and torch.is_autocast_enabled("cpu") else x
    plain = F.layer_norm
    layer_norm = lambda *args: plain(*map(widen, args))
    rms_norm = lambda x, shape, weight, eps: layer_norm(x, shape, weight)
    attention = lambda q, k, v, mask=None, causal=False: FusedAttention.apply(q, k, v, mask, causal)
    with mock.patch.multiple(F, layer_norm=layer_norm, rms_norm=rms_norm), \
            mock.patch.object(modeling, "attention", attention):
        yield


def fused(q, k, v, n_keys, gate):
    """What the Triton kernel keeps, on any machine."""
    return modeling.attend_op(q, k, v, n_keys, gate.float().tanh(), True)[0]


def micro_step(model, B, W, T, A, dtype, keep_gradients=False, on_gpu=True):
    """AudioFlamingo.forward, and backward, for B clips of W windows and texts of T tokens, A of them answers:
    equal lengths need no numbers. Call it in the FakeTensorMode of the model's weights. -> Ledger"""
    ledger, weights = Ledger(), list(model.parameters())
    hooks = [module.register_forward_pre_hook(lambda *_, part=name.split(".")[0]: ledger.enter(part))
             for name, module in model.named_modules() if name.startswith(("xattn.", "lm."))]
    gradient = lambda p: ledger.hold(p.grad, GRADIENTS)
    hooks += [p.register_post_accumulate_grad_hook(gradient) for p in weights if p.requires_grad]
    modeling.BACKENDS["fit"] = fused
    model.backend = "fit" if on_gpu else "sdpa"
    with ledger, as_on_gpu() if on_gpu else nullcontext():
        for t in [*weights, *model.buffers()]:
            ledger.hold(t, TRAINED if t.requires_grad else FROZEN)
            t.grad = torch.zeros_like(t) if keep_gradients and t.requires_grad else None
            if t.grad is not None:
                ledger.hold(t.grad, GRADIENTS)
        length = round(model.config.window_length * model.audio_config["sample_rate"])
        sound, ids = torch.zeros(B * W, length, dtype=torch.int16), torch.zeros(B, T, dtype=torch.long)
        part = 64 if on_gpu or model.clap.training else 4  # as AudioFlamingo.listen
        n_keys = torch.full((B,), W * model.clap.tokens_per_window)
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            ledger.enter("clap")
            audio, heard = [], 0
            for some in sound.split(part):
                again = len(audio) and not model.clap_trains() and len(some) == part  # adds its tokens alone
                audio.append(torch.empty_like(audio[0]) if again else model.clap(modeling.to_float(some)))
                heard += 0 if again else len(some)
            ledger.flops[PARTS["clap"]] *= B * W / heard
            audio = torch.cat(audio)
            ledger.enter("audio_transformer")
            audio = model.audio_transformer(audio.view(B, -1, model.clap.width), n_keys)
            ledger.enter("xattn")
            x = model.forward_hidden(ids, model.keys_values(audio), n_keys)
            ledger.enter("head")
            x = x[:, :A].flatten(0, 1)
            loss = model.summed_loss(x, torch.zeros(B * A, dtype=torch.long))
            del sound, audio, x
        ledger.enter(BACKWARD)
        loss.backward()
    for hook in hooks:
        hook.remove()
    for made in (modeling.hann_and_mel, modeling.window_order):  # without numbers
        made.cache_clear()
    return ledger


# ------------------------------------------------------------------------------------------------------------
# A recipe


def check(c):
    """ValueError for what no card, clip or run is."""
    most = dict(gpu=10 ** 4, gpus=10 ** 6, windows=10 ** 5, tokens=10 ** 6, answers=c.tokens, mfu=1)
    most |= dict(items=math.inf, tflops=math.inf)
    for name, bound in most.items():
        value = getattr(c, name)
        if value is not None and not 0 < value <= bound:
            raise UserError(f"{name} = {value!r}, expected more than 0" +
                             f", at most {bound}" * (bound < math.inf))
    pick_precision(c.precision, torch.device("cpu"))


def hardware(c, path):
    """-> number and GB of the cards: as given, as the config's docstring says ("Hardware: 8 x 80 GB"), or one
    of 80 GB."""
    text = ast.get_docstring(ast.parse(open(path).read())) if path else ""
    said = re.search(r"Hardware: (?:(\d+) x )?[^.]*?(\d+) GB", text or "")
    number, size = (said[1] or 1, said[2]) if said else (1, 80)
    return c.gpus or int(number), c.gpu or float(size)


def epoch_items(c):
    """Clips of an epoch: of --items, or of the manifests if all are there, else None."""
    if c.items:
        return c.items * c.dataset_blending_global_weight
    root = config.resolve_path(c.dataset_file_root)
    if not all(os.path.isfile(f"{root}/{name}.json") for name in c.dataset_blending_config):
        return None
    manifests = open_manifests(c, c.dataset_blending_config).items()
    return sum(len(m) * c.dataset_blending_config[n] for n, m in manifests) * c.dataset_blending_global_weight


def largest(peak, least, B, room):
    """The largest batch whose peak(batch) bytes are seen to fit in room, to a tenth; 0 if none. From B on
    along lines through two batches, and by halves where a peak bends. least: bytes without a clip."""
    known, guess = {0: least}, B
    while guess not in known and len(known) < 10:
        known[guess] = peak(guess)
        low = max((b for b, size in known.items() if size <= room), default=None)
        high = min((b for b, size in known.items() if size > room), default=math.inf)
        if low is None or high - low <= max(1, low // 10):
            break
        a, b = sorted(known)[-2:] if high == math.inf else (low, high)
        slope = (known[b] - known[a]) / (b - a)
        guess = low + math.floor((room - known[low]) / slope) if slope > 0 else 2 * low
        if high == math.inf and slope > 0 and guess - low <= low // 10 and len(known) > 3:
            break  # three steps were taken, and the line through two of them ends within the tenth
        guess = min(guess, 20 * low) if high == math.inf else min(max(guess, (low + high) // 2), high - 1)
    return low or 0


def fit(c):
    path = next((arg for arg in sys.argv[1:] if arg.endswith(".py")), None)
    number, size = hardware(c, path)
    room = 0.95 * (size * 2 ** 30 - 1e9)
    dtype = torch.float32 if c.precision == "fp32" else torch.bfloat16
    check(c)
    model = build(c)
    B, W, accumulation = c.batch_size, c.windows or model.config.max_num_window, c.gradient_accumulation_steps
    parameters = Counter()
    for name, p in model.named_parameters():
        parameters[name.split(".")[0], p.requires_grad] += p.numel()
    trained = sum(n for (_, trains), n in parameters.items() if trains)
    ledgers = {}

    def peak(B, tokens=c.tokens, answers=c.answers):
        if (B, tokens, answers) not in ledgers:
            ledger = micro_step(model, B, W, tokens, answers, dtype, accumulation * number > 1)
            ledger.at_peak[ADAM] = 8 * trained // (number if c.shard_optimizer else 1)
            ledgers[B, tokens, answers] = ledger
        return ledgers[B, tokens, answers].at_peak.total()

    with FakeTensorMode(allow_non_fake_inputs=True):
        without_numbers(model, dtype)
        longest = peak(B, c.max_tokens, c.max_tokens // 2)
        peak(B)
        ledger = ledgers[B, c.tokens, c.answers]
        least = sum(ledger.at_peak[tag] for tag in (FROZEN, TRAINED, COPIES, ADAM)) + 4 * trained
        most = largest(peak, least, B, room)

    # --- time and traffic
    micro_flops = flops_per_step(model, B * c.tokens, B * W, B * c.answers)
    tflops = c.tflops or (790.0 if size > 24 else 165.0)
    seconds = micro_flops * accumulation / (1e12 * tflops * c.mfu)
    clips = B * accumulation / seconds  # a second and card
    window_bytes = 2 * round(model.config.window_length * model.audio_config["sample_rate"])
    items = epoch_items(c)
    figures = {
        "mode": "fit", "config": path, "gpus": number, "gpu_gb": size, "batch_size": B, "windows": W,
        "tokens": c.tokens, "answers": c.answers, "trained": trained,
        "frozen": sum(parameters.values()) - trained,
        "memory_gb": {name: n / 1e9 for name, n in ledger.at_peak.items()},
        "peak_gb": ledger.at_peak.total() / 1e9, "longest_texts_gb": longest / 1e9, "room_gb": room / 1e9,
        "largest_batch": most,
        "forward_gflop": {name: ledger.flops[name] / B / 1e9 for name in PARTS.values()},
        "flops_per_sample": micro_flops / B, "flops_per_step": micro_flops * accumulation * number,
        "tflops": tflops, "mfu": c.mfu, "step_s": seconds, "samples_per_s": clips * number,
        "windows_per_s": clips * number * W,
        "host_to_device_mb_s": clips * number * W * window_bytes / 1e6,
        "all_reduce_gb": 4 * trained / 1e9 if number > 1 else 0.0,
        "epoch_items": items, "epoch_hours": items and items / (clips * number) / 3600}
    report(c, figures, parameters, model)
    print(json.dumps(figures))


def report(c, f, parameters, model):
    again = ["blocks"] * c.gradient_checkpointing + ["the encoder's blocks"] * c.clap_gradient_checkpointing
    how = f"{c.precision}, {' and '.join(again) or 'nothing'} recomputed"
    print(f"{f['gpus']} x {f['gpu_gb']:g} GB | {f['batch_size']} clips of {f['windows']} windows and "
          f"{f['tokens']} tokens, {f['answers']} with labels | {c.gradient_accumulation_steps} micro-steps a "
          f"step | {how}")
    for name, whose in (("pretrained_path", "the"), ("clap_checkpoint", "the encoder's")):
        value = getattr(c, name)
        if value and not os.path.exists(config.resolve_path(value)) and not re.search(RELEASED, value):
            print(f"{name} = {value} is not here: {whose} sizes are the settings'")
    print(f"\n{'part':24}{'parameters':>16}{'trained':>16}{'forward GFLOP a clip':>24}")
    for part, name in PARTS.items():
        trains, frozen = parameters[part, True], parameters[part, False]
        print(f"{name:24}{trains + frozen:16,}{trains:16,}{f['forward_gflop'][name]:24.1f}")
    print(f"{'all':24}{f['trained'] + f['frozen']:16,}{f['trained']:16,}"
          f"{sum(f['forward_gflop'].values()):24.1f}\n\nmemory of a card at the peak, GB (10^9 bytes)")
    for name, size in f["memory_gb"].items():
        if size >= 0.0005:
            print(f"  {'kept of the ' if name in PARTS.values() else ''}{name}".ljust(40) + f"{size:9.3f}")
    longest = f"peak, texts of {c.max_tokens}, half labels"
    for name, size in (("peak", f["peak_gb"]), (longest, f["longest_texts_gb"]), ("room", f["room_gb"])):
        print(f"  {name:38}{size:9.3f}")
    print(f"  {'largest batch that fits':38}{f['largest_batch']:9}\n")
    print(f"a step: {f['flops_per_step'] / 1e12:.4g} TFLOP, {f['flops_per_sample'] / 1e12:.3g} a clip; at "
          f"{f['mfu']:.0%} of {f['tflops']:g} TFLOP/s {f['step_s']:.2f} s, {f['samples_per_s']:.4g} clips/s")
    print(f"to the cards: {f['windows_per_s']:.4g} windows/s, {f['host_to_device_mb_s']:.4g} MB/s; gradients "
          f"reduced between them: {f['all_reduce_gb']:.3g} GB a step")
    print("an epoch: " + (f"{f['epoch_items']:,.0f} clips, {f['epoch_hours']:.3g} h" if f["epoch_items"] else
                          f"its manifests are not here, say --items; 100,000 clips take "
                          f"{1e5 / f['samples_per_s'] / 3600:.3g} h"))
