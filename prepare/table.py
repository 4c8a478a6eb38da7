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
from prepare.manifests import read_table, write_manifest
from tools.common import UserError, check_writable

name: str = ""  # column of the clip's file, or several: first,second
prompt: str = ""  # column of the question, or the question itself
output: str = ""  # column of the answer
to: str = ""  # manifest to write: <folder>/<Name-Task>/<train, val or test...>.json
split_path: str = "."  # folder of the clips, in data_root or absolute
audio_start: str = ""  # column of the second at which a clip begins; empty: 0
duration: str = ""  # column of its seconds from there on; empty: measured
keep: str = ""  # columns to keep, by which eval.py groups scores: category,dataset


def cell_texts(value, where):
    """The texts of a cell: one, or those of a list. Empty ones and NaN are refused."""
    texts = ["" if part is None else str(part) for part in (value if isinstance(value, list) else [value])]
    if not texts or any(text.strip().lower() in ("", "nan") for text in texts):
        raise UserError(f"{where}: {value!r}, expected a text")
    return texts


def cell_text(value, where):
    return ", ".join(cell_texts(value, where))


def cell_seconds(value, where):
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UserError(f"{where}: {value!r}, expected seconds, not negative")
    return seconds


READERS = {"prompt": cell_text, "output": cell_text, "audio_start": cell_seconds, "duration": cell_seconds}


def table_items(c, path):
    """The items of a manifest, from a table whose every cell is checked."""
    rows = read_table(path)
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    names, kept = c.name.split(","), c.keep.split(",") if c.keep else []
    fields = {field: getattr(c, field) for field in READERS if getattr(c, field)}
    if " " in c.prompt and c.prompt not in columns:  # the question itself
        fields.pop("prompt")
    for column in [*names, *fields.values(), *kept]:
        if column not in columns:
            raise UserError(f"{path}: no column {column!r}; it has {', '.join(columns) or 'no rows'}")
    items = []
    for position, row in rows.items():
        where = f"{path} {position}, column"
        clips = []
        for column in [column for column in names if row.get(column)] or names[:1]:
            clips += cell_texts(row.get(column), f"{where} {column!r}")
        item = {"name": clips if len(clips) > 1 else clips[0], "prompt": c.prompt}
        for field, column in fields.items():
            item[field] = READERS[field](row.get(column), f"{where} {column!r}")
        items.append({column: row[column] for column in kept if row.get(column) is not None} | item)
    print(f"{path}: {len(rows)} rows")
    return items


def main(c):
    if len(c.files) != 1 or "" in (c.name, c.prompt, c.output, c.to):
        raise UserError("expected a table, --name, --prompt, --output and --to; --help describes them")
    if not re.fullmatch(r"(train|val|test.*)\.json", os.path.basename(c.to)):
        raise UserError(f"--to={c.to}: expected <Name-Task>/ and train.json, val.json or test.json")
    to = os.path.abspath(settings.resolve_path(c.to))
    check_writable(to)
    data_root = settings.resolve_path(c.data_root)
    written, left_out = write_manifest(to, table_items(c, c.files[0]), c.split_path, data_root)
    if not written:
        raise UserError(f"{c.files[0]}: none of its clips can be read in {data_root}/{c.split_path}, nothing "
                        f"is written")
    return 1 if left_out else 0


if __name__ == "__main__":
    settings.run(main, __file__, reads=("data_root",), files=True)
