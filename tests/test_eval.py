"""eval.py as a user runs it."""
import base64
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch

from tests.helpers import ROOT, fails_with_one_line, run, write_manifest

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def test_the_report_plays_what_was_heard(trained, tiny_data, tmp_path):
    """Of a clip of 4.3 s: two windows of 2.5 s, or the one that `duration` leaves; of two clips both."""
    pytest.importorskip("matplotlib")
    names = [f"{tiny_data}/7.wav", f"{tiny_data}/1.wav"]
    items = [(names[0], "All?", "noise"), (names[0], "Its begin?", "noise", 1.0), (names, "Both?", "noise")]
    write_manifest(tmp_path, "toy-AQA/test", items)
    run("eval.py", "--split", "toy-AQA/test", f"--init_from={trained}/tiny", "--max_new_tokens=2",
        f"--dataset_file_root={tmp_path}", f"--data_root={tmp_path}", f"--results={tmp_path}/r")
    page = (tmp_path / "r/report.html").read_text()
    seconds = {}
    for entry in page.split('class="item"')[1:]:
        sound = base64.b64decode(re.search("data:audio/wav;base64,([^\"]+)", entry)[1])
        asked = next(prompt for _, prompt, *_ in items if prompt in entry)
        seconds[asked] = len(soundfile.read(io.BytesIO(sound))[0]) / 16000
    assert seconds == {"All?": 5.0, "Its begin?": 2.5, "Both?": 7.5}



def read(file):
    """-> header and items of kept answers."""
    header, *items = [json.loads(line) for line in open(file)]
    return header, items



def test_eval_scores_keeps_and_continues(trained, tiny_data, tmp_path):
    options = ["--split", "toy-AQA/test", f"--init_from={trained}/tiny", "--max_new_tokens=4",
               "--eval_batch_size=3", f"--results={tmp_path}", f"--scores={tmp_path}/scores.json"]
    first = run("eval.py", *options)
    assert "toy-AQA/test: accuracy" in first.stdout and "rule exact_match" in first.stdout
    file = tmp_path / "toy-AQA--test.jsonl"
    lines = file.read_text().splitlines()
    header, items = read(file)
    assert header["matters"]["max_new_tokens"] == 4 and {"model", "manifest", "commit"} <= set(header)
    assert [item["id"] for item in items] == list(range(8))
    assert {"audio", "prompt", "output", "answer", "score"} <= set(items[0])
    # kept answers are not asked again; a line cut off by a kill and the missing ones are
    items[2]["answer"] = "noise"
    kept = [header, *items[:5]]
    file.write_text("\n".join(json.dumps(item) for item in kept) + "\n" + lines[6][:30])
    run("eval.py", *options)
    _, again = read(file)
    assert again[2]["answer"] == "noise" and again[2]["score"] == 1.0
    assert [item["answer"] for item in again[3:]] == [item["answer"] for item in items[3:]]
    task = json.load(open(tmp_path / "scores.json"))["tasks"]["toy-AQA/test"]
    expected = {"accuracy": np.mean([item["score"] for item in again]), "chance": 0.5, "n": 8}
    assert {key: task[key] for key in expected} == expected



def test_answers_do_not_outlive_their_model(trained, tiny_config, tiny_data, tmp_path):
    """Another number of tokens, a newer checkpoint, a corrected label, another clip of the same name."""
    shutil.copytree(f"{trained}/tiny", tmp_path / "run")
    shutil.copytree(tiny_data, tmp_path / "data")
    options = ["--split", "toy-AQA/test", f"--init_from={tmp_path}/run",
               f"--dataset_file_root={tmp_path}/data", f"--data_root={tmp_path}/data", "--report=false"]
    file = tmp_path / "run/eval/toy-AQA--test.jsonl"

    def ask(*more):
        done = run("eval.py", *options, *more)
        return read(file), [line for line in done.stderr.splitlines() if "asked again" in line]

    (header, first), said = ask("--max_new_tokens=4")
    assert not said
    marked = [item | {"answer": "kept"} for item in first]
    file.write_text("\n".join(json.dumps(line) for line in (header, *marked)) + "\n")
    (_, items), said = ask("--max_new_tokens=2")
    assert len(said) == 1 and "max_new_tokens 4 -> 2" in said[0]
    assert not any(i["answer"] == "kept" for i in items)
    (_, items), said = ask("--max_new_tokens=4")  # back again: nothing is lost
    assert len(said) == 1 and all(i["answer"] == "kept" for i in items)

    labels = tmp_path / "data/toy-AQA/test.json"
    content = json.loads(labels.read_text())
    content["data"]["0"]["output"], content["data"]["1"]["prompt"] = "kept", "Another question?"
    content["data"]["4"]["duration"] = 1.0
    labels.write_text(json.dumps(content))
    (_, items), said = ask("--max_new_tokens=4")  # references are those of now; a changed question is asked
    assert not said and items[0]["answer"] == "kept" and items[0]["score"] == 1
    assert items[1]["answer"] != "kept" and items[4]["answer"] != "kept"

    soundfile.write(tmp_path / "data/2.wav", np.random.default_rng(5).standard_normal(50000) * 0.1, 16000)
    (_, items), _ = ask("--max_new_tokens=4")
    assert items[2]["answer"] != "kept" and items[3]["answer"] == "kept"

    saved = torch.load(tmp_path / "run/checkpoint_0.pt", weights_only=True)
    saved["model_state_dict"]["xattn.0.attn_gate"] += 1
    torch.save(saved, tmp_path / "run/checkpoint_1.pt")
    (_, items), said = ask("--max_new_tokens=4")
    assert len(said) == 1 and "weights" in said[0] and not any(i["answer"] == "kept" for i in items)



@pytest.mark.parametrize("launcher", [(), TORCHRUN])
def test_kills_lose_and_repeat_nothing(trained, tiny_data, tmp_path, launcher):
    """SIGKILL after some answers, twice; then to the end: each item once, none asked twice, same table."""
    items = [(f"{tiny_data}/{i % 8}.wav", f"Question {i}?", "noise") for i in range(24)]
    write_manifest(tmp_path, "toy-AQA/test", items)
    options = ["--split", "toy-AQA/test", f"--init_from={trained}/tiny", f"--dataset_file_root={tmp_path}",
               f"--data_root={tmp_path}", "--max_new_tokens=3", "--eval_batch_size=2", "--report=false"]
    whole = run("eval.py", *options, f"--results={tmp_path}/whole").stdout
    parts = lambda: sorted(tmp_path.glob("killed/*.part*"))
    answered = lambda: [json.loads(line)["id"] for part in parts() for line in open(part) if '"id"' in line]
    command = (*launcher, "eval.py", *options, f"--results={tmp_path}/killed")
    for seen in (1, 9):
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while len(answered()) < seen and process.poll() is None:
            time.sleep(0.01)
        subprocess.run(["pkill", "-KILL", "-f", f"{tmp_path}/killed"], check=False)  # torchrun's workers, too
        process.communicate()
    before = answered()
    assert len(before) == len(set(before)) >= 9
    last = run(*command)
    assert last.stdout == whole and not parts()
    kept = lambda folder: (tmp_path / folder / "toy-AQA--test.jsonl").read_bytes()
    assert kept("killed") == kept("whole")



def test_a_wrong_split_is_told_before_weights_are_loaded(trained, tmp_path):
    """Also where the run's own data is looked through: its language model is not read for it."""
    result = fails_with_one_line("eval.py", "--split", "toy-AQA/tset", f"--init_from={trained}/tiny",
                                 saying="toy-AQA/tset.json: no such manifest")
    assert "cross-attention" not in result.stderr



def test_eval_counts_unreadable_clips_as_wrong(trained, tiny_data, tmp_path):
    items = [(f"{tiny_data}/0.wav", "Tone?", "noise"), ("gone.wav", "Tone?", "noise")]
    write_manifest(tmp_path, "toy-AQA/test", items)
    result = run("eval.py", "--split", "toy-AQA/test", f"--init_from={trained}/tiny",
                 f"--dataset_file_root={tmp_path}", f"--data_root={tmp_path}",
                 f"--results={tmp_path}/r", "--max_new_tokens=2")
    assert "unreadable clips 1" in result.stdout



def test_eval_on_mmaus_own_file(trained, tiny_data, tmp_path):
    (tmp_path / "MMAU").mkdir()
    questions = [{"id": f"u{i}", "audio_id": f"./{i}.wav", "question": "Which?",
                  "choices": ["tone", "noise"], "answer": "tone",
                  "task": ["sound", "music"][i % 2]} for i in range(4)]
    (tmp_path / "MMAU/test-mini.json").write_text(json.dumps(questions))
    result = run("eval.py", "--split", " MMAU/test-mini , ", f"--init_from={trained}/tiny",
                 f"--dataset_file_root={tmp_path}", f"--data_root={tiny_data}",
                 f"--results={tmp_path}/r", "--max_new_tokens=2")
    assert "mark stripped" in result.stdout and "task: sound" in result.stdout
    assert "published 3B 61.56" in result.stdout
    rows = json.load(open(tmp_path / "r/MMAU--test-mini.json"))
    assert [row["id"] for row in rows] == ["u0", "u1", "u2", "u3"]
    assert all(row["model_output"] == row["model_prediction"] for row in rows)
    assert os.path.exists(tmp_path / "r/report.html") or importlib.util.find_spec("matplotlib") is None

