"""prepare/check.py and prepare/convert.py, and the process pool they work with."""
import glob
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

import checkpoint
import config
from data import Clips, Manifest
from model import ClapEncoder, mel_bands
from prepare import check, convert
from prepare.check import cause_of, inspect_item
from prepare.convert import make_copy
from tests.helpers import ROOT, run, write_manifest
from tools.common import UserError, map_parallel

rng = np.random.default_rng(0)
AUDIO_CONFIG = {"window_length": 10.0, "window_overlap": 0.0, "max_num_window": 3, "sample_rate": 16000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six clips of four formats, three manifests, some items of which are broken, and a config of all."""
    folder, items = str(tmp_path_factory.mktemp("clips")), []
    for i in range(6):
        seconds, rate = float(rng.uniform(1, 45)), [16000, 44100, 48000][i % 3]
        name = f"{i}.{['wav', 'flac', 'mp3', 'ogg'][i % 4]}"
        samples = rng.standard_normal((int(seconds * rate), 1 + i % 2)) * 0.01
        soundfile.write(f"{folder}/{name}", samples, rate)
        items.append((name, "What is it?", f"Noise {i}.", seconds))
    write_manifest(folder, "good-AQA/train", items)
    write_manifest(folder, "good-AQA/val", [(["0.wav", "1.flac"], "Two?", "Yes.", items[0][3] + items[1][3])])
    with open(f"{folder}/text.wav", "w") as f:
        f.write("no audio")
    soundfile.write(f"{folder}/silent.wav", np.zeros(32000), 16000)
    soundfile.write(f"{folder}/empty.wav", np.zeros(0), 16000)
    with open(f"{folder}/4.wav", "rb") as whole, open(f"{folder}/half.wav", "wb") as half:
        half.write(whole.read(os.path.getsize(whole.name) // 2))
    bad = [("text.wav", "p", "o"), ("gone.wav", "p", "o"), ("half.wav", "p", "o", items[4][3]),
           ("silent.wav", "p", "o"), ("empty.wav", "p", "o"), ("0.wav", "p", "o", items[0][3] / 4)]
    path = write_manifest(folder, "bad-AQA/train", bad + items[:2])
    with open(path) as f:
        content = json.load(f)
    content["data"]["6"] |= {"audio_start": 0.5, "duration": 0.25}  # a part of a file is no fault
    with open(path, "w") as f:
        json.dump(content, f)
    with open(f"{folder}/config.py", "w") as f:
        f.write(f"dataset_file_root = data_root = {folder!r}\nmax_num_window = 3\n"
                "dataset_blending_config = {'good-AQA/train': 1.0, 'bad-AQA/train': 1.0}\n"
                "valid_dataset_config = {'good-AQA/val': 1.0}\n")
    return folder


@pytest.mark.slow
def test_check_reads_every_file_and_classes_what_is_wrong(folder, tmp_path):
    with open(f"{folder}/bad-AQA/train.json") as f:
        before = f.read()
    options = f"--page={tmp_path}/new/check.html", f"--write={tmp_path}/clean"
    result = run("prepare/check.py", f"{folder}/config.py", *options, ok=False)
    assert result.returncode == 1, result.stderr
    with open(f"{folder}/bad-AQA/train.json") as f:
        assert f.read() == before
    kept = {"good-AQA/train": 6, "good-AQA/val": 1, "bad-AQA/train": 2}
    for name, n in kept.items():
        assert len(Manifest(f"{tmp_path}/clean/{name}.json", folder)) == n and name in result.stdout
    for name in ("text.wav", "gone.wav", "half.wav", "silent.wav", "empty.wav", "0.wav"):
        assert f"/{name}: " in result.stdout
    with open(tmp_path / "new/check.html") as f:
        page = f.read()
    assert page.count("<audio") == page.count("<img") == 5 and "'http" not in page.replace('"', "'")
    assert all(name in page for name in kept)
    cleaned = [f"{tmp_path}/clean/{name}.json" for name in kept]
    run("prepare/check.py", *cleaned, "--data_root", folder)


def test_causes(folder):
    manifest = Manifest(f"{folder}/bad-AQA/train.json", folder)
    problems = [inspect_item([manifest], AUDIO_CONFIG, (0, i))[0] for i in range(8)]
    causes = [problem and cause_of(problem) for problem in problems]
    assert causes == ["not readable as audio", "no such audio file", "truncated", "silent", "no audio",
                      "wrong duration", None, None]


@pytest.mark.parametrize("kind", ["wav", "w64", "rf64", "aiff", "au"])
def test_a_file_shorter_than_its_header_is_truncated(tmp_path, kind):
    soundfile.write(tmp_path / f"x.{kind}", rng.standard_normal(64000) * 0.1, 16000, format=kind.upper())
    content = (tmp_path / f"x.{kind}").read_bytes()
    (tmp_path / f"half.{kind}").write_bytes(content[:len(content) // 2])
    items = [(f"x.{kind}", "?", "noise"), (f"half.{kind}", "?", "noise"), (f"half.{kind}", "?", "noise", 2.0)]
    manifest = Manifest(write_manifest(tmp_path, "cut-AQA/test", items), tmp_path)
    whole, cut, of_its_duration = (inspect_item([manifest], AUDIO_CONFIG, (0, i))[0] for i in range(3))
    assert whole is None and of_its_duration is None and cause_of(cut) == "truncated"


@pytest.mark.parametrize("script, options, name", [
    (check, [], "dataset_blending_config"), (check, ["nowhere.json"], "nowhere.json"),
    (check, ["{val}", "--write=/dev/null/x"], "/dev/null/x"),
    (check, ["{val}", "--page=/dev/null/x.html"], "/dev/null"),
    (check, ["{val}", "--write={folder}"], "val.json"),
    (convert, ["{val}"], "--to"), (convert, ["{val}", "--to=/dev/null/x"], "/dev/null/x"),
    (convert, ["{val}", "{folder}/./good-AQA/val.json", "--to={tmp}/to"], "good-AQA/val.json")])
def test_what_cannot_be_done_is_found_first(folder, tmp_path, script, options, name):
    """The last: two manifests of one name."""
    names = {"val": f"{folder}/good-AQA/val.json", "folder": folder, "tmp": tmp_path}
    options = [option.format(**names) for option in options]
    c = config.load(options, f"{script.__name__.replace('.', '/')}.py", files=True)
    with pytest.raises((UserError, FileNotFoundError), match=name):
        script.main(c)


# ------------------------------------------------------------------------------------------------------------
# Copies


def all_files(folder):
    return [os.path.join(where, file) for where, _, files in os.walk(folder) for file in files]


@pytest.mark.slow
def test_copies_hold_the_windows_and_are_made_again_where_missing_or_stale(folder, tmp_path):
    command = "prepare/convert.py", f"{folder}/config.py", f"--to={tmp_path}"
    result = run(*command, ok=False)
    assert result.returncode == 1 and result.stderr.count("left out: bad-AQA/train") == 3, result.stderr
    kept = {"good-AQA/train": range(6), "good-AQA/val": [0], "bad-AQA/train": [2, 3, 5, 6, 7]}
    for name, indices in kept.items():
        before = Clips([Manifest(f"{folder}/{name}.json", folder)], None, AUDIO_CONFIG)
        after = Clips([Manifest(f"{tmp_path}/{name}.json")], None, AUDIO_CONFIG)
        assert len(after) == len(indices)
        for copied, i in zip((after[j] for j in range(len(after))), indices):
            original = before[i]
            assert copied["n_windows"] == original["n_windows"] and copied["output"] == original["output"]
            assert (copied["windows"].int() - original["windows"].int()).abs().max() <= 1
            assert copied["truncated_seconds"] == 0
    files = {path: os.stat(path).st_mtime_ns for path in all_files(tmp_path / "audio")}
    lost = sorted(files)[:3]
    os.remove(lost[0])
    os.truncate(lost[1], 0)  # as a machine leaves it that went down
    os.truncate(lost[2], os.path.getsize(lost[2]) // 2)
    run(*command, ok=False)
    again = {path: os.stat(path).st_mtime_ns for path in all_files(tmp_path / "audio")}
    assert set(again) == set(files) and [path for path in sorted(files) if again[path] != files[path]] == lost
    run("prepare/check.py", f"{tmp_path}/good-AQA/train.json")


POSITIVE = np.abs(rng.standard_normal(20000)) * 0.1


@pytest.mark.parametrize("samples", [
    POSITIVE, np.concatenate([[-1e-6], POSITIVE]), np.full(9000, 0.3), 0.9 + 0.05 * np.sin(np.arange(20000)),
    np.zeros(5000), np.ones(1)], ids=["positive", "nearly", "constant", "offset", "silence", "one"])
def test_a_copy_of_a_signal_that_is_never_negative(tmp_path, samples):
    """Loading scales it in another way: its copy must not become another signal. make_copy compares."""
    soundfile.write(tmp_path / "x.wav", samples, 16000, subtype="FLOAT")
    name, seconds = make_copy(str(tmp_path / "x.wav"), 0.0, None, str(tmp_path / "to"), AUDIO_CONFIG)
    assert seconds == len(samples) / 16000 and all_files(tmp_path / "to") == [str(tmp_path / "to" / name)]
    with open(tmp_path / "x.wav", "ab") as f:
        f.write(b"  ")  # another content: another copy
    assert make_copy(str(tmp_path / "x.wav"), 0.0, None, str(tmp_path / "to"), AUDIO_CONFIG)[0] != name


@pytest.mark.slow
def test_the_temporaries_of_a_killed_run_are_removed(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.tile(rng.standard_normal(4410000) * 0.1, 3), 44100)
    path = write_manifest(tmp_path, "long-AQA/train", [("x.wav", "?", "noise")])
    command = "prepare/convert.py", path, f"--data_root={tmp_path}", f"--to={tmp_path}/to"
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, start_new_session=True)
    while not glob.glob(f"{tmp_path}/to/audio/*/*.tmp"):
        assert process.poll() is None
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    of_another = f"{glob.glob(f'{tmp_path}/to/audio/*/*.tmp')[0]}.{os.getpid()}.tmp"  # of a process that runs
    open(of_another, "w").close()
    run(*command)
    left = all_files(tmp_path / "to/audio")
    assert sorted(os.path.splitext(file)[1] for file in left) == [".flac", ".tmp"] and of_another in left


# ------------------------------------------------------------------------------------------------------------
# The audio settings of a config


@pytest.mark.parametrize("rate", [16000, 48000])
def test_windows_and_rate_are_those_of_the_pretrained_model(tiny_settings, tmp_path, rate):
    encoder = ClapEncoder(16, [1, 1, 1, 1], [1, 2, 2, 4], 128)
    state = {name.replace("htsat", "module.audio_branch"): t for name, t in encoder.state_dict().items()}
    if rate == 48000:
        state["module.audio_branch.logmel_extractor.melW"] = mel_bands(torch.device("cpu"), rate, 14000)
    torch.save({"state_dict": state}, tmp_path / "clap.pt")
    names = config.defaults() | tiny_settings | {"clap_checkpoint": f"{tmp_path}/clap.pt"}
    model, state = checkpoint.init_from_parts(SimpleNamespace(**names))
    checkpoint.materialize(model, state, "cpu", None, "new").save_pretrained(f"{tmp_path}/release")
    expected = {"window_length": 2.5, "window_overlap": 0.0, "max_num_window": 2, "sample_rate": rate}
    for options, changed in [([], {}), (["--max_num_window=5"], {"max_num_window": 5})]:
        c = config.load([f"--pretrained_path={tmp_path}/release", *options], "prepare/check.py", files=True)
        assert check.audio_config_of(c) == expected | changed


@pytest.mark.parametrize("options, most", [
    ([], 3), (["--max_num_window=2"], 2), (["a.json"], 30), (["a.json", "--max_num_window=2"], 2),
    (["--pretrained_path=nvidia/audio-flamingo-2"], 30)])
def test_windows_without_a_model_on_this_disk(options, most):
    c = config.load(options, "prepare/check.py", files=True)
    assert check.audio_config_of(c) == AUDIO_CONFIG | {"max_num_window": most}


# ------------------------------------------------------------------------------------------------------------
# The pool


def square_or_die(task):
    if task == 17:
        os._exit(11)
    return task * task


def test_a_pool_names_the_task_that_ends_its_process():
    assert sorted(map_parallel(square_or_die, range(17), 3)) == [(i, i * i) for i in range(17)]
    with pytest.raises(UserError, match="task number 17:"):
        list(map_parallel(square_or_die, range(40), 3, "task number {}".format))


def slow_write(folder, task):
    """As make_copy: a temporary file that is there while it works."""
    try:
        open(f"{folder}/{task}.tmp", "w").close()
        time.sleep(0.5)
    finally:
        os.remove(f"{folder}/{task}.tmp")


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_half_written(tmp_path):
    code = (f"import config, functools\nfrom tests.test_check import map_parallel, slow_write\n"
            f"work = functools.partial(slow_write, {str(tmp_path)!r})\n"
            f"config.run(lambda c: list(map_parallel(work, range(99), 2)) and None, 'prepare/check.py')")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
    while not os.listdir(tmp_path):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait() == 130 and os.listdir(tmp_path) == []
