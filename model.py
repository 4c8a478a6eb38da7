"""Audio Flamingo 2: a frozen language model that listens through gated cross-attention.

    windows of sound -> log-mel -> CLAP (HTS-AT) -> 64 tokens per window -> audio transformer -> keys and values
    text -> embeddings -> [gated cross-attention over the audio -> language model block] x layers -> logits

    from model import AudioFlamingo
    model = AudioFlamingo.from_pretrained("exp/sft")            # a run, a checkpoint, a release directory, a hub id
    model.generate(["What is happening?"], windows, n_windows)  # windows from data.load_audio

Shapes: B clips, W windows, S audio tokens of a clip (64 per window; (clap_spec_size/32)^2 in general), T text tokens,
D language-model width, C audio width, V vocabulary, H heads of d channels. Paper: arXiv 2503.03983.
"""
import glob
import hashlib
import importlib.util
import json
import math
import os
import re
import sys
import types
import warnings
from contextlib import nullcontext
from functools import lru_cache
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

if importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl
else:  # a CPU or macOS wheel of torch: naive and sdpa need none of it, and the kernels below stay plain functions
    triton, tl = SimpleNamespace(jit=lambda f: f, __version__=None), SimpleNamespace(constexpr=None)

SAMPLE_RATE = 16000  # Hz, of everything

# ----------------------------------------------------------------------------------------------------------------------
# Sound to log-mel


@lru_cache
def mel_filters(device):
    """(513, 64) float32 triangles: 64 HTK mel bands over 50-8000 Hz, no area normalisation, for a 1024-point FFT."""
    mel = lambda hz: 2595 * math.log10(1 + hz / 700)
    edges = 700 * (10 ** (torch.linspace(mel(50), mel(8000), 66, dtype=torch.float64) / 2595) - 1)
    bins = torch.linspace(0, SAMPLE_RATE / 2, 513, dtype=torch.float64)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0).float().to(device)


@lru_cache
def hann(device):
    return torch.hann_window(1024, device=device)


def log_mel(windows):
    """windows (n, L) float32 in [-1, 1] -> (n, 1 + L//160, 64) float32, 10 log10 of the mel power."""
    with torch.autocast(windows.device.type, enabled=False):
        spectrum = torch.stft(windows, 1024, 160, window=hann(windows.device), pad_mode="reflect", return_complex=True)
        power = spectrum.real.square() + spectrum.imag.square()
        return 10 * torch.log10((power.transpose(1, 2) @ mel_filters(windows.device)).clamp(min=1e-10))


# ----------------------------------------------------------------------------------------------------------------------
# CLAP: HTS-AT of the package laion-clap


@lru_cache
def load_htsat_class():
    """laion_clap.clap_module.htsat.HTSAT_Swin_Transformer; neither laion_clap's nor torchlibrosa's __init__ runs.

    Those import torchvision, librosa, numba and wandb, and download tokenizers. The encoder's file needs torch, its
    neighbour `.feature_fusion` and torchlibrosa's augmentation.py. So it is executed between stand-ins: empty packages
    with the same folders, and modules that hold the names it takes from `.utils` (for its training heads) and from
    `torchlibrosa.stft` (its waveform front end), neither of which we use.
    """
    found = {n: importlib.util.find_spec(n) for n in ("laion_clap", "torchlibrosa")}  # finds folders, runs nothing
    if None in found.values():
        raise ModuleNotFoundError("laion-clap or torchlibrosa is missing: pip install --no-deps laion-clap torchlibrosa")
    name = "laion_clap_htsat"
    stand_ins = {n: types.ModuleType(n) for n in (name, f"{name}.utils", "torchlibrosa", "torchlibrosa.stft")}
    stand_ins[name].__path__ = [os.path.join(os.path.dirname(found["laion_clap"].origin), "clap_module")]
    stand_ins["torchlibrosa"].__path__ = [os.path.dirname(found["torchlibrosa"].origin)]
    utils, front_end = stand_ins[f"{name}.utils"], stand_ins["torchlibrosa.stft"]
    utils.do_mixup = utils.interpolate = None
    front_end.Spectrogram = front_end.LogmelFilterBank = lambda **_: nn.Identity()
    sys.modules.update(stand_ins)
    warnings.filterwarnings("ignore", message="torch.meshgrid", category=UserWarning)  # its call, of an older torch
    module = importlib.import_module(f"{name}.htsat")
    for n in ("torchlibrosa", "torchlibrosa.stft", "torchlibrosa.augmentation"):
        del sys.modules[n]  # whoever imports torchlibrosa later gets the real one
    return module.HTSAT_Swin_Transformer


class ClapEncoder(nn.Module):
    """windows (n, L) -> (n, S, C): the tokens before HTS-AT's pooling, S = (spec_size/32)^2, C = 8 embed_dim."""

    def __init__(self, embed_dim, depths, num_heads, spec_size=256, position=False):
        super().__init__()
        mel = SimpleNamespace(sample_rate=SAMPLE_RATE, window_size=1024, hop_size=160, mel_bins=64, fmin=50, fmax=8000)
        self.htsat = load_htsat_class()(spec_size=spec_size, patch_size=4, patch_stride=(4, 4), embed_dim=embed_dim,
                                        depths=depths, num_heads=num_heads, window_size=8, config=mel, ape=position,
                                        enable_fusion=True, fusion_type="aff_2d")
        for unused in ("spectrogram_extractor", "logmel_extractor", "tscam_conv", "head"):
            delattr(self.htsat, unused)  # its own waveform front end and AudioSet classifier
        share = (spec_size / 256) ** 2  # of a 10 s window: mask the same part of a shorter one
        self.htsat.spec_augmenter.time_dropper.drop_width = max(1, round(64 * share))
        self.width = 8 * embed_dim
        self.tokens_per_window = (spec_size // 32) ** 2
        self.max_frames = spec_size * (spec_size // 64)

    def forward(self, windows):
        return self.encode(log_mel(windows))

    def encode(self, mel):
        """mel (n, frames, 64), as log_mel gives it -> (n, S, C)."""
        h = self.htsat
        if mel.shape[1] > self.max_frames:
            raise ValueError(f"window_length gives {mel.shape[1]} frames of 10 ms, clap_spec_size {h.spec_size} takes "
                             f"{self.max_frames}")
        x = h.bn0(mel.transpose(1, 2)[..., None]).permute(0, 3, 2, 1)  # per mel band; (n, 1, frames, 64)
        if self.training:
            x = h.spec_augmenter(x)
        x = h.reshape_wav2img(x).to(h.norm.weight.dtype)  # (n, 1, spec_size, spec_size): time quarters under each other
        # A window is CLAP's own length, never "longer": the fusion branch (local mel crops) is not used.
        x = h.patch_embed.norm(h.patch_embed.proj(x).flatten(2).transpose(1, 2))  # (n, (spec_size/4)^2, embed_dim)
        if h.ape:
            x = x + h.absolute_pos_embed.to(x.dtype)
        for layer in h.layers:  # the stages' blocks one by one: layer(x) would also stack every attention map
            for block in layer.blocks:
                x = block(x)[0]
            if layer.downsample is not None:
                x = layer.downsample(x)
        x = h.norm(x)  # (n, S, C) on a grid of (time parts x 2 frequency bins) rows and sqrt(S) columns in time
        n, S, C = x.shape
        x = x.view(n, h.freq_ratio, -1, math.isqrt(S), C)  # (n, time part, frequency bin, column, C)
        return x.transpose(1, 2).reshape(n, S, C)  # token = bin * (S/2) + time step


# ----------------------------------------------------------------------------------------------------------------------
# Rotary embedding: rotate the pairs (i, i + r/2) of the first r channels by position * base^(-2i/r)


def rotary_table(positions, r, base):
    """positions (..., T) -> cos, sin (..., T, r) in float32."""
    frequency = base ** (-torch.arange(0, r, 2, device=positions.device, dtype=torch.float32) / r)
    angle = positions[..., None].float() * frequency
    return torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()


def rotate(x, cos, sin):
    """x (B, H, T, d); cos, sin (T, r) or (B, 1, T, r), r <= d: the other channels pass through. In float32."""
    r = cos.shape[-1]
    head = x[..., :r]  # times float32 tables: float32 (or float64) arithmetic whatever x is
    half = torch.cat([-head[..., r // 2:], head[..., :r // 2]], -1)
    head = (head * cos + half * sin).to(x.dtype)
    return head if r == x.shape[-1] else torch.cat([head, x[..., r:]], -1)


# ----------------------------------------------------------------------------------------------------------------------
# Audio transformer: mixes the tokens of all windows of a clip


class AudioAttention(nn.Module):
    def __init__(self, width, n_head):
        super().__init__()
        self.n_head, self.d = n_head, width // n_head
        self.w_qs, self.w_ks, self.w_vs, self.fc = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.layer_norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x, rope, mask):
        B, S, C = x.shape
        q, k, v = (w(x).view(B, S, self.n_head, self.d).transpose(1, 2) for w in (self.w_qs, self.w_ks, self.w_vs))
        o = F.scaled_dot_product_attention(rotate(q, *rope), rotate(k, *rope), v, attn_mask=mask)  # (B, H, S, d)
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
            raise ValueError(f"audio_transformer_n_head = {n_head} does not divide the audio width {width}")
        self.layer_norm = nn.LayerNorm(width, eps=1e-6)  # of the input; there is no final norm
        self.layer_stack = nn.ModuleList([
            nn.ModuleDict({"slf_attn": AudioAttention(width, n_head), "pos_ffn": AudioFeedForward(width, d_inner)})
            for _ in range(n_layers)])
        for layer in self.layer_stack:  # at first each passes on what it is given: noise would hide what CLAP's tokens tell
            nn.init.zeros_(layer.slf_attn.fc.weight)
            nn.init.zeros_(layer.pos_ffn.w_2.weight)
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


# ----------------------------------------------------------------------------------------------------------------------
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
    # a row without keys sees key 0 and is replaced by zeros afterwards: no kernel of SDPA meets an empty softmax
    mask = key_mask(n_keys.clamp(min=1), k.shape[1])
    o = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)
    has_keys = (n_keys > 0).view(*n_keys.shape, *[1] * (4 - n_keys.ndim))  # (B, 1 or T, 1, 1)
    return (gate.tanh() * torch.where(has_keys, o, 0)).to(q.dtype)


# Fused kernels, in the manner of FlashAttention-2 (arXiv 2307.08691). A program owns one block of tokens (or of keys)
# of one head and walks over the other side. Scores are in base 2: scale = log2(e) / sqrt(d). Keys past n_keys are never
# read. The backward needs, with dy the gradient of y and delta = rowsum(dy * o) of the un-gated o:
#     d tanh(gate) = sum(delta)        ds = p * (dy v^T - delta)        dv, dk, dq = tanh(gate) * (p^T dy, ds^T q, ds k)
# so the gate touches last results only: its own gradient is right at gate 0, and small gates cost no float16 range.


@triton.jit
def store_output(acc, m, l, y_ptr, o_ptr, lse_ptr, gate_ptr, b, h, t, T,
                 H: tl.constexpr, D: tl.constexpr, STORE_Y: tl.constexpr, STORE_O: tl.constexpr):
    """Sum acc (t, d) of running maximum m and weight l -> y, and for the backward (or the reduction) o and lse."""
    l = tl.where(l > 0, l, 1.0)  # a token without keys: o = 0, lse = -1e30, and no weight beside another share
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
    """Grid (token blocks, B H, splits); with splits > 1 each stores o and lse of its keys, (splits, B, ...)."""
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    t, c = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, D)
    n = tl.minimum(tl.load(n_ptr + b * n_b + t * n_t, mask=t < T, other=0), N).to(tl.int32)
    q = tl.load(q_ptr + b * q_b + h * q_h + t[:, None] * q_t + c, mask=t[:, None] < T, other=0.0)  # (t, d)
    m, l = tl.full((BLOCK_T,), -1e30, tl.float32), tl.zeros((BLOCK_T,), tl.float32)  # finite: -inf - -inf is NaN
    acc = tl.zeros((BLOCK_T, D), tl.float32)
    n_max = tl.max(n)  # of the tokens here: padded keys cost nothing
    share = tl.cdiv(n_max, tl.num_programs(2) * BLOCK_N) * BLOCK_N
    first = tl.program_id(2) * share
    for start in range(first, tl.minimum(first + share, n_max), BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = tl.load(k_ptr + b * k_b + h * k_h + keys[:, None] * k_n + c, mask=keys[:, None] < n_max, other=0.0)
        v = tl.load(v_ptr + b * v_b + h * v_h + keys[:, None] * v_n + c, mask=keys[:, None] < n_max, other=0.0)
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
    q = tl.load(q_ptr + b * q_b + h * q_h + t[:, None] * q_t + c, mask=t[:, None] < T, other=0.0)
    lse = tl.load(lse_ptr + row, mask=t < T, other=0.0)
    dq = tl.zeros((BLOCK_T, D), tl.float32)
    n_max = tl.max(n)
    for start in range(0, n_max, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = tl.load(k_ptr + b * k_b + h * k_h + keys[:, None] * k_n + c, mask=keys[:, None] < n_max, other=0.0)
        v = tl.load(v_ptr + b * v_b + h * v_h + keys[:, None] * v_n + c, mask=keys[:, None] < n_max, other=0.0)
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
    k = tl.load(k_ptr + b * k_b + h * k_h + keys[:, None] * k_n + c, mask=keys[:, None] < n_max, other=0.0)
    v = tl.load(v_ptr + b * v_b + h * v_h + keys[:, None] * v_n + c, mask=keys[:, None] < n_max, other=0.0)
    dk, dv = tl.zeros((BLOCK_N, D), tl.float32), tl.zeros((BLOCK_N, D), tl.float32)
    for start in range(0, tl.where(first < n_max, T, 0), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        row, at = (b * H + h) * T + t, ((b * T + t) * H + h)[:, None] * D + c
        n = tl.minimum(tl.load(n_ptr + b * n_b + t * n_t, mask=t < T, other=0), N).to(tl.int32)
        q = tl.load(q_ptr + b * q_b + h * q_h + t[:, None] * q_t + c, mask=t[:, None] < T, other=0.0)
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


INTERPRETED = bool(triton.__version__) and not isinstance(forward_kernel, triton.JITFunction)  # TRITON_INTERPRET=1

# (bytes a number, head dim up to) -> kernel: tokens of a block, keys of a block, warps, pipeline stages. Fixed, where
# @triton.autotune would stall the first steps. With Triton 3.6 to 3.9 no entry spills registers, and none takes over
# 99 KB of shared memory, on sm_80, sm_90, sm_100 or gfx942 (`tools/bench.py kernel`). 64 rows of two bytes are what
# sm_90's wgmma takes at least. float32 multiplies exactly, on plain cores: hence its small blocks.
BLOCKS = {
    (2, 64): {"forward": (64, 64, 4, 3), "dq": (64, 64, 4, 3), "dkv": (32, 64, 4, 3), "combine": (16, 0, 4, 1)},
    (2, 128): {"forward": (64, 32, 4, 3), "dq": (64, 32, 4, 3), "dkv": (16, 64, 4, 2), "combine": (16, 0, 4, 1)},
    (4, 64): {"forward": (32, 32, 4, 2), "dq": (32, 32, 4, 2), "dkv": (16, 32, 4, 2), "combine": (16, 0, 4, 1)},
    (4, 128): {"forward": (32, 16, 8, 2), "dq": (32, 16, 8, 2), "dkv": (16, 32, 8, 1), "combine": (16, 0, 4, 1)}}
PROGRAMS = 256  # about two per multiprocessor of a large GPU: when decoding gives fewer, the keys are split as well


def block_sizes(kernel, dtype, d, T):
    """Launch arguments of a kernel, "forward", "dq", "dkv" or "combine"; texts of up to 16 tokens get blocks of 16."""
    tokens, keys, warps, stages = BLOCKS[dtype.itemsize, 64 if d <= 64 else 128][kernel]
    tokens = 16 if T <= 16 else tokens
    sizes = {"BLOCK_T": tokens, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages}
    return {name: size for name, size in sizes.items() if size}


def launch(kernel, grid, *args, **options):
    if 0 not in grid:  # an empty batch has nothing to launch
        with torch.cuda.device(args[0].device) if args[0].is_cuda else nullcontext():
            kernel[grid](*args, **options)


def strides_and_sizes(q, k, v, n_keys):
    """The arguments that forward, dq and dkv share: how to address q, k, v and n_keys, sizes, scale in base 2."""
    per_token = n_keys.stride(1) if n_keys.ndim == 2 else 0
    scale = math.log2(math.e) / math.sqrt(q.shape[-1])
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], n_keys.stride(0), per_token)
    return (*strides, q.shape[1], k.shape[1], scale)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n_keys: torch.Tensor, tanh_gate: torch.Tensor,
           save: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> y (B, T, H, d) and, when saved for the backward, o like y and lse (B, H, T) float32 in base 2, else empty."""
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
        launch(combine_kernel, (triton.cdiv(T, sizes["BLOCK_T"]), B * H), part, part_lse, tanh_gate, y, o, lse,
               T, splits, H, d, **sizes, STORE_O=save)
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
    launch(dq_kernel, (triton.cdiv(T, sizes["BLOCK_T"]), B * H), q, k, v, n_keys, tanh_gate, dy, o, lse, delta, dq,
           *shapes, H, d, **sizes)
    sizes = block_sizes("dkv", q.dtype, d, T)
    launch(dkv_kernel, (triton.cdiv(N, sizes["BLOCK_N"]), B * H), q, k, v, n_keys, n_max, tanh_gate, dy, lse, delta,
           dkv, *shapes, H, d, **sizes)
    return dq, dkv, delta.sum().view(1)


# As operators, so that torch.compile(fullgraph=True) takes them whole and knows their shapes and gradients.
attend_op = torch.library.custom_op("audio_flamingo::attend", attend, mutates_args=())
attend_backward_op = torch.library.custom_op("audio_flamingo::attend_backward", attend_backward, mutates_args=())


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
    """tanh(gate) softmax(q k^T / sqrt(d)) v over the first n_keys keys; eq. of section 3 of Flamingo, arXiv 2204.14198.

    q (B, T, H, d); k, v (B, N, H, d), strided views allowed; n_keys int (B,), or (B, T) for a number per token, 0 keys
    give zeros; gate (1,), the raw parameter, of any float dtype -> (B, T, H, d) of q's dtype. Differentiable in
    q, k, v, gate. backend: "naive" (the spec, float64 too), "sdpa", "triton", or "auto" (pick_backend). The padding of
    k and v must be finite except for "triton", which never reads it. ValueError for shapes or dtypes that do not fit.
    """
    (B, T, H, d), N = q.shape, k.shape[1]
    if k.shape != (B, N, H, d) or v.shape != k.shape or not q.dtype == k.dtype == v.dtype:
        raise ValueError("q, k, v: expected (B, T, H, d), (B, N, H, d), (B, N, H, d) of one dtype, got "
                         + ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (q, k, v)))
    if n_keys.shape not in ((B,), (B, T)) or n_keys.is_floating_point():
        raise ValueError(f"n_keys: expected integers {(B,)} or {(B, T)}, got {tuple(n_keys.shape)} {n_keys.dtype}")
    backend = pick_backend(q.device)[0] if backend == "auto" else backend
    if backend == "naive":
        return naive_attention(q, k, v, n_keys, gate)
    if backend == "sdpa":
        return sdpa_attention(q, k, v, n_keys, gate)
    if backend != "triton":
        raise ValueError(f"backend={backend!r}: expected 'auto', 'triton', 'sdpa' or 'naive'")
    return triton_attention(q, k, v, n_keys, gate)[0]


def triton_attention(q, k, v, n_keys, gate):
    """-> y, and what its backward keeps: the un-gated o like y (empty when no gradient is asked for)."""
    d = q.shape[-1]
    if not triton.__version__ or not (q.is_cuda or INTERPRETED):
        raise ValueError(f"backend='triton': expected triton and a GPU, or TRITON_INTERPRET=1 before the import; got "
                         f"triton {triton.__version__} and tensors on {q.device}")
    if d not in (32, 64, 128) or q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"backend='triton': expected heads of 32, 64 or 128 channels in float32, float16 or bfloat16, "
                         f"got {d} in {q.dtype}")
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, gate))
    op = attend_op if save or torch.compiler.is_compiling() else attend  # a plain call skips the dispatcher
    # tanh in torch: exact near 0, where the gate starts, and differentiated there
    return op(q, k, v, n_keys, gate.float().tanh(), save)[:2]


class AddProduct(torch.autograd.Function):
    """x + y W^T for y = tanh(gate) o: the backward takes o, which attention keeps anyway, so y need not be kept."""

    @staticmethod
    def forward(ctx, x, y, o, tanh_gate, weight):
        ctx.save_for_backward(o, tanh_gate, weight)
        return add_product(x, y, weight)

    @staticmethod
    def backward(ctx, dx):
        o, tanh_gate, weight = ctx.saved_tensors
        g = dx.to(o.dtype)
        dweight = g.flatten(0, 1).t() @ o.flatten(0, 1)
        return dx, g @ weight.to(o.dtype), None, None, (tanh_gate * dweight).to(weight.dtype)


def add_product(x, y, weight):
    """x (B, T, D) + y (B, T, n) W^T, x as the product's addend but where autocast would round a float32 x to bf16."""
    if x.dtype == weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return torch.addmm(x.flatten(0, 1), y.flatten(0, 1), weight.t()).view_as(x)
    return x + F.linear(y, weight)


class GatedCrossAttention(nn.Module):
    """x <- x + tanh(attn_gate) Attn(LN(x), audio); x <- x + tanh(ff_gate) FF(x), before a language-model block."""

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

    def keys_values(self, audio):
        """audio (B, S, C) -> (B, S, 2, H, d): depends on the clip alone, so once per request."""
        return self.attn.to_kv(audio).view(*audio.shape[:2], 2, self.heads, self.d)

    def queries(self, x):
        return self.attn.to_q(self.attn.norm(x)).view(*x.shape[:2], self.heads, self.d)  # (B, T, 8, 64)

    def forward(self, x, kv, n_keys, backend="auto"):
        """x (B, T, D), kv of keys_values, n_keys (B,) or (B, T) -> (B, T, D)."""
        x = self.attention(x, kv, n_keys, backend)
        return x + self.ff_gate.tanh().to(x.dtype) * self.ff(x)

    def attention(self, x, kv, n_keys, backend):
        """x + tanh(attn_gate) Attn(LN(x), audio). Its backward keeps x, q, o, lse, k, v: LN(x) is computed again."""
        q = (checkpoint(self.queries, x, use_reentrant=False, preserve_rng_state=False) if torch.is_grad_enabled()
             else self.queries(x))
        weight = self.attn.to_out.weight
        backend = pick_backend(x.device)[0] if backend == "auto" else backend
        if backend == "triton":
            y, o = triton_attention(q, *kv.unbind(2), n_keys, self.attn_gate)  # (B, T, 8, 64)
        else:
            y, o = gated_cross_attention(q, *kv.unbind(2), n_keys, self.attn_gate, backend), ()
        if len(o):
            return AddProduct.apply(x, y.flatten(2), o.flatten(2), self.attn_gate.detach().tanh(), weight)
        return add_product(x, y.flatten(2), weight)


# ----------------------------------------------------------------------------------------------------------------------
# Language model: the Qwen2 and Llama families


def lm_config(path, cache_dir=None):
    """The numbers of a Hugging Face config that our block needs; ValueError for what it does not compute."""
    from transformers import AutoConfig
    hf = AutoConfig.from_pretrained(local_or_hub(path, cache_dir, "*.json"))
    rope = getattr(hf, "rope_parameters", None) or getattr(hf, "rope_scaling", None) or {}
    known = {"model_type": ("qwen2", "llama", "mistral"), "hidden_act": ("silu",), "sliding window": (None, False)}
    sliding = getattr(hf, "sliding_window", None) if getattr(hf, "use_sliding_window", True) else None
    found = {"model_type": hf.model_type, "hidden_act": hf.hidden_act, "sliding window": sliding}
    for name, value in found.items():
        if value not in known[name]:
            raise ValueError(f"{path}: {name} {value!r} is not supported, expected one of {known[name]}")
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"{path}: rotary scaling {rope} is not supported, expected the default (none)")
    bias = getattr(hf, "attention_bias", False)
    return SimpleNamespace(
        width=hf.hidden_size, layers=hf.num_hidden_layers, heads=hf.num_attention_heads, inner=hf.intermediate_size,
        kv_heads=hf.num_key_value_heads, d=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        eps=hf.rms_norm_eps, rope_theta=rope.get("rope_theta") or getattr(hf, "rope_theta", 10000.0),
        qkv_bias=bias or hf.model_type == "qwen2", out_bias=bias, mlp_bias=getattr(hf, "mlp_bias", False),
        tied=hf.tie_word_embeddings, vocab=hf.vocab_size)


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class KVCache:
    """Keys and values of the text so far: row b holds the tokens at positions 0 ... positions[b]."""

    def __init__(self, lm, B, length, device, dtype):
        c = lm.config
        self.kv = torch.zeros(c.layers, 2, B, c.kv_heads, length, c.d, device=device, dtype=dtype)
        self.rows = torch.arange(B, device=device)
        self.filled = 0  # the longest row, so that decoding reads no further

    def prefill(self, i, k, v):
        """k, v (B, H, T, d) of the right-padded prompts; slots of padding are overwritten before they are read."""
        self.filled = k.shape[2]
        self.kv[i, 0, :, :, :self.filled], self.kv[i, 1, :, :, :self.filled] = k, v

    def append(self, i, k, v, positions):
        """One token per row, at its own position (B,). -> keys, values (B, H, filled, d) and mask (B, 1, 1, filled)."""
        self.kv[i, 0, self.rows, :, positions], self.kv[i, 1, self.rows, :, positions] = k[:, :, 0], v[:, :, 0]
        mask = torch.arange(self.filled, device=k.device) <= positions[:, None]
        return self.kv[i, 0, :, :, :self.filled], self.kv[i, 1, :, :, :self.filled], mask[:, None, None]


class SelfAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.d = c.d
        self.q_proj = nn.Linear(c.width, c.heads * c.d, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.width, c.kv_heads * c.d, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.width, c.kv_heads * c.d, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.heads * c.d, c.width, bias=c.out_bias)

    def forward(self, x, rope, cache=None, i=None, positions=None):
        B, T, _ = x.shape
        q, k, v = (w(x).view(B, T, -1, self.d).transpose(1, 2) for w in (self.q_proj, self.k_proj, self.v_proj))
        q, k, mask = rotate(q, *rope), rotate(k, *rope), None
        if cache is not None and positions is not None:
            k, v, mask = cache.append(i, k, v, positions)
        elif cache is not None:
            cache.prefill(i, k, v)
        # Text is right-padded: causality alone keeps real tokens from seeing padding.
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
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

    def forward(self, x, rope, cache=None, i=None, positions=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, i, positions)
        return x + self.mlp(self.post_attention_layernorm(x))


class TokenTable(nn.Module):
    """Token embeddings (or the head's rows). The rows added to the pretrained vocabulary are a parameter of their own,
    so that they can train while the pretrained rows stay frozen; checkpoints hold the two as one table."""

    def __init__(self, vocab, added, width):
        super().__init__()
        self.weight, self.added = nn.Parameter(torch.empty(vocab, width)), nn.Parameter(torch.empty(added, width))

    def forward(self, ids):
        n = len(self.weight)
        added = F.embedding((ids - n).clamp(min=0), self.added)
        return torch.where((ids < n)[..., None], F.embedding(ids.clamp(max=n - 1), self.weight), added)

    def logits(self, x):
        return torch.cat([F.linear(x, self.weight.to(x.dtype)), F.linear(x, self.added.to(x.dtype))], -1)


class LanguageModel(nn.Module):
    """embed_tokens, layers, norm and the head; AudioFlamingo.hidden lets it listen between the blocks."""

    def __init__(self, config, added):
        super().__init__()
        self.config = config
        self.embed_tokens = TokenTable(config.vocab, added, config.width)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.norm = RMSNorm(config.width, config.eps)
        if not config.tied:
            self.lm_head = TokenTable(config.vocab, added, config.width)

    def blocks(self, x, first=0, last=None, listen=None, cache=None, positions=None, recompute=False):
        """x (B, T, D), the stream before block `first` -> that before block `last`, or after all. listen(i, x) is what
        happens to the stream before block i; with a cache, positions (B,) are those of one new token per row."""
        at = torch.arange(x.shape[1], device=x.device) if positions is None else positions[:, None, None]
        rope = rotary_table(at, self.config.d, self.config.rope_theta)

        def layer(i, x):
            return self.layers[i](x if listen is None else listen(i, x), rope, cache, i, positions)

        for i in range(len(self.layers))[first:last]:
            x = checkpoint(layer, i, x, use_reentrant=False) if recompute else layer(i, x)
        return x

    def forward(self, ids, layers=None):
        """The plain language model: ids (B, T) right-padded -> (B, T, D) before the head, after all blocks or `layers`."""
        return self.norm(self.blocks(self.embed_tokens(ids), last=layers))

    def logits(self, x):
        return (self.embed_tokens if self.config.tied else self.lm_head).logits(x)

# ----------------------------------------------------------------------------------------------------------------------
# The whole model

TOKENS = ("<audio>", "<|endofchunk|>", "<|PAD_TOKEN|>", "<SEP>")


def local_or_hub(path, cache_dir, patterns):
    """A folder as it is; org/name from the hub (or its cache, with HF_HUB_OFFLINE=1); else FileNotFoundError."""
    if os.path.isdir(path):
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        from huggingface_hub import snapshot_download
        try:
            return snapshot_download(path, cache_dir=cache_dir, allow_patterns=patterns)
        except Exception as error:  # the hub's client raises many kinds; to the user all of them mean "not there"
            raise FileNotFoundError(f"{path} is not a folder here, and the hub did not give it: "
                                    f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
    raise FileNotFoundError(f"{path}: no such folder, and not a hub id (org/name)")


def load_tokenizer(path, cache_dir=None):
    """The language model's tokenizer with <audio>, <|endofchunk|>, <|PAD_TOKEN|> and, if it has no sep token, <SEP>."""
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(local_or_hub(path, cache_dir, ["*.json", "*.txt", "*.model"]))
    tokenizer.add_tokens(list(TOKENS[:2]), special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": TOKENS[2]})
    if tokenizer.sep_token is None:
        tokenizer.add_special_tokens({"sep_token": TOKENS[3]})
    return tokenizer


def read_safetensors(folder):
    from safetensors.torch import load_file
    files = sorted(glob.glob(os.path.join(folder, "*.safetensors")))
    if not files:
        raise FileNotFoundError(f"{folder}: no *.safetensors here")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


# Names of the published checkpoints (left) and ours (right).
RENAMES = ((r"^clap\.(?:nvclap|afclap)\.", "clap.htsat."),
           (r"^audio_transformer_clap\.", "audio_transformer."),
           (r"^lang_encoder\.model\.layers\.(\d+)\.gated_cross_attn_layer_sound\.", r"xattn.\1."),
           (r"^lang_encoder\.model\.layers\.(\d+)\.decoder_layer\.", r"lm.layers.\1."),
           (r"^lang_encoder\.(?:model\.)?", "lm."))
PUBLISHED = ((r"^clap\.htsat\.", "clap.nvclap."),
             (r"^audio_transformer\.", "audio_transformer_clap."),
             (r"^xattn\.(\d+)\.", r"lang_encoder.model.layers.\1.gated_cross_attn_layer_sound."),
             (r"^lm\.layers\.(\d+)\.", r"lang_encoder.model.layers.\1.decoder_layer."),
             (r"^lm\.lm_head\.", "lang_encoder.lm_head."),
             (r"^lm\.", "lang_encoder.model."))
UNUSED = re.compile(r"old_decoder_blocks\.|gated_cross_attn_layers_sound\.|position_enc\.inv_freq$|rotary_emb\.inv_freq$"
                    r"|\.(spectrogram_extractor|logmel_extractor|tscam_conv|head)\.")


def rename(name, table):
    for pattern, ours in table:
        name, n = re.subn(pattern, ours, name)
        if n:
            break
    return name


def from_published(state, tied, vocab):
    """A published state dict under our names: known-unused tensors dropped (and counted), tables cut at row `vocab`."""
    ours, dropped = {}, []
    for name, tensor in state.items():
        name = rename(name.removeprefix("module."), RENAMES)
        if UNUSED.search(name) or (tied and name.startswith("lm.lm_head.")):
            dropped.append(name)
        elif name in ("lm.embed_tokens.weight", "lm.lm_head.weight"):
            ours[name], ours[name.replace("weight", "added")] = tensor[:vocab], tensor[vocab:]
        else:
            ours[name] = tensor
    if dropped:
        print(f"skipped {len(dropped)} tensors that are duplicates or never used, e.g. {dropped[0]}")
    return ours


def load_strictly(module, state, source, may_lack=()):
    """Load every tensor of state, and every tensor of the module but those in may_lack; ValueError lists all misfits."""
    own = module.state_dict()
    misfits = {"missing": [n for n in own if n not in state and not n.startswith(tuple(may_lack))],
               "unexpected": [n for n in state if n not in own],
               "wrong shape": [f"{n} {tuple(t.shape)} instead of {tuple(own[n].shape)}"
                               for n, t in state.items() if n in own and t.shape != own[n].shape]}
    if any(misfits.values()):
        raise ValueError(f"{source} does not fit the model: " +
                         "; ".join(f"{what}: {', '.join(names)}" for what, names in misfits.items() if names))
    module.load_state_dict(state, strict=False, assign=any(t.is_meta for t in own.values()))


def fingerprint(tensors):
    """A short hash that tells one set of weights from another, from some 256 values of each, rounded to bf16."""
    digest = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        sample = t.detach().flatten()[:: max(1, t.numel() // 256)].float().cpu().to(torch.bfloat16)
        digest.update(f"{name} {tuple(t.shape)}".encode() + sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def infer_sizes(state):
    """The settings that a release directory's weights tell by their shapes (under our names)."""
    count = lambda pattern: len({m[0] for n in state if (m := re.match(pattern, n))})

    def heads(stage):  # a stage without blocks (depth 0) only halves the grid: it has no heads, and 1 does no harm
        table = state.get(f"clap.htsat.layers.{stage}.blocks.0.attn.relative_position_bias_table")
        return 1 if table is None else table.shape[1]

    if "clap.htsat.patch_embed.proj.weight" not in state or "audio_transformer.layer_norm.weight" not in state:
        raise ValueError("this is not an Audio Flamingo 2 release: it holds no clap.nvclap.* or audio_transformer_clap.*")
    return dict(clap_embed_dim=state["clap.htsat.patch_embed.proj.weight"].shape[0],
                clap_depths=[count(rf"clap\.htsat\.layers\.{s}\.blocks\.\d+") for s in range(4)],
                clap_num_heads=[heads(s) for s in range(4)],
                clap_position="clap.htsat.absolute_pos_embed" in state,
                audio_transformer_n_layers=count(r"audio_transformer\.layer_stack\.\d+"),
                audio_transformer_d_inner=state["audio_transformer.layer_stack.0.pos_ffn.w_1.weight"].shape[0],
                cross_attn_every_n_layers=sorted({int(n.split(".")[1]) for n in state if n.startswith("xattn.")}))


def newest_checkpoint(run):
    """The interim checkpoint of a run if there is one (it is newer than any epoch's), else that of the last epoch."""
    interim = os.path.join(run, "checkpoint_interim.pt")
    if os.path.exists(interim):
        return interim
    names = os.listdir(run) if os.path.isdir(run) else []
    epochs = [int(m[1]) for name in names if (m := re.fullmatch(r"checkpoint_(\d+)\.pt", name))]
    return os.path.join(run, f"checkpoint_{max(epochs)}.pt") if epochs else None


def gated_blocks(every, layers):
    """Indices of the blocks with cross-attention before them, from a stride or a list."""
    blocks = [i for i in range(layers) if (i + 1) % every == 0] if isinstance(every, int) else list(every)
    if not blocks or not all(isinstance(i, int) and 0 <= i < layers for i in blocks):
        raise ValueError(f"cross_attn_every_n_layers = {every!r} names no block, or one outside 0...{layers - 1}")
    return blocks


class AudioFlamingo(nn.Module):
    def __init__(self, config):
        """Modules and tokenizer from the settings (config/defaults.py). Language-model weights stay on the meta device
        until from_config or from_pretrained loads them."""
        super().__init__()
        c = self.config = config
        self.tokenizer = load_tokenizer(c.tokenizer_path or c.lang_encoder_path, c.cache_dir)
        self.audio_id, self.end_id = self.tokenizer.convert_tokens_to_ids(list(TOKENS[:2]))
        self.pad_id, self.sep_id = self.tokenizer.pad_token_id, self.tokenizer.sep_token_id
        self.stop_ids = [self.end_id, self.tokenizer.eos_token_id]
        lm = lm_config(c.lang_encoder_path, c.cache_dir)
        lm.vocab = self.audio_id  # rows before <audio> are the language model's, the few from it on are ours
        with torch.device("meta"):
            self.lm = LanguageModel(lm, added=len(self.tokenizer) - self.audio_id)
        self.clap = ClapEncoder(c.clap_embed_dim, c.clap_depths, c.clap_num_heads, c.clap_spec_size, c.clap_position)
        width = self.clap.width
        self.audio_transformer = AudioTransformer(width, c.audio_transformer_n_head, c.audio_transformer_n_layers,
                                                  c.audio_transformer_d_inner)
        self.xattn = nn.ModuleDict({str(i): GatedCrossAttention(lm.width, width)
                                    for i in gated_blocks(c.cross_attn_every_n_layers, lm.layers)})
        self.backend, self.texts = c.attention_backend, {}

    # --- listening and reading

    def listen(self, windows, n_windows):
        """windows (sum W, L) float32 (or int16), n_windows (B,) -> audio tokens (B, S, C), n_keys (B,) of real ones."""
        if windows.dtype == torch.int16:
            windows = windows.float() / 32767
        tokens = torch.cat([self.clap(part) for part in windows.split(64)])  # real windows only; (sum W, 64, C)
        slots = torch.arange(int(n_windows.max()), device=tokens.device) < n_windows.to(tokens.device)[:, None]
        audio = tokens.new_zeros(*slots.shape, *tokens.shape[1:])
        audio[slots] = tokens
        n_keys = slots.sum(1) * self.clap.tokens_per_window
        return self.audio_transformer(audio.flatten(1, 2), n_keys), n_keys

    def keys_values(self, audio):
        """audio (B, S, C) -> {block: (B, S, 2, H, d)} for all gated blocks, in one product."""
        blocks = [int(i) for i in self.xattn]
        kv = F.linear(audio, torch.cat([x.attn.to_kv.weight for x in self.xattn.values()]))
        some = self.xattn[str(blocks[0])]
        return dict(zip(blocks, kv.view(*audio.shape[:2], len(blocks), 2, some.heads, some.d).unbind(2)))

    def hidden(self, ids, audio, n_keys, kv=None, cache=None, positions=None):
        """ids (B, T) -> (B, T, D) before the head. audio: tokens of listen, or kv: the keys and values made from them."""
        def listen(i, x):
            if str(i) not in self.xattn:
                return x
            gated = self.xattn[str(i)]
            return gated(x, gated.keys_values(audio) if kv is None else kv[i], n_keys, self.backend)

        first, x = self.text_states(ids) if self.training and self.config.cache_text else (0, self.lm.embed_tokens(ids))
        recompute = self.training and self.config.gradient_checkpointing
        return self.lm.norm(self.lm.blocks(x, first, None, listen, cache, positions, recompute))

    @torch.no_grad()
    def text_states(self, ids):
        """ids (B, T) -> the first gated block, and the stream (B, T, D) before it, which depends on the text alone: the
        frozen blocks up to there run once for every text (cache_text)."""
        first = min(map(int, self.xattn))
        texts = [tuple(row[row != self.pad_id].tolist()) for row in ids]
        if new := [b for b, text in enumerate(texts) if text not in self.texts]:
            x = self.lm.blocks(self.lm.embed_tokens(ids[new]), last=first)
            self.texts.update((texts[b], states[:len(texts[b])].clone()) for b, states in zip(new, x))
        kept = self.texts[texts[0]].new_zeros(*ids.shape, self.lm.config.width)
        for row, text in zip(kept, texts):
            row[:len(text)] = self.texts[text]
        return first, kept

    def forward(self, input_ids, windows, n_windows, labels=None):
        """input_ids (B, T) right-padded; windows (sum W, L); n_windows (B,); labels (B, T) unshifted, -100 ignored.
        -> logits (B, T, V) and no loss, or no logits and the mean loss over the labelled tokens: with labels the
        head runs at the positions before labelled tokens alone (V = 151,669 makes the rest expensive)."""
        x = self.hidden(input_ids, *self.listen(windows, n_windows))
        if labels is None:
            return self.lm.logits(x), None
        kept = labels[:, 1:] != -100
        logits = self.lm.logits(x[:, :-1][kept]).float()
        return None, F.cross_entropy(logits, labels[:, 1:][kept], reduction="sum") / max(len(logits), 1)

    # --- answering

    def prompt_ids(self, prompt):
        return self.tokenizer(f"<audio>{prompt.strip().lower()}{self.tokenizer.sep_token}")["input_ids"]

    @torch.inference_mode()
    def stream(self, prompts, windows, n_windows, max_new_tokens=256, temperature=0.0, top_k=None, top_p=None, seed=0):
        """The same as generate, as a Python generator of one (B,) tensor of token ids per step; -1 in finished rows."""
        if len(prompts) != len(n_windows) or int(n_windows.sum()) != len(windows):
            raise ValueError(f"{len(prompts)} prompts, {len(n_windows)} clips and {len(windows)} windows (of "
                             f"{int(n_windows.sum())} announced) do not belong together")
        device, was_training = self.lm.norm.weight.device, self.training
        self.eval()
        rows = [self.prompt_ids(p) for p in prompts]
        lengths = torch.tensor([len(r) for r in rows], device=device)
        T = max(map(len, rows))
        ids = torch.tensor([r + [self.pad_id] * (T - len(r)) for r in rows], device=device)
        audio, n_keys = self.listen(windows.to(device), n_windows)
        kv = self.keys_values(audio)  # once, not at every token
        cache = KVCache(self.lm, len(rows), T + max_new_tokens, device, kv[min(kv)].dtype)
        noise = torch.Generator().manual_seed(seed)
        stops = torch.tensor(self.stop_ids, device=device)
        done = torch.zeros(len(rows), dtype=torch.bool, device=device)
        x = self.hidden(ids, None, n_keys, kv, cache)[torch.arange(len(rows)), lengths - 1]  # (B, D)
        try:
            for step in range(max_new_tokens):
                token = pick(self.lm.logits(x).float(), temperature, top_k, top_p, noise)
                done = done | torch.isin(token, stops)
                yield token.masked_fill(done, -1)
                if step + 1 == max_new_tokens or done.all():
                    break
                cache.filled += 1
                x = self.hidden(token[:, None], None, n_keys, kv, cache, positions=lengths + step)[:, 0]
        finally:  # also when the reader stops early
            self.train(was_training)

    def generate(self, prompts, windows, n_windows, max_new_tokens=256, temperature=0.0, top_k=None, top_p=None, seed=0):
        """prompts: B strings as in a manifest; windows (sum W, L) and n_windows (B,) of their clips -> B strings.
        Greedy at temperature 0. An answer does not depend on the rest of the batch, sampled ones included."""
        steps = list(self.stream(prompts, windows, n_windows, max_new_tokens, temperature, top_k, top_p, seed))
        rows = torch.stack(steps, 1).tolist() if steps else [[] for _ in prompts]
        return [self.tokenizer.decode([t for t in row if t >= 0], skip_special_tokens=True) for row in rows]

    # --- training

    def set_trainable(self, config):
        """Freeze everything, then free the parts of model.md's stages. -> a table part / parameters / trainable."""
        self.requires_grad_(False)
        assert not any(p.requires_grad for p in self.parameters())
        tables = [self.lm.embed_tokens] + ([] if self.lm.config.tied else [self.lm.lm_head])
        parts = {"audio encoder (CLAP)": [self.clap], "audio transformer": [self.audio_transformer],
                 "gated cross-attention": list(self.xattn.values()), "embeddings and head": tables,
                 "language-model blocks": [self.lm.layers, self.lm.norm]}
        if config.freeze_lm_embeddings not in (True, False, "added"):
            raise ValueError(f"freeze_lm_embeddings = {config.freeze_lm_embeddings!r}, expected True, False or 'added'")
        if config.cache_text and (config.freeze_lm_embeddings is not True or config.unfreeze_full_lm):
            raise ValueError("cache_text keeps what frozen blocks make of a text: expected freeze_lm_embeddings = True and "
                             "unfreeze_full_lm = False")
        self.audio_transformer.requires_grad_(True)
        self.xattn.requires_grad_(True)
        if config.freeze_lm_embeddings is False:
            self.lm.embed_tokens.requires_grad_(True)  # a tied head follows; one of its own stays frozen
        if config.freeze_lm_embeddings == "added":
            for table in tables:
                table.added.requires_grad_(True)
        if config.unfreeze_full_lm:
            self.lm.requires_grad_(True)
        if config.clap_finetune:
            for name, p in self.clap.named_parameters():  # the fusion branch is not used: no gradient would come
                p.requires_grad_("mel_conv2d" not in name and "fusion_model" not in name)
        count = lambda modules, free: sum(p.numel() for m in modules for p in m.parameters() if p.requires_grad or not free)
        rows = [f"{part:24} {count(m, False):15,} {count(m, True):15,}" for part, m in parts.items()]
        return "\n".join([f"{'part':24} {'parameters':>15} {'trainable':>15}"] + rows)

    def cast(self, frozen, trained=torch.float32):
        """Frozen weights to one dtype, trained ones to another. BatchNorm's statistics stay float32."""
        for module in self.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    p.data = p.data.to(trained if p.requires_grad else frozen)
            for name, b in module._buffers.items():
                if b is not None and b.is_floating_point():
                    module._buffers[name] = b.to(trained if self.clap_trains() else frozen)
        self.clap.htsat.bn0.float()
        return self

    def clap_trains(self):
        return any(p.requires_grad for p in self.clap.parameters())

    def train(self, mode=True):
        super().train(mode)
        self.clap.train(mode and self.clap_trains())  # no drop path, no SpecAugment, no BatchNorm update when frozen
        return self

    # --- loading and saving

    @classmethod
    def from_config(cls, config):
        """The start of a training run: pretrained language model, CLAP from clap_checkpoint, the rest random."""
        model = cls(config)
        model.load_language_model(local_or_hub(config.lang_encoder_path, config.cache_dir, ["*.safetensors", "*.json"]))
        if config.clap_checkpoint:
            model.load_clap(config.clap_checkpoint)
        return model

    @classmethod
    def from_pretrained(cls, path, lang_encoder_path=None, device="cpu", dtype=torch.float32, **settings):
        """path: a run directory, a checkpoint_<epoch>.pt, a release directory or a hub id. settings override the saved
        ones. A checkpoint holds trained weights only: the frozen ones come from where its run took them."""
        from config import defaults
        if lang_encoder_path:
            settings["lang_encoder_path"] = lang_encoder_path
        if unknown := set(settings) - set(defaults()):
            raise ValueError(f"from_pretrained: unknown setting {', '.join(sorted(unknown))}")
        if not os.path.isfile(path):
            path = local_or_hub(path, settings.get("cache_dir"), ["safe_ckpt/*", "clap_ckpt/*", "*.json", "lm/*"])
            if not os.path.exists(os.path.join(path, "safe_ckpt/metadata.json")):
                if (checkpoint_file := newest_checkpoint(path)) is None:
                    raise FileNotFoundError(f"{path}: neither checkpoint_<epoch>.pt nor safe_ckpt/metadata.json in it")
                path = checkpoint_file
        load = cls._from_checkpoint if os.path.isfile(path) else cls._from_release
        model = load(path, defaults(), settings)
        return model.requires_grad_(False).cast(dtype).to(device).eval()

    @classmethod
    def _from_checkpoint(cls, path, base, settings):
        saved = load_pickle(path)
        if "model_state_dict" not in saved:
            raise ValueError(f"{path}: no model_state_dict in it; is it a training checkpoint?")
        config = SimpleNamespace(**(base | saved.get("config", {}) | settings))
        if config.pretrained_path:
            start = os.path.join(config.pretrained_path, config.pretrained_ckpt or "").rstrip("/")
            model = cls.from_pretrained(start, **settings)  # that run knows where its own frozen weights came from
            model.config = config
        else:
            model = cls.from_config(config)
        own = model.state_dict()
        frozen = {n: own[n] for n in own if n not in saved["kept"]} if "kept" in saved else {}
        if saved.get("frozen_hash", fingerprint(frozen)) != fingerprint(frozen):
            raise ValueError(f"{path}: the frozen weights it was trained with are not those found now under "
                             f"{saved['frozen_from']}")
        model.load_trained(saved, path)
        return model

    def load_trained(self, saved, path):
        """Copy a training checkpoint's tensors in: ours say what they keep; published ones may lack LM and CLAP."""
        state = from_published(saved["model_state_dict"], self.lm.config.tied, self.lm.config.vocab)
        own = self.state_dict()
        lacking = [n for n in own if n not in saved["kept"]] if "kept" in saved else ("lm.", "clap.")
        load_strictly(self, {n: t.to(own[n].dtype) if n in own else t for n, t in state.items()}, path, lacking)

    @classmethod
    def _from_release(cls, path, base, settings):
        metadata = json.load(open(os.path.join(path, "safe_ckpt/metadata.json")))
        state = read_safetensors(os.path.join(path, "safe_ckpt"))
        if absent := [k for keys in metadata.values() for k in keys if k not in state]:
            raise ValueError(f"{path}/safe_ckpt: tensors named in metadata.json are missing: {', '.join(absent)}")
        inferred = infer_sizes({rename(n, RENAMES): t for n, t in state.items()})
        lm_folder = os.path.join(path, "lm")  # save_pretrained puts config and tokenizer there
        found = {"lang_encoder_path": lm_folder} if os.path.isdir(lm_folder) else {}
        own = os.path.join(path, "config.json")
        saved = json.load(open(own)) if os.path.exists(own) else {}
        saved = {name: value for name, value in saved.items() if name in base}
        model = cls(SimpleNamespace(**(base | inferred | saved | found | settings)))
        load_strictly(model, from_published(state, model.lm.config.tied, model.lm.config.vocab), f"{path}/safe_ckpt")
        return model

    def load_language_model(self, folder):
        """Every weight of a Hugging Face directory. The rows of our added tokens, all of them marks between texts, start
        around the row of its own such mark, eos: a frozen language model knows where that belongs."""
        state = {n.removeprefix("model."): t for n, t in read_safetensors(folder).items() if not UNUSED.search(n)}
        vocab, added = self.lm.config.vocab, len(self.lm.embed_tokens.added)
        if self.lm.config.tied:
            state.pop("lm_head.weight", None)
        for table in ("embed_tokens.weight", "lm_head.weight"):
            if table in state:
                rows = state[table]
                if len(rows) < vocab:
                    raise ValueError(f"{folder}: {table} has {len(rows)} rows, its tokenizer {vocab} tokens")
                near, noise = rows[self.tokenizer.eos_token_id].float(), torch.randn(added, rows.shape[1])
                state[table] = rows[:vocab]
                state[table.replace("weight", "added")] = near + 0.5 * rows[:vocab].float().std(0) * noise
        load_strictly(self.lm, state, folder)

    def load_clap(self, file):
        """CLAP training checkpoint: {"state_dict": {"module.audio_branch.*", "module.text_branch.*", ...}}."""
        saved = load_pickle(file)
        prefix = "module.audio_branch."
        state = {n.removeprefix(prefix): t for n, t in saved.get("state_dict", {}).items() if n.startswith(prefix)}
        if not state:
            raise ValueError(f"{file}: no module.audio_branch.* in its state_dict")
        load_strictly(self.clap.htsat, {n: t for n, t in state.items() if not UNUSED.search(f".{n}")}, file)

    def published_state(self, names=None):
        """{published name: tensor} of all parameters and buffers, or of those in names; token tables in one piece."""
        own, state = self.state_dict(), {}
        for name, tensor in own.items():
            whole = name.replace(".added", ".weight")
            if names is not None and name not in names or (name != whole and (names is None or whole in names)):
                continue
            if name.replace(".weight", ".added") != name and name.replace(".weight", ".added") in own:
                tensor = torch.cat([tensor, own[name.replace(".weight", ".added")].to(tensor.dtype)])
            state[rename(name, PUBLISHED)] = tensor
        return state

    def save_pretrained(self, folder):
        """The release layout (safe_ckpt/, clap_ckpt/epoch_16.pt), with our config.json and lm/ (config, tokenizer)."""
        from safetensors.torch import save_file
        state = {n: t.detach().cpu().contiguous() for n, t in self.published_state().items()}
        if self.lm.config.tied:
            state["lang_encoder.lm_head.weight"] = state["lang_encoder.model.embed_tokens.weight"].clone()
        r = self.audio_transformer.rotary_dim
        state["audio_transformer_clap.position_enc.inv_freq"] = 4096.0 ** (-torch.arange(0, r, 2).float() / r)
        shards, size = [{}], 0
        for name, tensor in state.items():
            if size > 4e9:
                shards.append({})
                size = 0
            shards[-1][name] = tensor
            size += tensor.numel() * tensor.element_size()
        for sub in ("safe_ckpt", "clap_ckpt", "lm"):
            os.makedirs(os.path.join(folder, sub), exist_ok=True)
        for i, shard in enumerate(shards):
            save_file(shard, os.path.join(folder, f"safe_ckpt/weight_{i}.safetensors"))
        clap = {"module.audio_branch." + n: t.cpu() for n, t in self.clap.htsat.state_dict().items()}
        save_atomically({"epoch": 16, "state_dict": clap}, os.path.join(folder, "clap_ckpt/epoch_16.pt"))
        from transformers import AutoConfig
        AutoConfig.from_pretrained(local_or_hub(self.config.lang_encoder_path, self.config.cache_dir, "*.json")
                                   ).save_pretrained(os.path.join(folder, "lm"))
        self.tokenizer.save_pretrained(os.path.join(folder, "lm"))
        from config import model_settings
        for name, content in (("config.json", model_settings(self.config, only_given=False)),
                              ("safe_ckpt/metadata.json", {f"weight_{i}": list(s) for i, s in enumerate(shards)})):
            with open(os.path.join(folder, name), "w") as f:
                json.dump(content, f, indent=1)


def pick_device(name="auto"):
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device = {name!r}, expected auto, cpu, cuda or cuda:<n>") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device = {name!r}, but no CUDA device is available here")
    return device


def pick_precision(precision, device):
    """-> (dtype of products and frozen weights, reason). bf16 where the hardware multiplies it faster than float32."""
    if precision not in ("amp_bf16", "fp32"):
        raise ValueError(f"precision = {precision!r}, expected amp_bf16 or fp32")
    if precision == "fp32":
        return torch.float32, "asked for"
    if device.type == "cpu" and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.float32, "this processor has no bf16 units, emulated bf16 is 5 times slower"
    return torch.bfloat16, "amp_bf16"


def load_pickle(path):
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and storage errors alike: the file is not what it should be
        raise ValueError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0]})") from error


def save_atomically(content, path):
    """torch.save that leaves either the old file or the new one, also when the machine dies in between."""
    with open(path + ".tmp", "wb") as f:
        torch.save(content, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def pick(logits, temperature, top_k, top_p, generator):
    """logits (B, V) float32 -> token ids (B,). Sampling adds one Gumbel noise vector to every row (argmax of
    logits + Gumbel noise is a draw from the softmax), so a row's answer does not depend on the others."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[1])).values[:, -1:], -math.inf)
    if top_p:
        ordered, index = logits.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # the first token is always kept
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, index, beyond), -math.inf)
    uniform = torch.rand(logits.shape[1], generator=generator).clamp(min=1e-20).to(logits.device)
    return (logits - (-uniform.log()).log()).argmax(-1)
