"""Where in a recording the model listens, at every word of an answer (python sample.py --timeline=out/clip).

The weights are the softmax of q and k of every gated block, computed again from what the block is given: the
same whatever attention backend answered.
"""
import json
import os

import torch

from data import encode_prompts, encode_text
from tools.common import UserError, atomic_write
from tools.sample.decoding import hear


@torch.no_grad()
def listening(model, ids, windows, heard=None):
    """ids [T] of a text about one clip, windows (W, L) -> (T, time steps of all windows): the mean
    attention over gated blocks, heads and frequency bins; rows sum to 1. heard: see tools.sample.decoding.hear."""
    bins = getattr(model.clap, "frequency_bins", 1)
    kv, n_keys = heard or hear(model, windows, torch.tensor([len(windows)]))
    ids = torch.tensor([ids], device=n_keys.device)
    x, place, weights = model.lm.embed_tokens(ids), model.lm.positions(ids), []
    for i, block in enumerate(model.lm.layers):  # AudioFlamingo.forward_hidden, with a look at the weights on the way
        if i in kv:
            gated = model.xattn[str(i)]
            q = gated.attn.to_q(gated.attn.norm(x[0])).view(-1, gated.heads, gated.d)  # (T, H, d)
            scores = torch.einsum("thd,nhd->htn", q, kv[i][0, :, 0]).float() / gated.d ** 0.5
            weights.append(scores.softmax(-1).mean(0))
            x = gated(x, kv[i], n_keys, model.backend)
        x = block(x, place)
    weights = torch.stack(weights).mean(0).view(ids.shape[1], len(windows), bins, -1)  # (T, W, bin, step)
    return weights.sum(2).flatten(1).cpu()


def attention_over_time(model, prompt, windows):
    """Where it listens when it has read the prompt: a weight per time step, summing to 1."""
    return listening(model, encode_prompts(model.tokenizer, [prompt])[0], windows)[-1]


def timeline(model, prompt, answer, windows, heard=None):
    """-> {"words", "tokens" [first, end) of each, "seconds" [start, end) of each time step, "weights" words x
    steps, ...}: a word's row is the mean over its tokens, each as it was about to be said."""
    before = encode_prompts(model.tokenizer, [prompt])[0]
    (said,) = encode_text(model.tokenizer, [answer])
    weights = listening(model, before + said, windows, heard)[len(before) - 1:-1]  # as it was chosen
    words, spans = [], []
    for at in range(len(said)):
        piece = model.tokenizer.decode(said[:at + 1])[len(model.tokenizer.decode(said[:at])):]
        if not words or piece[:1].isspace():
            words.append("")
            spans.append([at, at])
        words[-1] += piece
        spans[-1][1] = at + 1
    steps = weights.shape[1] // len(windows)
    length, overlap = model.audio_config["window_length"], model.audio_config["window_overlap"]
    starts = [w * (length - overlap) + s * length / steps for w in range(len(windows)) for s in range(steps)]
    return {"prompt": prompt, "answer": answer, "words": [word.strip() for word in words], "tokens": spans,
            "seconds": [[round(start, 4), round(start + length / steps, 4)] for start in starts],
            "weights": [weights[a:b].mean(0).tolist() for a, b in spans],
            "sample_rate": model.audio_config["sample_rate"]}


def picture(told, windows, most=60):
    """-> a matplotlib Figure: the log-mel, and under it the first `most` words x seconds."""
    from matplotlib.figure import Figure

    from model import log_mel, to_float
    mel = log_mel(to_float(windows), told["sample_rate"]).flatten(0, 1).T  # (64, frames)
    seconds = told["seconds"][-1][1]
    words = [word.replace("$", r"\$") for word in told["words"][:most]]  # no formulas
    n = len(words)
    figure = Figure(figsize=(9, 3 + 0.25 * n), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True, height_ratios=[2, max(1, 0.25 * n)])
    axes[0].imshow(mel, origin="lower", aspect="auto", extent=(0, seconds, 0, 64), cmap="magma")
    axes[0].set(ylabel="mel band")
    if n:
        axes[1].imshow(told["weights"][:n], aspect="auto", extent=(0, seconds, n, 0), cmap="viridis")
    axes[1].set(xlabel="seconds heard", yticks=[i + 0.5 for i in range(n)], yticklabels=words)
    return figure


def write_timeline(base, told, windows):
    """<base>.json and, with matplotlib, <base>.png."""
    os.makedirs(os.path.dirname(base) or ".", exist_ok=True)
    with atomic_write(base + ".json") as f:
        json.dump(told, f, ensure_ascii=False)
    try:
        figure = picture(told, windows)
    except ModuleNotFoundError as error:
        raise UserError(f"{base}.json is written; the picture needs matplotlib: pip install -r "
                                  f"requirements-eval.txt") from error
    figure.suptitle(f"“{told['prompt']}” → “{told['answer'].strip()}”".replace("$", r"\$"), wrap=True)
    with atomic_write(base + ".png", "wb") as f:
        figure.savefig(f, format="png", dpi=110)
