"""A table of clips -> a manifest.

    python prepare/table.py clips.csv --name=path --prompt="What is heard?" --output=label \\
        --to=data/manifests/Mine-AQA/train.json --split_path=mine
    python prepare/table.py pairs.jsonl --name=first,second --prompt=question --output=answer --to=...

CSV or TSV with a header, JSON (a list of objects), JSONL or Parquet. --name, --output, --audio_start,
--duration and --keep name columns; --prompt a column, or the prompt itself. Several clips of one question:
several columns (a row may leave all but one empty), or a column of lists. Audio lies at
data_root/split_path/name. Durations are measured where no column tells them: the seconds from audio_start on.
Clips that are missing or no sound are left out and counted (exit code 1); what is wrong with a table is told
by row and column, and nothing is written (2).
"""
import difflib
import json
import math
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import config as settings
from prepare.manifests import SOUNDS, Parser, place_for, read_table, run, write
from tools.common import UserError


FIELDS = ("name", "prompt", "output", "audio_start", "duration")


def text_of(value, where):
    """A cell as text: lists joined by ", "; an empty one, NaN and objects are errors."""
    if isinstance(value, dict):
        raise UserError(f"{where}: an object, expected a text")
    if isinstance(value, list) and value:
        return ", ".join(text_of(part, where) for part in value)
    text = str(value).lower() if isinstance(value, bool) else "" if value in (None, []) else str(value)
    if not text.strip() or text.strip().lower() == "nan":
        raise UserError(f"{where}: {'NaN' if text.strip() else 'empty'}, expected a text")
    return text


def number_of(value, where):
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise UserError(f"{where}: {value!r}, expected seconds, not negative")
    return number


def clips_of(row, columns, where):
    """A name, or a list of two and more."""
    cells = [(column, row.get(column)) for column in columns]
    filled = [(column, value) for column, value in cells if value not in (None, "", [])]
    names = []
    for column, value in filled or cells[:1]:
        if isinstance(value, str) and value.startswith("[") and value.endswith('"]'):
            try:
                value = json.loads(value)  # a list in a cell of text
            except ValueError as error:
                raise UserError(f"{where}, column {column!r}: {value!r} is no list ({error})") from error
        for name in value if isinstance(value, list) else [value]:
            text_of(name, f"{where}, column {column!r}")
            names.append(str(name))
    return names if len(names) > 1 else names[0]


def checked(path, rows, columns, wanted):
    """The wanted columns, of which every one has to be there."""
    if not rows:
        raise UserError(f"{path}: holds no row" + " below its header" * bool(columns))
    for option, column in wanted:
        if columns.count(column) > 1:
            raise UserError(f"{path}: {columns.count(column)} columns named {column!r}, expected one")
        if column not in columns:
            near = difflib.get_close_matches(column, columns, n=1) or columns[:8]
            no_header = any(name.lower().endswith(SOUNDS) for name in columns)
            raise UserError(f"{path}: no column {column!r} for --{option}; it has {', '.join(columns)}" + (
                "; its first line looks like data: the header is missing" if no_header else
                f"; nearest: {near[0]}" if near else ""))


def items_of(path, options):
    """Read and check the table -> the items of a manifest."""
    rows, columns, how = read_table(path, options.delimiter, options.encoding)
    name_columns = [options.name] if options.name in columns else options.name.split(",")
    keep = options.keep.split(",") if options.keep else []
    literal = options.prompt not in columns and " " in options.prompt.strip()
    wanted = [("name", column) for column in name_columns] + [("output", options.output)]
    wanted += [] if literal else [("prompt", options.prompt)]
    wanted += [(option, getattr(options, option)) for option in ("audio_start", "duration")
               if getattr(options, option)] + [("keep", column) for column in keep]
    checked(path, rows, columns, wanted)
    for column in keep:  # what the manifest says by these names is not another column's
        if column in FIELDS and column != getattr(options, column):
            raise UserError(f"--keep={options.keep}: {column!r} is a field of every item; "
                             f"--{column}={column} takes it from that column")
    items, seen = [], {}
    for where, row in rows:
        cell = lambda column: f"{path} {where}, column {column!r}"
        prompt = options.prompt if literal else text_of(row.get(options.prompt), cell(options.prompt))
        item = {"name": clips_of(row, name_columns, f"{path} {where}"), "prompt": prompt,
                "output": text_of(row.get(options.output), cell(options.output))}
        for field in ("audio_start", "duration"):
            column = getattr(options, field)
            if column:
                item[field] = number_of(row.get(column), cell(column))
        same = json.dumps(item, sort_keys=True)
        if same in seen:
            raise UserError(f"{cell(name_columns[0])}: the same clip, prompt and output as {seen[same]}")
        seen[same] = where
        kept = {column: row.get(column) for column in keep}
        items.append(item | {column: value for column, value in kept.items() if value == value is not None})
    print(f"{path}: {len(rows)} rows, {how}")
    return items


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("table", help="CSV, TSV, JSON, JSONL or Parquet file")
    parser.add_argument("--name", required=True, help="column of the clip's file, or several: first,second")
    parser.add_argument("--prompt", required=True, help="a column, or the prompt itself")
    parser.add_argument("--output", required=True, help="column of the answer")
    parser.add_argument("--to", required=True, help="manifest to write: <folder>/<Name-Task>/<split>.json")
    parser.add_argument("--split_path", default=".", help="folder of the clips, in data_root or absolute")
    parser.add_argument("--data_root", default=settings.defaults()["data_root"], help="default %(default)s")
    parser.add_argument("--audio_start", help="column of the second at which a clip begins")
    parser.add_argument("--duration", help="column of its seconds from there on; measured without it")
    parser.add_argument("--keep", help="columns to keep, by which eval.py groups scores: category,dataset")
    parser.add_argument("--delimiter", help="of a CSV: , ; | or tab; without it what its header has most of")
    parser.add_argument("--encoding", help="without it UTF-8, else latin-1")
    options = parser.parse_args(argv)
    split = os.path.basename(options.to)
    if not split.startswith(("train.json", "val.json", "test")) or not split.endswith(".json"):
        raise UserError(f"--to={options.to}: expected <Name-Task>/ and train.json, val.json or test.json")
    to, items = place_for(options.to), items_of(options.table, options)
    done, left_out = write(to, items, options.split_path, settings.resolve_path(options.data_root))
    if not done:
        raise FileNotFoundError(f"{options.table}: none of its clips can be read at "
                                f"{os.path.join(options.data_root, options.split_path)}; nothing is written")
    return 1 if left_out else 0


if __name__ == "__main__":
    run(main)
