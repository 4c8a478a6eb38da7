"""A table of clips -> a manifest.

    python prepare/table.py clips.csv --name=path --prompt="What is heard?" --output=label \\
        --to=data/manifests/Mine-AQA/train.json --split_path=mine
    python prepare/table.py pairs.jsonl --name=first,second --prompt=question --output=answer --to=...

CSV or TSV with a header, JSON (a list of objects), JSONL or Parquet. Several clips of one question: several
columns (a row may leave all but one empty), or a column of lists. Several answers: a column of lists, which
are the references, too, where they are no labels of a classification. Audio lies at
data_root/split_path/name; of {"path", "bytes"} (Hugging Face's audio column) the bytes are written there.

Cells are texts as they stand. Clips that are missing or no sound are left out and counted (exit code 1); what
is wrong with a table is reported by row and column, and nothing is written (2).
"""
import base64
import hashlib
import itertools
import os
import re
import sys
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import config as settings
from prepare.manifests import Row, as_list, read_table, write_manifests
from tools.common import UserError, atomic_write, check_not_read, check_writable
from tools.data.audio import find_file

name: str = ""  # column of the clip's file, or several: first,second
prompt: str = ""  # column of the question, or the question itself
output: str = ""  # column of the answer
to: str = ""  # manifest to write: <folder>/<Name-Task>/<train, val, dev, test...>.json
split_path: str = "."  # folder of the clips, in data_root or absolute
audio_start: str = ""  # column of the second at which a clip begins; empty: 0
duration: str = ""  # column of its seconds from there on; empty: measured
keep: str = ""  # columns to keep, by which eval.py groups scores: category,dataset
encoding: str = ""  # of a CSV or TSV; empty: UTF-8, UTF-16 with a byte order mark, else guessed, with a note


def cell_texts(row, column):
    """The texts of a cell: one, or those of a list. UserError where it is empty or holds something else."""
    for value in as_list(row[column]) or [None]:
        if type(value) not in (str, int, float, bool) or repr(value) in ("''", "nan", "inf", "-inf"):
            raise UserError(f"{row.where}, column {column!r}: {value!r:.80}, expected text, number or bool")
    return [str(value) for value in as_list(row[column])]


def cell_text(row, column):
    return ", ".join(cell_texts(row, column))


def cell_seconds(row, column):
    text = cell_text(row, column).strip()
    if not re.fullmatch(r"[0-9]*\.?[0-9]+([eE][+-]?[0-9]+)?", text) or float(text) >= 1e7:  # see data.py
        raise UserError(f"{row.where}, column {column!r}: {text!r}, expected seconds, not negative")
    return float(text)


def save_audio(clip, where, folder, undo):
    """Write the bytes of {"path", "bytes"} below the folder, not over another file. -> path, or a hash."""
    name, content = clip.get("path"), clip.get("bytes")
    if content is None:
        return name
    try:
        content = content if isinstance(content, bytes) else base64.b64decode(content, validate=True)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: bytes that are not base64 ({error})") from error
    name = os.path.normpath(str(name or hashlib.sha256(content).hexdigest()[:16] + ".wav"))
    file = find_file(os.path.join(folder, name))
    if name.startswith(("/", "..")):
        raise UserError(f"{where}: path {name!r}, expected one below split_path")
    if not os.path.exists(file):
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with atomic_write(file, "wb") as f:
            f.write(content)
        undo.callback(os.remove, file)
    elif Path(file).read_bytes() != content:
        raise UserError(f"{where}: path {name!r}, where {file} is another clip")
    return name


def cell_clips(row, column, folder, undo):
    """Names of the clips of a cell."""
    where = f"{row.where}, column {column!r}"
    row[column] = [save_audio(cell, where, folder, undo) if isinstance(cell, dict) else cell
                   for cell in as_list(row[column])]
    return cell_texts(row, column)


def table_items(c, path, folder, undo):
    """The items of a manifest, from a table whose every cell is checked."""
    rows, names = list(read_table(path, c.encoding)), c.name.split(",")
    columns = Row(dict.fromkeys(itertools.chain(*rows), True), path)
    kept = [column for column in c.keep.split(",") if column and columns[column]]
    literal_prompt = " " in c.prompt and c.prompt not in columns
    for row in tqdm(rows, "rows", disable=None):
        item = {column: row[column] for column in kept if row.get(column) not in (None, "", [])}
        for column in item:
            cell_texts(row, column)
        clips = []
        for column in [column for column in names if row[column]] or names[:1]:
            clips += cell_clips(row, column, folder, undo)
        answers = cell_texts(row, c.output)
        if len(answers) > 1 and not re.search("(Classification|Tagging)[^/]*/[^/]*$", c.to):
            item["references"] = answers
        item["name"] = clips if len(clips) > 1 else clips[0]
        item["prompt"] = c.prompt if literal_prompt else cell_text(row, c.prompt)
        item["output"] = ", ".join(answers)
        for field in ("audio_start", "duration"):
            column = getattr(c, field)
            if column:
                item[field] = cell_seconds(row, column)
        yield item


def main(c):
    if len(c.files) != 1 or "" in (c.name, c.prompt, c.output, c.to):
        raise UserError("expected a table, --name, --prompt, --output and --to; --help describes them")
    if not re.search(r"(^|/)(train|val|valid|validation|dev|test[^/]*)\.json$", c.to):
        raise UserError(f"--to={c.to}: expected <Name-Task>/ and train, val, dev or test .json")
    to, data_root = settings.resolve_path(c.to), settings.resolve_path(c.data_root)
    path = find_file(c.files[0])
    check_writable(to)
    check_not_read(to, [path])
    with ExitStack() as undo:  # what was written, where something is wrong with the table
        items = [(to, item) for item in table_items(c, path, os.path.join(data_root, c.split_path), undo)]
        code = write_manifests(items, c.split_path, data_root, path)
        undo.pop_all()
    return code


if __name__ == "__main__":
    settings.run(main, __file__, reads=("data_root",), files=True)
