"""Training and decoding written the published way, on the weights of an AudioFlamingo: what ours is compared
with, in value (tests/test_model.py) and in time (tools/bench.py train and decode).

Windows are padded to those of the longest clip and encoded clip by clip, by laion-clap's own blocks.
Attention forms all scores. The head runs at every position. Decoding computes the audio's keys and values at
every token.
Weights and log-mel are the model's; nothing else is.
"""
import math

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from model import log_mel


def padded(windows, n_windows):
    """windows (sum W, L) int16 or float32 -> (B, max W, L) float32, and a mask (B, max W) of real ones."""
    if windows.dtype == torch.int16:
        windows = windows.float() / 32767
    clips = windows.split(n_windows.tolist())
    x = pad_sequence(clips, batch_first=True)
    index = torch.arange(x.shape[1])
    mask = index < n_windows[:, None]
    return x, mask.to(x.device)


def split_heads(x, d):
    """(B, T, H d) -> (B, H, T, d)."""
    return x.unflatten(-1, (-1, d)).transpose(1, 2)


def attend(q, k, v, mask):
    """q (B, H, T, d), k and v (B, H, S, d), mask True where a query sees a key -> (B, T, H d)."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, lowest)
    o = scores.softmax(-1) @ v
    return o.transpose(1, 2).flatten(2)


def rotate(x, r, base, first=0):
    """Rotary embedding of the first r channels of x (B, H, T, d), whose positions begin with `first`."""
    last = first + x.shape[2]
    positions = torch.arange(first, last, device=x.device)
    exponent = torch.arange(0, r, 2, device=x.device) / r
    angle = positions[:, None] / base ** exponent
    angle = torch.cat([angle, angle], -1)
    head = x[..., :r].float()
    rest = x[..., r:]
    left, right = head.chunk(2, -1)
    turned = torch.cat([-right, left], -1)
    head = head * angle.cos() + turned * angle.sin()
    return torch.cat([head.to(x.dtype), rest], -1)


# ------------------------------------------------------------------------------------------------------------
# Audio


def encode(clap, windows):
    """One clip's windows (W, L) -> its tokens (W, 64, C), by laion-clap's own blocks."""
    h = clap.htsat
    x = log_mel(windows).mT[..., None]
    x = h.bn0(x).permute(0, 3, 2, 1)
    x = h.reshape_wav2img(x)
    x = h.patch_embed.proj(x).flatten(2)
    x = h.patch_embed.norm(x.mT)
    for stage in h.layers:
        x, _ = stage(x)
    x = h.norm(x)
    columns = math.isqrt(x.shape[1])
    x = x.unflatten(1, (h.freq_ratio, -1, columns))
    return x.transpose(1, 2).flatten(1, 3)


def audio_transformer(transformer, x, mask):
    """x (B, S, C), mask (B, 1, 1, S) -> (B, S, C)."""
    r = transformer.rotary_dim
    x = transformer.layer_norm(transformer.scale * x)
    for layer in transformer.layer_stack:
        a, ff = layer.slf_attn, layer.pos_ffn
        d = x.shape[-1] // a.n_head
        q = split_heads(a.w_qs(x), d)
        k = split_heads(a.w_ks(x), d)
        v = split_heads(a.w_vs(x), d)
        q = rotate(q, r, 4096)
        k = rotate(k, r, 4096)
        y = a.fc(attend(q, k, v, mask))
        x = a.layer_norm(x + y)
        y = F.relu(ff.w_1(x))
        x = ff.layer_norm(x + ff.w_2(y))
    return x


def audio_tokens(model, windows, mask):
    """windows (B, W, L) and mask (B, W) of `padded` -> audio (B, S, C) and its mask (B, 1, 1, S)."""
    tokens = torch.stack([encode(model.clap, clip) for clip in windows])  # (B, W, 64, C)
    mask = mask.repeat_interleave(tokens.shape[2], 1)
    mask = mask[:, None, None]
    x = tokens.flatten(1, 2)
    x = audio_transformer(model.audio_transformer, x, mask)
    return x, mask


# ------------------------------------------------------------------------------------------------------------
# Text


def rms_norm(module, x):
    x32 = x.float()
    mean = x32.pow(2).mean(-1, keepdim=True)
    x32 = x32 * torch.rsqrt(mean + module.eps)
    return module.weight * x32.to(x.dtype)


def gated_block(block, x, audio, mask):
    a, d = block.attn, block.d
    y = a.norm(x)
    q = split_heads(a.to_q(y), d)
    kv = split_heads(a.to_kv(audio), d)
    k, v = kv.chunk(2, 1)
    y = a.to_out(attend(q, k, v, mask))
    x = x + y * block.attn_gate.tanh()
    return x + block.ff(x) * block.ff_gate.tanh()


def language_block(block, x, c, kv_cache):
    """kv_cache: [k, v] (B, H, positions so far, d), or [] at first; it grows by those of x (B, T, D)."""
    a, d = block.self_attn, c.d
    first = kv_cache[0].shape[2] if kv_cache else 0
    y = rms_norm(block.input_layernorm, x)
    q = split_heads(a.q_proj(y), d)
    k = split_heads(a.k_proj(y), d)
    v = split_heads(a.v_proj(y), d)
    q = rotate(q, d, c.rope_theta, first)
    k = rotate(k, d, c.rope_theta, first)
    if kv_cache:
        k = torch.cat([kv_cache[0], k], 2)
        v = torch.cat([kv_cache[1], v], 2)
    kv_cache[:] = k, v
    groups = c.heads // c.kv_heads
    k = k.repeat_interleave(groups, 1)
    v = v.repeat_interleave(groups, 1)
    causal = x.new_ones(q.shape[2], k.shape[2]).bool()
    y = attend(q, k, v, causal.tril(first))
    x = x + a.o_proj(y)
    y = rms_norm(block.post_attention_layernorm, x)
    return x + block.mlp(y)


def text_states(model, ids, audio, mask, caches=None):
    """ids (B, T) -> (B, T, D) before the head."""
    lm = model.lm
    x = lm.embed_tokens(ids)
    for i, block in enumerate(lm.layers):
        if str(i) in model.xattn:
            x = gated_block(model.xattn[str(i)], x, audio, mask)
        cache = caches[i] if caches else []
        x = language_block(block, x, lm.config, cache)
    return rms_norm(lm.norm, x)


def loss(model, ids, windows, mask, labels):
    """ids, labels (B, T); windows and mask of `padded` -> mean over the labels."""
    audio, mask = audio_tokens(model, windows, mask)
    x = text_states(model, ids, audio, mask)
    logits = model.lm.logits(x).float()  # (B, T, V)
    logits = logits[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()
    return F.cross_entropy(logits, targets, ignore_index=-100)


@torch.no_grad()
def greedy_tokens(model, ids, windows, mask):
    """Yield the tokens (B, 1) of greedy answers to ids (B, T), without end."""
    audio, mask = audio_tokens(model, windows, mask)
    caches = [[] for _ in model.lm.layers]
    while True:
        x = text_states(model, ids, audio, mask, caches)
        logits = model.lm.logits(x[:, -1:])
        ids = logits.argmax(-1)
        yield ids
