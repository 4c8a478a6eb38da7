"""Training and decoding written the published way, on the weights of an AudioFlamingo: what ours is compared
with, in value (tests/test_model.py) and in time (tools/bench.py train and decode).

Windows are padded to those of the longest clip and encoded clip by clip, by laion-clap's own blocks. Attention
forms all scores. The head runs at every position. Decoding computes the audio's keys and values at every token.
Weights and log-mel are the model's; nothing else is.
"""
import math

import torch
import torch.nn.functional as F

from model import log_mel


def padded(windows, n_windows):
    """windows (sum W, L) int16 or float32 -> (B, max W, L) float32, and a mask (B, max W) of the real ones."""
    longest = torch.arange(int(n_windows.max()))
    mask = longest < n_windows[:, None]
    mask = mask.to(windows.device)
    if windows.dtype == torch.int16:
        windows = windows.float() / 32767
    x = windows.new_zeros(*mask.shape, windows.shape[1])
    x[mask] = windows
    return x, mask


def split_heads(x, d):
    """(B, T, H d) -> (B, H, T, d)."""
    return x.unflatten(-1, (-1, d)).transpose(1, 2)


def attend(q, k, v, mask):
    """q (B, H, T, d), k and v (B, H, S, d), mask True where a query sees a key -> (B, T, H d)."""
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    lowest = torch.finfo(scores.dtype).min
    weights = scores.masked_fill(~mask, lowest).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def rotate(x, r, base, first=0):
    """Rotary embedding of the first r channels of x (B, H, T, d), whose positions begin with `first`."""
    positions = torch.arange(first, first + x.shape[2], device=x.device)
    exponent = torch.arange(0, r, 2, device=x.device) / r
    angle = positions[:, None] / base ** exponent
    angle = torch.cat([angle, angle], -1)
    head, rest = x[..., :r].float(), x[..., r:]
    left, right = head.chunk(2, -1)
    turned = torch.cat([-right, left], -1)
    head = head * angle.cos() + turned * angle.sin()
    return torch.cat([head.to(x.dtype), rest], -1)


# ------------------------------------------------------------------------------------------------------------
# Audio


def encode(clap, windows):
    """One clip's windows (W, L) -> its tokens (W, 64, C), by laion-clap's own blocks."""
    h = clap.htsat
    x = log_mel(windows).transpose(1, 2)
    x = h.bn0(x[..., None]).permute(0, 3, 2, 1)
    x = h.patch_embed.proj(h.reshape_wav2img(x))
    x = x.flatten(2).transpose(1, 2)
    x = h.patch_embed.norm(x)
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
        q = rotate(split_heads(a.w_qs(x), d), r, 4096)
        k = rotate(split_heads(a.w_ks(x), d), r, 4096)
        v = split_heads(a.w_vs(x), d)
        x = a.layer_norm(x + a.fc(attend(q, k, v, mask)))
        y = ff.w_2(F.relu(ff.w_1(x)))
        x = ff.layer_norm(x + y)
    return x


def audio_tokens(model, windows, mask):
    """windows (B, W, L) and mask (B, W) of `padded` -> audio (B, S, C) and its mask (B, 1, 1, S)."""
    tokens = [encode(model.clap, clip) for clip in windows]
    tokens = torch.stack(tokens)  # (B, W, 64, C)
    mask = mask.repeat_interleave(tokens.shape[2], 1)
    mask = mask[:, None, None]
    x = tokens.flatten(1, 2)
    return audio_transformer(model.audio_transformer, x, mask), mask


# ------------------------------------------------------------------------------------------------------------
# Text


def rms_norm(module, x):
    x32 = x.float()
    mean = x32.pow(2).mean(-1, keepdim=True)
    x32 = x32 * torch.rsqrt(mean + module.eps)
    return module.weight * x32.to(x.dtype)


def gated_block(block, x, audio, mask):
    a, d = block.attn, block.d
    q = split_heads(a.to_q(a.norm(x)), d)
    k, v = a.to_kv(audio).chunk(2, -1)
    o = attend(q, split_heads(k, d), split_heads(v, d), mask)
    x = x + a.to_out(o) * block.attn_gate.tanh()
    return x + block.ff(x) * block.ff_gate.tanh()


def language_block(block, x, c, kv_cache):
    """kv_cache: [k, v] (B, H, positions so far, d), or [] at first; it grows by those of x (B, T, D)."""
    a, d = block.self_attn, c.d
    first = kv_cache[0].shape[2] if kv_cache else 0
    y = rms_norm(block.input_layernorm, x)
    q = rotate(split_heads(a.q_proj(y), d), d, c.rope_theta, first)
    k = rotate(split_heads(a.k_proj(y), d), d, c.rope_theta, first)
    v = split_heads(a.v_proj(y), d)
    if kv_cache:
        k = torch.cat([kv_cache[0], k], 2)
        v = torch.cat([kv_cache[1], v], 2)
    kv_cache[:] = k, v
    groups = c.heads // c.kv_heads
    k = k.repeat_interleave(groups, 1)
    v = v.repeat_interleave(groups, 1)
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    causal = causal.tril(first).to(x.device)
    x = x + a.o_proj(attend(q, k, v, causal))
    return x + block.mlp(rms_norm(block.post_attention_layernorm, x))


def text_states(model, ids, audio, mask, caches=None):
    """ids (B, T) -> (B, T, D) before the head."""
    lm = model.lm
    x = lm.embed_tokens(ids)
    for i, block in enumerate(lm.layers):
        if str(i) in model.xattn:
            x = gated_block(model.xattn[str(i)], x, audio, mask)
        x = language_block(block, x, lm.config, caches[i] if caches else [])
    return rms_norm(lm.norm, x)


def loss(model, ids, windows, mask, labels):
    """ids, labels (B, T); windows and mask of `padded` -> mean over the labels."""
    audio, mask = audio_tokens(model, windows, mask)
    x = text_states(model, ids, audio, mask)
    logits = model.lm.logits(x).float()  # (B, T, V)
    logits, targets = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


@torch.no_grad()
def greedy_tokens(model, ids, windows, mask):
    """Yield the tokens (B, 1) of greedy answers to ids (B, T), without end."""
    audio, mask = audio_tokens(model, windows, mask)
    caches = [[] for _ in model.lm.layers]
    while True:
        x = text_states(model, ids, audio, mask, caches)
        ids = model.lm.logits(x[:, -1:]).argmax(-1)
        yield ids
