"""sample.py and eval.py as a user runs them, and every scoring rule on cases worked out by hand."""
import json

import numpy as np
import pytest
import soundfile

import eval as scoring
from tests.helpers import fails_with_one_line, run, write_manifest


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory):
    out = tmp_path_factory.mktemp("exp")
    run("train.py", tiny_config, f"--expdir={out}", "--run_name=tiny", "--num_epochs=1")
    return out


def sample(trained, *options, **kw):
    return run("sample.py", f"--init_from={trained}/tiny", "--max_new_tokens=4", *options, **kw)


def test_clips_of_all_kinds_are_answered(trained, tmp_path):
    clips = {"silent": (np.zeros(16000), 16000), "short": (np.ones(160) * 0.1, 16000),
             "seven": (np.random.default_rng(0).standard_normal((8000, 7)) * 0.1, 16000),
             "fast": (np.random.default_rng(1).standard_normal(19200) * 0.1, 192000)}
    for name, (sound, rate) in clips.items():
        soundfile.write(tmp_path / f"{name}.wav", sound, rate)
        sample(trained, "--audio", tmp_path / f"{name}.wav")
    paths = ",".join(str(tmp_path / f"{name}.wav") for name in clips)
    result = sample(trained, "--audio", paths, "--prompt", "What?")
    assert [line.split(": ")[0] for line in result.stdout.splitlines()] == paths.split(",")


def test_questions_file(trained, tiny_data, tmp_path):
    with open(tmp_path / "q.jsonl", "w") as f:
        f.writelines(json.dumps({"path": f"{tiny_data}/{i}.wav", "prompt": f"Question {i}?"}) + "\n" for i in range(5))
    sample(trained, "--input", tmp_path / "q.jsonl", "--output", tmp_path / "a.jsonl", "--batch_size=2")
    answers = [json.loads(line) for line in open(tmp_path / "a.jsonl")]
    assert [a["prompt"] for a in answers] == [f"Question {i}?" for i in range(5)]
    alone = sample(trained, "--audio", f"{tiny_data}/3.wav", "--prompt", "Question 3?").stdout
    assert alone.rstrip("\n") == answers[3]["output"].rstrip("\n")


def test_what_is_not_heard_is_said_once(trained, tiny_data, tmp_path):
    """Two windows of 2.5 s are heard of a clip of 12 s, on the command line as in Python; and of 8 clips, none is longer."""
    import torch

    from data import load_audio
    from model import AudioFlamingo
    soundfile.write(tmp_path / "long.wav", np.random.default_rng(2).standard_normal(12 * 16000) * 0.1, 16000)
    note = "note: 1 of 1 clips are longer than the 5 s that are heard (max_num_window = 2): 7.0 s are left out"
    result = sample(trained, "--audio", tmp_path / "long.wav", "--prompt", "What?", "--precision=fp32")
    assert result.stderr.count("note:") == 1 and note in result.stderr
    model = AudioFlamingo.from_pretrained(f"{trained}/tiny")
    windows = torch.from_numpy(load_audio(str(tmp_path / "long.wav"), **model.hearing))
    assert len(windows) == 2
    answer = model.generate(["What?"], windows, torch.tensor([2]), max_new_tokens=4)[0]
    assert result.stdout.rstrip("\n") == answer.rstrip("\n")
    assert "note:" not in sample(trained, "--audio", f"{tiny_data}/3.wav").stderr
    options = ["--split", "toy-AQA/test", f"--init_from={trained}/tiny", "--max_new_tokens=1", f"--results={tmp_path}"]
    note = "note: 5 of 8 clips are longer than the 2.5 s that are heard (max_num_window = 1)"
    assert note in run("eval.py", *options, "--max_num_window=1").stdout


def test_newest_run_is_the_default(trained, tiny_data):
    assert "tiny" in run("sample.py", f"--expdir={trained}", "--audio", f"{tiny_data}/0.wav", "--max_new_tokens=2").stderr


@pytest.mark.parametrize("content, saying", [(None, "no such audio file"), ("text", "not readable as audio"), ("", "audio")])
def test_bad_clips_are_one_line(trained, tmp_path, content, saying):
    path = tmp_path / "clip.wav"
    if content is not None:
        path.write_text(content)
    fails_with_one_line("sample.py", f"--init_from={trained}/tiny", "--audio", path, saying=["clip.wav", saying])


def test_other_bad_input_is_one_line(trained, tiny_data, tmp_path):
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    clip = f"{tiny_data}/0.wav"
    fails_with_one_line("sample.py", f"--init_from={trained}/tiny", "--audio", tmp_path / "empty.wav", saying="no audio")
    fails_with_one_line("sample.py", "--audio", clip, f"--init_from={tmp_path}/none", saying="none")
    fails_with_one_line("sample.py", "--audio", clip, f"--init_from={tmp_path}", saying="neither checkpoint")
    fails_with_one_line("sample.py", saying="--audio")
    (tmp_path / "bad.pt").write_text("x")
    fails_with_one_line("sample.py", "--audio", clip, f"--init_from={tmp_path}/bad.pt", saying="bad.pt")
    (tmp_path / "bad.jsonl").write_text('{"path": "a.wav"}\n')
    fails_with_one_line("sample.py", "--input", tmp_path / "bad.jsonl", saying="line 1")
    fails_with_one_line("eval.py", "--split", "no-AQA/test", f"--init_from={trained}/tiny", saying="no-AQA/test.json")
    fails_with_one_line("eval.py", "--split", "toy-AQA/test", "--metric=x", saying="multiple_choice")


def test_eval_scores_keeps_and_continues(trained, tiny_data, tmp_path):
    options = ["--split", "toy-AQA/test", f"--init_from={trained}/tiny", "--max_new_tokens=4", "--eval_batch_size=3",
               f"--results={tmp_path}", f"--scores={tmp_path}/scores.json"]
    first = run("eval.py", *options)
    assert "toy-AQA/test: accuracy" in first.stdout and "rule exact_match" in first.stdout
    file = tmp_path / "toy-AQA--test.jsonl"
    lines = file.read_text().splitlines()
    items = [json.loads(line) for line in lines]
    assert [item["id"] for item in items] == list(range(8))
    assert {"audio", "prompt", "output", "answer", "score"} <= set(items[0])
    items[2]["answer"] = "noise"  # kept answers are not asked again; a line cut off by a kill and the missing ones are
    file.write_text("\n".join(json.dumps(item) for item in items[:5]) + "\n" + lines[5][:30])
    run("eval.py", *options)
    again = [json.loads(line) for line in open(file)]
    assert again[2]["answer"] == "noise" and again[2]["score"] == 1.0
    assert [item["answer"] for item in again[3:]] == [item["answer"] for item in items[3:]]
    task = json.load(open(tmp_path / "scores.json"))["tasks"]["toy-AQA/test"]
    assert task == {"accuracy": np.mean([item["score"] for item in again]), "chance": 0.5, "n": 8}


def test_eval_counts_unreadable_clips_as_wrong(trained, tiny_data, tmp_path):
    write_manifest(tmp_path, "toy-AQA/test", [(f"{tiny_data}/0.wav", "Tone?", "noise"), ("gone.wav", "Tone?", "noise")])
    result = run("eval.py", "--split", "toy-AQA/test", f"--init_from={trained}/tiny", f"--dataset_file_root={tmp_path}",
                 f"--data_root={tmp_path}", f"--results={tmp_path}/r", "--max_new_tokens=2")
    assert "unreadable clips 1" in result.stdout


def items(*rows):
    return [{"prompt": p, "output": o, "answer": a} for p, o, a in rows]


MC = "Which? (A) dog. (B) big dog. (C) cat."


def test_rules():
    rows = items((MC, "(C) cat", "(C) cat"), (MC, "(C) cat", "cat"), (MC, "(C) cat", ""), (MC, "(A) dog", "(A) dog (B)"),
                 (MC, "(B) big dog", "the answer is (B) big dog."), (MC, "(A) dog", "(B) big dog"))
    assert scoring.multiple_choice(rows)["accuracy"] == pytest.approx(2 / 6) and [r["score"] for r in rows] == [1, 0, 0, 0, 1, 0]
    rows = items((MC, "cat", "(C) cat"), (MC, "cat", "A cat"), (MC, "cat", "cat"))
    assert scoring.multiple_choice(rows)["accuracy"] == pytest.approx(2 / 3)  # an output without its letter
    rows = items((MC, "(C) cat", "C"), (MC, "(C) cat", "A or C: a cat"), (MC, "(A) dog", "who knows"), (MC, "(B) big dog", "B"))
    scores = scoring.muchomusic(rows)
    assert scores["accuracy"] == 0.75 and scores["unanswered"] == 0.25
    rows = items(("q", "yes, yes, yes", "Yes."), ("q", "yes, no, yes", "no"), ("q", "dog, a cat, bird", "cat"),
                 ("q", "rain, wind, sea", "sun"), ("q", "no, no, no", "yes"))
    scores = scoring.clotho_aqa(rows)
    assert (scores["unanimous"], scores["non-binary"], scores["n unanimous"], scores["n non-binary"]) == (0.5, 0.5, 2, 2)
    rows = items(("q", "The Dog", "dog!"), ("q", "two", "too"))
    assert scoring.exact_match(rows)["accuracy"] == 0.5 and scoring.closed_set(rows)["matching"] == "exact"
    rows = items(("q", "neutral", "it is neutral"), ("q", "entailment", "contradiction"), ("q", "neutral", ""))
    assert scoring.entailment(rows)["accuracy"] == pytest.approx(1 / 3)
    rows = items(("q", "yes", "Yes, it is"), ("q", "no", "there is no"), ("q", "no", "No."))
    scores = scoring.cmm(rows)
    assert (scores["perception"], scores["hallucination resistance"]) == (1.0, 0.5)


@pytest.mark.parametrize("task, prompt, rule", [
    ("Clotho-AQA-AQA", "Is it?", "clotho_aqa"), ("MMAU", MC, "multiple_choice"), ("Music-AVQA-AQA_All", "What?", "exact_match"),
    ("CochlScene-SceneClassification", "Where?", "closed_set"), ("NSynth-MIR", "What?", "closed_set"),
    ("MuChoMusic", MC, "muchomusic"), ("AudioEntailmentQA", "So?", "entailment"), ("CMM-AQA", "Is it?", "cmm"),
    ("audiocaps-AudioCaptioning", "Say.", "captioning")])
def test_rule_by_task_name(task, prompt, rule):
    assert scoring.choose_rule(task, items((prompt, "x", "x"))).__name__ == rule
