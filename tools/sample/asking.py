"""From paths of clips and questions about them to the items of decoding.py; for sample.py and its page."""
import os
from dataclasses import fields

import torch

from data import read_clip, truncation_warning
from tools.common import UserError, read_json_lines
from tools.sample.decoding import Sampling


def sampling_of(c):
    """The Sampling that a script's settings ask for."""
    return Sampling(**{field.name: getattr(c, field.name) for field in fields(Sampling)})


def load_item(prompt, paths, model):
    """A prompt and its clips -> an item of decoding.py, windows in int16, and the seconds of each clip that
    are beyond the model's windows."""
    clips = [read_clip(path, **model.audio_config) for path in paths]
    windows = [torch.from_numpy(windows) for windows, _ in clips]
    return (prompt, torch.cat(windows), list(map(len, windows))), [seconds for _, seconds in clips]


def truncation_note(seconds, model):
    """One line about the clips that load_item truncated; '' if none."""
    return truncation_warning(len(seconds), sum(s > 0 for s in seconds), sum(seconds), model.audio_config)


def read_questions(path):
    """JSONL of {"path": str or list, "prompt": str, ...} -> [(question, paths of its clips)]. A path that
    does not exist is looked for in the folder of the file. UserError names the first wrong line."""
    questions = []
    for number, question in read_json_lines(path):
        names = question.get("path")
        names = names if isinstance(names, list) else [names]
        if not names or not all(isinstance(text, str) for text in [*names, question.get("prompt")]):
            raise UserError(f"{path} line {number}: expected path, a clip or list of clips, and prompt, text")
        folder = os.path.dirname(path)
        paths = [name if os.path.exists(name) else os.path.join(folder, name) for name in names]
        questions.append((question, paths))
    return questions
