"""Public datasets to manifests. tests/sources.json has small files of every source in its original
layout, with its traps, and the (clip, output)s of the manifests that have to come out."""
import glob
import io
import json
import os
import re
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import pytest

import config
import eval as scoring
from data import Manifest
from prepare import datasets, manifests
from tests.helpers import ROOT, fails_with_one_line, lay_out, run
from tools.common import UserError, read_json_elements, read_json_rows

with open(f"{ROOT}/tests/sources.json", encoding="utf-8") as f:
    SOURCES = json.load(f)
with open(f"{ROOT}/tests/source_cases.json", encoding="utf-8") as f:
    CASES, JSON_TEXTS = json.load(f).values()


def convert(tmp_path, source, files, clips=(), data_root=""):
    """-> exit code of prepare/datasets.py, after which the manifests are in tmp_path/to."""
    folder = lay_out(tmp_path / source, files, clips)
    options = [source, f"--from={folder}", f"--to={tmp_path}/to", f"--data_root={tmp_path}/{data_root}"]
    return datasets.main(config.load(options, "prepare/datasets.py", files=True))


def read_manifests(root):
    """{Name-Task/split: Manifest} of those in root/to."""
    names = [file.removesuffix(".json") for file in glob.glob("*/*.json", root_dir=f"{root}/to")]
    return {name: Manifest(f"{root}/to/{name}.json", str(root)) for name in names}


# ------------------------------------------------------------------------------------------------------------
# Sources


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """{source: {Name-Task/split: Manifest}} of all sources."""
    found = {}
    for source, layout in SOURCES.items():
        root = tmp_path_factory.mktemp(source)
        clips = list(layout["other clips"])
        for name, _ in [item for items in layout["manifests"].values() for item in items]:
            clips += [name] if isinstance(name, str) else name
        assert convert(root, source, layout["files"], clips) == 0, source
        found[source] = read_manifests(root)
        assert set(found[source]) == set(layout["manifests"]), source
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_source(source, converted):
    for name, expected in SOURCES[source]["manifests"].items():
        manifest = converted[source][name]
        assert [[item["name"], item["output"]] for item in manifest.items] == expected, name
        assert manifest.head["split_path"] == source
        for i, item in enumerate(manifest.items):
            assert all(map(os.path.isfile, manifest[i]["paths"]))
            assert item["duration"] == pytest.approx(0.2 * len(manifest[i]["paths"]))
            assert item["prompt"].strip() and "<" not in item["prompt"]


@pytest.mark.parametrize("source", SOURCES)
def test_right_answers_score_100(source, converted):
    settings = SimpleNamespace(metric=None, labels=None, matching="exact", text_encoder="", device="cpu")
    for name, manifest in converted[source].items():
        if "Captioning" in name or name == "Clotho-AQA-AQA/train":
            continue
        rows = [item | {"audio": str(item["name"]), "answer": item["output"]} for item in manifest.items]
        if "Clotho-AQA" in name:  # one of the three
            rows = [row | {"answer": row["answer"].split(", ")[0]} for row in rows]
        row = scoring.score_split(name, rows, settings)
        assert row.get("mAP", row.get("accuracy")) == 1, name


def test_references_options_and_groups_of_scores(converted):
    item = lambda source, name: converted[source][name].items[0]
    captions = item("audiocaps", "audiocaps-AudioCaptioning/test")["references"]
    assert captions == ["Rain, then wind", "Rain falls"]
    clotho = converted["clotho"]["Clotho-v2-AudioCaptioning/train"].items
    assert len({clotho[i]["prompt"] for i in range(5)}) == 1  # of one clip, so that eval.py takes them as one
    mmau = item("mmau", "MMAU/test-mini")
    assert mmau["task"] == "sound" and mmau["category"] == ["x", "y"]
    question = item("muchomusic", "MuChoMusic-AQA/test")
    assert question["music_knowledge"] == ["instrumentation"] and question["music_reasoning"] == []
    assert sorted(question["choices"]) == ["A bell", "A bongo", "A gong", "A snare."]
    question = item("music_avqa", "Music-AVQA-AQA_All/test")
    assert question["prompt"] == "Is the acoustic guitar louder than the cello?"
    assert question["category"] == "Comparative"


def repeat(lines):
    """[[template of a number and its parts, how many], ...] -> lines."""
    return [template.format(i, i // 5, i // 10, i % 10, i // 100, i % 100)
            for template, n in lines for i in range(n)]


@pytest.mark.slow
@pytest.mark.parametrize("source", [source for source in SOURCES if "published" in SOURCES[source]])
def test_published_counts(source, tmp_path):
    published = SOURCES[source]["published"]
    files = {path: repeat(lines) for path, lines in published["lines"].items()}
    folder = lay_out(tmp_path, files | dict.fromkeys(repeat(published["paths"]), b""))
    items = datasets.source_items(source, manifests.Folder(folder))
    assert Counter(name for name, _ in items) == published["counts"]


def test_prompts_are_chosen_the_same_everywhere():
    """By a hash of the clip's own name that does not change with the process, or where the clip lies."""
    names = [f"{i}.wav" for i in range(200)]
    for kind, prompts in datasets.PROMPTS.items():
        assert {datasets.choose_prompt(kind, name) for name in names} == set(prompts), kind
    # crc32("x.wav") % 3 = 1
    assert datasets.choose_prompt("scene", "a/x.wav") == "Name the acoustic scene of this recording."


@pytest.mark.slow
def test_help_lists_the_sources():
    text = run("prepare/datasets.py", "--help").stdout
    assert all(f"\n{source}\n" in "\n" + text for source in SOURCES)
    for field in ("home: http", "licence: ", "layout: "):
        assert text.count(field) == len(SOURCES) == 23


@pytest.mark.parametrize("source", SOURCES)
def test_wrong_folder(source, tmp_path):
    """One with other things, and tables whose clips are gone."""
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/{source}")):
        convert(tmp_path, source, {"readme.txt": ["x"]}, ["other.wav"])
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/{source}")):
        convert(tmp_path, source, SOURCES[source]["files"])
    assert not os.path.exists(tmp_path / "to")


# ------------------------------------------------------------------------------------------------------------
# What users meet


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['source']}: {case['about']}")
def test_what_users_have(case, tmp_path, capsys):
    """Clips in several folders and formats, pointers, contradictory rows, mistakes."""
    arguments = tmp_path, case["source"], case["files"], case["clips"]
    if "error" in case:
        with pytest.raises(UserError, match=case["error"]):
            convert(*arguments)
        assert not os.path.exists(tmp_path / "to")
        return
    assert convert(*arguments) == case["code"]
    found = {name: [[item["name"], item["output"]] for item in manifest.items]
             for name, manifest in read_manifests(tmp_path).items()}
    assert found == case["manifests"]
    printed = "".join(capsys.readouterr())
    assert [text for text in case["printed"] if text not in printed] == []


def test_a_source_outside_of_data_root_has_an_absolute_path(tmp_path):
    files = {"meta/esc50.csv": ["filename,category", "0.wav,dog"]}
    assert convert(tmp_path, "esc50", files, ["audio/0.wav"], "elsewhere") == 0
    manifest = read_manifests(tmp_path)["ESC50-EventClassification/test"]
    assert manifest.head["split_path"] == f"{tmp_path}/esc50" and os.path.isfile(manifest[0]["path"])


@pytest.mark.parametrize("text, rows", JSON_TEXTS)
def test_json_is_read_in_parts(text, rows, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    if rows is None:
        with pytest.raises(UserError, match="x.json"):
            list(read_json_rows(path))
        return
    assert list(read_json_rows(path)) == rows
    parts = read_json_elements(io.StringIO(f"{json.dumps(rows)}, {json.dumps(rows)}]"), "[", size=7)
    assert list(parts) == [rows, rows]


@pytest.mark.slow
def test_millions_of_rows_need_no_memory(tmp_path):
    """A row of OpenAQA takes 1.7 KB."""
    row = {"instruction": "?", "audio_id": "x/1.wav", "dataset": "d", "task": "t", "output": "A dog."}
    files = {"openaqa.json": [row] * 6000}
    tracemalloc.start()
    assert convert(tmp_path, "openaqa", files, ["x/1.wav"]) == 0
    assert tracemalloc.get_traced_memory()[1] < 7e6
    tracemalloc.stop()
    assert len(read_manifests(tmp_path)["OpenAQA-AQA/train"]) == 6000


@pytest.mark.parametrize("wanted, found", [
    (["train/x.wav"], "a/train/x.wav"), (["Train/x"], "a/train/x.wav"), (["x.wav"], None),
    (["test/x.wav"], None),
    (["test/x.wav", "b/dev/x.wav"], "b/dev/x.wav"), (["y.wav"], "c/y.wav"), (["z.wav"], None),
    (["e/z"], "e/z.wav"), (["w.1.wav"], "only/one/w.1.mp3"), (["one/w.1"], "only/one/w.1.mp3"),
    ([".hidden.wav"], None), ([" x.wav"], None)])
def test_find(wanted, found, tmp_path):
    """What a name stands for: the nearest folder wins, and nothing is guessed."""
    files = ("a/train/x.wav", "b/dev/x.wav", "c/y.flac", "c/y.wav", "d/z.wav", "e/z.wav", "only/one/w.1.mp3",
             "f/.hidden.wav")
    lay_out(tmp_path, dict.fromkeys(files, ["x"]))
    assert manifests.Folder(str(tmp_path)).find(*wanted) == found


@pytest.mark.slow
def test_scripts(tmp_path):
    """As a user runs them: errors in one line with exit code 2."""
    fails_with_one_line("prepare/datasets.py", "esc50", f"--from={tmp_path}/none", saying=f"{tmp_path}/none")
    fails_with_one_line("prepare/datasets.py", "esc50", "--from", tmp_path, saying="meta/esc50.csv")
