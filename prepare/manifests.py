"""What table.py and datasets.py share: reading tables, finding clips, measuring them, writing manifests.

A manifest's item here is {"name": a file below split_path, or a list of files, "prompt", "output"}, with
"audio_start" (seconds), "duration", "references" and what eval.py groups scores by where there are any.

CSV and JSON are read with the standard library, so that they need nothing installed; Parquet needs pyarrow
(requirements-prepare.txt).
"""
import csv
import functools
import io
import json
import os
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from tools.common import (UserError, atomic_write, join_names, optional_import, read_json, read_json_lines,
                          shorten)

SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aif", ".aiff", ".au", ".w64", ".caf")

# ------------------------------------------------------------------------------------------------------------
# Tables


def decode_text(path):
    """The text of a file: UTF-8, UTF-16 with a byte order mark, else latin-1, with a note."""
    with open(path, "rb") as f:
        content = f.read()
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        print(f"note: {path} is not UTF-8, read as latin-1")
        return content.decode("latin-1")


def read_csv(path):
    """-> {"row 2 (line 3)": {column: text}}. Cells are not stripped, blank lines are skipped; the delimiter
    is the one of , ; | and tab that the header has most of."""
    text, rows = decode_text(path), {}
    delimiter = max(",;\t|", key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            where = f"row {len(rows) + 1} (line {reader.line_num})"
            if None in row or None in row.values():  # what DictReader has for cells too many, or too few
                raise UserError(f"{path} {where}: expected {len(row)} cells: {', '.join(reader.fieldnames)}")
            rows[where] = row
    except csv.Error as error:  # e.g. a quote that is never closed
        raise UserError(f"{path} row {len(rows) + 1}: not CSV ({error})") from error
    return rows


def read_parquet(path):
    pyarrow = optional_import("pyarrow.parquet", f"{path}: Parquet", "prepare")
    try:
        return pyarrow.read_table(path).to_pylist()
    except (ValueError, OSError) as error:  # its own errors are among these
        raise UserError(f"{path}: not readable as Parquet ({shorten(error)})") from error


def read_table(path):
    """-> {where: {column: value}} of a CSV, TSV, JSON, JSONL or Parquet file; where: for error messages."""
    ending = os.path.splitext(path)[1].lower()
    if ending == ".parquet":
        rows = read_parquet(path)
    elif ending == ".jsonl":
        rows = [row for _, row in read_json_lines(path)]
    elif ending == ".json":
        rows = read_json(path)
    else:
        return read_csv(path)
    if isinstance(rows, dict):
        rows = rows.get("data")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected a list of objects {{column: value}}")
    return {f"row {i}": row for i, row in enumerate(rows, 1)}


# ------------------------------------------------------------------------------------------------------------
# Clips


class Row(dict):
    """{column: value}; a column that is missing is a UserError, which names the file."""

    def __init__(self, cells, path):
        super().__init__(cells)
        self.path = path

    def __missing__(self, column):
        raise UserError(f"{self.path}: no column {column!r}, it has {', '.join(map(repr, self))}")


def stem(name):
    """A file's name without the ending of a sound: "18.44.wav" -> "18.44"; "meta.csv" as it is."""
    base, ending = os.path.splitext(name)
    return base if ending.lower() in SOUNDS else name


def parents(path):
    """The folders of a path in lower case, the innermost first."""
    return path.casefold().split("/")[-2::-1]


class Folder:
    """A source as it was unpacked. Names are never stripped: some begin with a space, or end with one."""

    def __init__(self, path):
        if not os.path.isdir(path):
            raise UserError(f"{path}: no such folder")
        self.path = os.path.abspath(path)
        self.files = defaultdict(list)  # stem: paths below the folder
        self.notes = Counter()  # what is left out: how often
        for folder, folders, names in os.walk(path, followlinks=True):
            folders.sort()
            for name in sorted(names):
                if not name.startswith("."):  # also the "._name" twins of archives made on a Mac
                    self.files[stem(name)].append(os.path.relpath(os.path.join(folder, name), path))

    def find(self, *wanted):
        """The file of the first wanted "name" or "folder/name" that is there; None: none, or several.

        Of a sound the ending does not matter. Where folders are named the file's own folder must be the last
        of them (archives unpack into folders of their own: train/train); the more agree the better."""
        for path in wanted:
            matches = defaultdict(dict)  # number of folders that agree: {folder: its first file}
            for file in self.files.get(stem(os.path.basename(path)), ()):
                agree = len(os.path.commonprefix([parents(path), parents(file)]))
                if agree or "/" not in path:
                    matches[agree].setdefault(os.path.dirname(file), file)
            nearest = matches[max(matches, default=0)]
            if len(nearest) == 1:
                return nearest.popitem()[1]
            if nearest:
                self.notes["names stand for several files: not guessed"] += 1
        return None

    def clip(self, *wanted):
        """The clip's file; without one the first name that was wanted, which is then reported as missing."""
        return self.find(*wanted) or wanted[0]

    def parts(self, files, *names):
        """Yield (part, absolute path of its file) of the named parts of a source, at least of one. files:
        templates of the file's name, of which the first that is there is taken; {}: the part's name."""
        empty = True
        for part in names:
            wanted = [file.format(part) for file in files]
            path = self.find(*wanted)
            if path:
                yield part, os.path.join(self.path, path)
                empty = False
            else:
                print(f"note: {self.path} has no {' or '.join(wanted)}")
        if empty:
            raise UserError(f"{self.path}: expected {' or '.join(files)} of {join_names(names)} in it")

    def rows(self, files, *names):
        """Yield the rows of the parts' tables, with "part", and "split" where there is no such column."""
        for part, path in self.parts(files, *names):
            for cells in read_table(path).values():
                yield Row({"part": part, "split": part} | cells, path)

    def match(self, pattern, example):
        """Rows with "clip" and the named groups of the pattern, of files whose path fits; of one name the
        first. example: what is expected."""
        rows = {}
        for name, files in self.files.items():
            for file in files:
                fit = re.search(pattern, "/" + file)
                if fit:
                    rows.setdefault(name, {"clip": file} | fit.groupdict())
        if not rows:
            raise UserError(f"{self.path}: expected files such as {example} in it")
        return list(rows.values())


@functools.cache
def seconds_of(path):
    """Seconds of a sound file, or in words why it is none."""
    from tools.data.audio import count_frames
    if not os.path.isfile(path):
        return "missing"
    try:
        frames, rate = count_frames(path)
    except Exception:  # whatever a decoder raises for a damaged file: it is one of many
        with open(path, "rb") as f:
            pointer = f.read(40).startswith(b"version https://git-lfs")
        return "Git LFS pointers (run: git lfs pull)" if pointer else "not readable as sound"
    return frames / rate if frames else "empty"


# ------------------------------------------------------------------------------------------------------------
# Manifests


def measure_item(item, folder):
    """Set the duration of an item that has none: the seconds from audio_start on of all its clips. -> why the
    item can't be used, or None."""
    if not item["prompt"].strip():
        return "without a question"
    if not item["output"].strip() and "choices" not in item:  # some benchmarks keep their answers back
        return "without an answer"
    total = 0
    for name in item["name"] if isinstance(item["name"], list) else [item["name"]]:
        seconds = seconds_of(os.path.join(folder, name))
        if isinstance(seconds, str):
            return seconds
        if ".." in name.split("/"):
            return "outside of the folder"
        total += seconds - item.get("audio_start", 0)
        if seconds <= item.get("audio_start", 0):
            return "shorter than audio_start"
    item.setdefault("duration", round(total, 3))
    return None


def save_manifest(file, split_path, items):
    """Write <...>/<Name-Task>/<split>.json, whole or not at all."""
    task, split = file.removesuffix(".json").split("/")[-2:]
    data = {str(i): item for i, item in enumerate(items)}
    os.makedirs(os.path.dirname(file), exist_ok=True)
    with atomic_write(file) as f:
        json.dump({"split": split, "split_path": split_path, "flamingo_task": task, "total_num": len(items),
                   "data": data}, f, indent=1)


def write_manifest(file, items, split_path, data_root):
    """Write the items whose clips can be read, if any, and print what is left out. -> number of items
    written, of those left out."""
    measure = functools.partial(measure_item, folder=os.path.join(data_root, split_path))
    with ThreadPoolExecutor(16) as pool:
        reasons = list(tqdm(pool.map(measure, items), "clips", len(items), disable=None))
    good = [item for item, reason in zip(items, reasons) if reason is None]
    for reason in dict.fromkeys(filter(None, reasons)):
        names = [repr(item["name"]) for item, other in zip(items, reasons) if other == reason]
        print(f"{file}: {len(names)} of {len(items)} items are left out, {reason}: {join_names(names, 3)}")
    if good:
        save_manifest(file, split_path, good)
        hours = sum(item["duration"] for item in good) / 3600
        print(f"{file}: {len(good)} items, {hours:.2f} h")
    return len(good), len(items) - len(good)
