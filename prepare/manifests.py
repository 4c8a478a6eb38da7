"""What table.py and datasets.py share: reading tables, finding clips, measuring them, writing manifests.

A manifest's item here is {"name": file below the folder, or a list of two and more, "prompt", "output"}, with
"audio_start" (seconds), "references" and what eval.py groups scores by where a source has them.
"""
import argparse
import csv
import io
import itertools
import json
import os
import re
import sys
import tempfile
from collections import Counter
from multiprocessing.pool import ThreadPool

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tqdm import tqdm

import config as settings
from tools.common import UserError, check_writable, name_disk_errors, read_json

SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aif", ".aiff", ".au", ".w64", ".caf")
VIDEOS = (".mp4", ".mkv", ".webm")
POINTER = "Git LFS pointers, not sounds (run: git lfs pull)"
VIDEO = "videos, whose sound is to be extracted first (ffmpeg -i x.mp4 -vn -ac 1 x.wav)"

# ------------------------------------------------------------------------------------------------------------
# Tables


def decode(path, encoding=None):
    """-> text and the encoding that was told, or that fits: UTF-8, UTF-16 with its mark, else latin-1."""
    with open(path, "rb") as f:
        content = f.read()
    utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    for name in [encoding] if encoding else ["utf-16" if utf16 else "utf-8-sig", "latin-1"]:
        try:
            return content.decode(name), name.removesuffix("-sig")
        except UnicodeDecodeError as error:
            wrong = f"{path}: byte {error.start} is not {name}; give --encoding"
        except LookupError:
            wrong = f"encoding = {name!r}: no such encoding"
    raise UserError(wrong)


END = "(the end of the table)"  # a line behind the last


def read_csv(path, delimiter=None, encoding=None):
    """-> [(row number and line, {column: text})], [the columns], how it was read. Cells are not stripped."""
    text, encoding = decode(path, encoding)
    first = text.lstrip("\r\n").partition("\n")[0]
    likely = "\t" if path.lower().endswith(".tsv") else max(",;\t|", key=first.count)
    delimiter = {"tab": "\t", "\\t": "\t"}.get(delimiter, delimiter) or likely
    if len(delimiter) > 1 or delimiter in '"\r\n':
        raise UserError(f"delimiter = {delimiter!r}, expected one character, or tab")
    lines = itertools.chain(io.StringIO(text, newline=""), [END])  # which a quote without its other takes in
    reader, rows, columns, before = csv.reader(lines, delimiter=delimiter), [], None, 0
    try:
        for cells in reader:
            where = f"row {len(rows) + 1} (line {reader.line_num})"
            if cells and cells[-1].endswith(END):
                if cells != [END]:
                    raise UserError(f"{path} line {before + 1}: a quote begins in this row that never ends")
                break
            before = reader.line_num
            if columns is None:
                columns = cells or None  # blank lines may stand before it
            elif cells and len(cells) != len(columns):
                raise UserError(f"{path} {where}: {len(cells)} cells, expected {len(columns)}: "
                                 f"{', '.join(columns)} (delimiter {delimiter!r})")
            elif cells:  # a blank line is none
                rows.append((where, dict(zip(columns, cells))))
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: {error}") from error
    return rows, columns or [], f"delimiter {delimiter!r}, {encoding}"


def once(pairs):
    """The object of these pairs, of which json.load would keep the last of a name."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise UserError(f"{max(names, key=names.count)!r} is there twice")
    return row


def read_json_rows(path, encoding=None):
    """A JSON list of objects, or one object a line -> as read_csv."""
    text, encoding = decode(path, encoding)
    listed, found = text.lstrip().startswith("["), []
    for i, line in enumerate([text] if listed else text.split("\n"), 1):
        try:
            read = json.loads(line, object_pairs_hook=once) if line.strip() else []
            found += read if listed or not line.strip() else [read]
        except (ValueError, RecursionError) as error:  # the second: nested a thousand deep
            where = "" if listed else f" row {i}"
            raise UserError(f"{path}{where}: not JSON ({error}); expected a list of objects, or an object a "
                             f"line") from error
    found = [(f"row {i}", row) for i, row in enumerate(found, 1)]
    for where, row in found:
        if not isinstance(row, dict):
            raise UserError(f"{path} {where}: a {type(row).__name__}, expected an object with the columns")
    return found, list(dict.fromkeys(name for _, row in found for name in row)), encoding


def read_parquet(path):
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:  # not there, or one that does not fit this numpy
        raise UserError(f"{path}: Parquet needs pyarrow: pip install -r requirements-prepare.txt "
                                  f"({error})") from error
    try:
        table = parquet.read_table(path)
    except (ValueError, OSError) as error:  # pyarrow's own errors are among these
        raise UserError(f"{path}: not readable as Parquet ({error})") from error
    rows = [(f"row {i}", row) for i, row in enumerate(table.to_pylist(), 1)]
    return rows, table.column_names, "Parquet"


def read_table(path, delimiter=None, encoding=None):
    """-> [(where, {column: value})], [the columns], how it was read."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such table")
    kind = os.path.splitext(path)[1].lower()
    if kind == ".parquet":
        return read_parquet(path)
    if kind in (".json", ".jsonl", ".ndjson"):
        return read_json_rows(path, encoding)
    return read_csv(path, delimiter, encoding)


# ------------------------------------------------------------------------------------------------------------
# Clips


def stem(name):
    """A file's name without the ending of a sound or video: "18.44.wav" -> "18.44"; "meta.csv" as it is."""
    base, ending = os.path.splitext(name)
    return base if ending.lower() in SOUNDS + VIDEOS else name


class Folder:
    """A source as it was unpacked. Names are never stripped: some begin with a space, or end with one."""

    def __init__(self, path):
        if not os.path.isdir(path):
            raise FileNotFoundError(f"{path}: no such folder")
        self.path, self.files, self.notes, self.reading = os.path.abspath(path), {}, Counter(), path
        for folder, below, names in os.walk(path, followlinks=True):
            real = os.path.realpath(folder) + os.sep  # a link to a folder above would never end
            below[:] = [name for name in sorted(below)
                        if not real.startswith(os.path.realpath(os.path.join(folder, name)) + os.sep)]
            for name in sorted(names, key=lambda name: (name.lower().endswith(VIDEOS), name)):
                if not name.startswith("."):  # also the "._name" twins of archives made on a Mac
                    file = os.path.relpath(os.path.join(folder, name), path).replace(os.sep, "/")
                    self.files.setdefault(stem(name), []).append(file)

    def find(self, *wanted):
        """The file that is there of "name" or "folder/name"s, the first that fits; None: none, or several.

        Of a sound the ending does not matter. Where folders are given the file's own folder has that name
        (archives unpack into folders of their own: train/train), and the more of them agree the better."""
        for path in wanted:
            folders, found = path.casefold().split("/")[:-1], {}
            for file in self.files.get(stem(path.rpartition("/")[2]), ()):
                there, same = file.casefold().split("/")[:-1], 0
                while same < min(len(folders), len(there)) and folders[-1 - same] == there[-1 - same]:
                    same += 1
                if same or not folders:
                    found.setdefault(same, {}).setdefault(tuple(there), file)
            nearest = found[max(found)] if found else {}
            if len(nearest) == 1:  # of a folder's x.wav and x.flac the first will do
                return next(iter(nearest.values()))
        return None

    def clip(self, *wanted):
        """The clip's file; where it isn't there the first name that was wanted, which write() reports."""
        found = self.find(*wanted)
        if found is None and any(stem(os.path.basename(path)) in self.files for path in wanted):
            self.notes["clips are there several times, or in a folder of another name: not guessed"] += 1
        return found or wanted[0]

    def need(self, *wanted):
        found = self.find(*wanted)
        if found is None:
            raise FileNotFoundError(f"{self.path}: expected {' or '.join(map(repr, wanted))} in it")
        return os.path.join(self.path, found)

    def splits(self, **files):
        """(split, path of its file or of one of its files) of the splits that are there; one has to be."""
        wanted = {split: (names,) if isinstance(names, str) else names for split, names in files.items()}
        there = {split: self.find(*names) for split, names in wanted.items()}
        if not any(there.values()):
            self.need(*next(iter(wanted.values())))
        for split, file in there.items():
            if file is None:
                print(f"note: {self.path} has no {wanted[split][0]!r}: split {split} is left out")
            else:
                yield split, os.path.join(self.path, file)

    def match(self, pattern, example):
        """(file, *groups) of the files whose path fits, of one name the first; example: what is expected."""
        rows = []
        for files in self.files.values():
            sounds = [file for file in files if file.lower().endswith(SOUNDS)]
            hits = [(file, re.search(pattern, "/" + file)) for file in sounds]
            rows += [(file, *hit.groups()) for file, hit in hits if hit][:1]
        if not rows:
            raise FileNotFoundError(f"{self.path}: expected files such as {example!r} in it")
        return sorted(rows)

    def rows(self, path, *columns):
        """Dicts of a table with these columns; path: absolute, or as in need."""
        path = self.reading = path if os.path.isabs(path) else self.need(path)
        rows, there, _ = read_table(path)
        for column in columns:
            if column not in there:
                raise UserError(f"{path}: no column {column!r}, expected {', '.join(columns)}; "
                                 f"it has {', '.join(map(repr, there))}")
        return [row for _, row in rows]

    def json(self, path):
        self.reading = os.path.join(self.path, path)
        return read_json(self.reading)


def seconds_of(path):
    """Seconds of a sound file, or in words why it is none."""
    from tools.data.audio import count_frames
    if not os.path.isfile(path):
        return "missing"
    try:
        frames, rate = count_frames(path)
        return frames / rate if frames else "empty"
    except Exception:  # whatever a decoder says of a damaged file, it is one of many
        with open(path, "rb") as f:
            pointer = f.read(40).startswith(b"version https://git-lfs")
        video = path.lower().endswith(VIDEOS)
        return POINTER if pointer else VIDEO if video else "not readable as sound"


def measure(paths, name):
    """{path: seconds, or in words why there are none}, in parallel."""
    paths = list(dict.fromkeys(paths))
    with ThreadPool(min(16, 4 * (os.cpu_count() or 1))) as pool:
        found = pool.imap(seconds_of, paths, chunksize=64)
        return dict(zip(paths, tqdm(found, desc=name, total=len(paths), unit="clip", disable=None)))


# ------------------------------------------------------------------------------------------------------------
# Manifests


def split_path_of(folder, data_root):
    """The folder relative to data_root where it is inside, else absolute."""
    folder, data_root = os.path.abspath(folder), os.path.abspath(data_root)
    inside = os.path.commonpath([folder, data_root]) == data_root
    return os.path.relpath(folder, data_root).replace(os.sep, "/") if inside else folder


def paths_of(item, folder):
    names = [item["name"]] if isinstance(item["name"], str) else item["name"]
    return [os.path.join(folder, name) for name in names]


def with_duration(item, folder, seconds):
    """The item with the seconds that it hears from audio_start on, of all its clips; or why it can't be."""
    if not item["prompt"].strip():
        return "without a question"
    if not item["output"].strip() and "choices" not in item:  # there are tests that keep their answers back
        return "without an answer"
    start, total = item.get("audio_start", 0), 0
    for path in paths_of(item, folder):
        if isinstance(seconds[path], str):
            return seconds[path]
        if seconds[path] <= start:
            return "shorter than their audio_start"
        total += seconds[path] - start
    return item if "duration" in item else item | {"duration": round(total, 3)}


def place_for(path):
    """The manifest's place as an absolute path; told before the long work if nothing can be written there."""
    path = os.path.abspath(settings.resolve_path(path))
    check_writable(path)
    return path


def write(to, items, split_path, data_root):
    """Write the items whose clips can be read to <...>/<Name-Task>/<split>.json, whole or not at all, and say
    what is left out. -> number of items, of those left out; without an item nothing is written."""
    from data import Manifest
    folder, name = os.path.join(data_root, split_path), "/".join(to.removesuffix(".json").split(os.sep)[-2:])
    seconds = measure((path for item in items for path in paths_of(item, folder)), name)
    done = [with_duration(item, folder, seconds) for item in items]
    good = [item for item in done if not isinstance(item, str)]
    for why in dict.fromkeys(why for why in done if isinstance(why, str)):
        names = [item["name"] for item, reason in zip(items, done) if reason == why]
        shown = list(dict.fromkeys(map(repr, names)))
        shown = shown[:3] + ["..."] * (len(shown) > 3)
        print(f"{name}: the clips of {len(names)} of {len(items)} items are {why}: {', '.join(shown)}")
    if good:
        task, split = name.split("/")
        content = {"split": split, "split_path": split_path, "flamingo_task": task, "total_num": len(good)}
        place = os.path.dirname(to)
        os.makedirs(place, exist_ok=True)
        with name_disk_errors(to), tempfile.TemporaryDirectory(prefix=".", dir=place) as tmp:  # checked, then moved
            file = os.path.join(tmp, task, split + ".json")
            os.makedirs(os.path.dirname(file))
            with open(file, "w") as f:
                f.write(json.dumps(content)[:-1] + ', "data": {\n')  # an item a line
                lines = (f'"{i}": {json.dumps(item, allow_nan=False)}' for i, item in enumerate(good))
                f.write(",\n".join(lines) + "}}\n")
            try:
                Manifest(file, data_root)
            except ValueError as error:
                raise UserError(str(error).replace(file, to)) from None
            os.replace(file, to)
        hours = sum(item["duration"] for item in good) / 3600
        print(f"{name}: {len(good)} items, {hours:.2f} h -> {to}")
    return len(good), len(items) - len(good)


# ------------------------------------------------------------------------------------------------------------
# Scripts


class Parser(argparse.ArgumentParser):
    """One line about what is wrong, as every script here."""

    def __init__(self, doc, **more):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=raw, allow_abbrev=False, **more)

    def error(self, message):
        raise UserError(message)


def run(main):
    """Exit code of main(): 0 done, 1 done but some clips were left out, 2 not done, with one line why."""
    try:
        sys.exit(main())
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        sys.exit(print("error: " + " ".join(str(error).split("\n")), file=sys.stderr) or 2)
