"""sample.py as a user runs it."""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
import torch

from tests.helpers import ROOT, fails_with_one_line, run

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def sample(trained, *options, **kw):
    return run("sample.py", f"--init_from={trained}/tiny", "--max_new_tokens=4", *options, **kw)



def test_clips_of_all_kinds_are_answered(trained, tmp_path):
    clips = {"silent": (np.zeros(16000), 16000), "short": (np.ones(160) * 0.1, 16000),
             "seven": (np.random.default_rng(0).standard_normal((8000, 7)) * 0.1, 16000),
             "fast": (np.random.default_rng(1).standard_normal(19200) * 0.1, 192000)}
    for name, (sound, rate) in clips.items():
        soundfile.write(tmp_path / f"{name}.wav", sound, rate)
        sample(trained, "--audio", tmp_path / f"{name}.wav")
    paths = [f"{name}.wav" for name in clips]  # beside the file of questions
    questions = [{"path": path, "prompt": "What?", "id": i} for i, path in enumerate(paths)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    lines = sample(trained, "--input", tmp_path / "q.jsonl").stdout.splitlines()
    answers = [json.loads(line) for line in lines]
    assert [(a["path"], a["id"]) for a in answers] == [(path, i) for i, path in enumerate(paths)]



def test_several_clips_of_one_question(trained, tiny_data, tmp_path):
    clips = [f"{tiny_data}/{i}.wav" for i in (1, 4)]
    both = sample(trained, "--audio", clips[0], "--audio", clips[1], "--prompt", "What differs?").stdout
    line = json.dumps({"path": clips, "prompt": "What differs?"}) + "\n"
    (tmp_path / "q.jsonl").write_text(line + json.dumps({"path": clips[0], "prompt": "What differs?"}))
    lines = sample(trained, "--input", tmp_path / "q.jsonl").stdout.splitlines()
    answers = [json.loads(line) for line in lines]
    assert answers[0]["output"].rstrip("\n") == both.rstrip("\n") and answers[0]["path"] == clips



def test_follow_ups(trained, tiny_data):
    """Each question of a chat is answered as if it were asked alone."""
    command = ["sample.py", "--audio", f"{tiny_data}/2.wav", "--precision=fp32", "--max_new_tokens=4",
               f"--init_from={trained}/tiny"]
    alone = [run(*command, "--prompt", prompt).stdout for prompt in ("One?", "Two?", "Three?")]
    chat = subprocess.run([sys.executable, *command, "--chat", "--prompt", "One?"], cwd=ROOT, text=True,
                          input="Two?\n\nThree?\n", capture_output=True)
    assert chat.returncode == 0 and chat.stdout == "".join(alone)



def test_one_bad_clip_among_many(trained, tiny_data, tmp_path):
    """The others are answered and written, its own line says why, and the exit code is 1."""
    (tmp_path / "text.wav").write_text("no sound")
    bad = [str(tmp_path / name) for name in ("text.wav", "gone.wav")]
    paths = [f"{tiny_data}/0.wav", bad[0], f"{tiny_data}/1.wav", bad[1]]
    lines = [json.dumps({"path": path, "prompt": "What?"}) for path in paths]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    done = sample(trained, "--input", tmp_path / "q.jsonl", "--output", tmp_path / "a.jsonl", ok=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "2 of 4" in done.stderr
    answers = [json.loads(line) for line in open(tmp_path / "a.jsonl")]
    assert [a["path"] for a in answers] == paths
    assert [isinstance(a["output"], str) for a in answers] == [True, False, True, False]
    assert "not readable as audio" in answers[1]["error"] and "no such audio file" in answers[3]["error"]



@pytest.mark.parametrize("line", ['{"path": "a.wav", "prompt": null}', '{"path": [], "prompt": "x"}', '["a"]',
                                  '{"path": 3, "prompt": "x"}', "{"])
def test_a_wrong_question_is_told_with_its_line_first(tmp_path, line):
    """Before a model is looked for."""
    (tmp_path / "q.jsonl").write_text('{"path": "a.wav", "prompt": "x"}\n' + line)
    fails_with_one_line("sample.py", "--input", tmp_path / "q.jsonl", "--init_from=none",
                        saying="q.jsonl line 2")



def test_questions_file(trained, tiny_data, tmp_path):
    questions = [{"path": f"{tiny_data}/{i}.wav", "prompt": f"Question {i}?"} for i in range(5)]
    with open(tmp_path / "q.jsonl", "w") as f:
        f.writelines(json.dumps(question) + "\n" for question in questions)
    sample(trained, "--input", tmp_path / "q.jsonl", "--output", tmp_path / "a.jsonl", "--batch_size=2")
    answers = [json.loads(line) for line in open(tmp_path / "a.jsonl")]
    assert [a["prompt"] for a in answers] == [f"Question {i}?" for i in range(5)]
    alone = sample(trained, "--audio", f"{tiny_data}/3.wav", "--prompt", "Question 3?").stdout
    assert alone.rstrip("\n") == answers[3]["output"].rstrip("\n")



def test_what_is_not_heard_is_said_once(trained, tiny_data, tmp_path):
    """Of 12 s two windows of 2.5 s are heard, by the command as in Python; of the 8 clips, none is longer."""
    from data import load_audio
    from model import AudioFlamingo
    soundfile.write(tmp_path / "long.wav", np.random.default_rng(2).standard_normal(12 * 16000) * 0.1, 16000)
    note = ("note: 1 of 1 clips are longer than the 5 s that are heard (max_num_window = 2): "
            "7.0 s are left out")
    result = sample(trained, "--audio", tmp_path / "long.wav", "--prompt", "What?", "--precision=fp32")
    assert result.stderr.count("note:") == 1 and note in result.stderr
    model = AudioFlamingo.from_pretrained(f"{trained}/tiny")
    windows = torch.from_numpy(load_audio(str(tmp_path / "long.wav"), **model.audio_config))
    assert len(windows) == 2
    answer = model.generate(["What?"], windows, torch.tensor([2]), max_new_tokens=4)[0]
    assert result.stdout.rstrip("\n") == answer.rstrip("\n")
    assert "note:" not in sample(trained, "--audio", f"{tiny_data}/3.wav").stderr
    options = ["--split", "toy-AQA/test", f"--init_from={trained}/tiny",
               "--max_new_tokens=1", f"--results={tmp_path}"]
    note = "note: 5 of 8 clips are longer than the 2.5 s that are heard (max_num_window = 1)"
    assert note in run("eval.py", *options, "--max_num_window=1").stdout



def test_newest_run_is_the_default(trained, tiny_data):
    clip = f"{tiny_data}/0.wav"
    result = run("sample.py", f"--expdir={trained}", "--audio", clip, "--max_new_tokens=2")
    assert "tiny" in result.stderr



@pytest.mark.parametrize("content, saying", [
    (None, "no such audio file"), ("text", "not readable as audio"), ("", "audio")])
def test_bad_clips_are_one_line(trained, tmp_path, content, saying):
    path = tmp_path / "clip.wav"
    if content is not None:
        path.write_text(content)
    model = f"--init_from={trained}/tiny"
    fails_with_one_line("sample.py", model, "--audio", path, saying=["clip.wav", saying])



def test_other_bad_input_is_one_line(trained, tiny_data, tmp_path):
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    (tmp_path / "bad.pt").write_text("x")
    (tmp_path / "bad.jsonl").write_text('{"path": "a.wav"}\n')
    model, clip = f"--init_from={trained}/tiny", f"{tiny_data}/0.wav"
    cases = [  # the last: told before the model is looked for, default or not
        (("sample.py", model, "--audio", tmp_path / "empty.wav"), "no audio"),
        (("sample.py", "--audio", clip, f"--init_from={tmp_path}/none"), "none"),
        (("sample.py", "--audio", clip, f"--init_from={tmp_path}"), "no checkpoint_<ep"),
        (("sample.py",), "--audio"),
        (("sample.py", "--audio", clip, f"--init_from={tmp_path}/bad.pt"), "bad.pt"),
        (("sample.py", "--input", tmp_path / "bad.jsonl"), "line 1"),
        (("eval.py", "--split", "no-AQA/test", model), "no-AQA/test.json"),
        (("eval.py", "--split", "toy-AQA/test", "--metric=x"), "multiple_choice"),
        (("eval.py", "--split", "no-AQA/test", "--dataset_file_root=data/manifests", "--init_from=none"),
         "data/manifests/no-AQA/test.json")]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda case: fails_with_one_line(*case[0], saying=case[1]), cases))



@pytest.mark.parametrize("script, options, saying", [
    ("eval", ["--results=/dev/null/x"], "/dev/null/x: cannot be written to"),
    ("eval", ["--results={tmp}/a.jsonl"], "a.jsonl: cannot be written to"),
    ("eval", ["--scores=/dev/null/x/s.json"], "/dev/null/x: cannot be written to"),
    ("eval", ["--scores={tmp}"], "a folder, expected the name of a file"),
    ("eval", ["--scores={tmp}/list.json"], "list.json: not a file of scores"),
    ("eval", ["--scores={tmp}/a.jsonl"], "a.jsonl: not JSON"),
    ("eval", ["--labels={tmp}/none"], "none: no such file of labels"),
    ("eval", ["--labels={tmp}/list.json"], "list.json: 1 is a int, expected a label"),
    ("score", ["--results=/dev/null/x"], "/dev/null/x: cannot be written to"),
    ("score", ["--scores={tmp}/list.json"], "list.json: not a file of scores"),
    ("sample", ["--output={tmp}"], "a folder, expected the name of a file"),
    ("sample", ["--output=/dev/null/x.jsonl"], "/dev/null: cannot be written to"),
    ("sample", ["--timeline=/dev/null/x"], "/dev/null: cannot be written to"),
    ("sample", ["--export=/dev/null/x"], "/dev/null/x: cannot be written to"),
    ("sample", ["--export={tmp}/r", "--int8"], "--export writes the weights .* leave out audio, int8")])
def test_places_are_looked_at_before_the_long_work(trained, tiny_data, tmp_path, monkeypatch, script, options,
                                                   saying):
    import config
    import eval as scores
    import sample as answers
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "output": "o", "answer": "a"}\n' * 2)
    unexpected = lambda *_, **__: pytest.fail("the work has begun")
    for module, work in ((scores, "load_weights"), (scores, "score_split"), (answers, "load_weights"),
                         (answers, "export_release")):
        monkeypatch.setattr(module, work, unexpected)
    module, main, own = {
        "eval": (scores, scores.main, ["--split=toy-AQA/test"]),
        "score": (scores, lambda c: scores.score_files(c, [f"{tmp_path}/a.jsonl"]), ["--task=toy-AQA"]),
        "sample": (answers, answers.main, [f"--audio={tiny_data}/0.wav"])}[script]
    argv = [f"--init_from={trained}/tiny", *own, *(option.format(tmp=tmp_path) for option in options)]
    there = sorted(os.listdir(tmp_path))
    with pytest.raises((ValueError, FileNotFoundError), match=saying):
        main(config.load(argv, f"{module.__name__}.py", module.READS))
    assert sorted(os.listdir(tmp_path)) == there

