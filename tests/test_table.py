"""Tables of clips to manifests."""
import json
import os

import pytest

import config
from data import Manifest
from prepare import table
from tests.helpers import fails_with_one_line, lay_out, run
from tools.common import UserError


@pytest.fixture
def make_manifest(tmp_path):
    lay_out(tmp_path / "root/mine", {}, ["a.wav", "b.wav", " c.wav"])

    def make(name, content, *options):
        path = lay_out(tmp_path, {name: content}) + "/" + name
        to = f"--to={tmp_path}/to/Mine-AQA/train.json"
        shared = [f"--data_root={tmp_path}/root", "--split_path=mine", to]
        return table.main(config.load([path, *shared, *options], "prepare/table.py", files=True))

    make.items = lambda: list(Manifest(f"{tmp_path}/to/Mine-AQA/train.json", f"{tmp_path}/root").items)
    return make


ASK = ("--name=path", "--prompt=What is heard?", "--output=label")
ROWS = [{"path": "a.wav", "label": "dog, small"}, {"path": "b.wav", "label": "café"}]


@pytest.mark.parametrize("name, content", [
    ("t.csv", 'path,label\na.wav,"dog, small"\n\nb.wav,café\n'.encode()),
    ("t.csv", 'path;label\r\na.wav;"dog, small"\r\nb.wav;café\r\n'.encode()),
    ("t.csv", '\ufeffpath|label\na.wav|dog, small\nb.wav|café'.encode()),
    ("t.txt", 'label\tpath\ndog, small\ta.wav\ncafé\tb.wav\n'.encode()),
    ("t.tsv", 'path\tlabel, or so\tlabel\na.wav\t,\tdog, small\nb.wav\t,\tcafé\n'.encode()),
    ("t.csv", 'path,label\na.wav,"dog, small"\nb.wav,café\n'.encode("latin-1")),
    ("t.json", ROWS), ("t.jsonl", list(map(json.dumps, ROWS))), ("t.parquet", None)],
    ids=["comma", "semicolon, crlf", "bar, bom", "tab", "tsv", "latin-1", "json", "jsonl",
         "parquet"])
def test_tables(name, content, make_manifest, tmp_path, capsys):
    if content is None:
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (requirements-prepare.txt)")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows")
        content = (tmp_path / "rows").read_bytes()
    assert make_manifest(name, content, *ASK) == 0
    same = {"prompt": "What is heard?", "duration": 0.2}
    assert make_manifest.items() == [{"name": "a.wav", "output": "dog, small"} | same,
                                     {"name": "b.wav", "output": "café"} | same]
    assert ("latin-1" in capsys.readouterr().out) == (isinstance(content, bytes) and b"caf\xe9\n" in content)


def test_columns(make_manifest):
    """The prompt from a column, start and duration, kept columns, numbers, lists of clips and of labels."""
    rows = [{"path": ["a.wav", "b.wav"], "ask": "Which is louder?", "n": 2, "start": 0.05, "group": "x"},
            {"path": ["b.wav"], "ask": "How long?", "n": ["one", "1"], "start": 0, "group": None}]
    options = ("--name=path", "--prompt=ask", "--output=n", "--audio_start=start", "--keep=group")
    assert make_manifest("t.json", rows, *options) == 0
    assert make_manifest.items() == [
        {"name": ["a.wav", "b.wav"], "prompt": "Which is louder?", "output": "2", "audio_start": 0.05,
         "duration": 0.3, "group": "x"},  # of both
        {"name": "b.wav", "prompt": "How long?", "output": "one, 1", "audio_start": 0.0, "duration": 0.2}]
    rows = ["first,second,label,s", "a.wav,b.wav,x,0.1", '" c.wav",,y,0.2']
    options = ("--name=first,second", "--prompt=What is it?", "--output=label", "--duration=s")
    assert make_manifest("t.csv", rows, *options) == 0
    assert [item["name"] for item in make_manifest.items()] == [["a.wav", "b.wav"], " c.wav"]
    assert [item["duration"] for item in make_manifest.items()] == [0.1, 0.2]


def test_clips_that_are_missing_or_too_short(make_manifest, capsys):
    rows = ["path,label,s", "a.wav,x,0", "gone.wav,y,0", "a.wav,z,3", "../../root/mine/a.wav,x,0"]
    assert make_manifest("t.csv", rows, *ASK, "--audio_start=s") == 1
    assert [item["output"] for item in make_manifest.items()] == ["x"]
    assert "gone.wav" in capsys.readouterr().out


@pytest.mark.parametrize("name, content, named, options", [
    ("t.csv", ["a.wav,dog", "b.wav,cat"], "t.csv.*'path'", ASK),
    ("t.csv", ["path,lable", "a.wav,dog"], "t.csv.*'label'.*lable", ASK),
    ("t.csv", ["path,label", "a.wav,dog"], "'lable'", ("--name=path", "--prompt=lable", "--output=label")),
    ("t.csv", ["path,label"], "t.csv", ASK),
    ("t.csv", b"", "t.csv", ASK),
    ("t.csv", ["path,label", "a.wav,dog", "b.wav,"], r"t.csv row 2.*'label'", ASK),
    ("t.csv", ["path,label", 'a.wav,"two', 'lines"', ",cat"], r"row 2.*'path'", ASK),
    ("t.csv", ["path,label", "a.wav,dog,cat"], r"row 1.*path, label", ASK),
    ("t.csv", ["path,label", "a.wav"], r"row 1.*path, label", ASK),
    ("t.csv", ["path,label", "a.wav,dog", 'b.wav,"cat', "c.wav,cow"], "t.csv row 2", ASK),
    ("t.csv", ["path,label,d", "a.wav,dog,-1"], r"row 1.*'d'", (*ASK, "--audio_start=d")),
    ("t.csv", ["path,label,d", "a.wav,dog,1:30"], "'d'", (*ASK, "--duration=d")),
    ("t.csv", ["path,label", "z.wav,dog"], "t.csv", ASK),
    ("t.csv", ["path,label", "a.wav,dog"], "kepe", (*ASK, "--kepe=x")),
    ("t.csv", ["path,label", "a.wav,dog"], "--output", ASK[:2]),
    ("t.csv", ["path,label", "a.wav,dog"], "--to", (*ASK, "--to=x.json")),
    ("t.jsonl", ['{"path": "a.wav", "label": "x"}', '{"path"'], "t.jsonl line 2", ASK),
    ("t.jsonl", ['{"path": "a.wav", "label": "x"}', '{"path": "a.wav"}'], "row 2.*'label'", ASK),
    ("t.json", [{"path": "a.wav", "label": []}], "row 1.*'label'", ASK),
    ("t.json", {"path": "a.wav"}, "t.json", ASK),
    ("t.parquet", b"PAR1", "t.parquet", ASK)])
def test_mistakes_are_named_and_nothing_is_written(name, content, named, options, make_manifest, tmp_path):
    """An older manifest stays as it is."""
    assert make_manifest("good.csv", ["path,label", "a.wav,dog"], *ASK) == 0
    with pytest.raises(UserError, match=named):
        make_manifest(name, content, *options)
    assert [item["output"] for item in make_manifest.items()] == ["dog"]
    assert os.listdir(tmp_path / "to/Mine-AQA") == ["train.json"]


@pytest.mark.slow
def test_script(tmp_path):
    """As a user runs it: errors in one line with exit code 2."""
    lay_out(tmp_path, {"clips.csv": ["path,label", "a.wav,dog"]}, ["root/a.wav"])
    options = ["prepare/table.py", tmp_path / "clips.csv", *ASK, f"--data_root={tmp_path}/root"]
    run(*options, f"--to={tmp_path}/Mine-AQA/val.json")
    assert len(Manifest(f"{tmp_path}/Mine-AQA/val.json", f"{tmp_path}/root")) == 1
    fails_with_one_line(*options, f"--to={tmp_path}/clips.csv/x/train.json", saying="clips.csv/x")
