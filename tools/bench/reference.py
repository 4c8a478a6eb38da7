"""A training step written the published way, on the weights of an AudioFlamingo: windows padded to those of
the longest clip and encoded clip by clip, score matrices everywhere, the head at every position, weights in
float32. The independent version that ours is compared with, in value and in time (tools/bench.py train)."""
import math

import torch
import torch.nn.functional as F

from model import log_mel, naive_attention, to_float


def padded(windows, n_windows):
    """-> windows (B, W, L) float32 and their mask (B, W), as the published loader hands them over."""
    mask = (torch.arange(int(n_windows.max())) < n_windows[:, None]).to(windows.device)
    x = windows.new_zeros(*mask.shape, windows.shape[1], dtype=torch.float32)
    x[mask] = to_float(windows)
    return x, mask


def norm(module, x):
    x32 = x.float()
    return module.weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + module.eps)).to(x.dtype)


def rotate(x, r, base):
    """x (B, H, T, d), the first r channels turned by position."""
    angle = torch.arange(x.shape[2])[:, None] / base ** (torch.arange(0, r, 2) / r)
    cos, sin = (torch.cat([f(angle)] * 2, -1).to(x.device) for f in (torch.cos, torch.sin))
    head, rest = x[..., :r].float(), x[..., r:]
    turned = torch.cat([-head[..., r // 2:], head[..., :r // 2]], -1)
    return torch.cat([(head * cos + turned * sin).to(x.dtype), rest], -1)


def attend(q, k, v, seen):
    scores = (q @ k.transpose(2, 3)) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1) @ v


def encode(clap, windows):
    """One clip's windows (W, L) -> (W, 64, C), by laion-clap's own blocks."""
    h = clap.htsat
    x = h.bn0(log_mel(windows).transpose(1, 2)[..., None]).permute(0, 3, 2, 1)
    x = h.patch_embed.norm(h.patch_embed.proj(h.reshape_wav2img(x)).flatten(2).transpose(1, 2))
    for stage in h.layers:
        x, _ = stage(x)
    x = h.norm(x)
    n, S, C = x.shape
    return x.view(n, h.freq_ratio, -1, math.isqrt(S), C).transpose(1, 2).reshape(n, S, C)


def mix(transformer, x, seen):
    """The audio transformer on padded tokens (B, S, C)."""
    x = transformer.layer_norm(transformer.scale * x)
    for layer in transformer.layer_stack:
        a = layer.slf_attn
        q, k, v = (w(x).unflatten(-1, (a.n_head, -1)).transpose(1, 2) for w in (a.w_qs, a.w_ks, a.w_vs))
        q, k = (rotate(y, transformer.rotary_dim, 4096.0) for y in (q, k))
        x = a.layer_norm(x + a.fc(attend(q, k, v, seen).transpose(1, 2).flatten(2)))
        f = layer.pos_ffn
        x = f.layer_norm(x + f.w_2(F.relu(f.w_1(x))))
    return x


def block(b, x, c):
    y, a = norm(b.input_layernorm, x), b.self_attn
    q, k, v = (w(y).unflatten(-1, (-1, c.d)).transpose(1, 2) for w in (a.q_proj, a.k_proj, a.v_proj))
    q, k = rotate(q, c.d, c.rope_theta), rotate(k, c.d, c.rope_theta)
    k, v = (y.repeat_interleave(c.heads // c.kv_heads, 1) for y in (k, v))
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    x = x + a.o_proj(attend(q, k, v, causal).transpose(1, 2).flatten(2))
    return x + b.mlp(norm(b.post_attention_layernorm, x))


def loss(model, ids, windows, mask, labels):
    """ids, labels (B, T); windows (B, W, L) padded, mask (B, W) True where real -> mean over labels."""
    tokens = torch.stack([encode(model.clap, clip) for clip in windows])  # (B, W, 64, C)
    n_keys = mask.sum(1) * tokens.shape[2]
    seen = mask.repeat_interleave(tokens.shape[2], 1)[:, None, None]  # (B, 1, 1, S)
    audio = mix(model.audio_transformer, tokens.flatten(1, 2), seen)
    lm, x = model.lm, model.lm.embed_tokens(ids)
    for i, b in enumerate(lm.layers):
        if str(i) in model.xattn:
            g = model.xattn[str(i)]
            q = g.attn.to_q(g.attn.norm(x)).unflatten(-1, (g.heads, g.d))
            k, v = g.attn.to_kv(audio).unflatten(-1, (2, g.heads, g.d)).unbind(2)
            x = x + g.attn.to_out(naive_attention(q, k, v, n_keys, g.attn_gate).flatten(2))
            x = x + g.ff(x) * g.ff_gate.tanh()
        x = block(b, x, lm.config)
    logits = lm.logits(norm(lm.norm, x)).float()  # (B, T, V)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
