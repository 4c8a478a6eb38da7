"""From paths of clips and questions about them to the items of decoding.py, and files of questions and
answers; for sample.py and its page."""
import hashlib
import json
import os
import sys
from dataclasses import fields

import torch

from data import read_clip, truncation_warning
from tools.common import UserError, name_disk_errors, parse_json_line, read_json_lines
from tools.data.audio import find_file
from tools.sample.decoding import Sampling, encode_audio_kv


def sampling_of(c):
    """The Sampling that a script's settings ask for."""
    return Sampling(**{field.name: getattr(c, field.name) for field in fields(Sampling)})


def load_item(prompt, paths, model):
    """A prompt and its clips -> an item of decoding.py, windows in int16, and the seconds of each clip that
    are beyond the model's windows."""
    clips, seconds = [], []
    for path in paths:
        windows, truncated = read_clip(path, **model.audio_config)
        clips.append(torch.from_numpy(windows))
        seconds.append(truncated)
    return (prompt, torch.cat(clips), list(map(len, clips))), seconds


def load_clips(paths, model):
    """Clips to ask about -> windows, the numbers of them, audio keys and values, a note if one was
    truncated."""
    item, truncated = load_item("", paths, model)
    _, windows, counts = item
    return windows, counts, encode_audio_kv(model, [item]), truncation_note(truncated, model)


def truncation_note(seconds, model):
    """One line about the clips that load_item truncated; '' if none."""
    n_truncated = sum(s > 0 for s in seconds)
    return truncation_warning(len(seconds), n_truncated, sum(seconds), model.audio_config)


# ------------------------------------------------------------------------------------------------------------
# Files


def read_questions(path):
    """JSONL of {"path": str or list, "prompt": str, ...} -> [(question, paths of its clips)]. A path that
    does not exist is looked for in the folder of the file. UserError names the first wrong line."""
    questions, folder, answered = [], os.path.dirname(path), 0
    for number, question in read_json_lines(path):
        names = question.get("path")
        names = names if isinstance(names, list) else [names]
        expected = {"path, a clip or a list of clips": names, "prompt, a text": [question.get("prompt")]}
        for key, texts in expected.items():
            if not texts or not all(isinstance(text, str) for text in texts):
                raise UserError(f"{path} line {number}: {texts!r:.80}, expected {key}")
        paths = [name if os.path.exists(find_file(name)) else os.path.join(folder, name) for name in names]
        question.pop("error", None)  # of an earlier answer
        answered += "answer" in question
        questions.append((question, paths))
    if not questions:
        raise UserError(f"{path}: holds no question")
    if answered:
        print(f"{path}: {answered} questions hold an answer already, which is replaced", file=sys.stderr)
    return questions


def to_json_line(line):
    """Also of half a surrogate pair, which stays escaped: UTF-8 cannot encode it."""
    text = json.dumps(line, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace").decode()


def append_line(path, line):
    """To the end of a file, whose last line may have been torn."""
    with name_disk_errors(path), open(path, "a+b") as f:
        f.seek(max(0, f.tell() - 1))
        torn = f.read() not in (b"", b"\n")
        f.write(b"\n" * torn + to_json_line(line).encode())


def answer_key(identity, prompt, paths):
    """A hash of what an answer depends on: identity (weights and settings), prompt and clips, which count by
    name, size and time."""
    parts = [identity, prompt, paths]
    for path in filter(os.path.exists, map(find_file, paths)):
        parts += os.path.getsize(path), os.path.getmtime(path)
    text = json.dumps(parts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_part(part, keys):
    """{key: {"answer"}} of the lines that killed runs left in a file, where they have one of the keys."""
    kept, keys = {}, set(keys)
    with open(part, "a+b") as f:
        f.seek(0)
        lines = [parse_json_line(line) or {} for line in f]
    for line in lines:
        if str(line.get("key")) in keys:
            kept[line["key"]] = {"answer": line["answer"]}
    if lines:
        begin = "goes on" if kept else "begins anew"
        print(f"{part}: {begin}, {len(kept)} of its {len(lines)} lines are answers to these questions with "
              "these weights, settings and clips", file=sys.stderr)
    return kept
