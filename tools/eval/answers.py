"""Answers that eval.py keeps: which of them still hold, in files that a kill at any time leaves usable.

<path> holds a header line and an item a line. While a split is answered, every rank adds to a file of its
own, <path>.<id>.part<rank>, where id tells the model and the settings; what another model answered is kept
beside as <stem>.<id>.jsonl. An item is asked again unless this model heard this file with this prompt.
"""
import glob
import hashlib
import json
import os
import sys

from tools.common import parse_json_line
from tools.eval.records import write_items


def identity(matters):
    return hashlib.sha256(json.dumps(matters, sort_keys=True).encode()).hexdigest()[:8]


def question_of(manifest, i):
    """What an answer depends on, beside the model: prompt, file, its size and time, and the part heard."""
    item = manifest[i]
    try:
        stats = map(os.stat, item["paths"])
        stamp = [n for stat in stats for n in (stat.st_size, int(stat.st_mtime))]
    except OSError:  # it can't be read, which is an answer, too, until it is there
        stamp = None
    return {"audio": item["path"], "start": item["start"], "duration": item["duration"],
            "prompt": item["prompt"], "file": stamp}


def read_lines(path):
    """-> header (None: there is none) and items; a line cut off by a kill is left out."""
    with open(path, "rb") as f:
        lines = [entry for entry in map(parse_json_line, f) if entry is not None]
    header = lines.pop(0) if lines and "matters" in lines[0] else None
    return header, lines


def set_aside(path, matters):
    """Move answers of another model or other settings out of the way, and say it in one line."""
    if not os.path.exists(path):
        return
    header, _ = read_lines(path)
    before = header["matters"] if header else {}
    if before == matters:
        return
    aside = beside(path, identity(before) if header else "before")
    os.replace(path, aside)
    changed = [name for name in matters if before.get(name) != matters[name]]
    changed = ", ".join(f"{name} {before.get(name)} -> {matters[name]}" for name in changed)
    print(f"{path}: these answers were given otherwise ({changed}), so the questions are asked again; the "
          f"old answers are in {aside}", file=sys.stderr, flush=True)


def beside(path, name):
    return f"{path.removesuffix('.jsonl')}.{name}.jsonl"


def kept(path, manifest, matters):
    """{index: item} of the answers that hold."""
    found, holds = {}, {}
    for file in (path, beside(path, identity(matters)), *sorted(glob.glob(f"{glob.escape(path)}.*.part*"))):
        if os.path.exists(file):
            header, items = read_lines(file)
            if header and header["matters"] == matters:
                found |= {item["id"]: item for item in items}
    for i, item in found.items():
        now = question_of(manifest, i) if i < len(manifest) else {"prompt": None}
        if all(item.get(key) == value for key, value in now.items()):
            holds[i] = item
    return holds


def open_part(path, matters, rank, about):
    """The file that this rank adds its answers to, with its header."""
    file = f"{path}.{identity(matters)}.part{rank}"
    new = not os.path.exists(file) or os.path.getsize(file) == 0
    f = open(file, "a")
    header = json.dumps({"matters": matters} | about) + "\n"
    f.write(header if new else "\n")  # after a line that was cut off: a new one
    f.flush()
    return f


def finish(path, items, matters, about):
    """All items into <path>, whole or not at all; then the parts go."""
    write_items(path, items, {"matters": matters} | about)
    own = identity(matters)
    for file in (beside(path, own), *glob.glob(f"{glob.escape(path)}.{own}.part*")):
        if os.path.exists(file):
            os.remove(file)
