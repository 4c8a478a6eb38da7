"""Cross-attention over time, for every token of an answer (python sample.py --timeline=out/clip).

The weights are the softmax of the queries and keys of every gated block, computed from the hidden states that
enter it: the same whatever attention backend answered.
"""
import json
import os

import torch

from data import encode_prompts, encode_text
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
        x = gated.attn.norm(x[0])
        q = gated.attn.to_q(x)
        q = q.view(-1, gated.heads, gated.d)  # (T, H, d)
        k = kv[i][0, :, 0]  # (N, H, d)
        scores = torch.einsum("thd,nhd->htn", q, k)
        scores = scores.float() / gated.d ** 0.5
        mean = scores.softmax(-1).mean(0)
        weights.append(mean)  # (T, N)

    ids = torch.tensor([ids], device=n_keys.device)
    model.forward_hidden(ids, kv, n_keys, inspect=inspect)
    bins = getattr(model.clap, "frequency_bins", 1)
    weights = torch.stack(weights).mean(0)
    weights = weights.view(ids.shape[1], len(windows), bins, -1)  # (T, W, bin, step)
    return weights.sum(2).flatten(1).cpu()


def attention_timeline(model, prompt, answer, windows, audio_kv=None):
    """-> {"tokens" of the answer, "weights" tokens x time steps, each from the position that predicts the
    token, "seconds" [start, end) of each step, "prompt", "answer", "sample_rate"}."""
    (before,) = encode_prompts(model.tokenizer, [prompt])
    (ids,) = encode_text(model.tokenizer, [answer])
    weights = cross_attention_weights(model, before + ids, windows, audio_kv)
    weights = weights[len(before) - 1:-1]
    length = model.audio_config["window_length"]
    hop = length - model.audio_config["window_overlap"]
    steps = weights.shape[1] // len(windows)  # of a window
    step = length / steps  # seconds
    window_starts = torch.arange(len(windows)) * hop
    step_starts = torch.arange(steps) * step
    starts = (window_starts[:, None] + step_starts).flatten()
    spans = torch.stack([starts, starts + step], 1)
    return {
        "prompt": prompt,
        "answer": answer,
        "sample_rate": model.audio_config["sample_rate"],
        "tokens": [model.tokenizer.decode([token]) for token in ids],
        "seconds": spans.tolist(),
        "weights": weights.tolist(),
    }


def timeline_figure(timeline, windows):
    """-> a matplotlib Figure: the log-mel, and under it tokens x seconds."""
    tokens, weights = timeline["tokens"], timeline["weights"]
    return log_mel_figure(windows, timeline["sample_rate"], weights[:MAX_TOKENS], tokens[:MAX_TOKENS])


def write_timeline(base, timeline, windows):
    """<base>.json and, with matplotlib, <base>.png."""
    os.makedirs(os.path.dirname(base) or ".", exist_ok=True)
    with atomic_write(base + ".json") as f:
        json.dump(timeline, f, ensure_ascii=False)
    figure = timeline_figure(timeline, windows)
    title = f"{timeline['prompt']} {timeline['answer']}"
    figure.suptitle(plain_label(title, 100))
    with atomic_write(base + ".png", "wb") as f:
        f.write(png_bytes(figure, dpi=110))
