"""sample.py and eval.py as a user runs them."""
import importlib.util
import json
import os

import numpy as np
import pytest
import soundfile

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
    fails_with_one_line("eval.py", "--split", "no-AQA/test", "--dataset_file_root=data/manifests", "--init_from=none",
                        saying="data/manifests/no-AQA/test.json")  # told before the model is looked for, default or not


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
    expected = {"accuracy": np.mean([item["score"] for item in again]), "chance": 0.5, "n": 8}
    assert {key: task[key] for key in expected} == expected


def test_eval_counts_unreadable_clips_as_wrong(trained, tiny_data, tmp_path):
    write_manifest(tmp_path, "toy-AQA/test", [(f"{tiny_data}/0.wav", "Tone?", "noise"), ("gone.wav", "Tone?", "noise")])
    result = run("eval.py", "--split", "toy-AQA/test", f"--init_from={trained}/tiny", f"--dataset_file_root={tmp_path}",
                 f"--data_root={tmp_path}", f"--results={tmp_path}/r", "--max_new_tokens=2")
    assert "unreadable clips 1" in result.stdout


def test_eval_on_mmaus_own_file(trained, tiny_data, tmp_path):
    (tmp_path / "MMAU").mkdir()
    questions = [{"id": f"u{i}", "audio_id": f"./{i}.wav", "question": "Which?", "choices": ["tone", "noise"], "answer": "tone",
                  "task": ["sound", "music"][i % 2]} for i in range(4)]
    (tmp_path / "MMAU/test-mini.json").write_text(json.dumps(questions))
    result = run("eval.py", "--split", " MMAU/test-mini , ", f"--init_from={trained}/tiny", f"--dataset_file_root={tmp_path}",
                 f"--data_root={tiny_data}", f"--results={tmp_path}/r", "--max_new_tokens=2")
    assert "mark stripped" in result.stdout and "task: sound" in result.stdout and "published 3B 61.56" in result.stdout
    rows = json.load(open(tmp_path / "r/MMAU--test-mini.json"))
    assert [row["id"] for row in rows] == ["u0", "u1", "u2", "u3"]
    assert all(row["model_output"] == row["model_prediction"] for row in rows)
    assert os.path.exists(tmp_path / "r/report.html") or importlib.util.find_spec("matplotlib") is None
