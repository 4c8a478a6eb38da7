"""From paths of clips and questions about them to what tools/sample/decoding.py takes; for sample.py and its page."""
import os
from dataclasses import fields

import torch

from data import read_clip, truncation_warning
from tools.common import UserError, read_json_lines
from tools.sample.decoding import Sampling


def sampling_of(c):
    """The Sampling that a script's settings ask for."""
    return Sampling(**{field.name: getattr(c, field.name) for field in fields(Sampling)})


def load_clips(paths, model):
    """The clips of one prompt -> windows (sum W, L) int16, the number of windows of each clip, and the seconds of
    each that are beyond the model's windows."""
    clips = [read_clip(path, **model.audio_config) for path in paths]
    windows = torch.cat([torch.from_numpy(clip) for clip, _ in clips])
    return windows, [len(clip) for clip, _ in clips], [seconds for _, seconds in clips]


def truncation_note(seconds, model):
    """One line about the clips that load_clips truncated; '' if none."""
    return truncation_warning(len(seconds), sum(s > 0 for s in seconds), sum(seconds), model.audio_config)


def read_questions(path):
    """JSONL of {"path": str or list, "prompt": str, ...} -> [(question, paths of its clips)]. A relative path means
    the working directory, or the folder of the file if it is there alone. UserError names the first wrong line."""
    questions = []
    for number, question in read_json_lines(path):
        names, prompt = question.get("path"), question.get("prompt")
        names = [names] if isinstance(names, str) else names
        if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names + [prompt])):
            raise UserError(f'{path} line {number}: expected {{"path": clip or list of clips, "prompt": text}}')
        questions.append((question, [name if os.path.exists(name) else beside(path, name) for name in names]))
    return questions


def beside(file, name):
    """The path of a name in the folder of a file, if it is there; else the name as it is."""
    path = os.path.join(os.path.dirname(file), name)
    return path if os.path.exists(path) else name
