"""data.py check and convert, as commands; and the processes they work with."""
import json
import os
import re
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

import config
from data import Clips, Manifest
from prepare import convert
from prepare.check import inspect, targets_of
from prepare.convert import make_copy
from tests.helpers import fails_with_one_line, run, write_manifest
from tools.common import UserError, map_parallel

rng = np.random.default_rng(0)
AUDIO_SETTINGS = {"window_length": 10.0, "window_overlap": 0.0, "max_num_window": 3, "sample_rate": 16000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve clips of all kinds with three manifests, some items broken, and a config."""
    folder, items = str(tmp_path_factory.mktemp("clips")), []
    for i in range(12):
        seconds, rate = float(rng.uniform(1, 45)), int(rng.choice([16000, 22050, 44100, 48000]))
        name = f"{i}.{['wav', 'flac', 'mp3', 'ogg'][i % 4]}"
        sound = rng.standard_normal((int(seconds * rate), 1 + i % 2)) * 0.01
        soundfile.write(f"{folder}/{name}", sound, rate)
        items.append((name, "What is it?", f"Noise {i}.", seconds))
    write_manifest(folder, "good-AQA/train", items)
    write_manifest(folder, "good-AQA/val", [(["0.wav", "1.flac"], "Two?", "Yes.", items[0][3] + items[1][3])])
    open(f"{folder}/text.wav", "w").write("no sound")
    raw = open(f"{folder}/4.wav", "rb").read()
    open(f"{folder}/half.wav", "wb").write(raw[:len(raw) // 2])
    bad = [("text.wav", "p", "o"), ("gone.wav", "p", "o"), ("half.wav", "p", "o", items[4][3]),
           ("0.wav", "p", "o", items[0][3] / 4), ("half.raw", "p", "o")]
    os.link(f"{folder}/half.wav", f"{folder}/half.raw")
    path = write_manifest(folder, "bad-AQA/train", bad + items[:3])
    content = json.load(open(path))
    content["data"]["5"] |= {"audio_start": 0.5, "duration": 0.25}  # a part of a file is no fault
    json.dump(content, open(path, "w"))
    return folder


def config_of(folder, lm, *names):
    path = f"{folder}/config.py"
    with open(path, "w") as f:
        f.write(f"dataset_file_root = data_root = {folder!r}\nmax_num_window = 3\n"
                f"lang_encoder_path = {lm!r}\n"
                f"dataset_blending_config = {dict.fromkeys(names, 1.0)}\n"
                f"valid_dataset_config = {{'good-AQA/val': 1.0}}\n")
    return path


def test_check_command(tmp_path):
    soundfile.write(tmp_path / "good.wav", rng.standard_normal(32000) * 0.1, 16000)
    soundfile.write(tmp_path / "silent.wav", np.zeros(32000), 16000)
    open(tmp_path / "broken.wav", "w").write("x")
    files = ("good.wav", "silent.wav", "broken.wav", "gone.wav")
    path = write_manifest(tmp_path, "a-AQA/test", [(f, "p", "o") for f in files])
    before = open(path).read()
    result = run("prepare/check.py", path, "--data_root", tmp_path, f"--write={tmp_path}/clean", ok=False)
    assert result.returncode == 1 and "4 items, 1 good" in result.stdout, result
    assert open(path).read() == before
    clean = Manifest(f"{tmp_path}/clean/a-AQA/test.json", str(tmp_path))
    assert [item["name"] for item in clean.items] == ["good.wav"]


def test_check_of_a_config_with_a_page(folder, tiny_lm, tmp_path):
    config = config_of(folder, tiny_lm, "good-AQA/train", "bad-AQA/train")
    options = f"--page={tmp_path}/new/check.html", f"--write={tmp_path}/clean"
    result = run("prepare/check.py", config, *options, ok=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    for word in ("good-AQA/train: 12 items, 12 good", "good-AQA/val: 1 items, 1 good",
                 "bad-AQA/train: 8 items, 3 good",
                 "text.wav: not readable as audio", "gone.wav: no such audio file", "half.wav: truncated",
                 "0.wav: wrong duration", "half.raw: not readable as audio"):
        assert word in result.stdout, word
    assert "windows a clip: least 1" in result.stdout and "sample rate: least" in result.stdout
    page = open(tmp_path / "new/check.html").read()
    for word in ("Causes of failure", "not readable as audio: 2", "gone.wav", "windows a clip"):
        assert word in page, word
    assert len(re.findall('class="item"', page)) == 5 and page.count("<audio") == 5
    learnt = "".join(re.findall('class="learnt">(.*?)</span>', page, re.S))
    learnt = learnt.replace(" ", "")
    assert "noise0.&lt;|endofchunk|&gt;" in learnt and "whatisit" not in learnt
    clean = Manifest(f"{tmp_path}/clean/bad-AQA/train.json", folder)
    assert [item["name"] for item in clean.items] == ["0.wav", "1.flac", "2.mp3"]
    cleaned = [f"{tmp_path}/clean/{name}.json" for name in ("good-AQA/train", "bad-AQA/train")]
    run("prepare/check.py", *cleaned, "--data_root", folder)


@pytest.mark.parametrize("options, saying", [
    ([], "name manifests"), (["nowhere.json"], "nowhere.json: no such manifest"),
    (["--write=/dev/null/x"], "cannot be written to"), (["--page=/dev/null/x.html"], "cannot be written to"),
    (["--page={folder}"], "a folder, expected the name of a file"),
    (["--write={folder}"], "would overwrite"), (["--wirte=x"], "unknown setting 'wirte'; nearest: write")])
def test_what_check_cannot_do_is_one_line(folder, options, saying):
    manifest = [f"{folder}/good-AQA/val.json"] if options and options[0].startswith("--") else []
    options = [option.format(folder=folder) for option in options]
    fails_with_one_line("prepare/check.py", *manifest, *options, saying=saying)


def test_convert_gives_the_same_windows(folder, tiny_lm, tmp_path):
    config = config_of(folder, tiny_lm, "good-AQA/train", "bad-AQA/train")
    result = run("prepare/convert.py", config, f"--to={tmp_path}/to", ok=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.count("left out") == 3 and "bad-AQA/train: 5 of 8 items" in result.stdout
    all_kept = {"good-AQA/train": range(12), "good-AQA/val": [0], "bad-AQA/train": [2, 3, 5, 6, 7]}
    for name, kept in all_kept.items():
        before = Clips([Manifest(f"{folder}/{name}.json", folder)], None, AUDIO_SETTINGS)
        after = Clips([Manifest(f"{tmp_path}/to/{name}.json")], None, AUDIO_SETTINGS)
        assert len(after) == len(kept)
        for i, j in enumerate(kept):
            a, b = before[j], after[i]
            assert a["n_windows"] == b["n_windows"] and a["output"] == b["output"]
            assert np.abs(a["windows"].numpy().astype(int) - b["windows"].numpy()).max() <= 1
            assert b["truncated_seconds"] == 0
            told, paths = after.manifests[0].items[i], after.item(i)["paths"]
            seconds = sum(soundfile.info(path).duration for path in paths)
            assert "audio_start" not in told and abs(told["duration"] - seconds) < 1e-3
    assert (after.windows() == [sum(after[i]["n_windows"]) for i in range(len(after))]).all()
    files = {path: os.stat(path).st_mtime_ns for path in all_files(f"{tmp_path}/to/audio")}
    lost = sorted(files)[:3]
    os.remove(lost[0])
    os.truncate(lost[1], 0)  # as a machine leaves it that went down
    os.truncate(lost[2], os.path.getsize(lost[2]) // 2)
    run("prepare/convert.py", config, f"--to={tmp_path}/to", ok=False)
    again = {path: os.stat(path).st_mtime_ns for path in all_files(f"{tmp_path}/to/audio")}
    assert set(again) == set(files) and [p for p in sorted(files) if again[p] != files[p]] == lost
    run("prepare/check.py", f"{tmp_path}/to/good-AQA/train.json")


@pytest.mark.parametrize("kind", ["wav", "w64", "rf64", "aiff", "au"])
def test_files_cut_short_that_decoders_take_for_whole(tmp_path, kind):
    soundfile.write(tmp_path / f"x.{kind}", rng.standard_normal(64000) * 0.1, 16000, format=kind.upper())
    content = (tmp_path / f"x.{kind}").read_bytes()
    (tmp_path / f"half.{kind}").write_bytes(content[:len(content) // 2])
    names = [(f"x.{kind}", "?", "noise"), (f"half.{kind}", "?", "noise"), (f"half.{kind}", "?", "noise", 2.0)]
    manifest = Manifest(write_manifest(tmp_path, "cut-AQA/test", names), tmp_path)
    whole, cut, told = (inspect([manifest], AUDIO_SETTINGS, (0, i))[0] for i in range(3))
    assert whole is None and told is None
    assert re.fullmatch(r"truncated: 2\.00 s, its header says [34]\.\d\d s", cut), cut


def all_files(folder):
    return [os.path.join(where, file) for where, _, files in os.walk(folder) for file in files]


@pytest.mark.parametrize("kind", ["never negative", "hardly negative", "constant", "offset", "silence",
                                  "one"])
def test_copies_of_odd_signals(tmp_path, kind):
    """The peak rule takes what is never negative for another signal: a copy must not become one."""
    positive = np.abs(rng.standard_normal(20000)) * 0.1
    x = {"never negative": positive, "hardly negative": np.concatenate([[-1e-6], positive]),
         "constant": np.full(9000, 0.3), "offset": 0.9 + 0.05 * np.sin(np.arange(20000)),
         "silence": np.zeros(5000), "one": np.ones(1)}[kind]
    soundfile.write(tmp_path / "x.wav", x, 16000, subtype="FLOAT")
    clip = str(tmp_path / "x.wav"), 0.0, None
    seconds = make_copy(clip, str(tmp_path / "to"), AUDIO_SETTINGS)  # compares its windows
    assert seconds == len(x) / 16000 and len(all_files(tmp_path / "to")) == 1


def test_convert_without_a_place_is_one_line(folder, tmp_path):
    manifest = f"{folder}/good-AQA/val.json"
    fails_with_one_line("prepare/convert.py", manifest, "--to=/dev/null/x", saying="cannot be written to")
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    fails_with_one_line("prepare/convert.py", manifest, f"--to={tmp_path}/link",
                        saying="link/audio: cannot be written to")
    fails_with_one_line("prepare/convert.py", manifest, saying="--to=DIR")
    assert os.listdir(tmp_path) == ["link"]
    fails_with_one_line("data.py", "check", manifest, saying="python prepare/check.py")


def test_a_clip_that_changes_while_it_is_converted_is_told(tmp_path, monkeypatch):
    """Its copy has another name: the manifest must not point at one that is not there."""
    for i in range(2):
        soundfile.write(tmp_path / f"{i}.wav", rng.standard_normal(9000) * 0.1, 16000)
    path = write_manifest(tmp_path, "a-AQA/train", [(f"{i}.wav", "p", "o") for i in range(2)])

    def then_change(*arguments):
        yield from map_parallel(*arguments)
        soundfile.write(tmp_path / "1.wav", rng.standard_normal(8000) * 0.1, 16000)

    monkeypatch.setattr(convert, "map_parallel", then_change)
    c = config.load([path, f"--to={tmp_path}/to", f"--data_root={tmp_path}"], "prepare/convert.py", files=True)
    with pytest.raises(ValueError, match=r"1\.wav: changed while it was converted"):
        convert.main(c)
    assert os.listdir(tmp_path / "to/a-AQA") == []
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="0"):
        convert.main(c)
    after = Clips([Manifest(f"{tmp_path}/to/a-AQA/train.json")], None, AUDIO_SETTINGS)
    assert all(after[i]["windows"] is not None for i in range(2))


def half_written(folder, task):
    try:
        open(f"{folder}/{task}.tmp", "w").close()
        time.sleep(0 if task == 0 else 0.5)
    finally:
        os.remove(f"{folder}/{task}.tmp")
    return task


def test_a_pool_that_is_closed_leaves_nothing_half_written(tmp_path):
    results = map_parallel(partial(half_written, str(tmp_path)), range(9), 2)
    assert next(results) == (0, 0)
    while not os.path.exists(tmp_path / "1.tmp"):
        time.sleep(0.01)
    results.close()  # as Ctrl-C does
    assert os.listdir(tmp_path) == []


def square_or_die(task):
    if task == 17:
        os._exit(11)
    return task * task


def test_a_pool_names_the_task_that_ends_its_process():
    assert sorted(map_parallel(square_or_die, range(17), 3)) == [(i, i * i) for i in range(17)]
    with pytest.raises(UserError, match="task number 17:"):
        list(map_parallel(square_or_die, range(40), 3, "task number {}".format))


def test_manifests_of_one_name_are_not_written_over_each_other():
    two = [SimpleNamespace(name="Mine-AQA/test", file=f"{folder}/Mine-AQA/test.json") for folder in "ab"]
    assert targets_of("to", two[:1]) == ["to/Mine-AQA/test.json"]
    with pytest.raises(ValueError, match="a/Mine-AQA/test.json and b/Mine-AQA/test.json are both called"):
        targets_of("to", two)
