"""Files of questions and answers: JSONL of any system, MMAU's official JSON, and the cache of answers.

An item is a dict of a manifest's keys and "answer", the system's; FIELDS are the keys that scoring reads.
"""
import glob
import hashlib
import json
import os
from string import ascii_uppercase
from tempfile import TemporaryDirectory

from data import Manifest
from tools.common import (UserError, atomic_write, parse_json_line, read_json, read_json_lines,
                          read_json_object)
from tools.eval.parsing import answer_text

FIELDS = {"prompt": ("text",), "answer": ("text",),
          "output": ("text",),  # the reference answer
          "references": ("list of texts",),  # several reference answers (captions)
          "choices": ("list of texts",),  # options, where the prompt does not list them
          "audio": ("text", "list of texts"),  # the clip: questions about one clip belong together
          "question": ("text",), "audio_id": ("text",)}  # of MMAU
OTHER_NAMES = {"reference": "output", "path": "audio"}
# Keys that make sub-categories: those of MMAU, MuChoMusic, CMM and Audio Entailment
GROUPS = ("task", "category", "sub-category", "sub_category", "granularity", "difficulty", "dataset",
          "Dataset", "genre", "music_knowledge", "music_reasoning")


def kind_of(value):
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return "list of texts"
    return "text" if isinstance(value, str) else type(value).__name__


def check_item(item, where, required=("prompt", "output", "answer")):
    """The item under the names of FIELDS; UserError names the file, the line or item, and the wrong key."""
    if not isinstance(item, dict):
        raise UserError(f"{where}: a {kind_of(item)}, expected an object with {', '.join(required)}")
    item = dict(item)
    for other, key in OTHER_NAMES.items():
        if other in item:
            item.setdefault(key, item[other])
    if isinstance(item.get("output"), list):
        item["references"] = item.pop("output")
    if kind_of(item.get("references")) == "list of texts":
        item.setdefault("output", "".join(item["references"][:1]))
    if item.get("answer", "") is None:  # the system gave none
        item["answer"] = ""
    for key, kinds in FIELDS.items():
        if key not in item and key in required:
            raise UserError(f"{where}: no {key!r}, expected {', '.join(required)}")
        if key in item and kind_of(item[key]) not in kinds:
            raise UserError(f"{where}: {key!r} is a {kind_of(item[key])}, expected a {' or '.join(kinds)}")
    return item


def read_answers(path):
    """Checked items of an answer file: JSON lines with the keys of FIELDS and any others, or MMAU's official
    results."""
    items = []
    if is_official(path):
        for i, question in enumerate(read_questions(path)):
            answer = question.get("model_output") or question.get("model_prediction")
            item = question | {"id": i, "audio": question["name"], "answer": answer}
            items.append(check_item(item, f"{path}: item {i}"))
        return items
    for number, line in read_json_lines(path):
        if number > 1 or {"prompt", "answer"} & set(line):  # else the header of results
            items.append(check_item({"id": len(items)} | line, f"{path} line {number}"))
    if not items:
        raise UserError(f"{path}: holds no answer")
    return items


def write_json(path, content):
    """Whole, or not at all."""
    with atomic_write(path) as f:
        json.dump(content, f, ensure_ascii=False, allow_nan=False, indent=1)


def write_items(path, items):
    """A JSON object a line, whole or not at all."""
    with atomic_write(path) as f:
        for item in items:
            f.write(json.dumps(item, ensure_ascii=False, allow_nan=False) + "\n")


def read_labels(path):
    """The labels of a file, one a line; None without a file."""
    if not path:
        return None
    with open(path, encoding="utf-8-sig") as f:
        return [line.strip() for line in f if line.strip()]


def read_scores(path):
    """{"tasks": {split: row}, ...} of a JSON file that rows can be added to."""
    return {"tasks": {}} | (read_json_object(path) if os.path.exists(path) else {})


def add_scores(path, rows):
    """Add the rows to a file of scores, whole or not at all."""
    scores = read_scores(path)
    scores["tasks"] |= rows
    write_json(path, scores)


# ------------------------------------------------------------------------------------------------------------
# MMAU's official JSON: a list of {"id", "audio_id", "question", "choices", "answer", ...}


def is_official(path):
    """Whether the file is a JSON list, not an object or lines."""
    with open(path, encoding="utf-8-sig") as f:
        return f.read(64).lstrip().startswith("[")


def read_questions(path):
    """The official list with prompt, output and name added. The test split has no answers: its
    outputs are empty."""
    questions = []
    for i, entry in enumerate(read_json(path)):
        question = check_item(entry, f"{path}: item {i}", required=("question", "choices", "audio_id"))
        options = [f"({letter}) {choice}" for letter, choice in zip(ascii_uppercase, question["choices"])]
        lines = [f"{question['question']} Choose the correct option from the following options:", *options]
        questions.append(question | {"prompt": "\n".join(lines), "output": question.get("answer", ""),
                                     "name": os.path.normpath(question["audio_id"])})
    return questions


def open_questions(path, name, data_root):
    """The official file as a Manifest, by way of a temporary copy in a manifest's form."""
    questions, folder = read_questions(path), TemporaryDirectory()
    content = {"split": "test", "split_path": ".", "flamingo_task": "MMAU", "total_num": len(questions),
               "data": dict(enumerate(questions))}
    copy = os.path.join(folder.name, name + ".json")
    os.makedirs(os.path.dirname(copy))
    with open(copy, "w") as f:
        json.dump(content, f)
    manifest = Manifest(copy, data_root)
    manifest.file, manifest.temporary_folder = path, folder  # which lives as long as the manifest
    return manifest


def write_official(path, questions, items):
    """Results in the official form: model_prediction, which its README asks for, and model_output, which its
    script reads; empty where there is no answer, because that script leaves out items without the key."""
    rows = []
    for question, item in zip(questions, items):
        answer = answer_text(item)
        row = {key: value for key, value in question.items() if key not in ("name", "prompt", "output")}
        rows.append(row | {"model_output": answer, "model_prediction": answer})
    write_json(path, rows)


# ------------------------------------------------------------------------------------------------------------
# The cache of answers: <stem>.cache<rank>.jsonl, only ever appended to, so that a kill leaves whole lines and
# at most a torn one. An answer's key is a hash of all that it depends on.


def answer_key(identity, item):
    """identity: weights, dtype, token limit and audio settings; item: of a Manifest. The prompt, the audio
    files with size and time, and the part of them count."""
    try:
        stats = [os.stat(path) for path in item["paths"]]
        files = [(stat.st_size, int(stat.st_mtime)) for stat in stats]
    except OSError:  # unreadable, which is an answer too, until the file is there
        files = None
    parts = [identity, files, *(item[key] for key in ("paths", "start", "duration", "prompt"))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def read_cache(stem):
    """{key: {"answer", ...}} of all ranks' files."""
    cached = {}
    for file in sorted(glob.glob(f"{glob.escape(stem)}.cache*.jsonl")):
        with open(file, "rb") as f:
            entries = [parse_json_line(line) for line in f]
        cached |= {entry.pop("key"): entry for entry in entries if entry}
    return cached


def append_answer(f, key, answer):
    """After a newline: the last line of a killed run may be torn."""
    f.write("\n" + json.dumps({"key": key} | answer, ensure_ascii=False))
    f.flush()


def item_of(manifest, i, cached):
    """The item that scoring reads: question i of the manifest as it is now, with its cached answer."""
    clip = manifest[i]
    item = manifest.items[i] | {"id": i, "audio": clip["path"], "start": clip["start"]}
    return check_item(item | cached, f"{manifest.file}: item {i}")
