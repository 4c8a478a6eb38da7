"""What table.py and datasets.py share: reading tables, finding clips, measuring them, writing manifests.

A manifest's item here is {"name": a file below split_path, or a list of files, "prompt", "output"}, with
"audio_start" (seconds), "duration", "references" and what eval.py groups scores by where there are any.

CSV and JSON are read with the standard library: cells stay the texts that they are ("007", "NA"), and a row
with too few cells is an error, not filled. Parquet needs pyarrow, a text that is not UTF-8 chardet
(requirements-prepare.txt).
"""
import csv
import functools
import glob
import io
import json
import os
import re
import shutil
import tempfile
import unicodedata
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from string import ascii_uppercase

from tqdm import tqdm

from tools.common import (UserError, atomic_write, decode_text, existing_folder, join_names, name_disk_errors,
                          optional_import, read_json_lines, read_json_rows, shorten)
from tools.data.audio import count_frames, find_file, find_placeholder

# Endings of sounds, and of videos, which have one
SOUNDS = set("""
    .3g2 .3gp .8svx .aac .ac3 .adts .aif .aifc .aiff .amr .ape .asf .au .avi .avr .caf .dts .dsf .eac3 .f4a
    .f4v .flac .flv .gsm .htk .iff .ircam .m4a .m4b .m4r .m4v .mka .mkv .mogg .mov .mp1 .mp2 .mp3 .mp4 .mpa
    .mpc .mpeg .mpg .mpga .nist .oga .ogg .ogv .ogx .opus .paf .pvf .ra .raw .rf64 .rm .sd2 .sds .sf .snd .sph
    .spx .svx .tta .voc .vox .w64 .wav .wave .weba .webm .wma .wmv .wv .xi""".split())

# ------------------------------------------------------------------------------------------------------------
# Tables

# A quoted cell of a TSV: in one line, or over several without a tab. What closes no cell is a character
TSV_QUOTED = re.compile(r'''(?<![^\t\r\n])"((?:[^"\r\n]|"")*|(?:[^"\t]|"")*)"(?![^\t\r\n])''')
NO_CHARACTER = "\ufdd0"  # Unicode keeps it free
csv.field_size_limit(2 ** 31 - 1)  # a cell may be a book


class Row(dict):
    """{column: value}; a column that is missing is a UserError, which names the file and the row."""

    def __init__(self, cells, where):
        super().__init__(cells)
        self.where = where

    def __missing__(self, column):
        raise UserError(f"{self.where}: no column {column!r}, it has {join_names(list(map(repr, self)), 20)}")


def holds_rows(cells, i, delimiter):
    """Whether cell i goes on with the rows behind it, as one does whose quote is not closed: with lines of as
    many cells, or of those up to the quote, one of them a clip's name."""
    for line in cells[i].splitlines()[1:]:
        parts = line.split(delimiter)
        if len(parts) in (i + 1, len(cells)) and any(ending(part) in SOUNDS for part in parts):
            return True
    return False


def read_csv(path, encoding=""):
    """Yield {column: text}. Cells are not stripped, blank lines are skipped. Of the delimiters a tab is taken
    where the header has one, else that of , ; | which it has most of."""
    text, quote = decode_text(path, encoding), '"'
    header = re.sub('"[^"]*"', "", text.lstrip("\r\n").partition("\n")[0])
    delimiter = "\t" if "\t" in header else max(",;|", key=header.count)
    if delimiter == "\t":
        quote = NO_CHARACTER
        text = TSV_QUOTED.sub(lambda cell: quote + cell[1].replace('""', '"') + quote, text)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quotechar=quote, strict=True)
    rows, number = (cells for cells in lines if "".join(cells).strip()), 0
    try:
        columns = next(rows, [])
        repeated = [column for column in columns if column and columns.count(column) > 1]
        if repeated:
            raise UserError(f"{path}: several columns are named {repeated[0]!r}")
        for number, cells in enumerate(rows, 1):
            if len(cells) != len(columns):
                raise UserError(f"{path} row {number}: {len(cells)} cells, expected {len(columns)}: "
                                f"{join_names(columns, 20)}")
            for i, column in enumerate(columns):
                if holds_rows(cells, i, delimiter):
                    raise UserError(f"{path} row {number}, column {column!r}: its quote takes in other rows")
            yield dict(zip(columns, cells))
    except csv.Error as error:  # e.g. a quote that is never closed
        raise UserError(f"{path} row {number + 1}: not CSV ({error})") from error


def read_parquet(path):
    pyarrow = optional_import("pyarrow.parquet", f"{path}: Parquet", "prepare")
    try:
        return pyarrow.read_table(path).to_pylist()
    except (ValueError, OSError) as error:  # its own errors are among these
        raise UserError(f"{path}: not readable as Parquet ({shorten(error)})") from error


def read_table(path, encoding=""):
    """Yield the Rows of a CSV, TSV, JSON, JSONL or Parquet file. JSON holds a list of rows, {"data": a list},
    or {name: row}. encoding: of a CSV or TSV, see decode_text."""
    problem = find_placeholder(path)
    if problem:
        raise UserError(f"{path} is {problem}")
    if ending(path) == ".parquet":
        rows = read_parquet(path)
    elif ending(path) in (".jsonl", ".ndjson"):
        rows = (row for _, row in read_json_lines(path))
    elif ending(path) == ".json":
        rows = read_json_rows(path)
    else:
        rows = read_csv(path, encoding)
    for number, row in enumerate(rows, 1):
        where = f"{path} row {number}"
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object {{column: value}}")
        yield Row(row, where)


# ------------------------------------------------------------------------------------------------------------
# Clips

LOSSLESS = {".wav", ".flac", ".aif", ".aiff", ".caf", ".w64", ".rf64"}
VIDEOS = set(".3gp .asf .avi .flv .m4v .mkv .mov .mp4 .mpeg .mpg .ogv .webm .wmv".split())


def ending(name):
    return os.path.splitext(name)[1].lower()


def stem(name):
    """A file's name without the ending of a sound: "18.44.wav" -> "18.44"; "meta.csv" as it is. In NFC: macOS
    decomposes the letters of names."""
    name = unicodedata.normalize("NFC", name)
    return os.path.splitext(name)[0] if ending(name) in SOUNDS else name


def parents(path):
    """The folders of a path in lower case, the innermost first."""
    return unicodedata.normalize("NFC", path).casefold().split("/")[-2::-1]


class Folder:
    """A source as it was unpacked. Names are never stripped: some begin with a space, or end with one.
    left_out: what of it can't be used, which is printed."""

    def __init__(self, path):
        self.path = os.path.abspath(path)
        self.left_out = []
        self.files = defaultdict(list)  # stem: paths below the folder
        for file in sorted(glob.glob("**", root_dir=path, recursive=True)):  # without .hidden ones
            if os.path.isfile(os.path.join(path, file)):
                self.files[stem(os.path.basename(file))].append(file)

    def leave_out(self, what):
        print(f"{self.path}: left out: {what}")
        self.left_out.append(what)

    def best_format(self, files, wanted):
        """Those of a clip's files that are best: downloaded sounds rather than videos, of the wanted folders
        and the wanted format, else a lossless one."""
        if len(files) < 2:
            return files
        ranks = {}
        for file in files:
            pointer = find_placeholder(os.path.join(self.path, file)) is not None
            others = len({*parents(wanted)} - {*parents(file)})
            lossy = ending(file) not in LOSSLESS
            ranks[file] = ending(file) in VIDEOS, others, pointer, ending(file) != ending(wanted), lossy
        return [file for file in files if ranks[file] == min(ranks.values())]

    def find_nearest(self, path):
        """The file of a "name" or "folder/name"; None: there is none, or several.

        Of a sound the ending does not matter. Where folders are named the file's own folder must be the last
        of them (archives unpack into folders of their own: train/train); the more agree the better."""
        folders = parents(path)
        matches = defaultdict(list)  # (number of folders that agree, whether there are no others): files
        for file in self.files.get(stem(os.path.basename(path)), ()):
            agree = len(os.path.commonprefix([folders, parents(file)]))
            if agree or not folders:
                matches[agree, agree == len(parents(file))].append(file)
        best = self.best_format(matches[max(matches, default=None)], path)
        return best[0] if len(set(map(os.path.dirname, best))) == 1 else None

    def find(self, *wanted):
        """The file of the first wanted name that is there: a sound, else a video. None: there is none."""
        found = list(filter(None, map(self.find_nearest, wanted)))
        return min(found, key=lambda file: ending(file) in VIDEOS, default=None)

    def clip(self, *wanted):
        """The clip's file; without one the first name that was wanted, which is then reported as missing."""
        return self.find(*wanted) or wanted[0]

    def parts(self, files, *names):
        """[(part, absolute path of its file)] of the named parts of a source, at least of one. files:
        templates of the file's name, of which the first that is there is taken; {}: the part's name."""
        found = []
        for part in names:
            wanted = [file.format(part) for file in files]
            file = self.find(*wanted)
            if file is None:
                print(f"note: {self.path} has no {' or '.join(wanted)}")
                continue
            path = os.path.join(self.path, file)
            problem = find_placeholder(path)
            if problem:
                self.leave_out(f"{path}, {problem}")
            else:
                found.append((part, path))
        if not found:
            expected = f"{self.path}: expected {' or '.join(files)} of {join_names(names)} in it"
            raise UserError(", ".join(self.left_out) or expected)
        return found

    def rows(self, files, *names):
        """Yield the rows of the parts' tables, with "part", and "split" where there is no such column. What
        JSON has instead of texts becomes one: "" of null, "5" of 5."""
        for part, path in self.parts(files, *names):
            row = None
            for row in read_table(path):
                for column, value in row.items():
                    if type(value) not in (str, bool, list, dict):
                        row[column] = "" if value is None else str(value)
                row["part"] = part
                row.setdefault("split", part)
                yield row
            if row is None:
                self.leave_out(f"{path}, without rows")

    def match(self, pattern, example):
        """Rows with "clip" and the named groups of the pattern, of sounds whose path fits. example: what is
        expected; of a clip in several folders or formats the one that shares most folders with it is
        taken."""
        rows = []
        for files in self.files.values():
            fits = {file: re.search(pattern, "/" + file) for file in files if ending(file) in SOUNDS}
            fitting = [file for file in files if fits.get(file)]
            for file in self.best_format(fitting, example)[:1]:
                rows.append({"clip": file} | fits[file].groupdict())
        if not rows:
            raise UserError(f"{self.path}: expected files such as {example} in it")
        return rows

    def consistent(self, rows):
        """The rows of [(id, content, row)] without ids that stand for several contents, which are counted."""
        contents = defaultdict(set)
        for ident, content, _ in rows:
            contents[ident].add(content)
        wrong = [ident for ident, several in contents.items() if len(several) > 1]
        if wrong:
            self.leave_out(f"{len(wrong)} ids whose rows contradict each other: {join_names(wrong)}")
        return [row for ident, _, row in rows if len(contents[ident]) == 1]


@functools.cache
def measure_clip(path):
    """Seconds of a sound file, or in words why it is none."""
    try:
        frames, rate = count_frames(path)
    except FileNotFoundError:
        return "missing, or one name of several files"
    except UserError:
        return find_placeholder(find_file(path)) or "not readable as sound"
    return frames / rate if frames else "empty"


# ------------------------------------------------------------------------------------------------------------
# Manifests


def as_list(cell):
    return cell if isinstance(cell, list) else [cell]


def add_options(question, options):
    """-> "Question? (A) xxx. (B) yyy." of the options xxx and yyy."""
    for letter, option in zip(ascii_uppercase, options):
        question += f" ({letter}) {option.rstrip('.')}."
    return question


def measure_item(item, folder):
    """Set the duration of an item that has none: the seconds from audio_start on of all its clips. -> why the
    item can't be used, or None."""
    answered = item["output"].strip() or "choices" in item  # some benchmarks keep their answers back
    if not item["prompt"].strip() or not answered:
        return "without a question or an answer"
    start, total = item.get("audio_start", 0), 0
    for name in as_list(item["name"]):
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


class ManifestWriter:
    """A manifest on its way to the disk: items wait in a file without a name, which ends with the process."""

    def __init__(self, file, split_path):
        self.file, self.split_path, self.total = file, split_path, 0
        self.items = tempfile.TemporaryFile("w+", dir=existing_folder(os.path.dirname(file)))

    def add(self, item):
        self.items.write(f'{"," * (self.total > 0)}\n "{self.total}": {json.dumps(item)}')
        self.total += 1

    def save(self):
        """Write <...>/<Name-Task>/<split>.json, whole or not at all."""
        task, split = self.file.removesuffix(".json").split("/")[-2:]
        head = json.dumps({"split": split, "split_path": self.split_path, "flamingo_task": task,
                           "total_num": self.total, "data": {}}).removesuffix("}}")
        os.makedirs(os.path.dirname(self.file), exist_ok=True)
        with self.items, atomic_write(self.file) as f:
            self.items.seek(0)
            f.write(head)
            shutil.copyfileobj(self.items, f)
            f.write("\n}}")


def save_manifest(file, split_path, items):
    """Write <...>/<Name-Task>/<split>.json, whole or not at all. items: any iterable of dicts."""
    manifest = ManifestWriter(file, split_path)
    with name_disk_errors(file):
        for item in items:
            manifest.add(item)
        manifest.save()


def write_manifests(items, split_path, data_root, source):
    """Write the items, pairs of (manifest, item), whose clips can be read, and print what is left out. Few
    are in memory at a time; nothing is written before all are read. -> exit code: 1 if anything is left out,
    else 0; UserError names the source where no clip can be read."""
    folder = os.path.join(data_root, split_path)
    manifests, totals = {}, Counter()
    left_out, examples = Counter(), defaultdict(list)  # {(manifest, reason): number}, {...: first names}
    items = iter(tqdm(items, "clips", disable=None))
    with ThreadPoolExecutor(16) as pool:
        while some := list(islice(items, 1000)):
            for (file, item), reason in zip(some, pool.map(lambda pair: measure_item(pair[1], folder), some)):
                totals[file] += 1
                if reason:
                    left_out[file, reason] += 1
                    if left_out[file, reason] <= 5:
                        examples[file, reason].append(repr(item["name"]))
                    continue
                if file not in manifests:
                    manifests[file] = ManifestWriter(file, split_path)
                with name_disk_errors(file):
                    manifests[file].add(item)
    for (file, reason), n in left_out.items():
        names = ", ".join(examples[file, reason])
        print(f"{file}: {n} of {totals[file]} items are left out, {reason}, e.g. {names}")
    for file, manifest in manifests.items():
        manifest.save()
        print(f"{file}: {manifest.total} items")
    if not manifests:
        raise UserError(f"{source}: no clip can be read in {data_root}/{split_path}, nothing is written")
    return int(bool(left_out))
