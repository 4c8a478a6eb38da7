"""A table of clips -> a manifest.

    python prepare/table.py clips.csv --name=path --prompt="What is heard?" --output=label \\
        --to=data/manifests/Mine-AQA/train.json --split_path=mine
    python prepare/table.py pairs.jsonl --name=first,second --prompt=question --output=answer --to=...

CSV or TSV with a header, JSON (a list of objects), JSONL or Parquet. Several clips of one question: several
columns (a row may leave all but one empty), or a column of lists. Audio lies at data_root/split_path/name.
Clips that are missing or no sound are left out and counted (exit code 1); what is wrong with a table is
reported by row and column, and nothing is written (2).
"""
import math
import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import config as settings
from prepare.manifests import read_table, write_manifests
from tools.common import UserError, check_writable

name: str = ""  # column of the clip's file, or several: first,second
prompt: str = ""  # column of the question, or the question itself
output: str = ""  # column of the answer
to: str = ""  # manifest to write: <folder>/<Name-Task>/<train, val or test...>.json
split_path: str = "."  # folder of the clips, in data_root or absolute
audio_start: str = ""  # column of the second at which a clip begins; empty: 0
duration: str = ""  # column of its seconds from there on; empty: measured
keep: str = ""  # columns to keep, by which eval.py groups scores: category,dataset


def cell_texts(row, column):
    """The texts of a cell: one, or those of a list. UserError where it is empty."""
    value = row[column]
    if value in (None, "", []):
        raise UserError(f"{row.where}, column {column!r}: empty")
    return [str(part) for part in value] if isinstance(value, list) else [str(value)]


def cell_text(row, column):
    return ", ".join(cell_texts(row, column))


def cell_seconds(row, column):
    try:
        seconds = float(row[column])
    except (TypeError, ValueError):
        seconds = -1
    if not 0 <= seconds < math.inf:
        raise UserError(f"{row.where}, column {column!r}: {row[column]!r}, expected seconds, not negative")
    return seconds


READERS = {"prompt": cell_text, "output": cell_text, "audio_start": cell_seconds, "duration": cell_seconds}


def table_items(c, path):
    """The items of a manifest, from a table whose every cell is checked."""
    rows, names = list(read_table(path)), c.name.split(",")
    literal_prompt = " " in c.prompt and not any(c.prompt in row for row in rows)
    for row in rows:
        if literal_prompt:
            row[c.prompt] = c.prompt
        item = {column: row[column] for column in c.keep.split(",") if column and row[column] is not None}
        clips = []
        for column in [column for column in names if row[column]] or names[:1]:
            clips += cell_texts(row, column)
        item["name"] = clips if len(clips) > 1 else clips[0]
        for field, read_cell in READERS.items():
            column = getattr(c, field)
            if column:
                item[field] = read_cell(row, column)
        yield item


def main(c):
    if len(c.files) != 1 or "" in (c.name, c.prompt, c.output, c.to):
        raise UserError("expected a table, --name, --prompt, --output and --to; --help describes them")
    if not re.fullmatch(r"(train|val|test.*)\.json", os.path.basename(c.to)):
        raise UserError(f"--to={c.to}: expected <Name-Task>/ and train.json, val.json or test.json")
    to, (path,) = settings.resolve_path(c.to), c.files
    check_writable(to)
    items = [(to, item) for item in table_items(c, path)]
    return write_manifests(items, c.split_path, settings.resolve_path(c.data_root), path)


if __name__ == "__main__":
    settings.run(main, __file__, reads=("data_root",), files=True)
