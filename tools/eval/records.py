"""Files of questions and answers: JSON lines or a JSON list of any system, the forms of MMAU and MuChoMusic,
and the cache of answers.

An item has "prompt", "output" (the reference answer) and "answer" (the system's); "references" where there
are several, "choices" where options need not stand in the prompt, "audio" (a clip, or a list of them:
questions about one clip belong together), "start" (seconds), "id", "score", and sub-categories. Other keys
are kept as they are.
"""
import ast
import glob
import json
import os
import re
import sys
from itertools import chain
from string import ascii_uppercase
from tempfile import TemporaryDirectory

from data import Manifest
from tools.common import (UserError, atomic_write, decode_text, join_names, parse_json_line, read_json,
                          read_json_lines, read_json_object)
from tools.eval.parsing import answer_text, item_options, labels_of, normalise, references_of

# Keys that make sub-categories: those of MMAU, MuChoMusic, CMM and Audio Entailment
GROUPS = ("task", "category", "sub-category", "sub_category", "granularity", "difficulty", "dataset",
          "Dataset", "genre", "music_knowledge", "music_reasoning", "knowledge", "reasoning")
OTHER_NAMES = {"reference": "output", "references": "output", "path": "audio", "paths": "audio",
               "audio_path": "audio", "audio_id": "audio", "audio_start": "start",
               "model_prediction": "model_output"}
REFERENCES = ("references", "reference", "output")
PLAIN = {str, int, float}  # types of a text, and of a number that stands for one; bool does not
# A prompt with options 1. 2.
NUMBERED = re.compile(r"(?<![\w.])1\s?[).:\]．、：）].*(?<![\w.])2\s?[).:\]．、：）]|[①⑴⒈❶]|1\ufe0f?\u20e3",
                      re.S)
MMAU = "MMAU's form: references in 'answer', prompts in 'question', answers in 'model_output'"
MUCHOMUSIC = "MuChoMusic's form: choices in 'answers', answers in 'model_output'"
INSTRUCTION = "Choose the correct option from the following options:"  # of MMAU

# ------------------------------------------------------------------------------------------------------------
# One item


def refuse(where, key, value, expected):
    raise UserError(f"{where}: {key!r} is {value!r:.80}, expected {expected}")


def plain_json(value):
    """A copy that can be written: NaN and Infinity become null, half a surrogate pair becomes "?"."""
    text = json.dumps(value, ensure_ascii=False).encode(errors="replace")
    return json.loads(text, parse_constant=lambda name: None)


def to_list(value):
    """A list; of one value, or of none (null, "") where it is no list. Also the list that a cell of a table
    holds as text, of JSON, Python or numpy (which prints no commas)."""
    if isinstance(value, str) and value.strip().startswith("["):
        commas = re.sub(r"(['\"])\s+(?=['\"])", r"\1, ", value.strip())
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
    options, text, plain = list(item_options(item)), str(value), type(value) in PLAIN
    if isinstance(value, str) or plain and not options:
        return text
    if text not in options:  # a column of numbers with an empty cell has 2.0 for 2
        text = text.removesuffix(".0")
    indexed = options[int(value)] if plain and value in range(len(options)) else None
    named = text if text in options or plain and key not in REFERENCES else None
    ambiguous = text in options and indexed not in (None, text) or NUMBERED.search(item["prompt"])
    if ambiguous or not (indexed or named):
        refuse(where, key, value, "a text, or the index of an option (from 0), which is no option's text")
    return indexed or named


def read_index(text, item, key, where):
    """A text, or the option whose index it is, as tables have it ("2", "2.0")."""
    choices, index = item_options(item), re.fullmatch(r"\s*(\d\d?)(?:\.0)?\s*", text)
    if index and text.strip() not in choices:
        if index[1] not in re.findall(r"\w+", " ".join(choices)):
            return option_text(int(index[1]), item, key, where)
        if key == "output":  # "2 dogs", or the third option?
            refuse(where, key, text, "the text of an option")
    return text


def read_answer(value, item, key, where):
    """An answer as text, "" where the system gave none; it may be the only one of a list."""
    if isinstance(value, list) and len(value) < 2:
        value = [*value, None][0]
    return "" if value is None else option_text(value, item, key, where)


def check_item(item, where):
    """The item as this module describes it; UserError names the file, the line or item, and the wrong key."""
    item = plain_json(item)
    for other, key in OTHER_NAMES.items():
        if other in item and item.get(key) is None:
            item[key] = item[other]
    for key in ("prompt", "output", "answer"):
        if key not in item:
            raise UserError(f"{where}: no {key!r}, expected prompt, output, answer; or MMAU's question, "
                            "choices, audio_id; or MuChoMusic's answers, answer_orders")
    if not isinstance(item["prompt"], str):
        refuse(where, "prompt", item["prompt"], "a text")
    choices = to_list(item.get("choices"))
    if len(choices) == 1 or "" in choices or not set(map(type, choices)) <= PLAIN:
        refuse(where, "choices", item["choices"], "a list of two or more texts")
    if "choices" in item:
        item["choices"] = list(map(str, choices))
    texts = {}
    for key in REFERENCES:
        values = [option_text(value, item, key, where) for value in to_list(item.get(key))]
        texts[key] = [text for text in values if text.strip()]
    if texts["reference"] and set(texts["reference"]).isdisjoint(texts["output"]):
        refuse(where, "output", item["output"], "the text under 'reference', or no 'answer' beside both")
    item["references"] = texts["references"] or texts["output"]
    item["output"] = [*texts["output"], *item["references"], ""][0]
    item["answer"] = read_answer(item["answer"], item, "answer", where)
    return item


# ------------------------------------------------------------------------------------------------------------
# Files


def read_entry(where, entry):
    """-> the item of an entry of a file, and which form it has."""
    keys, changed, form = set(entry), {}, "references in 'output', answers in 'answer'"
    if {"answers", "answer_orders"} <= keys:
        form, options, order = MUCHOMUSIC, to_list(entry["answers"]), to_list(entry["answer_orders"])
        if 0 not in order or len(order) != len(options):
            refuse(where, "answer_orders", order, "the order of the answers, 0 for the right one")
        changed = {"choices": options, "output": str(options[order.index(0)]), "answer": None}
    elif {"question", "choices", "audio_id"} <= keys and not {"prompt", "output"} & keys:
        form = MMAU
        changed = {"prompt": entry["question"], "output": entry.get("answer"), "answer": None,
                   "choices": entry["choices"] or [""]}
    elif "output" in keys and "answer" not in keys and {"reference", "references"} & keys:
        form = "references in 'reference' or 'references', answers in 'output'"
        changed = {"answer": entry["output"], "output": entry.get("reference")}
    item = check_item(entry | changed, f"{where} ({form})" if changed else where)
    choices, prompt = item.get("choices", ()), item["prompt"]
    if form in (MMAU, MUCHOMUSIC):
        answer = item.get("model_output")
        if form == MUCHOMUSIC and isinstance(answer, str):  # as its script reads it
            answer = answer.split("The correct answer is:")[-1]
        item["answer"] = read_answer(answer, item, "model_output", where)
    elif item_options(item) and "score" not in item and not NUMBERED.search(prompt):
        item["references"] = [read_index(text, item, "output", where) for text in references_of(item)]
        item["output"] = [*item["references"], ""][0]
        if choices:
            item["answer"] = read_index(item["answer"], item, "answer", where)
    if form == MMAU:
        item["prompt"] = f"{prompt.removesuffix(INSTRUCTION).rstrip()} {INSTRUCTION}"
        for letter, choice in zip(ascii_uppercase, choices):
            item["prompt"] += f"\n({letter}) {choice}"
    return item, form


def read_entries(path):
    """-> the items of JSON lines or of a JSON list, and which forms they have."""
    items, forms, is_list = [], set(), is_json_list(path)
    for number, entry in enumerate(read_json(path)) if is_list else read_json_lines(path):
        where = f"{path}: item {number}" if is_list else f"{path} line {number}"
        if not isinstance(entry, dict):
            raise UserError(f"{where}: a {type(entry).__name__}, expected an object")
        if "identity" not in entry or "prompt" in entry:  # no header of results
            item, form = read_entry(where, entry)
            items.append(item)
            forms.add(form)
    return items, forms


def read_answers(path):
    """The items of a file of answers; prints what was taken for the references and the answers."""
    items, forms = read_entries(path)
    if not items:
        raise UserError(f"{path}: holds no answer")
    print(f"{path}: {len(items)} items, {'; '.join(sorted(forms))}", file=sys.stderr)
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


def read_labels(path, items=()):
    """The labels of a file, one a line, or None without a file. UserError names labels of the items'
    references that the file lacks."""
    if not path:
        return None
    labels = [line.strip() for line in decode_text(path).splitlines() if line.strip()]
    with_comma = {normalise(label) for label in labels if "," in label}
    missing = set()
    for text in chain.from_iterable(map(references_of, items)):
        missing |= labels_of(text, with_comma)
    for text in labels:
        missing -= labels_of(text, with_comma)
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
    """The items of such a file, with the name of their clip. MMAU's test split has no answers: its outputs
    are empty."""
    items, _ = read_entries(path)
    outputs = [(item["output"], item.get("choices")) for item in items]
    wrong = [output for output, choices in outputs if choices and output not in ("", *choices)]
    if wrong:
        print(f"Warning: {path}: {len(wrong)} answers are none of their choices, {join_names(wrong)}",
              file=sys.stderr)
    return [item | {"name": os.path.normpath(str(item.get("audio", "")))} for item in items]


def open_questions(path, name, data_root):
    """The file as the Manifest of that name, by way of a temporary copy in a manifest's form."""
    questions, folder = read_questions(path), TemporaryDirectory()
    copy = os.path.join(folder.name, "questions.json")
    write_json(copy, {"split": "test", "split_path": ".", "flamingo_task": "MMAU",
                      "total_num": len(questions), "data": dict(enumerate(questions))})
    manifest = Manifest(copy, data_root)
    manifest.file, manifest.name = path, name
    manifest.temporary_folder = folder  # which lives as long as the manifest
    return manifest


def write_official(path, questions, items):
    """Results in MMAU's form: model_prediction, which its README asks for, and model_output, which its script
    reads; empty where there is no answer, because that script leaves out items without the key."""
    rows = []
    for question, item in zip(questions, items):
        answer = answer_text(item)
        added = "name", "audio", "prompt", "output", "references"
        row = {key: value for key, value in question.items() if key not in added}
        rows.append(row | dict(answer=question["output"], model_output=answer, model_prediction=answer))
    write_json(path, rows)


# ------------------------------------------------------------------------------------------------------------
# The cache of answers: <stem>.cache<rank>.jsonl, only appended to (append_line of tools/sample). A killed run
# leaves whole lines and at most a torn one. The key of an answer is a hash of all that it depends on.


def read_cache(cache):
    """{key: {"answer", ...}} of all ranks' files."""
    cached = {}
    for file in sorted(glob.glob(glob.escape(cache) + "*.jsonl")):
        with open(file, "rb") as f:
            entries = [parse_json_line(line) for line in f]
        cached |= {entry.pop("key"): entry for entry in entries if entry}
    return cached


def item_of(manifest, i, cached):
    """The item that scoring reads: question i of the manifest as it is now, with its cached answer."""
    clip = manifest[i]
    item = {"id": i} | manifest.items[i] | {"audio": clip["path"], "start": clip["start"]}
    return check_item(item | cached, f"{manifest.file}: item {i}")
