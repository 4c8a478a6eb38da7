"""Audio Flamingo 2: a frozen language model that attends to audio through gated cross-attention.

    audio -> windows -> log-mel -> CLAP (HTS-AT) -> 64 tokens a window -> audio transformer -> keys, values
    text -> embeddings -> [gated cross-attention over the audio -> language model block] x layers -> logits

    from model import AudioFlamingo
    model = AudioFlamingo.from_pretrained("exp/sft")            # a run, a checkpoint, a release, a hub id
    model.generate(["What is happening?"], windows, n_windows)  # data.load_audio(path, **model.audio_config)

Shapes: B texts, W windows, S audio tokens of a clip (64 per window; (clap_spec_size/32)^2 in general), T text
tokens, D language-model width, C audio width, V vocabulary, H heads of d channels. Paper: arXiv 2503.03983.

Read from the top; AudioFlamingo.forward_hidden is the idea in ten lines. The Triton kernels, which compute
what naive_attention spells out, stand last. Nothing here opens a file: checkpoint.py does.
"""
import math
import sys
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tools.checkpoint.htsat import FRONT_END, UserError, load_htsat_class, sample_rate_of_mel

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # naive and sdpa do not need it; the kernels below stay plain functions
    triton = SimpleNamespace(jit=lambda f: f, __version__=None)
    tl = SimpleNamespace(constexpr=None)

SAMPLE_RATE = 16000  # Hz, of CLAP; another encoder may have its own
AUDIO_SETTINGS = ("window_length", "window_overlap", "max_num_window")  # how a clip is cut into windows
SPECIAL_TOKENS = ("<audio>", "<|endofchunk|>", "<|PAD_TOKEN|>", "<SEP>")  # in the published order

# ------------------------------------------------------------------------------------------------------------
# From samples to log-mel


def to_float(windows):
    """int16 windows, as data.load_audio returns them, -> float32 in [-1, 1]; float32 windows stay."""
    return windows.float() / 32767 if windows.dtype == torch.int16 else windows


@lru_cache
def mel_bands(device, sample_rate=SAMPLE_RATE, top=8000):
    """(513, 64): triangles of 64 HTK mel bands over 50...top Hz, without area normalisation."""
    from transformers.audio_utils import mel_filter_bank
    bands = mel_filter_bank(513, 64, 50, top, sample_rate, mel_scale="htk")
    return torch.from_numpy(bands).float().to(device)


def log_mel(windows, sample_rate=SAMPLE_RATE, mel=None):
    """windows (n, L) float32 in [-1, 1] -> (n, 1 + L // hop, 64) float32, dB of power; mel: (513, 64)."""
    hop = sample_rate // 100  # 10 ms
    hann = torch.hann_window(1024, device=windows.device)
    mel = mel_bands(windows.device) if mel is None else mel
    with torch.autocast(windows.device.type, enabled=False):
        spectrum = torch.stft(windows, 1024, hop, window=hann, pad_mode="reflect", return_complex=True)
        power = spectrum.real.square() + spectrum.imag.square()
        return 10 * torch.log10((power.mT @ mel).clamp(min=1e-10))


# ------------------------------------------------------------------------------------------------------------
# The audio encoder. AudioFlamingo takes any module with these members:
#     width, tokens_per_window   C, and tokens of a window
#     sample_rate                Hz
#     forward(windows)           (n, L) float32 -> (n, tokens_per_window, C)
#     trainable()                the parameters that clap_finetune unfreezes
#     flops(n)                   operations of a forward pass over n windows, for the MFU
# Ours is CLAP: HTS-AT of the package laion-clap.


class ClapEncoder(nn.Module):
    """windows (n, L) -> (n, S, C): tokens before HTS-AT's pooling; S = (spec_size/32)^2, C = 8 embed_dim."""
    frequency_bins = 2  # of a window's tokens: token = bin * (S/2) + time step

    def __init__(self, embed_dim, depths, num_heads, spec_size=256, position=False, augment=True, mel=None,
                 fusion=True):
        """position: HTS-AT's absolute position embedding (published: none); augment: drop path and
        SpecAugment; mel: (513, 64) mel bands other than AF-CLAP's, from which the sample rate is inferred;
        fusion: whether HTS-AT is built with CLAP's feature-fusion branch (needed to load such checkpoints;
        never run)."""
        super().__init__()
        self.htsat = load_htsat_class()(
            spec_size=spec_size, patch_size=4, patch_stride=(4, 4), embed_dim=embed_dim, depths=depths,
            num_heads=num_heads, window_size=8, config=FRONT_END, ape=position, enable_fusion=fusion,
            fusion_type="aff_2d" if fusion else "None", drop_path_rate=0.1 if augment else 0.0)
        for unused in ("spectrogram_extractor", "logmel_extractor", "tscam_conv", "head"):
            delattr(self.htsat, unused)  # its own waveform front end and AudioSet classifier
        if position:  # as large as the patch embeddings beside it, so that it matters from the first step on
            nn.init.normal_(self.htsat.absolute_pos_embed, std=0.5)
        share = (spec_size / 256) ** 2  # of a 10 s window: mask the same part of a shorter one
        self.htsat.spec_augmenter.time_dropper.drop_width = max(1, round(64 * share))
        self.register_buffer("mel", mel)
        self.sample_rate = sample_rate_of_mel(mel)
        self.augment = augment
        self.gradient_checkpointing = False
        self.width = 8 * embed_dim
        self.tokens_per_window = (spec_size // 32) ** 2
        self.max_frames = spec_size * (spec_size // 64)

    def forward(self, windows):
        return self.encode(log_mel(windows, self.sample_rate, self.mel))

    def encode(self, mel):
        """mel (n, frames, 64), from log_mel -> (n, S, C). UserError if a window is too long for spec_size."""
        h = self.htsat
        if mel.shape[1] > self.max_frames:
            raise UserError(f"window_length: {mel.shape[1]} frames of 10 ms, expected at most "
                            f"{self.max_frames} with this clap_spec_size")
        x = h.bn0(mel.transpose(1, 2)[..., None]).permute(0, 3, 2, 1)  # per mel band; (n, 1, frames, 64)
        if self.training and self.augment:
            x = h.spec_augmenter(x)
        x = h.reshape_wav2img(x).to(h.norm.weight.dtype)  # (n, 1, spec_size, spec_size): time parts as rows
        # A window is CLAP's own length, never "longer": the fusion branch (local mel crops) is not used.
        x = h.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = h.patch_embed.norm(x)  # (n, (spec_size/4)^2, embed_dim)
        if h.ape:
            x = x + h.absolute_pos_embed.to(x.dtype)
        recompute = self.training and self.gradient_checkpointing
        for layer in h.layers:
            for block in layer.blocks:
                x = gradient_checkpoint(swin_block, block, x) if recompute else swin_block(block, x)
            if layer.downsample is not None:
                x = layer.downsample(x)
        x = h.norm(x)  # (n, S, C), a grid of (time parts x 2 frequency bins) rows and sqrt(S) columns in time
        n, S, C = x.shape
        x = x.view(n, h.freq_ratio, -1, math.isqrt(S), C)  # (n, time part, frequency bin, column, C)
        return x.transpose(1, 2).reshape(n, S, C)  # token = bin * (S/2) + time step

    def trainable(self):
        """All parameters but those of the fusion branch, which would get no gradient."""
        fusion = ("mel_conv2d", "fusion_model")
        return [p for name, p in self.named_parameters() if not any(part in name for part in fusion)]

    def flops(self, n):
        """Of the blocks' matrices and the attention inside their windows; downsampling adds a percent."""
        total = 0
        for stage in self.htsat.layers:
            for block in stage.blocks:
                attention = 2 * block.window_size ** 2 * block.dim  # multiply-adds of a patch: q k^T and p v
                total += block.input_resolution[0] ** 2 * (matrix_sizes(block) + attention)
        return 2 * n * total


def attention(q, k, v, mask=None, causal=False):
    """softmax(q k^T / sqrt(d) + mask) v by SDPA. q (B, H, T, d); k, v (B, H_kv, N, d), where H_kv divides H
    (GQA); mask: bool, True where a query attends to a key, or float, added to the scores."""
    if q.device.type == "cpu" and q.dtype is torch.bfloat16 and torch.is_grad_enabled():
        # the backward of a CPU's SDPA takes five to ten times as long in bfloat16 as in float32
        with torch.autocast("cpu", enabled=False):
            return attention(q.float(), k.float(), v.float(), mask, causal).to(q.dtype)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=gqa)


def swin_block(block, x):
    """A Swin block of HTS-AT, x (n, L, C), by SDPA: its own forward, which keeps score matrices, takes three
    times as long on a CPU."""
    n, L, C = x.shape
    side = block.input_resolution[0]
    w = block.window_size
    shift = block.shift_size
    attn = block.attn
    htsat = sys.modules[block.__module__]
    grid = block.norm1(x).view(n, side, side, C).roll((-shift, -shift), (1, 2))
    tiles = htsat.window_partition(grid, w).flatten(1, 2)  # (n windows, w^2 patches, C)
    q, k, v = attn.qkv(tiles).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    bias = attn.relative_position_bias_table[attn.relative_position_index].permute(2, 0, 1)[None]
    if shift:  # mask between patches that are adjacent only because of the cyclic shift
        bias = (bias + block.attn_mask[:, None]).repeat(n, 1, 1, 1)
    y = attn.proj(attention(q, k, v, mask=bias).transpose(1, 2).flatten(2))
    y = htsat.window_reverse(y.unflatten(1, (w, w)), w, side, side)
    x = x + block.drop_path(y.roll((shift, shift), (1, 2)).view(n, L, C))
    return x + block.drop_path(block.mlp(block.norm2(x)))


def matrix_sizes(module):
    """Numbers in a module's matrices: each is multiplied and added once per token."""
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)


# (module or function, *args): activations inside are not kept but recomputed in the backward pass
gradient_checkpoint = partial(checkpoint, use_reentrant=False)

# ------------------------------------------------------------------------------------------------------------
# RoPE: rotate the pairs (i, i + r/2) of the first r channels by position * base^(-2i/r)


def rope_table(positions, r, base, llama3=None):
    """positions (..., T) -> cos and signed sin (..., T, r) float32; llama3: see llama3_frequencies."""
    frequency = base ** (-torch.arange(0, r, 2, device=positions.device, dtype=torch.float32) / r)
    if llama3:
        frequency = llama3_frequencies(frequency, **llama3)
    angle = positions[..., None].float() * frequency
    cos = angle.cos()
    sin = angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def llama3_frequencies(frequency, factor, low_freq_factor, high_freq_factor,
                       original_max_position_embeddings):
    """The RoPE scaling of Llama 3.1 (rope_type "llama3", arXiv 2407.21783) for texts longer than it was first
    trained on: frequencies with at least high_freq_factor turns over the original length stay, those with at
    most low_freq_factor turns are divided by `factor`, those between are interpolated."""
    turns = original_max_position_embeddings * frequency / (2 * math.pi)
    keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return keep * frequency + (1 - keep) * frequency / factor


def rotate(x, cos, sin):
    """x (B, H, T, d); cos, sin (T, r) or (B, 1, T, r), r <= d: the other channels pass through."""
    r = cos.shape[-1]
    head = x[..., :r]
    # the tables are float32, and so is (or float64) the arithmetic, whatever x is
    head = torch.addcmul(head * cos, head.roll(r // 2, -1), sin).to(x.dtype)
    return head if r == x.shape[-1] else torch.cat([head, x[..., r:]], -1)


# ------------------------------------------------------------------------------------------------------------
# Audio transformer: mixes the tokens of all windows of a clip


class AudioAttention(nn.Module):
    def __init__(self, width, n_head):
        super().__init__()
        self.n_head = n_head
        self.w_qs = nn.Linear(width, width, bias=False)
        self.w_ks = nn.Linear(width, width, bias=False)
        self.w_vs = nn.Linear(width, width, bias=False)
        self.fc = nn.Linear(width, width, bias=False)
        self.layer_norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x, rope, mask):
        projections = self.w_qs, self.w_ks, self.w_vs
        q, k, v = (w(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2) for w in projections)  # (B, H, S, d)
        o = attention(rotate(q, *rope), rotate(k, *rope), v, mask)
        return self.layer_norm(x + self.fc(o.transpose(1, 2).flatten(2)))


class AudioFeedForward(nn.Module):
    def __init__(self, width, d_inner):
        super().__init__()
        self.w_1 = nn.Linear(width, d_inner)
        self.w_2 = nn.Linear(d_inner, width)
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
            attn = AudioAttention(width, n_head)
            feed_forward = AudioFeedForward(width, d_inner)
            nn.init.zeros_(attn.fc.weight)  # each layer starts as the identity (up to norms): random mixing
            nn.init.zeros_(feed_forward.w_2.weight)  # would hide the content of CLAP's tokens
            self.layer_stack.append(nn.ModuleDict({"slf_attn": attn, "pos_ffn": feed_forward}))
        d = width // n_head
        self.rotary_dim = min(d, max(d // 2, 32))
        self.scale = math.sqrt(width)

    def forward(self, x, n_keys):
        positions = torch.arange(x.shape[1], device=x.device)
        rope = rope_table(positions, self.rotary_dim, base=4096)
        mask = key_mask(n_keys, x.shape[1])
        x = self.layer_norm(self.scale * x)
        for layer in self.layer_stack:  # post-norm, as the published audio transformer
            x = layer.slf_attn(x, rope, mask)
            x = layer.pos_ffn(x)
        return x


# ------------------------------------------------------------------------------------------------------------
# Gated cross-attention: y = tanh(gate) softmax(q k^T / sqrt(d)) v, the readable spec first


def key_mask(n_keys, N):
    """n_keys (B,) or (B, T) -> bool (B, 1, 1 or T, N), True where the token attends to the key."""
    n_keys = n_keys[:, None] if n_keys.ndim == 1 else n_keys
    return (torch.arange(N, device=n_keys.device) < n_keys[..., None])[:, None]


def naive_attention(q, k, v, n_keys, gate):
    scores = torch.einsum("bthd,bnhd->bhtn", q, k) / math.sqrt(q.shape[-1])  # (B, H, T, N)
    mask = key_mask(n_keys, k.shape[1])
    # the smallest finite number, not -inf: a row without keys becomes uniform, then zero, and never NaN
    p = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) * mask
    o = torch.einsum("bhtn,bnhd->bthd", p, v)  # (B, T, H, d)
    return (gate.tanh() * o).to(q.dtype)


def sdpa_attention(q, k, v, n_keys, gate):
    # a row without keys attends to key 0, then is multiplied by 0: no kernel of SDPA gets an empty softmax
    mask = key_mask(n_keys.clamp(min=1), k.shape[1])
    has_keys = key_mask(n_keys, 1).transpose(1, 2)  # (B, 1 or T, 1, 1)
    o = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
    return (gate.tanh() * has_keys * o.transpose(1, 2)).to(q.dtype)


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
    ValueError for shapes or dtypes that do not fit, UserError for a backend that cannot run here.
    """
    B, T, H, d = q.shape
    kv_shape = (B, k.shape[1], H, d)
    if k.shape != kv_shape or v.shape != kv_shape or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"expected q (B, T, H, d), k and v (B, N, H, d) of one dtype, got {list(q.shape)} "
                         f"{q.dtype}, {list(k.shape)} {k.dtype}, {list(v.shape)} {v.dtype}")
    if n_keys.shape not in ((B,), (B, T)) or n_keys.is_floating_point():
        raise ValueError(f"n_keys: expected integers (B,) or (B, T), got {list(n_keys.shape)} {n_keys.dtype}")
    if backend == "auto":
        backend, _ = pick_backend(q.device)
    if backend not in BACKENDS:
        raise UserError(f"attention_backend = {backend!r}: expected auto, {', '.join(BACKENDS)}")
    return BACKENDS[backend](q, k, v, n_keys, gate)


class GatedCrossAttention(nn.Module):
    """x <- x + tanh(attn_gate) Attn(LN(x), audio); x <- x + tanh(ff_gate) FF(x); before a block of the LM."""

    def __init__(self, width, audio_width, heads=8, d=64):
        super().__init__()
        self.heads = heads
        self.d = d
        self.attn = nn.ModuleDict({
            "norm": nn.LayerNorm(width),
            "to_q": nn.Linear(width, heads * d, bias=False),
            "to_kv": nn.Linear(audio_width, 2 * heads * d, bias=False),
            "to_out": nn.Linear(heads * d, width, bias=False)})
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False))
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def keys_values(self, audio):
        """audio (B, S, C) -> (B, S, 2, H, d). It depends on the audio alone: computed once per request and
        reused at every decoding step."""
        kv = self.attn.to_kv(audio).unflatten(-1, (2, self.heads, self.d))
        if not torch.is_grad_enabled():  # a decoding step reads head by head: contiguous in that order
            kv = kv.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4)
        return kv

    def forward(self, x, kv, n_keys, backend="auto"):
        """x (B, T, D), kv (B, S, 2, H, d) of keys_values, n_keys (B,) or (B, T) -> (B, T, D)."""
        q = self.attn.to_q(self.attn.norm(x)).unflatten(-1, (self.heads, self.d))  # (B, T, 8, 64)
        y = gated_cross_attention(q, *kv.unbind(2), n_keys, self.attn_gate, backend)
        x = x + self.attn.to_out(y.flatten(2))
        return x + self.ff_gate.tanh().to(x.dtype) * self.ff(x)


# ------------------------------------------------------------------------------------------------------------
# Language model: the Qwen2, Qwen3, Llama and Mistral families


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Positions(NamedTuple):
    """RoPE tables and, when decoding, KV-cache slots and attention mask."""
    rope: tuple  # cos, sin
    slots: Tensor | None = None  # (B, T), of the KV cache: a token's slot is its position
    mask: Tensor | None = None  # (B, 1, T * H / H_kv, slots): 0, or -inf where a query does not attend


class SelfAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.d = c.d
        self.q_proj = nn.Linear(c.width, c.heads * c.d, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.width, c.kv_heads * c.d, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.width, c.kv_heads * c.d, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.heads * c.d, c.width, bias=c.out_bias)
        self.qk_norm = c.qk_norm
        if c.qk_norm:
            self.q_norm = RMSNorm(c.d, c.eps)
            self.k_norm = RMSNorm(c.d, c.eps)

    def forward(self, x, positions, kv_cache=None):
        """x (B, T, D) -> (B, T, D); kv_cache (2, B, H_kv, slots, d), this layer's, is updated in place."""
        B, T, _ = x.shape
        q, k, v = (w(x).view(B, T, -1, self.d) for w in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        qk = rotate(torch.cat([q, k], 2).transpose(1, 2), *positions.rope)
        q, k = qk.split([q.shape[2], k.shape[2]], 1)  # (B, H, T, d), (B, H_kv, T, d)
        v = v.transpose(1, 2)
        if kv_cache is None:  # texts are right-padded: the causal mask hides their padding
            o = attention(q, k, v, causal=True)
        else:
            slots = positions.slots[:, None, :, None].expand_as(k)
            k = kv_cache[0].scatter_(2, slots, k)
            v = kv_cache[1].scatter_(2, slots, v)
            # GQA without copies: the queries of a key head as rows
            grouped = q.reshape(*k.shape[:2], -1, self.d)
            o = F.scaled_dot_product_attention(grouped, k, v, positions.mask).reshape(q.shape)
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
        self.self_attn = SelfAttention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.width, c.eps)
        self.post_attention_layernorm = RMSNorm(c.width, c.eps)

    def forward(self, x, positions, kv_cache=None):
        x = x + self.self_attn(self.input_layernorm(x), positions, kv_cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class TokenEmbedding(nn.Module):
    """Token embeddings, or the head's rows. The rows of the added special tokens are a parameter of their
    own, so that they can train while the pretrained rows stay frozen; releases hold the two as one table."""

    def __init__(self, vocab, added, width):
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(vocab, width))
        self.added = nn.Parameter(0.02 * torch.randn(added, width))

    def forward(self, ids):
        n = len(self.weight)
        pretrained = F.embedding(ids.clamp(max=n - 1), self.weight)
        added = F.embedding((ids - n).clamp(min=0), self.added)
        return torch.where((ids < n)[..., None], pretrained, added)

    def logits(self, x):
        x = x.to(self.weight.dtype)  # x is cast, not the table: a copy of that would be a gigabyte
        return torch.cat([F.linear(x, rows) for rows in (self.weight, self.added)], -1)


class LanguageModel(nn.Module):
    """embed_tokens, layers, norm and the head; AudioFlamingo.forward_hidden runs gated blocks in between."""

    def __init__(self, config, added):
        """config: sizes, from language_models.sizes_of; added: rows of the embeddings beside config.vocab."""
        super().__init__()
        self.config = config
        self.embed_tokens = TokenEmbedding(config.vocab, added, config.width)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.norm = RMSNorm(config.width, config.eps)
        if not config.tied:
            self.lm_head = TokenEmbedding(config.vocab, added, config.width)

    def new_kv_cache(self, B, slots, like):
        """A KV cache (layers, 2, B, H_kv, slots, d); slot p is for the token at position p. Shapes stay while
        an answer grows: a decoding step is one graph."""
        c = self.config
        return like.new_zeros(c.layers, 2, B, c.kv_heads, slots, c.d)

    def make_positions(self, ids, positions=None, kv_cache=None):
        """Positions of ids (B, T): from 0 on, or with a KV cache at `positions` (B, T)."""
        c = self.config
        if kv_cache is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
            return Positions(rope_table(positions, c.d, c.rope_theta, c.rope_stretch))  # (T, d)
        rope = rope_table(positions[:, None], c.d, c.rope_theta, c.rope_stretch)  # (B, 1, T, d)
        slots = torch.arange(kv_cache.shape[4], device=ids.device)
        future = slots > positions.repeat(1, c.heads // c.kv_heads)[:, None, :, None]
        mask = kv_cache.new_zeros(future.shape).masked_fill_(future, -math.inf)
        return Positions(rope, positions, mask)

    def forward(self, ids, layers=None):
        """The language model alone: ids (B, T) right-padded -> (B, T, D) before the head; layers: how many of
        its blocks, None for all."""
        x = self.embed_tokens(ids)
        positions = self.make_positions(ids)
        for block in self.layers[:layers]:
            x = block(x, positions)
        return self.norm(x)

    def logits(self, x):
        head = self.embed_tokens if self.config.tied else self.lm_head
        return head.logits(x)


# ------------------------------------------------------------------------------------------------------------
# The whole model


def gated_blocks(every, layers):
    """Indices of the blocks with cross-attention before them, from a stride or a list."""
    blocks = list(range(every - 1, layers, every)) if isinstance(every, int) else every
    if not blocks or not set(blocks) <= set(range(layers)):
        raise UserError(f"cross_attn_every_n_layers = {every!r}: expected some of 0...{layers - 1}")
    return blocks


def from_host(array, device):
    return torch.from_numpy(array).to(device, non_blocking=True)


def pad_packed(x, n):
    """Pad packed sequences: (sum n, S, C) -> (P, max n * S, C). Padding repeats a sequence's last rows and
    must be masked. n (P,) is a numpy array: indices made on the host need no device synchronisation."""
    index = np.minimum(np.arange(n.max()), n[:, None] - 1)  # (P, max n), within a sequence
    index += (n.cumsum() - n)[:, None]
    if index.size > len(x):
        x = x.index_select(0, from_host(index.flatten(), x.device))
    return x.reshape(len(n), -1, x.shape[-1])


class AudioFlamingo(nn.Module):
    def __init__(self, config, lm, tokenizer, encoder=None):
        """config: the settings of config.MODEL_SETTINGS and attention_backend; lm: a LanguageModel, or its
        sizes; tokenizer: the language model's with our special tokens (data.extend_tokenizer); encoder: see
        "The audio encoder", None for CLAP of the config's sizes. Weights are random: checkpoint.py loads."""
        super().__init__()
        c = config
        self.config = config
        self.tokenizer = tokenizer
        self.audio_id, self.end_id = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS[:2]))
        self.pad_id = tokenizer.pad_token_id
        self.sep_id = tokenizer.sep_token_id
        self.stop_ids = [self.end_id, tokenizer.eos_token_id]
        self.lm = lm if isinstance(lm, nn.Module) else LanguageModel(lm, added=len(tokenizer) - lm.vocab)
        self.clap = encoder or ClapEncoder(c.clap_embed_dim, c.clap_depths, c.clap_num_heads,
                                           c.clap_spec_size)
        self.audio_config = {name: getattr(c, name) for name in AUDIO_SETTINGS}  # for data.load_audio
        self.audio_config["sample_rate"] = self.clap.sample_rate
        self.audio_transformer = AudioTransformer(
            self.clap.width, c.audio_transformer_n_head, c.audio_transformer_n_layers,
            c.audio_transformer_d_inner)
        self.xattn = nn.ModuleDict()
        for i in gated_blocks(c.cross_attn_every_n_layers, self.lm.config.layers):
            self.xattn[str(i)] = GatedCrossAttention(self.lm.config.width, self.clap.width)
        self.backend = c.attention_backend
        self.gradient_checkpointing = False  # of the language model's and the gated blocks

    # --- forward

    def encode_audio(self, windows, n_windows):
        """windows (sum W, L) int16 or float32 -> audio tokens (B, S, C) and n_keys, the valid audio tokens of
        each text: (B,), as n_windows, or (B, K) cumulative over its K clips (0 windows: fewer clips)."""
        small = windows.device.type == "cpu" and not self.clap.training  # fits the CPU's caches
        n_parts = math.ceil(len(windows) / (4 if small else 64))
        parts = windows.tensor_split(n_parts)  # of equal size, else a remainder of one would feed BatchNorm
        tokens = torch.cat([self.clap(to_float(part)) for part in parts])  # (sum W, 64, C)
        _, S, C = tokens.shape
        device = tokens.device
        counts = n_windows.cpu().numpy()
        per_clip = counts[counts > 0]
        audio = self.audio_transformer(pad_packed(tokens, per_clip), from_host(per_clip * S, device))
        n_keys = n_windows.to(device, non_blocking=True) * S
        if n_windows.ndim == 1:
            return audio, n_keys
        # several clips a text: their real windows, one clip after the other
        real = np.arange(per_clip.max()) < per_clip[:, None]  # (clips, max W)
        audio = audio.view(-1, S, C).index_select(0, from_host(np.flatnonzero(real), device))
        return pad_packed(audio, counts.sum(1)), n_keys.cumsum(1)

    def visible_keys(self, ids, n_keys):
        """n_keys of encode_audio -> n_keys of each token of ids (B, T): it attends to the clips whose <audio>
        precedes it (Flamingo's interleaved mask), a token before the first one to the first clip."""
        if n_keys.ndim == 1:
            return n_keys
        n_clips = (ids == self.audio_id).cumsum(1).clamp(1, n_keys.shape[1])
        return n_keys.gather(1, n_clips - 1)

    def keys_values(self, audio):
        """audio (B, S, C) -> {block index: (B, S, 2, H, d)} for the gated blocks."""
        return {int(i): block.keys_values(audio) for i, block in self.xattn.items()}

    def forward_hidden(self, ids, kv, n_keys, positions=None, kv_cache=None, inspect=None):
        """ids (B, T) -> (B, T, D) before the head; kv of keys_values, n_keys of visible_keys. With a kv_cache
        (LanguageModel.new_kv_cache) the ids are the tokens at `positions` (B, T) of texts whose earlier
        tokens are in it. inspect(i, x) is called with the residual stream x (B, T, D) before gated block i.
        """
        call = nn.Module.__call__
        if self.training and self.gradient_checkpointing:
            call = gradient_checkpoint
        x = self.lm.embed_tokens(ids)
        positions = self.lm.make_positions(ids, positions, kv_cache)
        for i, block in enumerate(self.lm.layers):
            if i in kv:
                if inspect:
                    inspect(i, x)
                x = call(self.xattn[str(i)], x, kv[i], n_keys, self.backend)
            x = call(block, x, positions, None if kv_cache is None else kv_cache[i])
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
        index = from_host(np.flatnonzero(targets.cpu().numpy() != -100), x.device)
        targets = targets.to(x.device, non_blocking=True).index_select(0, index)
        total = self.summed_loss(x.flatten(0, 1).index_select(0, index), targets)
        return None, total / max(len(index), 1)

    def summed_loss(self, x, targets, chunk=1024):
        """Cross-entropy of x (n, D) before the head and targets (n,); logits of `chunk` rows at a time."""
        if len(x) <= chunk:
            return F.cross_entropy(self.lm.logits(x).float(), targets, reduction="sum")
        total = 0
        for rows, labels in zip(x.split(chunk), targets.split(chunk)):
            total = total + gradient_checkpoint(self.summed_loss, rows, labels)
        return total

    # --- answering: tools/sample/decoding.py

    def generate(self, prompts, windows, n_windows, max_new_tokens=256, **sampling):
        """prompts: B strings as in a manifest; windows (sum W, L); n_windows (B,), or (B, K) for K clips a
        prompt, 0 for none; sampling: fields of tools.sample.decoding.Sampling -> B strings. No answer depends
        on the rest of its batch, sampled or not."""
        from tools.sample.decoding import generate
        return generate(self, prompts, windows, n_windows, max_new_tokens=max_new_tokens, **sampling)

    # --- training

    def set_trainable(self, config):
        """Freeze everything, then unfreeze what a run with these settings trains."""
        embeddings = config.freeze_lm_embeddings
        if embeddings not in (True, False, "added"):
            raise UserError(f"freeze_lm_embeddings = {embeddings!r}, expected True, False or 'added'")
        self.requires_grad_(False)
        self.audio_transformer.requires_grad_(True)
        self.xattn.requires_grad_(True)
        self.lm.requires_grad_(config.unfreeze_full_lm)
        self.lm.embed_tokens.requires_grad_(embeddings is False)  # a tied head follows
        for name, p in self.lm.named_parameters():
            if embeddings == "added" and name.endswith(".added"):
                p.requires_grad_(True)
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
        if lang_encoder_path:
            settings["lang_encoder_path"] = lang_encoder_path
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
# q, dq, y, dy and o are contiguous (B, T, H, D); k and v have the strides k_b, k_n, k_h; n_keys n_b and n_t.


@triton.jit
def load_rows(ptr, rows, stride, limit, D: tl.constexpr):
    """(rows, D) of one head; zeros from row `limit` on."""
    offsets = rows[:, None] * stride + tl.arange(0, D)
    return tl.load(ptr + offsets, mask=rows[:, None] < limit, other=0.0)


@triton.jit
def store_rows(ptr, x, rows, stride, limit, D: tl.constexpr):
    offsets = rows[:, None] * stride + tl.arange(0, D)
    tl.store(ptr + offsets, x.to(ptr.dtype.element_ty), mask=rows[:, None] < limit)


@triton.jit
def load_n_keys(n_ptr, n_b, n_t, b, t, T, N):
    n = tl.load(n_ptr + b * n_b + t * n_t, mask=t < T, other=0)
    return tl.minimum(n, N).to(tl.int32)


@triton.jit
def dot(a, b):
    return tl.dot(a, b, input_precision="ieee")  # no TF32 for float32 inputs


@triton.jit
def store_output(acc, m, l, y_ptr, o_ptr, lse_ptr, gate_ptr, b, h, t, T,
                 H: tl.constexpr, D: tl.constexpr, STORE_Y: tl.constexpr):
    """acc (t, D), running maximum m and sum l -> y and, for the backward or combine_kernel, o and lse."""
    l = tl.where(l > 0, l, 1.0)  # a token without keys: o = 0, lse = -1e30, which weighs nothing in a sum
    o = acc / l[:, None]
    head = (b * T * H + h) * D
    tl.store(lse_ptr + (b * H + h) * T + t, m + tl.log2(l), mask=t < T)
    store_rows(o_ptr + head, o, t, H * D, T, D)
    if STORE_Y:
        store_rows(y_ptr + head, tl.load(gate_ptr) * o, t, H * D, T, D)


@triton.jit
def forward_kernel(q_ptr, k_ptr, v_ptr, n_ptr, gate_ptr, y_ptr, o_ptr, lse_ptr,
                   k_b, k_n, k_h, n_b, n_t, T, N, scale,
                   H: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
                   STORE_Y: tl.constexpr):
    """Grid (token blocks, splits H, B). With several splits (flash-decoding) each stores o and lse of its
    share of the keys, (splits, B, ...)."""
    h = tl.program_id(1) % H
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = load_n_keys(n_ptr, n_b, n_t, b, t, T, N)
    q = load_rows(q_ptr + (b * T * H + h) * D, t, H * D, T, D)  # (t, D)
    kv = b * k_b + h * k_h
    m = tl.full((BLOCK_T,), -1e30, tl.float32)  # -inf - -inf is NaN
    l = tl.zeros((BLOCK_T,), tl.float32)
    acc = tl.zeros((BLOCK_T, D), tl.float32)
    n_max = tl.max(n)  # of the tokens here: padded keys cost nothing
    share = tl.cdiv(n_max, tl.num_programs(1) // H * BLOCK_N) * BLOCK_N
    first = tl.program_id(1) // H * share
    for start in range(first, tl.minimum(first + share, n_max), BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr + kv, keys, k_n, n_max, D)
        v = load_rows(v_ptr + kv, keys, k_n, n_max, D)
        s = dot(q, tl.trans(k)) * scale  # (t, n)
        s = tl.where(keys[None, :] < n[:, None], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s - m_new[:, None])
        acc = acc * alpha[:, None] + dot(p.to(v.dtype), v)
        l = l * alpha + tl.sum(p, 1)
        m = m_new
    b += tl.program_id(1) // H * tl.num_programs(2)
    store_output(acc, m, l, y_ptr, o_ptr, lse_ptr, gate_ptr, b, h, t, T, H, D, STORE_Y)


@triton.jit
def combine_kernel(part_ptr, part_lse_ptr, gate_ptr, y_ptr, o_ptr, lse_ptr, T, splits,
                   H: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr):
    """o and lse of the splits, (splits, B, T, H, D) float32, -> y; grid (token blocks, H, B)."""
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    m = tl.full((BLOCK_T,), -1e30, tl.float32)
    l = tl.zeros((BLOCK_T,), tl.float32)
    acc = tl.zeros((BLOCK_T, D), tl.float32)
    for split in range(splits):
        part = b + split * tl.num_programs(2)
        lse = tl.load(part_lse_ptr + (part * H + h) * T + t, mask=t < T, other=float("-inf"))
        o = load_rows(part_ptr + (part * T * H + h) * D, t, H * D, T, D)
        m_new = tl.maximum(m, lse)
        alpha = tl.exp2(m - m_new)
        weight = tl.exp2(lse - m_new)
        acc = acc * alpha[:, None] + weight[:, None] * o
        l = l * alpha + weight
        m = m_new
    store_output(acc, m, l, y_ptr, o_ptr, lse_ptr, gate_ptr, b, h, t, T, H, D, True)


@triton.jit
def dq_kernel(q_ptr, k_ptr, v_ptr, n_ptr, gate_ptr, dy_ptr, o_ptr, lse_ptr, delta_ptr, dq_ptr,
              k_b, k_n, k_h, n_b, n_t, T, N, scale,
              H: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """Grid (token blocks, H, B): delta, which dkv_kernel reads next, and dq."""
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = load_n_keys(n_ptr, n_b, n_t, b, t, T, N)
    head = (b * T * H + h) * D
    row = (b * H + h) * T + t
    q = load_rows(q_ptr + head, t, H * D, T, D)
    dy = load_rows(dy_ptr + head, t, H * D, T, D)
    o = load_rows(o_ptr + head, t, H * D, T, D)
    delta = tl.sum(dy.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta_ptr + row, delta, mask=t < T)
    lse = tl.load(lse_ptr + row, mask=t < T, other=0.0)
    kv = b * k_b + h * k_h
    dq = tl.zeros((BLOCK_T, D), tl.float32)
    n_max = tl.max(n)
    for start in range(0, n_max, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr + kv, keys, k_n, n_max, D)
        v = load_rows(v_ptr + kv, keys, k_n, n_max, D)
        p = tl.exp2(dot(q, tl.trans(k)) * scale - lse[:, None])  # (t, n)
        p = tl.where(keys[None, :] < n[:, None], p, 0.0)
        ds = p * (dot(dy, tl.trans(v)) - delta[:, None])
        dq += dot(ds.to(k.dtype), k)
    dq *= tl.load(gate_ptr) * scale * 0.6931471805599453  # ln 2: back from base 2
    store_rows(dq_ptr + head, dq, t, H * D, T, D)


@triton.jit
def dkv_kernel(q_ptr, k_ptr, v_ptr, n_ptr, n_max_ptr, gate_ptr, dy_ptr, lse_ptr, delta_ptr, dkv_ptr,
               k_b, k_n, k_h, n_b, n_t, T, N, scale,
               H: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """Grid (key blocks, H, B): dk, dv as the halves of (B, N, 2, H, D); zeros for keys that no token sees."""
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * BLOCK_N
    keys = first + tl.arange(0, BLOCK_N)
    n_max = tl.minimum(tl.load(n_max_ptr + b), N).to(tl.int32)
    kv = b * k_b + h * k_h
    k = load_rows(k_ptr + kv, keys, k_n, n_max, D)
    v = load_rows(v_ptr + kv, keys, k_n, n_max, D)
    dk = tl.zeros((BLOCK_N, D), tl.float32)
    dv = tl.zeros((BLOCK_N, D), tl.float32)
    head = (b * T * H + h) * D
    for start in range(0, tl.where(first < n_max, T, 0), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        n = load_n_keys(n_ptr, n_b, n_t, b, t, T, N)
        row = (b * H + h) * T + t
        q = load_rows(q_ptr + head, t, H * D, T, D)
        dy = load_rows(dy_ptr + head, t, H * D, T, D)
        lse = tl.load(lse_ptr + row, mask=t < T, other=0.0)
        delta = tl.load(delta_ptr + row, mask=t < T, other=0.0)
        s = dot(k, tl.trans(q)) * scale - lse[None, :]  # (n, t)
        p = tl.exp2(tl.where(keys[:, None] < n[None, :], s, float("-inf")))
        dv += dot(p.to(dy.dtype), dy)
        ds = p * (dot(v, tl.trans(dy)) - delta[None, :])
        dk += dot(ds.to(q.dtype), q)
    gate = tl.load(gate_ptr)
    dk *= gate * scale * 0.6931471805599453  # ln 2: back from base 2
    dkv = dkv_ptr + (b * N * 2 * H + h) * D
    store_rows(dkv, dk, keys, 2 * H * D, N, D)
    store_rows(dkv + H * D, gate * dv, keys, 2 * H * D, N, D)


# TRITON_INTERPRET=1 before the import
INTERPRETED = bool(triton.__version__) and not isinstance(forward_kernel, triton.JITFunction)

# (bytes a number, head dim up to) -> tokens of a block, keys of a block, warps, pipeline stages.
# Fixed, where @triton.autotune would stall the first steps. With Triton 3.6 to 3.9 no entry spills registers
# or takes over 99 KB of shared memory on sm_80, sm_90, sm_100 or gfx942 (`tools/bench.py kernel`). 64 rows of
# two bytes are the least that sm_90's wgmma takes. float32 multiplies on plain cores: hence its small blocks.
TOKEN_BLOCKS = {  # forward and dq: a program owns tokens
    (2, 64): (64, 64, 4, 3),
    (2, 128): (64, 32, 4, 3),
    (4, 64): (32, 32, 4, 2),
    (4, 128): (32, 16, 8, 2)}
KEY_BLOCKS = {  # dkv: a program owns keys
    (2, 64): (32, 64, 4, 3),
    (2, 128): (16, 64, 4, 2),
    (4, 64): (16, 32, 4, 2),
    (4, 128): (16, 32, 8, 1)}
MIN_PROGRAMS = 256  # about two per multiprocessor of a large GPU: a decoding step with fewer splits the keys


def block_sizes(kernel, dtype, d, T):
    """Launch arguments of "forward", "dq", "dkv" or "combine"; texts of up to 16 tokens get blocks of 16."""
    if kernel == "combine":
        return {"BLOCK_T": 16, "num_warps": 4, "num_stages": 1}
    table = KEY_BLOCKS if kernel == "dkv" else TOKEN_BLOCKS
    tokens, keys, warps, stages = table[dtype.itemsize, 64 if d <= 64 else 128]
    if T <= 16:
        tokens = 16
    return {"BLOCK_T": tokens, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages}


def launch(kernel, grid, *args, **options):
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **options)


def kernel_inputs(q, k, v, n_keys):
    """-> [q, k, v, n_keys] as the kernels address them; their strides, T, N and the scale."""
    if k.stride() != v.stride() or k.stride(3) != 1:  # the halves of one product are read where they lie
        k, v = k.contiguous(), v.contiguous()
    per_token = n_keys.stride(1) if n_keys.ndim == 2 else 0
    scale = math.log2(math.e) / math.sqrt(q.shape[-1])
    shapes = [*k.stride()[:3], n_keys.stride(0), per_token, q.shape[1], k.shape[1], scale]
    return [q.contiguous(), k, v, n_keys], shapes


def attend(q, k, v, n_keys, tanh_gate):
    """-> y (B, T, H, d) and, for the backward, o like y and lse (B, H, T) float32 in base 2."""
    B, T, H, d = q.shape
    inputs, shapes = kernel_inputs(q, k, v, n_keys)
    y, o, lse = outputs = empty_outputs(q, k, v, n_keys, tanh_gate)
    sizes = block_sizes("forward", q.dtype, d, T)
    blocks = triton.cdiv(T, sizes["BLOCK_T"])
    splits = 1
    if T <= 16:  # flash-decoding; of a long text the parts would be as large as the scores
        splits = min(MIN_PROGRAMS // (B * H), triton.cdiv(k.shape[1], sizes["BLOCK_N"]))
    if splits <= 1:
        launch(forward_kernel, (blocks, H, B), *inputs, tanh_gate, *outputs, *shapes, H, d, **sizes,
               STORE_Y=True)
        return outputs
    part = q.new_empty(splits, B, T, H, d, dtype=torch.float32)
    part_lse = q.new_empty(splits, B, H, T, dtype=torch.float32)
    launch(forward_kernel, (blocks, splits * H, B), *inputs, tanh_gate, y, part, part_lse, *shapes, H, d,
           **sizes, STORE_Y=False)
    launch(combine_kernel, (blocks, H, B), part, part_lse, tanh_gate, *outputs, T, splits, H, d,
           **block_sizes("combine", q.dtype, d, T))
    return outputs


def attend_backward(dy, q, k, v, n_keys, tanh_gate, o, lse):
    """-> dq, dkv (B, N, 2, H, d), d tanh(gate) (1,). No atomics: the same bits every time."""
    B, T, H, d = q.shape
    inputs, shapes = kernel_inputs(q, k, v, n_keys)
    dq, dkv, _ = empty_gradients(dy, q, k, v, n_keys, tanh_gate, o, lse)
    delta = torch.empty_like(lse)
    dy = dy.contiguous()
    sizes = block_sizes("dq", q.dtype, d, T)
    blocks = triton.cdiv(T, sizes["BLOCK_T"])
    launch(dq_kernel, (blocks, H, B), *inputs, tanh_gate, dy, o, lse, delta, dq, *shapes, H, d, **sizes)
    n_max = n_keys.contiguous() if n_keys.ndim == 1 else n_keys.amax(1)  # (B,)
    sizes = block_sizes("dkv", q.dtype, d, T)
    blocks = triton.cdiv(k.shape[1], sizes["BLOCK_N"])
    launch(dkv_kernel, (blocks, H, B), *inputs, n_max, tanh_gate, dy, lse, delta, dkv, *shapes, H, d, **sizes)
    return dq, dkv, delta.sum().view(1)


def empty_outputs(q, k, v, n_keys, tanh_gate):
    """Of attend."""
    B, T, H, d = q.shape
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.float32)


def empty_gradients(dy, q, k, v, n_keys, tanh_gate, o, lse):
    """Of attend_backward."""
    B, N, H, d = k.shape
    return q.new_empty(q.shape), k.new_empty(B, N, 2, H, d), tanh_gate.new_empty(1)


# As operators, so that torch.compile(fullgraph=True) takes them whole and knows their shapes and gradients.
SCHEMA = "Tensor q, Tensor k, Tensor v, Tensor n_keys, Tensor tanh_gate"
attend_op = torch.library.custom_op(
    "audio_flamingo::attend", attend, mutates_args=(), schema=f"({SCHEMA}) -> (Tensor, Tensor, Tensor)")
attend_op.register_fake(empty_outputs)
attend_backward_op = torch.library.custom_op(
    "audio_flamingo::attend_backward", attend_backward, mutates_args=(),
    schema=f"(Tensor dy, {SCHEMA}, Tensor o, Tensor lse) -> (Tensor, Tensor, Tensor)")
attend_backward_op.register_fake(empty_gradients)


def save_for_attend_backward(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # o and lse get no gradients: make no zeros for them
    ctx.save_for_backward(*inputs[:5], *output[1:])  # q, k, v, n_keys, tanh_gate, o, lse: nothing of T x N


def attend_gradients(ctx, dy, *_):
    if dy is None:
        return (None,) * 5
    dq, dkv, dtanh = attend_backward_op(dy, *ctx.saved_tensors)
    return dq, dkv[:, :, 0], dkv[:, :, 1], None, dtanh


attend_op.register_autograd(attend_gradients, setup_context=save_for_attend_backward)


def triton_attention(q, k, v, n_keys, gate):
    d = q.shape[-1]
    fits = d in (32, 64, 128) and q.dtype in (torch.float32, torch.float16, torch.bfloat16)
    if not fits or not triton.__version__ or not (q.is_cuda or INTERPRETED):
        raise UserError("attention_backend = 'triton' needs triton, a GPU (or TRITON_INTERPRET=1 at import), "
                        f"32, 64 or 128 channels in float32, float16 or bfloat16; got {d} in {q.dtype}")
    # decoding without torch.compile skips the dispatcher
    op = attend_op if torch.is_grad_enabled() or torch.compiler.is_compiling() else attend
    # tanh in torch: exact near 0, where the gate starts, and differentiated there
    return op(q, k, v, n_keys, gate.float().tanh())[0]


BACKENDS["triton"] = triton_attention
