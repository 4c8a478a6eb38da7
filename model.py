"""Audio Flamingo 2: a frozen language model that listens through gated cross-attention.

    sound -> windows -> log-mel -> CLAP (HTS-AT) -> 64 tokens a window -> audio transformer -> keys, values
    text -> embeddings -> [gated cross-attention over the audio -> language model block] x layers -> logits

    from model import AudioFlamingo
    model = AudioFlamingo.from_pretrained("exp/sft")            # a run, a checkpoint, a release, a hub id
    model.generate(["What is happening?"], windows, n_windows)  # of data.load_audio(path, **model.audio_config)

Shapes: B clips, W windows, S audio tokens of a clip (64 per window; (clap_spec_size/32)^2 in general), T text
tokens, D language-model width, C audio width, V vocabulary, H heads of d channels. Paper: arXiv 2503.03983.

Read from the top; AudioFlamingo.forward_hidden is the idea in ten lines. The Triton kernels, which compute what
naive_attention spells out, stand last. Nothing here opens a file: checkpoint.py does.
"""
import importlib.util
import math
from contextlib import nullcontext
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tools.checkpoint.htsat import FRONT_END, load_htsat_class, sample_rate_of_mel
from tools.common import UserError

if importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl
else:  # naive and sdpa need none of it, and the kernels below stay plain functions
    triton, tl = SimpleNamespace(jit=lambda f: f, __version__=None), SimpleNamespace(constexpr=None)

SAMPLE_RATE = 16000  # Hz, of CLAP; an encoder may have another
AUDIO_SETTINGS = ("window_length", "window_overlap", "max_num_window")  # how a clip is cut into windows
SPECIAL_TOKENS = ("<audio>", "<|endofchunk|>", "<|PAD_TOKEN|>", "<SEP>")  # in the published order

# ------------------------------------------------------------------------------------------------------------
# Sound to log-mel


def to_float(windows):
    """int16 windows, as data.load_audio gives them, -> float32 in [-1, 1]; float32 ones pass."""
    return windows.float() / 32767 if windows.dtype == torch.int16 else windows


@lru_cache
def hann_and_mel(device, sample_rate=SAMPLE_RATE, top=8000):
    """A (1024,) window, and (513, 64) triangles: 64 HTK mel bands over 50...top Hz, no area normalisation."""
    to_mel = lambda hz: 2595 * math.log10(1 + hz / 700)
    edges = 700 * (10 ** (torch.linspace(to_mel(50), to_mel(top), 66, dtype=torch.float64) / 2595) - 1)
    bins = torch.linspace(0, sample_rate / 2, 513, dtype=torch.float64)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    mel = torch.minimum(rising, falling).clamp(min=0).float()
    return torch.hann_window(1024, device=device), mel.to(device)


def log_mel(windows, sample_rate=SAMPLE_RATE, mel=None):
    """windows (n, L) float32 in [-1, 1] -> (n, 1 + L // hop, 64) float32, dB of power; mel: (513, 64)."""
    (hann, bands), hop = hann_and_mel(windows.device), sample_rate // 100  # 10 ms
    with torch.autocast(windows.device.type, enabled=False):
        spectrum = torch.stft(windows, 1024, hop, window=hann, pad_mode="reflect", return_complex=True)
        power = spectrum.real.square() + spectrum.imag.square()
        return 10 * torch.log10((power.mT @ (bands if mel is None else mel)).clamp(min=1e-10))


# ------------------------------------------------------------------------------------------------------------
# The audio encoder. AudioFlamingo takes any module with these: width (C), tokens_per_window, sample_rate
# (Hz), forward(windows (n, L) float32) -> (n, tokens_per_window, C), trainable() -> the parameters that
# fine-tuning may free, flops(n) -> operations of the products that n windows take, forward. Ours is CLAP:
# HTS-AT of laion-clap.


class ClapEncoder(nn.Module):
    """windows (n, L) -> (n, S, C): tokens before HTS-AT's pooling; S = (spec_size/32)^2, C = 8 embed_dim."""
    frequency_bins = 2  # of a window's tokens: bin * (S/2) + time step

    def __init__(self, embed_dim, depths, num_heads, spec_size=256, position=False, augment=True, mel=None,
                 fusion=True):
        """position: HTS-AT's own position embedding (published: none); augment: drop path, SpecAugment; mel:
        (513, 64) bands unless they are AF-CLAP's, which tell the sample rate; fusion: it has that branch."""
        super().__init__()
        self.htsat = load_htsat_class()(
            spec_size=spec_size, patch_size=4, patch_stride=(4, 4), embed_dim=embed_dim, depths=depths,
            num_heads=num_heads, window_size=8, config=FRONT_END, ape=position, enable_fusion=fusion,
            fusion_type="aff_2d" if fusion else "None", drop_path_rate=0.1 if augment else 0.0)
        self.register_buffer("mel", mel)
        self.sample_rate = sample_rate_of_mel(mel)
        for unused in ("spectrogram_extractor", "logmel_extractor", "tscam_conv", "head"):
            delattr(self.htsat, unused)  # its own waveform front end and AudioSet classifier
        if position:  # beside patches of size 1: heard from the first step on
            nn.init.normal_(self.htsat.absolute_pos_embed, std=0.5)
        share = (spec_size / 256) ** 2  # of a 10 s window: mask the same part of a shorter one
        self.htsat.spec_augmenter.time_dropper.drop_width = max(1, round(64 * share))
        self.augment, self.recompute, self.width = augment, False, 8 * embed_dim
        self.tokens_per_window = (spec_size // 32) ** 2
        self.max_frames = spec_size * (spec_size // 64)

    def __reduce__(self):  # HTS-AT's module is not importable before load_htsat_class has run
        return unpickled_encoder, (), self.__dict__

    def forward(self, windows):
        return self.encode(log_mel(windows, self.sample_rate, self.mel))

    def encode(self, mel):
        """mel (n, frames, 64), as log_mel gives it -> (n, S, C)."""
        h = self.htsat
        if mel.shape[1] > self.max_frames:
            raise UserError(f"window_length gives {mel.shape[1]} frames of 10 ms, clap_spec_size "
                             f"{h.spec_size} takes {self.max_frames}")
        x = h.bn0(mel.transpose(1, 2)[..., None]).permute(0, 3, 2, 1)  # per mel band; (n, 1, frames, 64)
        if self.training and self.augment:
            x = h.spec_augmenter(x)
        x = h.reshape_wav2img(x).to(h.norm.weight.dtype)  # (n, 1, spec_size, spec_size): time parts as rows
        # A window is CLAP's own length, never "longer": the fusion branch (local mel crops) is not used.
        x = h.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = h.patch_embed.norm(x)  # (n, (spec_size/4)^2, embed_dim)
        x = x + h.absolute_pos_embed.to(x.dtype) if h.ape else x
        call = partial(recomputed, swin_block) if self.training and self.recompute else swin_block
        for layer in h.layers:
            for block in layer.blocks:
                x = call(block, x)
            if layer.downsample is not None:
                x = layer.downsample(x)
        x = h.norm(x)  # (n, S, C), a grid of (time parts x 2 frequency bins) rows and sqrt(S) columns in time
        n, S, C = x.shape
        x = x.view(n, h.freq_ratio, -1, math.isqrt(S), C)  # (n, time part, frequency bin, column, C)
        return x.transpose(1, 2).reshape(n, S, C)  # token = bin * (S/2) + time step

    def trainable(self):
        """All parameters but those of the fusion branch, to which no gradient would come."""
        branch = ("mel_conv2d", "fusion_model")
        return [p for name, p in self.named_parameters() if not any(part in name for part in branch)]

    def flops(self, n):
        """Of the matrices alone; the attention inside HTS-AT's windows adds a few percent."""
        patches = (self.htsat.spec_size // 4) ** 2  # of a window; a quarter remains after every stage
        total = 0
        for i, stage in enumerate(self.htsat.layers):  # four patches are one to the downsampling matrix
            total += matrix_sizes(stage.blocks) * patches / 4 ** i
            total += matrix_sizes(stage.downsample or nn.Identity()) * patches / 4 ** (i + 1)
        return 2 * n * total


def attention(q, k, v, mask=None, causal=False):
    """softmax(q k^T / sqrt(d) + mask) v; q (B, H, T, d), k and v of as many heads or a divisor; a bool mask
    is True where a key is seen."""
    learns = torch.is_grad_enabled() and (q.requires_grad or v.requires_grad)
    if not learns or q.device.type != "cpu" or q.dtype is not torch.bfloat16:
        many = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=many)
    # spelled out: backwards, a CPU's fused kernel takes five times as long in bfloat16
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril() if causal else mask
    if mask is not None:
        seen = mask.dtype is torch.bool
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if seen else scores + mask
    return scores.softmax(-1) @ v


@lru_cache
def window_order(side, w, shift, device):
    """-> the patches of a (side, side) grid rolled by `shift`, window (w, w) by window; and the way back."""
    grid = torch.arange(side * side).view(side, side).roll((-shift, -shift), (0, 1))
    order = grid.view(side // w, w, side // w, w).transpose(1, 2).flatten()
    return order.to(device), order.argsort().to(device)


def swin_block(block, x):
    """A block of HTS-AT, x (n, L, C), without its score matrices: two thirds of its time on a CPU."""
    (n, L, C), w, attn = x.shape, block.window_size, block.attn
    order, back = window_order(block.input_resolution[0], w, block.shift_size, x.device)
    qkv = attn.qkv(block.norm1(x)[:, order]).view(-1, w * w, 3, attn.num_heads, C // attn.num_heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (n windows, heads, patches, d)
    bias = attn.relative_position_bias_table[attn.relative_position_index].permute(2, 0, 1)[None]
    if block.shift_size:  # patches that the roll made neighbours don't see each other
        bias = (bias + block.attn_mask[:, None]).repeat(n, 1, 1, 1)
    y = attention(q, k, v, bias.to(q.dtype)).transpose(1, 2).reshape(n, L, C)
    x = x + block.drop_path(attn.proj(y)[:, back])
    return x + block.drop_path(block.mlp(block.norm2(x)))


def unpickled_encoder():
    load_htsat_class()
    return ClapEncoder.__new__(ClapEncoder)


def matrix_sizes(module):
    """Numbers in a module's matrices: each is multiplied and added once per token."""
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)


# ------------------------------------------------------------------------------------------------------------
# Rotary embedding: rotate the pairs (i, i + r/2) of the first r channels by position * base^(-2i/r)


def rotary_table(positions, r, base, stretch=None):
    """positions (..., T) -> cos and signed sin (..., T, r) float32; stretch: see stretch_frequencies."""
    frequency = base ** (-torch.arange(0, r, 2, device=positions.device, dtype=torch.float32) / r)
    if stretch:
        frequency = stretch_frequencies(frequency, **stretch)
    angle = positions[..., None].float() * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def stretch_frequencies(frequency, factor, low_freq_factor, high_freq_factor,
                        original_max_position_embeddings):
    """Llama 3.1 reads texts longer than it was first trained on: waves that turn at least high_freq_factor
    times over the original length stay, those that turn at most low_freq_factor times get `factor` times
    slower, those between are blended linearly in their number of turns (arXiv 2407.21783)."""
    turns = original_max_position_embeddings * frequency / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return kept * frequency + (1 - kept) * frequency / factor


def rotate(x, cos, sin):
    """x (B, H, T, d); cos, sin (T, r) or (B, 1, T, r), r <= d: the other channels pass through."""
    r = cos.shape[-1]
    head = x[..., :r]  # times float32 tables: float32 (or float64) arithmetic whatever x is
    head = torch.addcmul(head * cos, head.roll(r // 2, -1), sin).to(x.dtype)
    return head if r == x.shape[-1] else torch.cat([head, x[..., r:]], -1)


# ------------------------------------------------------------------------------------------------------------
# Audio transformer: mixes the tokens of all windows of a clip


class AudioAttention(nn.Module):
    def __init__(self, width, n_head):
        super().__init__()
        self.n_head, self.d = n_head, width // n_head
        self.w_qs, self.w_ks, self.w_vs, self.fc = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.layer_norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x, rope, mask):
        B, S, C = x.shape
        split = lambda y: y.view(B, S, self.n_head, self.d).transpose(1, 2)  # (B, H, S, d)
        q, k, v = split(self.w_qs(x)), split(self.w_ks(x)), split(self.w_vs(x))
        o = attention(rotate(q, *rope), rotate(k, *rope), v, mask)
        return self.layer_norm(x + self.fc(o.transpose(1, 2).reshape(B, S, C)))


class AudioFeedForward(nn.Module):
    def __init__(self, width, d_inner):
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(width, d_inner), nn.Linear(d_inner, width)
        self.layer_norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x):
        return self.layer_norm(x + self.w_2(F.relu(self.w_1(x))))


class AudioTransformer(nn.Module):
    """tokens (B, S, C), n_keys (B,) real tokens of each clip -> (B, S, C); rows past n_keys mean nothing."""

    def __init__(self, width, n_head, n_layers, d_inner):
        super().__init__()
        if width % n_head:
            raise UserError(f"audio_transformer_n_head = {n_head} does not divide the audio width {width}")
        self.layer_norm = nn.LayerNorm(width, eps=1e-6)  # of the input; there is no final norm
        self.layer_stack = nn.ModuleList()
        for _ in range(n_layers):
            attention, feed_forward = AudioAttention(width, n_head), AudioFeedForward(width, d_inner)
            nn.init.zeros_(attention.fc.weight)  # each layer passes on what it is given at first: noise would
            nn.init.zeros_(feed_forward.w_2.weight)  # hide what CLAP's tokens tell
            self.layer_stack.append(nn.ModuleDict({"slf_attn": attention, "pos_ffn": feed_forward}))
        d = width // n_head
        self.scale, self.rotary_dim = math.sqrt(width), min(d, max(d // 2, 32))

    def forward(self, x, n_keys):
        S = x.shape[1]
        positions = torch.arange(S, device=x.device)
        rope = rotary_table(positions, self.rotary_dim, base=4096)
        mask = (positions < n_keys[:, None])[:, None, None]  # (B, 1, 1, S)
        x = self.layer_norm(self.scale * x)
        for layer in self.layer_stack:  # post-norm, as the published audio transformer
            x = layer.pos_ffn(layer.slf_attn(x, rope, mask))
        return x


# ------------------------------------------------------------------------------------------------------------
# Gated cross-attention: y = tanh(gate) softmax(q k^T / sqrt(d)) v, the readable spec first


def key_mask(n_keys, N):
    """n_keys (B,) or (B, T) -> bool (B, 1, 1 or T, N), True where the token sees the key."""
    n_keys = n_keys[:, None] if n_keys.ndim == 1 else n_keys
    return (torch.arange(N, device=n_keys.device) < n_keys[..., None])[:, None]


def naive_attention(q, k, v, n_keys, gate):
    scores = torch.einsum("bthd,bnhd->bhtn", q, k) / math.sqrt(q.shape[-1])  # (B, H, T, N)
    seen = key_mask(n_keys, k.shape[1])
    # the least finite number, not -inf: a row without keys becomes uniform, then zero, and never NaN
    p = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1) * seen
    o = torch.einsum("bhtn,bnhd->bthd", p, v)  # (B, T, H, d)
    return (gate.tanh() * o).to(q.dtype)


def sdpa_attention(q, k, v, n_keys, gate):
    # a row without keys sees key 0, behind a closed gate: no kernel of SDPA meets an empty softmax
    mask = key_mask(n_keys.clamp(min=1), k.shape[1])
    has_keys = (n_keys > 0).view(*n_keys.shape, *[1] * (4 - n_keys.ndim))  # (B, 1 or T, 1, 1)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    o = attention(q, k, v, mask).transpose(1, 2)
    return (gate.tanh() * has_keys * o).to(q.dtype)


BACKENDS = {"naive": naive_attention, "sdpa": sdpa_attention}  # and "triton", at the end of this file


@torch.compiler.assume_constant_result
def pick_backend(device):
    """-> the backend that "auto" means on this torch.device, and why."""
    if device.type != "cuda":  # ROCm calls its devices cuda, too
        return "sdpa", f"{device.type} does not run the Triton kernels"
    gpu = torch.cuda.get_device_properties(device)
    if not triton.__version__:
        return "sdpa", f"{gpu.name}, but triton is not installed"
    if torch.version.hip is None and gpu.major < 8:
        return "sdpa", f"{gpu.name} is older than sm_80, for which the Triton kernels are sized"
    return "triton", f"{gpu.name}, triton {triton.__version__}"


def gated_cross_attention(q, k, v, n_keys, gate, backend="auto"):
    """tanh(gate) softmax(q k^T / sqrt(d)) v over the first n_keys keys; section 3 of Flamingo, arXiv
    2204.14198.

    q (B, T, H, d); k, v (B, N, H, d), strided views allowed; n_keys int (B,), or (B, T) for a number per
    token, 0 keys give zeros; gate (1,), the raw parameter, of any float dtype -> (B, T, H, d) of q's dtype.
    Differentiable in q, k, v, gate. backend: "naive" (the spec, float64 too), "sdpa", "triton", or "auto"
    (pick_backend). The padding of k and v must be finite except for "triton", which never reads it.
    ValueError for shapes or dtypes that do not fit.
    """
    (B, T, H, d), N = q.shape, k.shape[1]
    if k.shape != (B, N, H, d) or v.shape != k.shape or not q.dtype == k.dtype == v.dtype:
        raise UserError("q, k, v: expected (B, T, H, d), (B, N, H, d), (B, N, H, d) of one dtype, got "
                         + ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (q, k, v)))
    if n_keys.shape not in ((B,), (B, T)) or n_keys.is_floating_point():
        raise UserError(f"n_keys: expected integers {(B,)} or {(B, T)}, got {tuple(n_keys.shape)} "
                         f"{n_keys.dtype}")
    backend = pick_backend(q.device)[0] if backend == "auto" else backend
    if backend not in BACKENDS:
        raise UserError(f"backend={backend!r}: expected 'auto' or one of {', '.join(BACKENDS)}")
    return BACKENDS[backend](q, k, v, n_keys, gate)


class GatedCrossAttention(nn.Module):
    """x <- x + tanh(attn_gate) Attn(LN(x), audio); x <- x + tanh(ff_gate) FF(x); before a block of the LM."""

    def __init__(self, width, audio_width, heads=8, d=64):
        super().__init__()
        self.heads, self.d = heads, d
        self.attn = nn.ModuleDict({
            "norm": nn.LayerNorm(width),
            "to_q": nn.Linear(width, heads * d, bias=False),
            "to_kv": nn.Linear(audio_width, 2 * heads * d, bias=False),
            "to_out": nn.Linear(heads * d, width, bias=False)})
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width, bias=False), nn.GELU(),
                                nn.Linear(4 * width, width, bias=False))
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, kv, n_keys, backend="auto"):
        """x (B, T, D), kv (B, S, 2, H, d) of keys_values, n_keys (B,) or (B, T) -> (B, T, D)."""
        q = self.attn.to_q(self.attn.norm(x)).view(*x.shape[:2], self.heads, self.d)  # (B, T, 8, 64)
        y = gated_cross_attention(q, *kv.unbind(2), n_keys, self.attn_gate, backend)
        x = x + self.attn.to_out(y.flatten(2))
        return x + self.ff_gate.tanh().to(x.dtype) * self.ff(x)


def keys_values(blocks, audio):
    """audio (B, S, C) -> for each gated block its (B, S, 2, H, d): to decode with, one product for all of
    them. It depends on the clip alone, so decoding makes it once per request."""
    sizes = (2, blocks[0].heads, blocks[0].d)
    if torch.is_grad_enabled():  # joined weights would be a copy, and their gradients another
        return [F.linear(audio, block.attn.to_kv.weight).unflatten(2, sizes) for block in blocks]
    kv = F.linear(audio, torch.cat([block.attn.to_kv.weight for block in blocks]))
    kv = kv.unflatten(2, (len(blocks), *sizes))
    # a token reads one head after the other: so lie its keys
    return kv.permute(2, 0, 3, 4, 1, 5).contiguous().permute(1, 4, 0, 2, 3, 5).unbind(2)


# ------------------------------------------------------------------------------------------------------------
# Language model: the Qwen2, Qwen3, Llama and Mistral families


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Positions(NamedTuple):
    """Where the tokens of a call stand in their texts."""
    rope: tuple  # cos, sin of their positions
    slots: torch.Tensor | None = None  # (B, T) of the cache, which are the positions
    mask: torch.Tensor | None = None  # (B, 1, queries of a key head, length): 0 where seen, else -inf


class SelfAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.d = c.d
        self.q_proj = nn.Linear(c.width, c.heads * c.d, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.width, c.kv_heads * c.d, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.width, c.kv_heads * c.d, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.heads * c.d, c.width, bias=c.out_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.d, c.eps), RMSNorm(c.d, c.eps)
        self.qk_norm = c.qk_norm

    def forward(self, x, place, past=None):
        """x (B, T, D); past (2, B, H, length, d), this layer's part of a cache, takes the new k and v."""
        B, T, _ = x.shape
        q, k, v = (w(x).view(B, T, -1, self.d) for w in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        qk, v = rotate(torch.cat([q, k], 2).transpose(1, 2), *place.rope), v.transpose(1, 2)
        q, k = qk.split([q.shape[2], k.shape[2]], 1)  # (B, H, T, d); k and v have fewer heads
        if past is None:  # causality alone keeps the tokens of right-padded texts from seeing padding
            o = attention(q, k, v, causal=True)
        else:
            slots = place.slots[:, None, :, None].expand_as(k)
            k, v = past[0].scatter_(2, slots, k), past[1].scatter_(2, slots, v)
            grouped = q.reshape(*k.shape[:2], -1, self.d)  # all queries of a key head: nothing is repeated
            o = F.scaled_dot_product_attention(grouped, k, v, place.mask).reshape(q.shape)
        return self.o_proj(o.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.width, c.inner, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.width, c.inner, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.inner, c.width, bias=c.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = SelfAttention(c), MLP(c)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(c.width, c.eps), RMSNorm(c.width, c.eps)

    def forward(self, x, place, past=None):
        x = x + self.self_attn(self.input_layernorm(x), place, past)
        return x + self.mlp(self.post_attention_layernorm(x))


class TokenTable(nn.Module):
    """Token embeddings, or the head's rows. Those added to the pretrained vocabulary are a parameter of their
    own, so that they can train while the others stay frozen; releases hold the two as one table."""

    def __init__(self, vocab, added, width):
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(vocab, width))
        self.added = nn.Parameter(0.02 * torch.randn(added, width))

    def forward(self, ids):
        n = len(self.weight)
        added = F.embedding((ids - n).clamp(min=0), self.added)
        return torch.where((ids < n)[..., None], F.embedding(ids.clamp(max=n - 1), self.weight), added)

    def logits(self, x):
        parts = self.weight, self.added  # x is cast, not they: a copy of the table would be a gigabyte
        return torch.cat([F.linear(x.to(rows.dtype), rows) for rows in parts], -1)


class LanguageModel(nn.Module):
    """embed_tokens, layers, norm and the head; AudioFlamingo.forward_hidden lets it listen between the layers."""

    def __init__(self, config, added):
        """config: language_models.sizes_of; added: rows of the tables beside config.vocab."""
        super().__init__()
        self.config = config
        self.embed_tokens = TokenTable(config.vocab, added, config.width)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.norm = RMSNorm(config.width, config.eps)
        if not config.tied:
            self.lm_head = TokenTable(config.vocab, added, config.width)

    def new_kv_cache(self, B, length, like):
        """Keys and values of texts so far, (layers, 2, B, H, length, d): slot p of a row is for its token at
        position p. Shapes stay while an answer grows: a decoding step is one graph."""
        c = self.config
        return like.new_zeros(c.layers, 2, B, c.kv_heads, length, c.d)

    def positions(self, ids, positions=None, kv_cache=None):
        """ids (B, T) -> their Positions: from position 0 on, or in a cache at positions (B, T)."""
        c = self.config
        at = torch.arange(ids.shape[1], device=ids.device) if kv_cache is None else positions[:, None]
        rope = rotary_table(at, c.d, c.rope_theta, c.rope_stretch)  # (T, d) or (B, 1, T, d)
        if kv_cache is None:
            return Positions(rope)
        slots = torch.arange(kv_cache.shape[4], device=ids.device)
        ahead = slots > positions.repeat(1, c.heads // c.kv_heads)[:, None, :, None]
        return Positions(rope, positions, kv_cache.new_zeros(ahead.shape).masked_fill_(ahead, -math.inf))

    def forward(self, ids, layers=None):
        """Without listening: ids (B, T) right-padded -> (B, T, D) before the head, after `layers` blocks."""
        x, place = self.embed_tokens(ids), self.positions(ids)
        for block in self.layers[:layers]:
            x = block(x, place)
        return self.norm(x)

    def logits(self, x):
        return (self.embed_tokens if self.config.tied else self.lm_head).logits(x)


# ------------------------------------------------------------------------------------------------------------
# The whole model


def gated_blocks(every, layers):
    """Indices of the blocks with cross-attention before them, from a stride or a list."""
    blocks = [i for i in range(layers) if (i + 1) % every == 0] if isinstance(every, int) else list(every)
    if not blocks or not all(isinstance(i, int) and 0 <= i < layers for i in blocks):
        raise UserError(f"cross_attn_every_n_layers = {every!r}: expected some of 0...{layers - 1}")
    return blocks


# (module, *args): the insides are computed again in the backward pass instead of being kept
recomputed = partial(checkpoint, use_reentrant=False)


def pad_packed(x, n, rows=None):
    """x (sum n, S, C), or its `rows`, n (P,) parts -> (P, max n S, C); after a part comes what must not be
    read. n and rows are numpy's: positions come from the host, a device need not be waited for."""
    at = np.minimum(np.arange(n.max()), np.maximum(n - 1, 0)[:, None]) + (n.cumsum() - n)[:, None]
    at = np.minimum(at, n.sum() - 1)  # (P, max n)
    at = torch.from_numpy(at if rows is None else rows[at]).flatten().to(x.device, non_blocking=True)
    x = x if rows is None and len(at) == len(x) else x.index_select(0, at)  # parts of one size: there already
    return x.reshape(len(n), -1, x.shape[-1])


class AudioFlamingo(nn.Module):
    def __init__(self, config, lm, tokenizer, encoder=None):
        """config: the settings of config.MODEL_SETTINGS and attention_backend; lm: a LanguageModel, or its
        sizes; tokenizer: the language model's with the marks of a prompt (data.extend_tokenizer); encoder: see "The
        audio encoder", None for CLAP of the config's sizes. What is not given has random weights;
        checkpoint.py loads them."""
        super().__init__()
        c, self.config, self.tokenizer = config, config, tokenizer
        self.audio_id, self.end_id = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS[:2]))
        self.pad_id, self.sep_id = tokenizer.pad_token_id, tokenizer.sep_token_id
        self.stop_ids = [self.end_id, tokenizer.eos_token_id]
        self.lm = lm if isinstance(lm, nn.Module) else LanguageModel(lm, added=len(tokenizer) - lm.vocab)
        self.clap = encoder = encoder or ClapEncoder(c.clap_embed_dim, c.clap_depths, c.clap_num_heads,
                                                     c.clap_spec_size)
        self.audio_config = {name: getattr(c, name) for name in AUDIO_SETTINGS} | {"sample_rate": encoder.sample_rate}
        self.audio_transformer = AudioTransformer(encoder.width, c.audio_transformer_n_head,
                                                  c.audio_transformer_n_layers, c.audio_transformer_d_inner)
        blocks = gated_blocks(c.cross_attn_every_n_layers, self.lm.config.layers)
        gated = lambda: GatedCrossAttention(self.lm.config.width, encoder.width)
        self.xattn = nn.ModuleDict({str(i): gated() for i in blocks})
        self.backend = c.attention_backend
        self.recompute = False  # training: the blocks, in the backward pass (gradient_checkpointing)

    # --- listening and reading

    def encode_audio(self, windows, n_windows):
        """windows (sum W, L) int16 or float32 -> audio tokens (B, S, C) and n_keys, how many are real: (B,)
        as n_windows, or (B, K), up to and with each of the K clips of a text (0 windows: there are fewer)."""
        part = 4 if windows.device.type == "cpu" and not self.clap.training else 64  # small enough for caches
        tokens = torch.cat([self.clap(to_float(some)) for some in windows.split(part)])  # (sum W, 64, C)
        S, counts, device = tokens.shape[1], n_windows.cpu().numpy(), tokens.device
        of_clips = counts[counts > 0]
        n_tokens = torch.from_numpy(of_clips * S).to(device, non_blocking=True)
        audio = self.audio_transformer(pad_packed(tokens, of_clips), n_tokens)  # (clips, max W S, C)
        n_keys = n_windows.to(device, non_blocking=True) * S
        if n_windows.ndim == 1:
            return audio, n_keys
        real = np.flatnonzero(np.arange(of_clips.max()) < of_clips[:, None])  # windows among (clips, max W)
        return pad_packed(audio.view(-1, S, audio.shape[2]), counts.sum(1), real), n_keys.cumsum(1)

    def visible_keys(self, ids, n_keys):
        """n_keys of listen for every token of ids (B, T): of the clips whose marks stand before or at it."""
        if n_keys.ndim == 1:
            return n_keys
        marks = (ids == self.audio_id).cumsum(1).clamp(1, n_keys.shape[1])  # before all: the first
        return n_keys.gather(1, marks - 1)

    def keys_values(self, audio):
        """audio (B, S, C) -> {block index: (B, S, 2, H, d)} for the gated blocks."""
        return dict(zip(map(int, self.xattn), keys_values(list(self.xattn.values()), audio)))

    def forward_hidden(self, ids, kv, n_keys, positions=None, kv_cache=None, inspect=None):
        """ids (B, T) -> (B, T, D) before the head; kv of keys_values, n_keys of visible_keys. With a kv_cache
        (LanguageModel.new_kv_cache) the ids are the tokens at `positions` (B, T) of texts whose earlier tokens
        are in it. inspect(i, x) is called with the residual stream x (B, T, D) before gated block i."""
        call = recomputed if self.training and self.recompute else nn.Module.__call__
        x, place = self.lm.embed_tokens(ids), self.lm.positions(ids, positions, kv_cache)
        for i, block in enumerate(self.lm.layers):
            if i in kv:
                if inspect:
                    inspect(i, x)
                x = call(self.xattn[str(i)], x, kv[i], n_keys, self.backend)
            x = call(block, x, place, None if kv_cache is None else kv_cache[i])
        return self.lm.norm(x)

    def forward(self, input_ids, windows, n_windows, labels=None):
        """input_ids (B, T) right-padded; windows (sum W, L); n_windows (B,), or (B, K) for K clips a text;
        labels (B, T) unshifted, -100 ignored -> logits (B, T, V) and no loss, or no logits and the mean loss
        over the labelled tokens: then the head runs before those alone (V = 151,669 is expensive)."""
        audio, n_keys = self.encode_audio(windows, n_windows)
        x = self.forward_hidden(input_ids, self.keys_values(audio), self.visible_keys(input_ids, n_keys))
        if labels is None:
            return self.lm.logits(x), None
        targets = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
        at = torch.from_numpy(np.flatnonzero(targets.cpu().numpy() != -100)).to(x.device, non_blocking=True)
        targets = targets.to(x.device, non_blocking=True).index_select(0, at)
        return None, self.summed_loss(x.flatten(0, 1).index_select(0, at), targets) / max(len(at), 1)

    def summed_loss(self, x, targets, most=1024):
        """x (n, D) before the head, targets (n,) -> cross-entropy; logits are made of `most` rows at once."""
        if len(x) > most:
            return sum(map(partial(recomputed, self.summed_loss), x.split(most), targets.split(most)))
        return F.cross_entropy(self.lm.logits(x).float(), targets, reduction="sum")

    # --- answering: tools/sample/decoding.py

    def stream(self, prompts, windows, n_windows, **how):
        """generate, step by step: a generator of (B,) token ids, -1 in rows that have ended."""
        from tools.sample.decoding import stream
        return stream(self, prompts, windows, n_windows, **how)

    def generate(self, prompts, windows, n_windows, max_new_tokens=256, **how):
        """prompts: B strings as in a manifest; windows (sum W, L); n_windows (B,) of their clips, or (B, K)
        of the K clips of each, 0 for none; how: fields of tools.sample.decoding.Sampling -> B strings. No answer
        depends on the rest of its batch, sampled or not."""
        from tools.sample.decoding import generate
        return generate(self, prompts, windows, n_windows, max_new_tokens=max_new_tokens, **how)

    # --- training

    def set_trainable(self, config):
        """Freeze everything, then free what a run with these settings trains."""
        table = config.freeze_lm_embeddings
        if table not in (True, False, "added"):
            raise UserError(f"freeze_lm_embeddings = {table!r}, expected True, False or 'added'")
        self.requires_grad_(False)
        self.audio_transformer.requires_grad_(True)
        self.xattn.requires_grad_(True)
        for name, p in self.lm.named_parameters():  # a tied head follows; one of its own is of the full LM
            frees = table is False if name.startswith("embed_tokens.") else config.unfreeze_full_lm
            p.requires_grad_(frees or (table == "added" and name.endswith(".added")))
        for p in self.clap.trainable():
            p.requires_grad_(config.clap_finetune)

    def clap_trains(self):
        return any(p.requires_grad for p in self.clap.parameters())

    def train(self, mode=True):
        super().train(mode)
        self.clap.train(mode and self.clap_trains())  # frozen: no drop path, SpecAugment or BatchNorm update
        return self

    # --- from and to disk: checkpoint.py

    @classmethod
    def from_pretrained(cls, path, lang_encoder_path=None, device="cpu", dtype=torch.float32, **settings):
        """path: a run directory, a checkpoint, a release directory or a hub id; settings override its own."""
        from checkpoint import load
        settings |= {"lang_encoder_path": lang_encoder_path} if lang_encoder_path else {}
        return load(path, device, dtype, **settings)

    def save_pretrained(self, folder):
        """Write the release layout, which from_pretrained and the published code read."""
        from checkpoint import save_release
        save_release(self, folder)


# ------------------------------------------------------------------------------------------------------------
# The Triton kernels, in the manner of FlashAttention-2 (arXiv 2307.08691). A program owns a block of tokens
# (or keys) of one head and walks over the other side. Scores are in base 2: scale = log2(e) / sqrt(d). Keys
# past n_keys are never read. The backward needs, with dy the gradient of y and delta = rowsum(dy * o):
#     d tanh(gate) = sum(delta)   ds = p * (dy v^T - delta)   dv, dk, dq = tanh(gate) * (p^T dy, ds^T q, ds k)
# so the gate touches last results only: its gradient is right at 0, and small gates cost no float16 range.


@triton.jit
def load_rows(ptr, per_clip, per_row, per_head, clip, rows, head, limit, D: tl.constexpr):
    """(rows, d) of one head; zeros from row `limit` on."""
    at = clip * per_clip + head * per_head + rows[:, None] * per_row + tl.arange(0, D)
    return tl.load(ptr + at, mask=rows[:, None] < limit, other=0.0)


@triton.jit
def store_output(acc, m, l, y_ptr, o_ptr, lse_ptr, gate_ptr, b, h, t, T,
                 H: tl.constexpr, D: tl.constexpr, STORE_Y: tl.constexpr, STORE_O: tl.constexpr):
    """acc (t, d), running maximum m and weight l -> y, and for the backward (or the reduction) o and lse."""
    l = tl.where(l > 0, l, 1.0)  # a token without keys: o = 0, lse = -1e30: no weight beside another share
    o = acc / l[:, None]
    at = ((b * T + t) * H + h)[:, None] * D + tl.arange(0, D)
    if STORE_Y:
        y = tl.load(gate_ptr) * o
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=t[:, None] < T)
    if STORE_O:
        tl.store(o_ptr + at, o.to(o_ptr.dtype.element_ty), mask=t[:, None] < T)
        tl.store(lse_ptr + (b * H + h) * T + t, m + tl.log2(l), mask=t < T)


@triton.jit
def forward_kernel(q_ptr, k_ptr, v_ptr, n_ptr, gate_ptr, y_ptr, o_ptr, lse_ptr,
                   q_b, q_t, q_h, k_b, k_n, k_h, v_b, v_n, v_h, n_b, n_t, T, N, scale,
                   H: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
                   STORE_Y: tl.constexpr, STORE_O: tl.constexpr):
    """Grid (token blocks, B H, splits); of several, each stores o and lse of its keys, (splits, B, ...)."""
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.minimum(tl.load(n_ptr + b * n_b + t * n_t, mask=t < T, other=0), N).to(tl.int32)
    q = load_rows(q_ptr, q_b, q_t, q_h, b, t, h, T, D)  # (t, d)
    m, l = tl.full((BLOCK_T,), -1e30, tl.float32), tl.zeros((BLOCK_T,), tl.float32)  # -inf - -inf is NaN
    acc = tl.zeros((BLOCK_T, D), tl.float32)
    n_max = tl.max(n)  # of the tokens here: padded keys cost nothing
    share = tl.cdiv(n_max, tl.num_programs(2) * BLOCK_N) * BLOCK_N
    first = tl.program_id(2) * share
    for start in range(first, tl.minimum(first + share, n_max), BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, k_b, k_n, k_h, b, keys, h, n_max, D)
        v = load_rows(v_ptr, v_b, v_n, v_h, b, keys, h, n_max, D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (t, n)
        s = tl.where(keys[None, :] < n[:, None], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        alpha, p = tl.exp2(m - m_new), tl.exp2(s - m_new[:, None])
        acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        l, m = l * alpha + tl.sum(p, 1), m_new
    b += tl.program_id(2) * (tl.num_programs(1) // H)
    store_output(acc, m, l, y_ptr, o_ptr, lse_ptr, gate_ptr, b, h, t, T, H, D, STORE_Y, STORE_O)


@triton.jit
def combine_kernel(part_ptr, part_lse_ptr, gate_ptr, y_ptr, o_ptr, lse_ptr, T, splits,
                   H: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, STORE_O: tl.constexpr):
    """The shares of the keys, (splits, B, T, H, d) float32, -> y; grid (token blocks, B H)."""
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    t, c = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, D)
    m, l = tl.full((BLOCK_T,), -1e30, tl.float32), tl.zeros((BLOCK_T,), tl.float32)
    acc = tl.zeros((BLOCK_T, D), tl.float32)
    for split in range(splits):
        part_b = b + split * (tl.num_programs(1) // H)
        lse = tl.load(part_lse_ptr + (part_b * H + h) * T + t, mask=t < T, other=float("-inf"))
        o = tl.load(part_ptr + ((part_b * T + t) * H + h)[:, None] * D + c, mask=t[:, None] < T, other=0.0)
        m_new = tl.maximum(m, lse)
        alpha, weight = tl.exp2(m - m_new), tl.exp2(lse - m_new)
        acc = acc * alpha[:, None] + weight[:, None] * o
        l, m = l * alpha + weight, m_new
    store_output(acc, m, l, y_ptr, o_ptr, lse_ptr, gate_ptr, b, h, t, T, H, D, True, STORE_O)


@triton.jit
def dq_kernel(q_ptr, k_ptr, v_ptr, n_ptr, gate_ptr, dy_ptr, o_ptr, lse_ptr, delta_ptr, dq_ptr,
              q_b, q_t, q_h, k_b, k_n, k_h, v_b, v_n, v_h, n_b, n_t, T, N, scale,
              H: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """Grid (token blocks, B H): delta, which dkv_kernel reads next, and dq."""
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    t, c = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, D)
    row, at = (b * H + h) * T + t, ((b * T + t) * H + h)[:, None] * D + c
    n = tl.minimum(tl.load(n_ptr + b * n_b + t * n_t, mask=t < T, other=0), N).to(tl.int32)
    dy = tl.load(dy_ptr + at, mask=t[:, None] < T, other=0.0)
    o = tl.load(o_ptr + at, mask=t[:, None] < T, other=0.0)
    delta = tl.sum(dy.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta_ptr + row, delta, mask=t < T)
    q = load_rows(q_ptr, q_b, q_t, q_h, b, t, h, T, D)
    lse = tl.load(lse_ptr + row, mask=t < T, other=0.0)
    dq = tl.zeros((BLOCK_T, D), tl.float32)
    n_max = tl.max(n)
    for start in range(0, n_max, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, k_b, k_n, k_h, b, keys, h, n_max, D)
        v = load_rows(v_ptr, v_b, v_n, v_h, b, keys, h, n_max, D)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None])  # (t, n)
        p = tl.where(keys[None, :] < n[:, None], p, 0.0)
        ds = p * (tl.dot(dy, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    dq *= tl.load(gate_ptr) * scale * 0.6931471805599453  # ln 2: back from base 2
    tl.store(dq_ptr + at, dq.to(dq_ptr.dtype.element_ty), mask=t[:, None] < T)


@triton.jit
def dkv_kernel(q_ptr, k_ptr, v_ptr, n_ptr, n_max_ptr, gate_ptr, dy_ptr, lse_ptr, delta_ptr, dkv_ptr,
               q_b, q_t, q_h, k_b, k_n, k_h, v_b, v_n, v_h, n_b, n_t, T, N, scale,
               H: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """Grid (key blocks, B H): dk, dv as the halves of (B, N, 2, H, d); keys that no token sees get zeros."""
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    first = tl.program_id(0) * BLOCK_N
    keys, c = first + tl.arange(0, BLOCK_N), tl.arange(0, D)
    n_max = tl.minimum(tl.load(n_max_ptr + b), N).to(tl.int32)
    k = load_rows(k_ptr, k_b, k_n, k_h, b, keys, h, n_max, D)
    v = load_rows(v_ptr, v_b, v_n, v_h, b, keys, h, n_max, D)
    dk, dv = tl.zeros((BLOCK_N, D), tl.float32), tl.zeros((BLOCK_N, D), tl.float32)
    for start in range(0, tl.where(first < n_max, T, 0), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        row, at = (b * H + h) * T + t, ((b * T + t) * H + h)[:, None] * D + c
        n = tl.minimum(tl.load(n_ptr + b * n_b + t * n_t, mask=t < T, other=0), N).to(tl.int32)
        q = load_rows(q_ptr, q_b, q_t, q_h, b, t, h, T, D)
        dy = tl.load(dy_ptr + at, mask=t[:, None] < T, other=0.0)
        lse = tl.load(lse_ptr + row, mask=t < T, other=0.0)
        delta = tl.load(delta_ptr + row, mask=t < T, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale - lse[None, :]  # (n, t)
        p = tl.exp2(tl.where(keys[:, None] < n[None, :], s, float("-inf")))
        dv += tl.dot(p.to(dy.dtype), dy, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(dy), input_precision="ieee") - delta[None, :])
        dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")
    gate = tl.load(gate_ptr)
    at = ((b * N + keys) * 2 * H + h)[:, None] * D + c
    dk *= gate * scale * 0.6931471805599453  # ln 2: back from base 2
    tl.store(dkv_ptr + at, dk.to(dkv_ptr.dtype.element_ty), mask=keys[:, None] < N)
    tl.store(dkv_ptr + at + H * D, (gate * dv).to(dkv_ptr.dtype.element_ty), mask=keys[:, None] < N)


# TRITON_INTERPRET=1 before the import
INTERPRETED = bool(triton.__version__) and not isinstance(forward_kernel, triton.JITFunction)

# (bytes a number, head dim up to) -> kernel: tokens of a block, keys of a block, warps, pipeline stages.
# Fixed, where @triton.autotune would stall the first steps. With Triton 3.6 to 3.9 no entry spills registers
# or takes over 99 KB of shared memory on sm_80, sm_90, sm_100 or gfx942 (`tools/bench.py kernel`). 64 rows of
# two bytes are the least that sm_90's wgmma takes. float32 multiplies on plain cores: hence its small blocks.
BLOCKS = {
    (2, 64): {"forward": (64, 64, 4, 3), "dq": (64, 64, 4, 3), "dkv": (32, 64, 4, 3)},
    (2, 128): {"forward": (64, 32, 4, 3), "dq": (64, 32, 4, 3), "dkv": (16, 64, 4, 2)},
    (4, 64): {"forward": (32, 32, 4, 2), "dq": (32, 32, 4, 2), "dkv": (16, 32, 4, 2)},
    (4, 128): {"forward": (32, 16, 8, 2), "dq": (32, 16, 8, 2), "dkv": (16, 32, 8, 1)}}
PROGRAMS = 256  # about two per multiprocessor of a large GPU: when decoding gives fewer, the keys are split


def block_sizes(kernel, dtype, d, T):
    """Launch arguments of "forward", "dq", "dkv" or "combine"; texts of up to 16 tokens get blocks of 16."""
    if kernel == "combine":
        return {"BLOCK_T": 16, "num_warps": 4, "num_stages": 1}
    tokens, keys, warps, stages = BLOCKS[dtype.itemsize, 64 if d <= 64 else 128][kernel]
    return {"BLOCK_T": min(tokens, 16) if T <= 16 else tokens, "BLOCK_N": keys, "num_warps": warps,
            "num_stages": stages}


def launch(kernel, grid, *args, **options):
    if 0 not in grid:  # an empty batch has nothing to launch
        with torch.cuda.device(args[0].device) if args[0].is_cuda else nullcontext():
            kernel[grid](*args, **options)


def strides_and_sizes(q, k, v, n_keys):
    """What forward, dq and dkv share: how to address q, k, v and n_keys, sizes, scale in base 2."""
    per_token = n_keys.stride(1) if n_keys.ndim == 2 else 0
    scale = math.log2(math.e) / math.sqrt(q.shape[-1])
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], n_keys.stride(0), per_token)
    return (*strides, q.shape[1], k.shape[1], scale)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n_keys: torch.Tensor, tanh_gate: torch.Tensor,
           save: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> y (B, T, H, d); o like y and lse (B, H, T) float32 in base 2 where they are saved, else empty."""
    (B, T, H, d), N = q.shape, k.shape[1]
    sizes = block_sizes("forward", q.dtype, d, T)
    blocks = triton.cdiv(T, sizes["BLOCK_T"])
    # flash-decoding, from shapes alone; never for long texts, whose shares would be as large as the scores
    splits = max(1, min(PROGRAMS // max(1, B * H), triton.cdiv(N, sizes["BLOCK_N"]))) if T <= 16 else 1
    empty = lambda *shape, dtype: torch.empty(shape, dtype=dtype, device=q.device)
    y = empty(B, T, H, d, dtype=q.dtype)
    o = empty(*(y.shape if save else (0,)), dtype=q.dtype)
    lse = empty(*((B, H, T) if save else (0,)), dtype=torch.float32)
    inputs, shapes = (q, k, v, n_keys, tanh_gate), strides_and_sizes(q, k, v, n_keys)
    if splits == 1:
        launch(forward_kernel, (blocks, B * H, 1), *inputs, y, o, lse, *shapes, H, d, **sizes,
               STORE_Y=True, STORE_O=save)
    else:
        part = empty(splits, B, T, H, d, dtype=torch.float32)
        part_lse = empty(splits, B, H, T, dtype=torch.float32)
        launch(forward_kernel, (blocks, B * H, splits), *inputs, y, part, part_lse, *shapes, H, d, **sizes,
               STORE_Y=False, STORE_O=True)
        sizes = block_sizes("combine", q.dtype, d, T)
        grid = (triton.cdiv(T, sizes["BLOCK_T"]), B * H)
        launch(combine_kernel, grid, part, part_lse, tanh_gate, y, o, lse, T, splits, H, d, **sizes,
               STORE_O=save)
    return y, o, lse


def attend_backward(dy: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n_keys: torch.Tensor,
                    tanh_gate: torch.Tensor, o: torch.Tensor, lse: torch.Tensor
                    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> dq, dkv (B, N, 2, H, d), d tanh(gate) (1,). No atomics: the same bits every time."""
    (B, T, H, d), N = q.shape, k.shape[1]
    dy, shapes = dy.contiguous(), strides_and_sizes(q, k, v, n_keys)
    dq, delta = torch.empty(o.shape, dtype=q.dtype, device=q.device), torch.empty_like(lse)
    dkv = torch.empty(B, N, 2, H, d, dtype=k.dtype, device=q.device)
    n_max = n_keys.contiguous() if n_keys.ndim == 1 else n_keys.amax(1)  # (B,)
    sizes = block_sizes("dq", q.dtype, d, T)
    grid = (triton.cdiv(T, sizes["BLOCK_T"]), B * H)
    launch(dq_kernel, grid, q, k, v, n_keys, tanh_gate, dy, o, lse, delta, dq, *shapes, H, d, **sizes)
    sizes = block_sizes("dkv", q.dtype, d, T)
    grid = (triton.cdiv(N, sizes["BLOCK_N"]), B * H)
    launch(dkv_kernel, grid, q, k, v, n_keys, n_max, tanh_gate, dy, lse, delta, dkv, *shapes, H, d, **sizes)
    return dq, dkv, delta.sum().view(1)


# As operators, so that torch.compile(fullgraph=True) takes them whole and knows their shapes and gradients.
as_operator = torch.library.custom_op
attend_op = as_operator("audio_flamingo::attend", attend, mutates_args=())
attend_backward_op = as_operator("audio_flamingo::attend_backward", attend_backward, mutates_args=())


@attend_op.register_fake
def _(q, k, v, n_keys, tanh_gate, save):
    B, T, H, d = q.shape
    lse = q.new_empty((B, H, T) if save else (0,), dtype=torch.float32)
    return q.new_empty(B, T, H, d), q.new_empty((B, T, H, d) if save else (0,)), lse


@attend_backward_op.register_fake
def _(dy, q, k, v, n_keys, tanh_gate, o, lse):
    B, N, H, d = k.shape
    return q.new_empty(o.shape), k.new_empty(B, N, 2, H, d), tanh_gate.new_empty(1)


def save_for_attend_backward(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # no zeros in place of the gradients that o and lse do not get
    ctx.save_for_backward(*inputs[:5], *output[1:])  # q, k, v, n_keys, tanh_gate, o, lse: nothing of T x N


def attend_gradients(ctx, dy, *_):
    if dy is None:
        return (None,) * 6
    dq, dkv, dtanh = attend_backward_op(dy, *ctx.saved_tensors)
    return dq, dkv[:, :, 0], dkv[:, :, 1], None, dtanh, None


attend_op.register_autograd(attend_gradients, setup_context=save_for_attend_backward)


def triton_attention(q, k, v, n_keys, gate):
    d = q.shape[-1]
    fits = d in (32, 64, 128) and q.dtype in (torch.float32, torch.float16, torch.bfloat16)
    if not fits or not triton.__version__ or not (q.is_cuda or INTERPRETED):
        raise UserError(f"backend='triton': expected triton, a GPU (or TRITON_INTERPRET=1 at import) and "
                         f"heads of 32, 64 or 128 channels in float32, float16 or bfloat16; got triton "
                         f"{triton.__version__}, {q.device} and {d} in {q.dtype}")
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, gate))
    op = attend_op if save or torch.compiler.is_compiling() else attend  # a plain call skips the dispatcher
    # tanh in torch: exact near 0, where the gate starts, and differentiated there
    return op(q, k, v, n_keys, gate.float().tanh(), save)[0]


BACKENDS["triton"] = triton_attention
