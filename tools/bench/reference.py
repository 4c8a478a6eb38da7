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

from model import log_mel, to_float


def heads_of(x, d, *layers):
    """x (B, T, D) projected by each of the layers, in heads: [(B, H, T, d)]."""
    heads = []
    for layer in layers:
        y = layer(x).unflatten(-1, (-1, d))
        heads.append(y.transpose(1, 2))
    return heads


def attend(q, k, v, mask):
    """q (B, H, T, d), k and v (B, H, S, d), mask True where a query sees a key -> (B, T, H d)."""
    scale = math.sqrt(q.shape[-1])
    scores = q @ k.mT / scale
    scores = scores.masked_fill(~mask, -math.inf)
    o = scores.softmax(-1) @ v
    return o.transpose(1, 2).flatten(2)


def rotate(x, r, base, first=0):
    """Rotary embedding of the first r channels of x (B, H, T, d), whose positions begin with `first`."""
    last = first + x.shape[2]
    positions = torch.arange(first, last, device=x.device)
    exponent = torch.arange(0, r, 2, device=x.device) / r
    angle = positions[:, None] / base ** exponent  # (T, r/2)
    cos, sin = angle.cos(), angle.sin()
    left, right = x[..., :r].float().chunk(2, -1)
    turned_left = left * cos - right * sin
    turned_right = right * cos + left * sin
    x32 = torch.cat([turned_left, turned_right, x[..., r:]], -1)
    return x32.to(x.dtype)


# ------------------------------------------------------------------------------------------------------------
# Audio


def encode(clap, windows):
    """One clip's windows (W, L) -> its tokens (W, 64, C), by laion-clap's own blocks."""
    h = clap.htsat
    x = log_mel(windows).mT[..., None]
    x = h.bn0(x)
    x = x.permute(0, 3, 2, 1)
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
        q, k, v = heads_of(x, d, a.w_qs, a.w_ks, a.w_vs)
        q = rotate(q, r, 4096)
        k = rotate(k, r, 4096)
        y = a.fc(attend(q, k, v, mask))
        x = a.layer_norm(x + y)
        y = F.relu(ff.w_1(x))
        x = ff.layer_norm(x + ff.w_2(y))
    return x


def audio_tokens(model, windows, n_windows):
    """windows (sum W, L), n_windows (B,) -> audio (B, S, C) and its mask (B, 1, 1, S)."""
    clips = to_float(windows).split(n_windows.tolist())
    clips = pad_sequence(clips, batch_first=True)  # (B, W, L)
    tokens = [encode(model.clap, clip) for clip in clips]
    x = torch.stack(tokens).flatten(1, 2)  # (B, S, C)
    index = torch.arange(clips.shape[1])
    mask = index < n_windows[:, None]  # (B, W)
    mask = mask.repeat_interleave(len(tokens[0][0]), 1)
    mask = mask[:, None, None].to(x.device)
    x = audio_transformer(model.audio_transformer, x, mask)
    return x, mask


# ------------------------------------------------------------------------------------------------------------
# Text


def rms_norm(module, x):
    x32 = x.float()
    squares = x32.pow(2)
    mean = squares.mean(-1, keepdim=True)
    x32 = x32 * torch.rsqrt(mean + module.eps)
    return module.weight * x32.to(x.dtype)


def gated_block(block, x, audio, mask):
    a, d = block.attn, block.d
    (q,) = heads_of(a.norm(x), d, a.to_q)
    (kv,) = heads_of(audio, d, a.to_kv)
    k, v = kv.chunk(2, 1)
    y = a.to_out(attend(q, k, v, mask))
    x = x + y * block.attn_gate.tanh()
    return x + block.ff(x) * block.ff_gate.tanh()


def language_block(block, x, c, kv_cache):
    """kv_cache: [k, v] (B, H, positions so far, d), or [] at first; it grows by those of x (B, T, D)."""
    a, d = block.self_attn, c.d
    first = kv_cache[0].shape[2] if kv_cache else 0
    y = rms_norm(block.input_layernorm, x)
    q, k, v = heads_of(y, d, a.q_proj, a.k_proj, a.v_proj)
    q = rotate(q, d, c.rope_theta, first)
    k = rotate(k, d, c.rope_theta, first)
    if kv_cache:
        k = torch.cat([kv_cache[0], k], 2)
        v = torch.cat([kv_cache[1], v], 2)
    kv_cache[:] = k, v
    groups = c.heads // c.kv_heads
    k = k.repeat_interleave(groups, 1)
    v = v.repeat_interleave(groups, 1)
    causal = q.new_ones(q.shape[2], k.shape[2]).tril(first)
    y = attend(q, k, v, causal > 0)
    x = x + a.o_proj(y)
    y = rms_norm(block.post_attention_layernorm, x)
    return x + block.mlp(y)


def text_states(model, ids, audio, mask, caches=None):
    """ids (B, T) -> (B, T, D) before the head; caches: of every language block, when decoding."""
    lm = model.lm
    x = lm.embed_tokens(ids)
    for i, block in enumerate(lm.layers):
        if str(i) in model.xattn:
            x = gated_block(model.xattn[str(i)], x, audio, mask)
        cache = caches[i] if caches else []
        x = language_block(block, x, lm.config, cache)
    return rms_norm(lm.norm, x)


def loss(model, ids, windows, n_windows, labels):
    """The arguments of AudioFlamingo.forward -> mean over the labels."""
    audio, mask = audio_tokens(model, windows, n_windows)
    x = text_states(model, ids, audio, mask)
    logits = model.lm.logits(x).float()  # (B, T, V)
    logits = logits[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()
    return F.cross_entropy(logits, targets)


@torch.no_grad()
def greedy_tokens(model, ids, windows, n_windows):
    """Yield the tokens (B, 1) of greedy answers to ids (B, T), without end."""
    audio, mask = audio_tokens(model, windows, n_windows)
    caches = [[] for _ in model.lm.layers]
    while True:
        x = text_states(model, ids, audio, mask, caches)
        logits = model.lm.logits(x[:, -1:])
        ids = logits.argmax(-1)
        yield ids
