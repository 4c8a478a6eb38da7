"""What table.py and datasets.py share: reading tables, finding clips, measuring them, writing manifests.

A manifest's item here is {"name": a file below split_path, or a list of files, "prompt", "output"}, with
"audio_start" (seconds), "duration", "references" and what eval.py groups scores by where there are any.

CSV and JSON are read with the standard library, so that they need nothing installed; Parquet needs pyarrow
(requirements-prepare.txt).
"""
import csv
import functools
import glob
import io
import json
import os
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from tools.common import (UserError, atomic_write, join_names, optional_import, read_json, read_json_lines,
                          shorten)
from tools.data.audio import count_frames

SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aif", ".aiff", ".au", ".w64", ".caf")

# ------------------------------------------------------------------------------------------------------------
# Tables


def decode_text(path):
    """The text of a file: UTF-8, else latin-1, with a note."""
    with open(path, "rb") as f:
        content = f.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        print(f"note: {path} is not UTF-8, read as latin-1")
        return content.decode("latin-1")


class Row(dict):
    """{column: value}; a column that is missing is a UserError, which names the file and the row."""

    def __init__(self, cells, where):
        super().__init__(cells)
        self.where = where

    def __missing__(self, column):
        raise UserError(f"{self.where}: no column {column!r}, it has {', '.join(map(repr, self))}")


def read_csv(path):
    """Yield {column: text}. Cells are not stripped, blank lines are skipped; the delimiter is the one of
    , ; | and tab that the header has most of."""
    text, number = decode_text(path), 0
    delimiter = max(",;\t|", key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for number, row in enumerate(reader, 1):
            if None in row or None in row.values():  # what DictReader has for cells too many, or too few
                columns = ", ".join(reader.fieldnames)
                raise UserError(f"{path} row {number}: too many or too few cells, expected {columns}")
            yield row
    except csv.Error as error:  # e.g. a quote that is never closed
        raise UserError(f"{path} row {number + 1}: not CSV ({error})") from error


def read_parquet(path):
    pyarrow = optional_import("pyarrow.parquet", f"{path}: Parquet", "prepare")
    try:
        return pyarrow.read_table(path).to_pylist()
    except (ValueError, OSError) as error:  # its own errors are among these
        raise UserError(f"{path}: not readable as Parquet ({shorten(error)})") from error


def read_table(path):
    """Yield the Rows of a CSV, TSV, JSON, JSONL or Parquet file. JSON holds a list of rows, {"data": a list},
    or {name: row}."""
    ending = os.path.splitext(path)[1].lower()
    if ending == ".parquet":
        rows = read_parquet(path)
    elif ending == ".jsonl":
        rows = (row for _, row in read_json_lines(path))
    elif ending == ".json":
        rows = read_json(path)
    else:
        rows = read_csv(path)
    if isinstance(rows, dict):
        rows = rows.get("data", rows.values())
    for number, row in enumerate(rows, 1):
        where = f"{path} row {number}"
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object {{column: value}}")
        yield Row(row, where)


# ------------------------------------------------------------------------------------------------------------
# Clips


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
        self.path = os.path.abspath(path)
        self.files = defaultdict(list)  # stem: paths below the folder
        for file in sorted(glob.glob("**", root_dir=path, recursive=True)):  # without .hidden ones
            if os.path.isfile(os.path.join(path, file)):
                self.files[stem(os.path.basename(file))].append(file)

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
            for row in read_table(path):
                row["part"] = part
                row.setdefault("split", part)
                yield row

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
def measure_clip(path):
    """Seconds of a sound file, or in words why it is none."""
    try:
        frames, rate = count_frames(path)
    except FileNotFoundError:
        return "missing, or one name of several files"
    except UserError:
        return "not readable as sound"
    return frames / rate if frames else "empty"


# ------------------------------------------------------------------------------------------------------------
# Manifests


def measure_item(item, folder):
    """Set the duration of an item that has none: the seconds from audio_start on of all its clips. -> why the
    item can't be used, or None."""
    answered = item["output"].strip() or "choices" in item  # some benchmarks keep their answers back
    if not item["prompt"].strip() or not answered:
        return "without a question or an answer"
    start, total = item.get("audio_start", 0), 0
    for name in item["name"] if isinstance(item["name"], list) else [item["name"]]:
        if ".." in name.split("/"):
            return "outside of the folder"
        seconds = measure_clip(os.path.join(folder, name))
        if isinstance(seconds, str):
            return seconds
        if seconds <= start:
            return "shorter than audio_start"
        total += seconds - start
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


def write_manifests(manifests, split_path, data_root, source):
    """Write the items of {file: items} whose clips can be read, and print what is left out. -> exit code: 1
    if anything is, else 0; UserError names the source where no clip can be read."""
    measure = functools.partial(measure_item, folder=os.path.join(data_root, split_path))
    written, code = 0, 0
    for file, items in manifests.items():
        good, left_out = [], defaultdict(list)  # left_out: {reason: names}
        with ThreadPoolExecutor(16) as pool:
            reasons = tqdm(pool.map(measure, items), "clips", len(items), disable=None)
            for item, reason in zip(items, reasons):
                if reason:
                    left_out[reason].append(repr(item["name"]))
                else:
                    good.append(item)
        for reason, names in left_out.items():
            print(f"{file}: {len(names)} of {len(items)} items are left out, {reason}: {join_names(names)}")
            code = 1
        if good:
            save_manifest(file, split_path, good)
            print(f"{file}: {len(good)} items")
            written += len(good)
    if not written:
        raise UserError(f"{source}: no clip can be read in {data_root}/{split_path}, nothing is written")
    return code
