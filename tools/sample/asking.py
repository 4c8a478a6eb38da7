"""Between a question and its answer: what sample.py and its page (tools/sample/page.py) share."""
import json
import os
import re

import torch

from data import read_clip, window_counts
from tools.common import UserError
from tools.sample.decoding import Sampling, answer, hear, text_of, tokens


def sampling(c):
    """The settings of a Sampling among those of a script."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "answer_prefix")
    return {name: getattr(c, name) for name in names}


def load_clips(paths, model):
    """-> windows (sum W, L) int16, n_windows (clips,), and of each clip the seconds that are not heard."""
    clips = [read_clip(path, **model.audio_config) for path in paths]
    windows = [torch.from_numpy(clip) for clip, _ in clips]
    return torch.cat(windows), torch.tensor([len(w) for w in windows]), [seconds for _, seconds in clips]


def hear_clips(windows, n_windows, model):
    """Keys and values of the clips of one prompt, for every question about them."""
    with torch.no_grad():
        return hear(model.eval(), windows, window_counts([n_windows.tolist()]))


def read_questions(path):
    """The lines of a JSONL file, {"path": str or list, "prompt": str, ...}; every one checked before any is
    answered. A path that is not there is looked for beside the file."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    questions = []
    for number, line in enumerate(open(path), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            paths = [item["path"]] if isinstance(item["path"], str) else item["path"]
            good = isinstance(item["prompt"], str) and paths and all(isinstance(p, str) for p in paths)
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            expected = '{"path": clip or list of clips, "prompt": text}'
            raise UserError(f"{path} line {number}: expected {expected}, got {line.strip()[:80]}")
        beside = [os.path.join(os.path.dirname(path), p) for p in paths]
        places = [b if not os.path.exists(p) and os.path.exists(b) else p for p, b in zip(paths, beside)]
        questions.append((item, places))
    return questions


def concluded(model, item, text, how, heard=None):
    """A reasoning answer that ends without its conclusion is cut at the last sentence and asked for it."""
    if "<conclusion>" in text.lower():
        return text
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", text)]
    prefix = f"{text[:ends[-1]] if ends else text} <conclusion>"
    return dict(answer(model, [item], 1, heard=heard, **how | {"answer_prefix": prefix}))[0]


def growing(model, item, heard, c):
    """An answer, longer and longer, as its tokens come."""
    ids, text, how = [], "", sampling(c)
    for step in tokens(model, [item], 1, Sampling(**how), heard):
        ids += [t for t in step.values() if t >= 0]
        text = text_of(model, ids, c.answer_prefix)
        if not text.endswith("\ufffd"):  # a character may be several tokens: wait until it is whole
            yield text
    text = text_of(model, ids, c.answer_prefix)
    yield concluded(model, item, text, how, heard) if c.reasoning else text
