"""Cross-attention over time, for every token of an answer (python sample.py --timeline=out/clip).

The weights are the softmax of the queries and keys of every gated block, computed from the hidden states that
enter it: the same whatever attention backend answered.
"""
import json

import torch

from data import encode_prompts
from tools.common import atomic_write
from tools.html_page import log_mel_figure, plain_label, png_bytes
from tools.sample.decoding import encode_audio_kv

MAX_TOKENS = 60  # rows of the picture


@torch.no_grad()
def cross_attention_weights(model, ids, windows, audio_kv=None):
    """ids [T] of a text about one clip, windows (W, L) -> (T, time steps of all windows): the mean over gated
    blocks, heads and frequency bins; rows sum to 1. audio_kv: of the clip, if it was encoded before."""
    item = "", windows, [len(windows)]
    kv, n_keys = audio_kv or encode_audio_kv(model, [item])
    weights = []

    def inspect(i, x):
        gated = model.xattn[str(i)]
        q = gated.attn.to_q(gated.attn.norm(x[0]))
        q = q.view(-1, gated.heads, gated.d)  # (T, H, d)
        k = kv[i][0, :, 0]  # (N, H, d)
        scores = torch.einsum("thd,nhd->htn", q, k)
        scores = scores.float() / gated.d ** 0.5
        weights.append(scores.softmax(-1).mean(0))  # (T, N)

    ids = torch.tensor([ids], device=n_keys.device)
    model.forward_hidden(ids, kv, n_keys, inspect=inspect)
    bins = getattr(model.clap, "frequency_bins", 1)
    weights = torch.stack(weights).mean(0)
    weights = weights.view(ids.shape[1], len(windows), bins, -1)  # (T, W, bin, step)
    return weights.sum(2).flatten(1).cpu()


def attention_timeline(model, prompt, answer, windows, audio_kv=None):
    """-> {"tokens" of the answer, which are its text, "weights" tokens x time steps, each from the position
    that predicts the token, "seconds" [start, end) of each step, "prompt", "answer", "sample_rate"}. Tokens
    that are bytes of one character count as one, with the mean of their weights."""
    (before,) = encode_prompts(model.tokenizer, [prompt])
    ids = model.tokenizer(answer, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    weights = cross_attention_weights(model, before + ids, windows, audio_kv)
    weights = weights[len(before) - 1:-1]
    tokens, rows, shown, first = [], [], "", 0
    for end in range(1, len(ids) + 1):
        text = model.tokenizer.decode(ids[:end])
        if end == len(ids) or not text.endswith("\ufffd"):
            tokens.append(text[len(shown):])
            rows.append(weights[first:end].mean(0).tolist())
            shown, first = text, end
    length = model.audio_config["window_length"]
    hop = length - model.audio_config["window_overlap"]
    steps = weights.shape[1] // len(windows)  # of a window
    step = length / steps  # seconds
    starts = [w * hop + k * step for w in range(len(windows)) for k in range(steps)]
    return {
        "prompt": prompt,
        "answer": answer,
        "sample_rate": model.audio_config["sample_rate"],
        "tokens": tokens,
        "seconds": [[start, start + step] for start in starts],
        "weights": rows,
    }


def timeline_figure(timeline, windows):
    """-> a matplotlib Figure: the log-mel, and under it tokens x seconds."""
    tokens, weights = timeline["tokens"], timeline["weights"]
    return log_mel_figure(windows, timeline["sample_rate"], weights[:MAX_TOKENS], tokens[:MAX_TOKENS])


def write_timeline(base, timeline, windows):
    """<base>.json and, with matplotlib, <base>.png."""
    with atomic_write(base + ".json") as f:
        json.dump(timeline, f, ensure_ascii=False)
    figure = timeline_figure(timeline, windows)
    title = f"{timeline['prompt']} {timeline['answer']}"
    figure.suptitle(plain_label(title, 100))
    with atomic_write(base + ".png", "wb") as f:
        f.write(png_bytes(figure, dpi=110))
