"""Tables of clips to manifests."""
import base64
import json
import os
import unicodedata

import pytest

import config
from data import Manifest
from prepare import table
from tests.helpers import fails_with_one_line, lay_out, run
from tools.common import UserError

ASK = ("--name=path", "--prompt=What is heard?", "--output=label")


@pytest.fixture
def make_manifest(tmp_path):
    lay_out(tmp_path / "root/mine", {}, ["a.wav", "b.wav", " c.wav"])

    def make(name, content, *options):
        content = content.encode() if isinstance(content, str) else content
        path = lay_out(tmp_path, {name: content}) + "/" + name
        to = f"--to={tmp_path}/to/Mine-AQA/train.json"
        shared = [f"--data_root={tmp_path}/root", "--split_path=mine", to]
        return table.main(config.load([path, *shared, *options], "prepare/table.py", files=True))

    make.items = lambda: list(Manifest(f"{tmp_path}/to/Mine-AQA/train.json", f"{tmp_path}/root").items)
    make.outputs = lambda: [item["output"] for item in make.items()]
    return make


@pytest.fixture
def parquet(tmp_path):
    """rows -> the bytes of a Parquet file."""
    reason = "pyarrow is not installed (requirements-prepare.txt)"
    pyarrow = pytest.importorskip("pyarrow", reason=reason)
    writer = pytest.importorskip("pyarrow.parquet", reason=reason)

    def to_bytes(rows):
        writer.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows")
        return (tmp_path / "rows").read_bytes()

    return to_bytes


def unfold(block):
    """The cells of a block's lines, split at ¦. In them ⏎ and ⇥ are a line end and a tab."""
    lines = block.strip("\n").replace("⏎", "\v").replace("⇥", "\t").split("\n")
    return [[cell.strip(" ").replace("\v", "\n") for cell in line.split("¦")] for line in lines]


SAME = """
t.csv ¦ path,label⏎a.wav,"dog, small"⏎⏎b.wav,café⏎,⏎  ⏎
t.csv ¦ \ufeffpath;label⏎a.wav;"dog, small"⏎b.wav;café⏎
t.csv ¦ ⏎"path"|"label, or so;"|label|⏎a.wav||dog, small|⏎b.wav||café|
t.txt ¦ label⇥path⏎dog, small⇥a.wav⏎café⇥b.wav⏎
t.tsv ¦ ,⇥path⇥label, or, so⇥label⏎0⇥a.wav⇥,⇥dog, small⏎1⇥b.wav⇥,⇥"café"⏎
t.json ¦ [{"path": "a.wav", "label": "dog, small"}, {"path": "b.wav", "label": "café"}]
t.json ¦ {"data": [{"path": "a.wav", "label": "dog, small"}, {"path": "b.wav", "label": "café"}]}
t.json ¦ {"x": {"path": "a.wav", "label": "dog, small"}, "y": {"path": "b.wav", "label": "café"}}
t.jsonl ¦ {"path": "a.wav", "label": "dog, small"}⏎⏎{"path": "b.wav", "label": "caf\\u00e9"}
lines.json ¦ {"path": "a.wav", "label": "dog, small"}⏎{"path": "b.wav", "label": "caf\\u00e9"}
t.ndjson ¦ {"path": "a.wav", "label": "dog, small"}⏎{"path": "b.wav", "label": "caf\\u00e9"}
"""


@pytest.mark.parametrize("name, content", unfold(SAME))
def test_tables(name, content, make_manifest):
    same = {"prompt": "What is heard?", "duration": 0.2}
    for encoding in ("utf-8", "utf-8-sig") if "json" in name else ("utf-8", "utf-16"):
        for line_end in ("\n", "\r\n") if "json" in name else ("\n", "\r\n", "\r"):
            assert make_manifest(name, content.replace("\n", line_end).encode(encoding), *ASK) == 0
            assert make_manifest.items() == [{"name": "a.wav", "output": "dog, small"} | same,
                                             {"name": "b.wav", "output": "café"} | same]


ENCODINGS = """
cp1252 ¦ dog’s “loud” bark
latin-1 ¦ jalapeño niño pájaro
cp1250 ¦ pies głośno szczeka żółw
cp1251 ¦ собака лает
koi8-r ¦ собака лает
gbk ¦ 狗在叫 猫
gb18030 ¦ 狗在叫 㐀㐁
cp932 ¦ ①犬が吠える～
big5 ¦ 狗在叫 貓
shift_jis ¦ 犬が吠える 猫
euc-jp ¦ 犬が吠える 猫
euc-kr ¦ 개가 짖는다
"""


def test_a_long_cell(make_manifest):
    assert make_manifest("t.csv", f'path,label\na.wav,"{"x," * 10 ** 5}"', *ASK) == 0
    assert make_manifest.outputs() == ["x," * 10 ** 5]


@pytest.mark.parametrize("encoding, words", unfold(ENCODINGS))
def test_encodings(encoding, words, make_manifest, capsys):
    """The guess is printed with what it makes of a word, also far into a file; --encoding decides."""
    pytest.importorskip("chardet", reason="chardet is not installed (requirements-prepare.txt)")
    labels = ["x" * 10 ** 5] * 3 * (encoding == "gbk") + words.split()
    content = "\n".join(["path,label", *("a.wav," + label for label in labels)]).encode(encoding)
    assert make_manifest("t.csv", content, *ASK) == 0
    assert make_manifest.outputs() == labels
    word = next(word for word in words.split() if not word.isascii())
    assert f"{word.encode(encoding)} is {word!r}" in capsys.readouterr().out
    assert make_manifest("t.csv", content, *ASK, f"--encoding={encoding}") == 0
    assert make_manifest.outputs() == labels
    assert "note" not in capsys.readouterr().out
    with pytest.raises(UserError, match="t.csv.*ascii"):
        make_manifest("t.csv", content, *ASK, "--encoding=ascii")


# Cells of the rows of a CSV or TSV, ↵ is a line break inside; the texts that they are, if they are others
CELLS = '''
t.tsv ¦ it's⏎"tis a dog⏎5" pipe⏎"bird⏎'cat'⏎cow"⏎"a" and "b"⏎"⏎""" x⏎"x"y"⏎" ¦
t.tsv ¦ "a ""b"""⏎"two↵lines"⏎"tab⇥in"⏎"x"⏎y ¦ a "b"⏎two↵lines⏎tab⇥in⏎x⏎y
t.csv ¦ it's⏎5" pipe⏎NA⏎null⏎None⏎nan⏎007⏎12345678901234567890⏎1e5⏎True⏎# x⏎'x ¦
t.csv ¦ "a ""b"""⏎"two↵lines, x"⏎"1,0"⏎"of↵a.wav" ¦ a "b"⏎two↵lines, x⏎1,0⏎of↵a.wav
'''


@pytest.mark.parametrize("name, cells, texts", unfold(CELLS))
def test_quotes_and_texts_as_they_stand(name, cells, texts, make_manifest):
    path = "a.wav\t" if name == "t.tsv" else "a.wav,"
    rows = [path.replace("a.wav", "path") + "label"]
    rows += [path + cell.replace("↵", "\n") for cell in cells.split("\n")]
    assert make_manifest(name, rows, *ASK) == 0
    texts = (texts or cells).split("\n")
    assert make_manifest.outputs() == [text.replace("↵", "\n") for text in texts]


COLUMNS = """[
{"path": ["a.wav", "b.wav"], "ask": "Which is louder?", "n": 2, "start": 0.05, "group": "x"},
{"path": ["b.wav"], "ask": "How long?", "n": ["one", 1], "start": 0}
]"""
ITEMS = """[
{"group": "x", "name": ["a.wav", "b.wav"], "prompt": "Which is louder?", "output": "2", "audio_start": 0.05,
 "duration": 0.3},
{"name": "b.wav", "prompt": "How long?", "output": "one, 1", "references": ["one", "1"], "audio_start": 0.0,
 "duration": 0.2}
]"""


def test_columns(make_manifest, tmp_path):
    """The prompt from a column, start and duration, kept columns, numbers, lists of clips and of answers."""
    options = ("--name=path", "--prompt=ask", "--output=n", "--audio_start=start", "--keep=group")
    assert make_manifest("t.json", COLUMNS, *options) == 0
    assert make_manifest.items() == json.loads(ITEMS)
    tagging = f"--to={tmp_path}/Tagging/Mine-AQA/train.json"  # the folder above the task's says nothing
    assert make_manifest("t.json", COLUMNS, *options, tagging) == 0
    assert list(Manifest(tagging[5:], f"{tmp_path}/root").items) == json.loads(ITEMS)
    rows = 'first,second,label,s\na.wav,b.wav,x,0.1\n" c.wav",,y,2e-1'
    assert make_manifest("t.csv", rows, *ASK, "--name=first,second", "--duration=s") == 0
    found = [(item["name"], item["duration"]) for item in make_manifest.items()]
    assert found == [(["a.wav", "b.wav"], 0.1), (" c.wav", 0.2)]


@pytest.mark.parametrize("split", ["validation", "valid", "dev", "test_clean"])
def test_splits_and_labels_of_a_classification(split, make_manifest, tmp_path):
    to = f"{tmp_path}/to/Mine-EventClassification/{split}.json"
    assert make_manifest("t.json", '[{"path": "a.wav", "label": ["x", "y"]}]', *ASK, f"--to={to}") == 0
    manifest = Manifest(to, f"{tmp_path}/root")
    assert manifest.head["split"] == split
    assert manifest.items[0]["output"] == "x, y"
    assert "references" not in manifest.items[0]


@pytest.mark.parametrize("there, asked", [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_of_a_mac_and_of_other_systems(there, asked, make_manifest, tmp_path):
    rows = "path,label\né/ü.wav,x\n가.wav,x\nば.wav,x"
    names = ["é/ü.wav", "가.wav", "ば.wav"]
    lay_out(tmp_path / "root/mine", {}, [unicodedata.normalize(there, name) for name in names])
    assert make_manifest("t.csv", unicodedata.normalize(asked, rows), *ASK) == 0
    assert len(make_manifest.items()) == len(names)


def test_clips_that_are_left_out(make_manifest, capsys):
    rows = "path,label,s\na.wav,x,0\ngone.wav,y,0\na.wav,z,3\n../../root/mine/a.wav,x,0"
    assert make_manifest("t.csv", rows, *ASK, "--audio_start=s") == 1
    assert make_manifest.outputs() == ["x"]
    assert "gone.wav" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_audio_column(kind, make_manifest, tmp_path, request, capsys):
    """Hugging Face's {"path", "bytes"} become files, not over other ones; none of a table with a mistake."""
    sound = (tmp_path / "root/mine/a.wav").read_bytes()

    def make(*clips):
        rows = [{"audio": {"path": path, "bytes": content}, "label": "x"} for path, content in clips]
        if kind == "parquet":
            content = request.getfixturevalue("parquet")(rows)
        else:
            to_text = lambda content: base64.b64encode(content).decode()
            content = [json.dumps(row, default=to_text) for row in rows]
        return make_manifest("t." + kind, content, *ASK, "--name=audio")

    clips = ("d/é.wav", sound), (None, sound), ("b.wav", None), ("./a.wav", sound), ("bad.wav", b"<html>")
    for _ in range(2):  # what is there already is not written again
        assert make(*clips) == 1
        assert "bad.wav" in capsys.readouterr().out
        names = [item["name"] for item in make_manifest.items()]
        assert len(names) == 4 and names[::2] == ["d/é.wav", "b.wav"]
        assert all((tmp_path / "root/mine" / name).read_bytes() == sound for name in names)
    files = sorted((tmp_path / "root").rglob("*"))
    for path in ("../x.wav", "/x.wav", "d/../../x.wav", "new.wav", "b.wav"):
        with pytest.raises(UserError, match=f"row [23], column 'audio'.*{os.path.basename(path)}"):
            make(("new.wav", sound), (path, sound + b"\0"), (path, sound + b"\1"))
        assert sorted((tmp_path / "root").rglob("*")) == files


# A table, what is named, and further options
MISTAKES = """
t.csv ¦ a.wav,dog⏎b.wav,cat ¦ t.csv.*'path' ¦
t.csv ¦ path, label⏎a.wav,dog ¦ t.csv.*'label'.*' label' ¦
t.csv ¦ path,label⏎a.wav,dog ¦ 'lable'.*'label' ¦ --prompt=lable
t.csv ¦ path,label⏎a.wav,dog ¦ t.csv.*'lable'.*'label' ¦ --keep=label,lable
t.csv ¦ path,label,label⏎a.wav,dog,cat ¦ t.csv.*'label' ¦
t.csv ¦ path,label ¦ t.csv ¦
t.csv ¦ ¦ t.csv ¦
t.csv ¦ path,label⏎a.wav,dog⏎b.wav, ¦ t.csv row 2.*'label' ¦
t.csv ¦ path,label⏎a.wav,"two⏎lines"⏎,cat ¦ t.csv row 2.*'path' ¦
t.csv ¦ path,label⏎a.wav,dog,cat ¦ t.csv row 1.*path, label ¦
t.csv ¦ path,label⏎a.wav ¦ t.csv row 1.*path, label ¦
t.csv ¦ path,label⏎a.wav,dog⏎# b⏎b.wav,cat ¦ t.csv row 2.*path, label ¦
t.csv ¦ path,label⏎a.wav,dog⏎b.wav,"cat⏎c.wav,cow ¦ t.csv row 2 ¦
t.csv ¦ path,label⏎a.wav,dog⏎b.wav,"cat" x⏎c.wav,cow ¦ t.csv row 2 ¦
t.csv ¦ path,label⏎a.wav,dog⏎b.wav,"cat⏎c.wav,cow⏎b.wav,x" ¦ t.csv row 2.*'label' ¦
t.tsv ¦ path⇥label⏎"a.wav⇥dog" ¦ t.tsv row 1.*path, label ¦
t.csv ¦ path;label⏎a.wav;dog⏎b.wav;"cat⏎"c.OGG";cow⏎b.wav;x" ¦ t.csv row 2 ¦
t.csv ¦ label,path⏎"dog,a.wav⏎cat,b.oga⏎cow",a.wav ¦ t.csv row 1.*'label' ¦
t.csv ¦ version https://git-lfs.github.com/spec/v1⏎size 132 ¦ t.csv.*git lfs ¦
t.jsonl ¦ <!DOCTYPE html>⏎<html></html> ¦ t.jsonl.*HTML ¦
t.csv ¦ path,label⏎z.wav,dog ¦ t.csv ¦
t.csv ¦ path,label⏎a.wav,dog\0\0 ¦ t.csv line 2 ¦
t.xlsx ¦ PK\3\4\0\0⏎ ¦ t.xlsx line 1 ¦
to/Mine-AQA/train.json ¦ [{"path": "a.wav", "label": "x"}] ¦ train.json ¦
t.csv ¦ path,label⏎a.wav,dog ¦ kepe ¦ --kepe=x
t.csv ¦ path,label⏎a.wav,dog ¦ --output ¦ --output=
t.csv ¦ path,label⏎a.wav,dog ¦ --to ¦ --to=x.json
t.csv ¦ path,label⏎a.wav,dog ¦ klingon ¦ --encoding=klingon
t.jsonl ¦ {"path": "a.wav", "label": "x"}⏎{"path" ¦ t.jsonl line 2 ¦
t.jsonl ¦ {"path": "a.wav", "label": "x"}⏎{"path": "a.wav"} ¦ t.jsonl row 2.*'label' ¦
t.json ¦ [{"path": "a.wav", "label": "x"}][] ¦ t.json ¦
t.json ¦ {"path": "a.wav"} ¦ t.json ¦
t.json ¦ {"data": 7} ¦ t.json ¦
t.json ¦ 7 ¦ t.json ¦
t.json ¦ [{"path": {"path": null}, "label": "x"}] ¦ t.json row 1.*'path' ¦
t.json ¦ [{"path": {"path": "a.wav", "bytes": "?"}, "label": "x"}] ¦ t.json row 1.*'path' ¦
t.json ¦ [{"path": "a.wav", "label": "x", "d": {"a": 1}}] ¦ t.json row 1.*'d' ¦ --keep=d
t.parquet ¦ PAR1 ¦ t.parquet ¦
"""
MISTAKES = unfold(MISTAKES)
for text in ("-1", "1:30", "1,5", "1_0", "nan", "inf", "1e9", "", "x"):
    MISTAKES.append(("t.csv", f"path;label;d\na.wav;x;{text}", "t.csv row 1.*'d'", "--audio_start=d"))
for cell in ('{"a": 1}', "null", "[]", '""', '["x", null]', '[["x"]]', "NaN", "Infinity"):
    row = f'[{{"path": "a.wav", "label": {cell}}}]'
    MISTAKES.append(("t.json", row, "t.json row 1.*'label'", ""))


for line_end in ("\r\n", "\r"):  # the last cell of a line that a quote takes in is a clip
    MISTAKES.append(("t.csv", line_end.join(("label,path", '"dog,a.wav', "cat,b.wav", 'cow",a.wav')),
                     "t.csv row 1.*'label'", ""))
for encoding in ("utf-16-le", "utf-32", "iso2022_jp", "mac-roman"):
    text = {"iso2022_jp": "犬", "mac-roman": "café à la crème"}.get(encoding, "x")
    MISTAKES.append(("t.csv", f"path,label\na.wav,{text}".encode(encoding), "t.csv.*--encoding", ""))
MISTAKES.append(("t.csv", "path,label\na.wav,café\n".encode() * 3 + b"b.wav,dog\x92s", "t.csv line 7", ""))


@pytest.mark.parametrize("name, content, named, options", MISTAKES)
def test_mistakes_are_named_and_nothing_is_written(name, content, named, options, make_manifest, tmp_path):
    """An older manifest stays as it is."""
    older = content.encode() if "train" in name else b"older"
    lay_out(tmp_path, {"to/Mine-AQA/train.json": older})
    with pytest.raises(UserError, match=named):
        make_manifest(name, content, *ASK, *options.split())
    assert os.listdir(tmp_path / "to/Mine-AQA") == ["train.json"]
    assert (tmp_path / "to/Mine-AQA/train.json").read_bytes() == older


def test_cells_of_parquet(make_manifest, parquet):
    def make(*labels):
        rows = [{"path": "a.wav", "label": label} for label in labels]
        return make_manifest("t.parquet", parquet(rows), *ASK)

    assert make("007", "NA", "un chien") == 0
    assert make_manifest.outputs() == ["007", "NA", "un chien"]
    for label in (b"un chien", {"a": 1}, None):
        with pytest.raises(UserError, match="t.parquet row 1, column 'label'"):
            make(label)


@pytest.mark.slow
def test_script(tmp_path):
    """As a user runs it: errors in one line with exit code 2."""
    lay_out(tmp_path, {"clips.csv": ["path,label", "a.wav,dog"]}, ["root/a.wav"])
    options = ["prepare/table.py", tmp_path / "clips.csv", *ASK, f"--data_root={tmp_path}/root"]
    run(*options, f"--to={tmp_path}/Mine-AQA/val.json")
    assert len(Manifest(f"{tmp_path}/Mine-AQA/val.json", f"{tmp_path}/root")) == 1
    fails_with_one_line(*options, f"--to={tmp_path}/clips.csv/x/train.json", saying="clips.csv/x")
