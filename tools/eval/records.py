"""Files of questions and answers: JSON lines or a JSON list of any system, the forms of MMAU and MuChoMusic,
and the cache of answers.

An item has "prompt", "output" (the reference answer) and "answer" (the system's); "references" where there
are several, "choices" where options need not stand in the prompt, "audio" (a clip, or a list of them:
questions about one clip belong together), "start" (seconds), "id", "score", and sub-categories. Other keys
are kept as they are.
"""
import ast
import glob
import hashlib
import json
import os
import re
import sys
from string import ascii_uppercase
from tempfile import TemporaryDirectory

from data import Manifest
from tools.common import (UserError, atomic_write, join_names, parse_json_line, read_json, read_json_lines,
                          read_json_object)
from tools.eval.parsing import answer_text, item_options, labels_of, normalise

# Keys that make sub-categories: those of MMAU, MuChoMusic, CMM and Audio Entailment
GROUPS = ("task", "category", "sub-category", "sub_category", "granularity", "difficulty", "dataset",
          "Dataset", "genre", "music_knowledge", "music_reasoning", "knowledge", "reasoning")
# Types of the keys that hold one value, and the keys that may hold a list, of texts and numbers. None of
# them may be a bool.
PLAIN, NUMBER = {str, int, float}, {int, float, type(None)}
FIELDS = {"prompt": {str}, "answer": {str, *NUMBER}, "id": {str, *NUMBER}, "start": NUMBER, "score": NUMBER}
LISTS = ("audio", "choices", "output", "references", *GROUPS)
OTHER_NAMES = {"reference": "output", "references": "output", "path": "audio", "paths": "audio",
               "audio_path": "audio", "audio_start": "start"}
# Forms of answers: the keys that they have, those that they lack, and their names of an item's keys
MMAU, MUCHOMUSIC, OURS = "MMAU's", "MuChoMusic's", "'output' is the reference, 'answer' the answer"
FORMS = {MMAU: ({"question", "choices", "audio_id"}, {"prompt", "output"},
                {"prompt": "question", "output": "answer", "answer": "model_output", "audio": "audio_id"}),
         MUCHOMUSIC: ({"answers", "answer_orders"}, {"choices"},
                      {"choices": "answers", "output": "answers", "answer": "model_output"}),
         "'reference' is the reference, 'output' the answer": (
             {"output", "reference"}, {"answer"}, {"output": "reference", "answer": "output"}),
         "'references' are the references, 'output' is the answer": (
             {"output", "references"}, {"answer"}, {"output": "references", "answer": "output"}),
         OURS: (set(), set(), {})}
INSTRUCTION = "Choose the correct option from the following options:"  # of MMAU
NUMBERED = re.compile(r"(?<![\w.])1\s?[).:\]].*(?<![\w.])2\s?[).:\]]", re.S)  # a prompt with options 1. 2.

# ------------------------------------------------------------------------------------------------------------
# One item


def refuse(where, key, value, expected):
    raise UserError(f"{where}: {key!r} is {json.dumps(value)[:80]}, expected {expected}")


def plain_json(value):
    """A copy that can be written: NaN and Infinity become null, half a surrogate pair becomes "?"."""
    text = json.dumps(value, ensure_ascii=False).encode(errors="replace")
    return json.loads(text, parse_constant=lambda name: None)


def to_list(value):
    """A list; of one value, or of none (null, "") where it is no list. Also the list that a cell of a table
    holds as text, of JSON, Python or numpy (which prints no commas)."""
    if isinstance(value, str) and value.startswith("["):
        commas = re.sub(r"(['\"])\s+(?=['\"])", r"\1, ", value)
        for read, text in ((json.loads, value), (ast.literal_eval, commas)):
            try:
                return read(text)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # as ast documents
                continue
    if isinstance(value, list):
        return value
    return [] if value in (None, "") else [value]


def option_text(value, item, key, where):
    """A reference or an answer as text. A number is the index of an option; without options, a text."""
    options = list(item_options(item))
    if isinstance(value, str) or not options:
        return str(value)
    indexed = options[int(value)] if value in range(len(options)) else None
    named = str(value) if str(value) in options else None
    if NUMBERED.search(item["prompt"]) or None not in (indexed, named) and indexed != named:
        refuse(where, key, value, "a text: the number is the index of one option, and the name of another")
    if key != "answer" and indexed is named is None:
        refuse(where, key, value, f"an option, or its index from 0 to {len(options) - 1}")
    return indexed or str(value)


def check_item(item, where):
    """The item as this module describes it; UserError names the file, the line or item, and the wrong key."""
    item = plain_json(item)
    for other, key in OTHER_NAMES.items():
        if other in item:
            item.setdefault(key, item[other])
    missing = [key for key in ("prompt", "output", "answer") if key not in item]
    if missing:
        raise UserError(f"{where}: no {', '.join(missing)}; expected prompt, output, answer, or in MMAU's "
                        "form question, choices, audio_id, or in MuChoMusic's answers, answer_orders")
    if isinstance(item["answer"], list) and len(item["answer"]) < 2:
        item["answer"] = [*item["answer"], None][0]
    for key, types in FIELDS.items():
        if type(item.get(key)) not in types:
            refuse(where, key, item[key], " or ".join(sorted(kind.__name__ for kind in types)))
    for key in LISTS:
        if not set(map(type, to_list(item.get(key)))) <= PLAIN:
            refuse(where, key, item[key], "a text, or a list of texts")
    choices = list(map(str, to_list(item.get("choices"))))
    if len(choices) == 1 or "" in choices:
        refuse(where, "choices", choices, "two or more texts")
    if "choices" in item:
        item["choices"] = choices
    found = {}
    for key in ("output", "references"):
        texts = [option_text(value, item, key, where) for value in to_list(item.get(key))]
        found[key] = [text for text in texts if text.strip()]
    item["references"] = found["references"] or found["output"]
    item["output"] = [*found["output"], *item["references"], ""][0]
    if len(item["references"]) < 2:
        del item["references"]
    answer = item["answer"]  # None: the system gave none
    item["answer"] = "" if answer is None else option_text(answer, item, "answer", where)
    return item


# ------------------------------------------------------------------------------------------------------------
# Files


def read_entry(where, entry):
    """-> the item of an entry of a file, and the entry's form."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: a {type(entry).__name__}, expected an object")
    keys = set(entry)
    form = next(form for form, (has, lacks, _) in FORMS.items() if has <= keys and not lacks & keys)
    item = entry | {key: entry.get(other) for key, other in FORMS[form][2].items()}
    if form == MMAU and item["answer"] is None:
        item["answer"] = entry.get("model_prediction")
    if form == MUCHOMUSIC:
        options, order = to_list(entry["answers"]), to_list(entry["answer_orders"])
        if order.count(0) != 1 or len(order) != len(options):
            refuse(where, "answer_orders", order, "the order of the answers, 0 for the right one")
        item["output"] = str(options[order.index(0)])
    item = check_item(item, where)
    if form == MMAU:
        item["prompt"] = item["prompt"].removesuffix(INSTRUCTION).rstrip() + " " + INSTRUCTION
        for letter, choice in zip(ascii_uppercase, item.get("choices", ())):
            item["prompt"] += f"\n({letter}) {choice}"
    words = re.findall(r"\w+", " ".join(item.get("choices", ())))
    if form == OURS and words and "score" not in item and not NUMBERED.search(item["prompt"]):
        for key in ("output", "answer"):  # an index as text, as tables have it
            if re.fullmatch(r"\d\d?", item[key]) and item[key] not in words:
                item[key] = option_text(int(item[key]), item, key, where)
    return item, form


def read_entries(path):
    """Yield (item, form, the entry itself) of JSON lines or of a JSON list."""
    if is_json_list(path):
        entries = [(f"{path}: item {i}", entry) for i, entry in enumerate(read_json(path))]
    else:
        entries = ((f"{path} line {number}", entry) for number, entry in read_json_lines(path))
    for where, entry in entries:
        if "identity" not in entry or "prompt" in entry:  # no header of results
            yield *read_entry(where, entry), entry


def read_answers(path):
    """The items of a file of answers; prints what was taken for the references and the answers."""
    items, forms = [], {}
    for item, form, _ in read_entries(path):
        items.append(item)
        forms[form] = forms.get(form, 0) + 1
    if not items:
        raise UserError(f"{path}: holds no answer")
    for form, n in forms.items():
        print(f"{path}: {n} items, {form}", file=sys.stderr)
    return items


def is_json_list(path):
    """Whether the file is a JSON list, not an object or lines."""
    with open(path, "rb") as f:
        return f.read(64).lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"[")


def write_json(path, content):
    """Whole, or not at all."""
    with atomic_write(path) as f:
        json.dump(plain_json(content), f, ensure_ascii=False, indent=1)


def write_items(path, items):
    """A JSON object a line, whole or not at all."""
    with atomic_write(path) as f:
        for item in items:
            f.write(json.dumps(item, ensure_ascii=False) + "\n")


def read_labels(path, items=(), several=False):
    """The labels of a file, one a line, or None without a file. UserError names labels of the items'
    references that the file lacks. several: an item may have more than one."""
    if not path:
        return None
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        labels = [line.strip() for line in f if line.strip()]
    with_comma = {normalise(label) for label in labels if "," in label}

    def units(text):
        return labels_of(text, with_comma) if several else {labels_of(text, with_comma)}

    known = set(map(normalise, labels)) if several else set().union(*map(units, labels))
    missing = set()
    for item in items:
        for text in item.get("references", [item["output"]]):
            if not units(text) <= known:
                missing.add(text)
    if missing or not labels:
        names = join_names(sorted(missing))
        raise UserError(f"{path}: lacks {len(missing)} labels of the references: {names}")
    return labels


def read_scores(path):
    """{"tasks": {split: row}, ...} of a JSON file that rows can be added to."""
    scores = read_json_object(path) if os.path.exists(path) else {"tasks": {}}
    if not isinstance(scores.get("tasks"), dict):
        raise UserError(f"{path}: no file of scores, which holds \"tasks\"")
    return scores


def add_scores(path, rows):
    """Add the rows to a file of scores, whole or not at all."""
    scores = read_scores(path)
    scores["tasks"] |= rows
    write_json(path, scores)


# ------------------------------------------------------------------------------------------------------------
# Question files: MMAU's official JSON is a list of {"id", "audio_id", "question", "choices", "answer", ...}


def read_questions(path):
    """The entries of such a file with prompt, output and name added. MMAU's test split has no answers: its
    outputs are empty."""
    questions = []
    for item, _, entry in read_entries(path):
        name = os.path.normpath(str(item["audio"]))
        questions.append(entry | {"prompt": item["prompt"], "output": item["output"], "name": name})
    return questions


def open_questions(path, name, data_root):
    """The file as the Manifest of that name, by way of a temporary copy in a manifest's form."""
    questions, folder = read_questions(path), TemporaryDirectory()
    content = {"split": "test", "split_path": ".", "flamingo_task": "MMAU", "total_num": len(questions),
               "data": dict(enumerate(questions))}
    copy = os.path.join(folder.name, "questions.json")
    write_json(copy, content)
    manifest = Manifest(copy, data_root)
    manifest.file, manifest.name = path, name
    manifest.temporary_folder = folder  # which lives as long as the manifest
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
    item = {"id": i} | manifest.items[i] | {"audio": clip["path"], "start": clip["start"]}
    return check_item(item | cached, f"{manifest.file}: item {i}")
