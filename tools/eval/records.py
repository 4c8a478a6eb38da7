"""Files of questions and answers: JSONL of any system, MMAU's official JSON as questions and as results."""
import json
import os
from tempfile import TemporaryDirectory

import config as settings
from tools.common import UserError, atomic_write, check_folder_writable, check_writable, read_json
from tools.eval.parsing import said
from tools.eval.results import GROUPS, read_scores

KEPT = ("output", "choices", "references", "audio_start", *GROUPS)  # what a manifest's item tells the rules
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def is_official(path):
    """A JSON list instead of an object or of lines: MMAU's question file, or results in its form."""
    with open(path) as f:
        return f.read(64).lstrip().startswith("[")


def read_questions(path):
    """The official list of {"id", "audio_id", "question", "choices", "answer", …} with prompt, output, name
    added.

    The test split has no answers: its outputs are empty. ValueError names the item and the key that is
    wrong."""
    questions = read_json(path)
    for i, question in enumerate(questions):
        for key, kind in (("question", str), ("choices", list), ("audio_id", str)):
            if not isinstance(question, dict) or not isinstance(question.get(key), kind):
                raise UserError(f"{path}: item {i} has no {key!r}, expected a {kind.__name__}")
        options = "\n".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, question["choices"]))
        ask = "Choose the correct option from the following options:"
        question["prompt"] = f"{question['question']} {ask}\n{options}"
        question["output"] = str(question.get("answer") or "")
        question["name"] = os.path.normpath(question["audio_id"])
    return questions


def open_questions(path, name, open_manifest):
    """The official file as open_manifest opens it, from a copy in a manifest's form that lives as long as it
    does."""
    questions = read_questions(path)
    split = str(questions[0].get("split") or "test") if questions else "test"
    folder = TemporaryDirectory()
    file = os.path.join(folder.name, name.removesuffix(".json").strip("/") + ".json")
    os.makedirs(os.path.dirname(file), exist_ok=True)
    with open(file, "w") as f:
        json.dump({"split": split if split.startswith("test") else "test", "split_path": ".",
                   "flamingo_task": "MMAU", "total_num": len(questions),
                   "data": {str(i): question for i, question in enumerate(questions)}}, f)
    manifest = open_manifest(file)
    manifest.file, manifest.folder_of_copy = path, folder
    return manifest


def write_official(path, questions, items):
    """Results in the official form: model_prediction, which its README asks for, and model_output, which its
    script reads. Questions without an answer stand in it, empty: that script would leave them out of its
    total."""
    rows = []
    for question, item in zip(questions, items):
        row = {key: value for key, value in question.items() if key not in ("name", "prompt", "output")}
        rows.append(row | {"model_output": said(item), "model_prediction": said(item)})
    with atomic_write(path) as f:
        json.dump(rows, f, ensure_ascii=False, indent=2)


def check_places(c, folder):
    """What eval.py reads and writes at the end is told before the long work if it can't be."""
    if folder:
        check_folder_writable(folder)
    if c.scores:
        check_writable(settings.resolve_path(c.scores))
        read_scores(settings.resolve_path(c.scores))
    if c.labels:
        read_labels(c.labels)


def read_labels(path):
    """The labels of a file, one a line, or of a JSON list."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file of labels")
    with open(path) as f:
        text = f.read()
    found = read_json(path) if text.lstrip().startswith("[") else text.splitlines()
    if wrong := [label for label in found if not isinstance(label, str)]:
        raise UserError(f"{path}: {wrong[0]!r} is a {type(wrong[0]).__name__}, expected a label")
    return [label.strip() for label in found if label.strip()]


def write_items(path, items, header=None):
    """A header, if there is one, and a JSON line an item, whole or not at all."""
    with atomic_write(path) as f:
        f.write(json.dumps(header) + "\n" if header else "")
        for item in items:
            told = {} if said(item) == (item["answer"] or "").strip() else {"conclusion": said(item)}
            f.write(json.dumps(item | told, ensure_ascii=False, allow_nan=False) + "\n")


def read_answers(path):
    """Items of any system: lines of {"prompt", "output" or "reference" or "references", "answer"}, other keys
    kept; or MMAU's official results. ValueError names the line and the key."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file of answers")
    if is_official(path):
        return [question | {"id": i, "audio": question["name"],
                            "answer": question.get("model_output") or question.get("model_prediction") or ""}
                for i, question in enumerate(read_questions(path))]
    items = []
    with open(path) as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                item = _read_line(line, f"{path} line {number}", first=number == 1)
                if item is not None:
                    items.append({"id": len(items)} | item)
    if not items:
        raise UserError(f"{path}: holds no answer")
    return items


def _read_line(line, where, first):
    try:
        item = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    if not isinstance(item, dict):
        raise UserError(f'{where}: a {type(item).__name__}, expected {{"prompt", "output", "answer"}}')
    if first and not {"prompt", "answer", "output", "reference", "references"} & set(item):
        return None  # the header of kept answers: what was run, not an item
    for key in ("output", "reference"):
        if isinstance(item.get(key), list) and "references" not in item:
            item["references"] = item.pop(key)
    if isinstance(item.get("references"), list) and item["references"] and "output" not in item:
        item["output"] = item["references"][0]
    if "output" not in item and "reference" in item:
        item["output"] = item.pop("reference")
    if "path" in item:  # as sample.py calls it
        item.setdefault("audio", item["path"])
    if item.get("answer", "") is None:  # a system that gave none
        item["answer"] = ""
    for key, name in (("prompt", "'prompt'"), ("output", "'output' or 'reference'"), ("answer", "'answer'")):
        if key not in item:
            raise UserError(f"{where}: no {name}")
        if not isinstance(item[key], str):
            raise UserError(f"{where}: {name} is a {type(item[key]).__name__}, expected a str")
    if not all(isinstance(text, str) for text in item.get("references", [])):
        raise UserError(f"{where}: 'references' holds something that is not a str")
    return item
