"""Public datasets to manifests. tests/sources.json has small files of every source in its original
layout, with its traps, and the (clip, output)s of the manifests that have to come out."""
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
from tools.common import UserError, read_json_list

with open(f"{ROOT}/tests/sources.json", encoding="utf-8") as f:
    SOURCES = json.load(f)


def convert(tmp_path, source, files, clips=()):
    """-> exit code of prepare/datasets.py, after which the manifests are in tmp_path/to."""
    folder = lay_out(tmp_path / source, files, clips)
    options = [source, f"--from={folder}", f"--to={tmp_path}/to", f"--data_root={tmp_path}"]
    return datasets.main(config.load(options, "prepare/datasets.py", files=True))


def outputs(tmp_path, name):
    manifest = Manifest(f"{tmp_path}/to/{name}.json", str(tmp_path))
    return [item["output"] for item in manifest.items]


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
        written = [os.path.relpath(os.path.join(folder, name), root / "to").removesuffix(".json")
                   for folder, _, names in os.walk(root / "to") for name in names]
        assert sorted(written) == sorted(layout["manifests"]), source
        found[source] = {name: Manifest(f"{root}/to/{name}.json", str(root)) for name in written}
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


def test_what_can_not_be_used_is_left_out_and_named(tmp_path, capsys):
    rows = ["filename,category", *(f"{i}.wav,dog" for i in range(7)), "8.wav, ", "9.wav,cat"]
    files = {"meta/esc50.csv": rows, "audio/3.wav": ["<html>404"], "audio/4.wav": b""}
    clips = ["audio/0.wav", "audio/8.wav", "a/audio/9.wav", "b/audio/9.wav"]
    assert convert(tmp_path, "esc50", files, clips) == 1
    out = capsys.readouterr().out
    for i in (1, 2, 3, 4, 5, 6, 8, 9):
        assert f"audio/{i}.wav'" in out, i
    assert out.count("of 9 items") == 4  # missing, a page, unreadable, no answer
    assert outputs(tmp_path, "ESC50-EventClassification/test") == ["dog"]


def test_a_source_outside_of_data_root_has_an_absolute_path(tmp_path):
    table_of_one = {"meta/esc50.csv": ["filename,category", "0.wav,dog"]}
    folder = lay_out(tmp_path / "esc50", table_of_one, ["audio/0.wav"])
    options = ["esc50", f"--from={folder}", f"--to={tmp_path}/to", f"--data_root={tmp_path}/elsewhere"]
    assert datasets.main(config.load(options, "prepare/datasets.py", files=True)) == 0
    manifest = Manifest(f"{tmp_path}/to/ESC50-EventClassification/test.json", "anywhere")
    assert manifest.head["split_path"] == folder and os.path.isfile(manifest[0]["path"])


@pytest.mark.parametrize("source, files, named", [
    ("esc50", {"meta/esc50.csv": ["name,label", "x,y"]}, "meta/esc50.csv.*'filename'"),
    ("nsynth", {"nsynth-test/examples.json": {"a": {"pitch": 1}}}, "examples.json.*instrument_family"),
    ("music_avqa", {"json/avqa-test.json": b"{"}, "json/avqa-test.json"),
    ("openaqa", {"openaqa.json": {"x": 1}}, "openaqa.json"),
    ("esc51", {"x": ["y"]}, "esc51.*esc50")])
def test_files_that_are_not_as_they_should_be(source, files, named, tmp_path):
    with pytest.raises(UserError, match=named):
        convert(tmp_path, source, files)
    assert not os.path.exists(tmp_path / "to")


POINTER = ["version https://git-lfs.github.com/spec/v1", "oid sha256:4d7a", "size 12345"]
FSD = {"FSD50K.ground_truth/eval.csv": ["fname,labels", "1,Dog"]}
ESC = {"meta/esc50.csv": ["filename,category", "cafe\u0301.wav,dog"]}
MELD = {"test_sent_emo.csv": ["Emotion,Sentiment,Dialogue_ID,Utterance_ID", "joy,positive,0,1"]}
CREMA, RAVDESS = "1001_DFA_ANG_XX", "03-01-07-01-02-01-01"


@pytest.mark.parametrize("source, files, clips, taken", [
    ("crema_d", {f"AudioMP3/{CREMA}.mp3": POINTER, f"VideoFlash/{CREMA}.flv": POINTER},
     [f"AudioWAV/{CREMA}.wav"], f"AudioWAV/{CREMA}.wav"),
    ("crema_d", {}, [f"AudioMP3/{CREMA}.mp3", f"x/AudioWAV/{CREMA}.wav"], f"x/AudioWAV/{CREMA}.wav"),
    ("crema_d", {}, [f"AudioMP3/{CREMA}.mp3"], f"AudioMP3/{CREMA}.mp3"),
    ("ravdess", {f"Actor_01/{RAVDESS}.mp4": b"x"}, [f"16k/{RAVDESS}.flac", f"Actor_01/{RAVDESS}.wav"],
     f"Actor_01/{RAVDESS}.wav"),
    ("gtzan", {}, ["a/jazz/jazz.00001.ogg", "genres/jazz/jazz.00001.wav"], "genres/jazz/jazz.00001.wav"),
    ("meld", MELD | {"output_repeated_splits_test/dia0_utt1.mp4": b"x"}, ["test/dia0_utt1.wav"],
     "test/dia0_utt1.wav"),
    ("meld", MELD | {"test/dia0_utt1.mp4": b"x", "test/dia0_utt1.flac": POINTER}, ["test/dia0_utt1.ogg"],
     "test/dia0_utt1.ogg"),
    ("fsd50k", FSD, ["FSD50K.eval_audio/1.flac", "FSD50K.eval_audio/1.mp3", "eval/1.wav"],
     "FSD50K.eval_audio/1.flac"),
    ("fsd50k", FSD, ["16k/FSD50K.eval_audio/1.wav", "FSD50K.eval_audio/1.wav"], "FSD50K.eval_audio/1.wav"),
    ("esc50", ESC, ["audio/caf\u00e9.ogg", "audio/caf\u00e9.wav"], "audio/caf\u00e9.wav"),
    ("vocalsound", {"meta/te_meta.csv": ["f0003"]},
     ["audio_44k/f0003_0_cough.wav", "b/audio_16k/f0003_0_cough.wav"], "b/audio_16k/f0003_0_cough.wav")])
def test_the_documented_folder_and_a_lossless_file(source, files, clips, taken, tmp_path):
    assert convert(tmp_path, source, files, clips) == 0
    for name in os.listdir(tmp_path / "to"):
        (file,) = os.listdir(tmp_path / "to" / name)
        assert Manifest(f"{tmp_path}/to/{name}/{file}").items[0]["name"] == taken


CAPTION = {"data": [{"id": "17", "caption": "A bell."}]}
SB, FREESOUND, LISTED = "SoundBible/sb_final.json", "fsd_final.json", "blacklist_exclude_test_ac.json"
OPENAQA = '{"instruction": "?", "audio_id": "x/1.wav", "dataset": "d", "task": "t", "output": "A dog."}'


@pytest.mark.parametrize("source, files, clips, named", [
    ("wavcaps", {SB: CAPTION, FREESOUND: POINTER, LISTED: {}}, ["SoundBible/17.flac"], FREESOUND),
    ("nonspeech7k", {"metadata of train set .csv": ["Filename,Classname", "a.wav,breath"],
                     "metadata of test set.csv": ["<!DOCTYPE html>", "x"]}, ["train/a.wav"],
     "metadata of test set.csv"),
    ("openaqa", {"a.json": POINTER, "b.json": [json.loads(OPENAQA)]}, ["x/1.wav"], "a.json")])
def test_metadata_that_was_not_downloaded(source, files, clips, named, tmp_path, capsys):
    assert convert(tmp_path, source, files, clips) == 1
    assert f"{tmp_path}/{source}/{named}" in capsys.readouterr().out and len(os.listdir(tmp_path / "to")) == 1
    with pytest.raises(UserError, match=re.escape(named)):  # nothing else is there
        only = {name: content for name, content in files.items() if name in (named, LISTED)}
        convert(tmp_path / "alone", source, only, clips)


def test_a_blacklist_that_was_not_downloaded(tmp_path):
    with pytest.raises(UserError, match=LISTED):
        convert(tmp_path, "wavcaps", {SB: CAPTION, LISTED: POINTER}, ["SoundBible/17.flac"])
    assert not os.path.exists(tmp_path / "to")


def avqa(ident, answer, question="Is it loud?", video="v", **more):
    return {"question_id": ident, "anser": answer, "question_content": question, "video_id": video,
            "templ_values": "[]", "type": '["Audio", "Counting"]'} | more


@pytest.mark.parametrize("source, files, clips, name, expected", [
    ("music_avqa", {"json/avqa-val.json": [
        avqa(1, "yes"), avqa(2, "one", "How many?"), avqa(1, "no"), avqa(3, "two", "Which?"),
        avqa(4, "no", "Old?"), avqa(3, "two", "Which?"), avqa(4, "no", "New?"), avqa(6, "six", video="w"),
        avqa(5, "x", "Deleted?", question_deleted=1), avqa(5, "left", "Where?"), avqa(6, "six")]},
     ["audio/v.wav", "audio/w.wav"], "Music-AVQA-AQA_All/val", ["one", "two", "left"]),
    ("esc50", {"meta/esc50.csv": ["filename,category", "a.wav,dog", "b.wav,cat", "a.wav,cow", "b.wav,cat"]},
     ["audio/a.wav", "audio/b.wav"], "ESC50-EventClassification/test", ["cat", "cat"]),
    ("fsd50k", {"eval.csv": ["fname,labels", "1,Dog", "1,\"Dog,Bark\"", "2,Cat"]},
     ["eval/1.wav", "eval/2.wav"], "FSD50k-EventClassification/test", ["cat"])])
def test_contradictory_rows_are_left_out(source, files, clips, name, expected, tmp_path, capsys):
    assert convert(tmp_path, source, files, clips) == 1
    assert outputs(tmp_path, name) == expected
    assert (f" {3 if source == 'music_avqa' else 1} ids") in capsys.readouterr().out


def test_answers_that_are_no_choice_are_counted(tmp_path, capsys):
    questions = [{"audio_id": "a.wav", "question": "Key?", "choices": ["C major", "D"], "answer": answer}
                 for answer in ("D", "A", "(A) C major", "")]
    assert convert(tmp_path, "mmau", {"mmau-test-mini.json": questions}, ["a.wav"]) == 0
    assert "mmau-test-mini.json: 2 answers" in capsys.readouterr().out


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("text", ["[]", "[ ]", '[{"a": [1, "]}"]}\n ,{"b\\"": "é\\u00e9"},{}]', "[null]"])
def test_json_lists_are_read_in_parts(text, size):
    assert list(read_json_list(io.StringIO(text[1:]), size)) == json.loads(text)
    with pytest.raises(ValueError):
        list(read_json_list(io.StringIO(text[1:-1]), size))


@pytest.mark.slow
def test_millions_of_rows_need_no_memory(tmp_path):
    """A row of OpenAQA takes 1.7 KB."""
    files = {"openaqa.json": ["[", *[OPENAQA + ","] * 5999, OPENAQA + "]"]}
    folder = lay_out(tmp_path / "openaqa", files, ["x/1.wav"])
    tracemalloc.start()
    options = ["openaqa", f"--from={folder}", f"--to={tmp_path}/to", f"--data_root={tmp_path}"]
    assert datasets.main(config.load(options, "prepare/datasets.py", files=True)) == 0
    assert tracemalloc.get_traced_memory()[1] < 7e6
    tracemalloc.stop()
    assert len(outputs(tmp_path, "OpenAQA-AQA/train")) == 6000


def test_vocalsound_by_its_speakers(tmp_path):
    clips = [f"data_44k/{name}.wav" for name in ("f0003_0_cough", "f0003_1_sigh", "m0004_0_sniff")]
    files = {"meta/te_meta.csv": ["spk_id,gender", "f0003,female,30"], "meta/tr_meta.csv": ["m0004,male,40"]}
    assert convert(tmp_path, "vocalsound", files, clips) == 0
    assert outputs(tmp_path, "VocalSound-VocalClassification/test") == ["cough", "sigh"]
    assert outputs(tmp_path, "VocalSound-VocalClassification/train") == ["sniff"]


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
