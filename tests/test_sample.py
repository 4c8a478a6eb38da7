"""sample.py as a user runs it."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch

import config
import sample
from data import load_audio
from model import AudioFlamingo
from tests.helpers import ROOT, fails_with_one_line, run
from tools.common import UserError


def run_sample(trained, *options, **kw):
    common = (f"--init_from={trained}/tiny", "--max_new_tokens=4", "--precision=fp32")
    return run("sample.py", *common, *options, **kw)


@pytest.fixture(scope="module")
def model(trained):
    return AudioFlamingo.from_pretrained(f"{trained}/tiny")


@pytest.fixture(scope="module")
def expected(model):
    """The answer in Python to a prompt about clips, as the script prints or writes it."""
    def generate(prompt, *paths, n=4):
        clips = [torch.from_numpy(load_audio(str(path), **model.audio_config)) for path in paths]
        n_windows = torch.tensor([[len(clip) for clip in clips]])
        n_windows = n_windows[:, 0] if len(clips) == 1 else n_windows
        return model.generate([prompt], torch.cat(clips), n_windows, max_new_tokens=n)[0]
    return generate


def write_lines(path, questions):
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    return path


def read_lines(path):
    with open(path) as f:
        return [json.loads(line) for line in f]


@pytest.mark.slow
def test_a_line_of_output_for_every_line_of_input(trained, tiny_data, expected, tmp_path):
    """Clips of all kinds, several clips, bad ones, a prompt that is too long: in order, with their keys."""
    rng = np.random.default_rng(0)
    clips = {"silent": (np.zeros(16000), 16000), "short": (np.ones(160) * 0.1, 16000),
             "empty": (np.zeros(0), 16000),
             "seven": (rng.standard_normal((8000, 7)) * 0.1, 16000),
             "fast": (rng.standard_normal(19200), 192000)}
    for name, (samples, rate) in clips.items():
        soundfile.write(tmp_path / f"{name}.wav", samples * 0.5, rate)
    (tmp_path / "text.wav").write_text("no audio")
    pair = [f"{tiny_data}/1.wav", f"{tiny_data}/4.wav"]
    paths = [f"{name}.wav" for name in clips]  # beside the file of questions
    paths += ["text.wav", "gone.wav", pair, pair[0], pair[0]]
    questions = [{"path": path, "prompt": f"Question {i}?", "id": [i]} for i, path in enumerate(paths)]
    questions[-1]["prompt"] = "long " * 600
    write_lines(tmp_path / "q.jsonl", questions)
    output = tmp_path / "a.jsonl"
    files = ("--input", tmp_path / "q.jsonl", "--output", output)
    done = run_sample(trained, *files, "--batch_size=3", ok=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    answers = read_lines(output)
    assert [json.loads(line) for line in done.stdout.splitlines()] == answers
    assert not os.path.exists(f"{output}.part")
    bad = {"empty.wav": "empty.wav", "text.wav": "text.wav", "gone.wav": "gone.wav"}
    for question, answer in zip(questions, answers, strict=True):
        assert question.items() <= answer.items()
        if str(question["path"]) in bad or question is questions[-1]:
            assert answer["answer"] is None and bad.get(question["path"], "tokens") in answer["error"]
        else:
            names = question["path"] if isinstance(question["path"], list) else [question["path"]]
            files = [os.path.join(tmp_path, name) for name in names]
            assert answer["answer"] == expected(question["prompt"], *files) and "error" not in answer


@pytest.mark.slow
def test_what_is_done_survives_a_kill(trained, tiny_data, tmp_path):
    questions = [{"path": f"{tiny_data}/0.wav", "prompt": f"Question {i}?"} for i in range(4000)]
    write_lines(tmp_path / "q.jsonl", questions)
    command = [sys.executable, "sample.py", f"--init_from={trained}/tiny", "--max_new_tokens=4",
               f"--input={tmp_path}/q.jsonl", f"--output={tmp_path}/a.jsonl"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = tmp_path / "a.jsonl.part"
    while not part.exists() or part.read_text().count("\n") < 20:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = read_lines(part)
    assert len(done) >= 20
    assert [line["prompt"] for line in done] == [q["prompt"] for q in questions[:len(done)]]


@pytest.mark.slow
def test_clips_of_one_question_and_follow_ups(trained, tiny_data, expected, tmp_path):
    """Each question of a chat is answered as if it were asked alone; the newest run is the default."""
    clips = [f"{tiny_data}/1.wav", f"{tiny_data}/4.wav"]
    command = [sys.executable, "sample.py", f"--expdir={trained}", "--precision=fp32", "--max_new_tokens=4",
               f"--audio={clips[0]}", f"--audio={clips[1]}", "--chat", "--prompt=One?",
               f"--output={tmp_path}/a.jsonl"]
    chat = subprocess.run(command, cwd=ROOT, text=True, input="Two?\n\nThree?\n", capture_output=True)
    answers = [expected(prompt, *clips) for prompt in ("One?", "Two?", "Three?")]
    assert chat.returncode == 0 and chat.stdout == "".join(answer + "\n" for answer in answers), chat.stderr
    assert [line["answer"] for line in read_lines(tmp_path / "a.jsonl")] == answers


@pytest.mark.slow
def test_a_truncated_clip_is_reported_once_with_its_seconds(trained, tiny_data, expected, tmp_path):
    soundfile.write(tmp_path / "long.wav", np.random.default_rng(2).standard_normal(12 * 16000) * 0.1, 16000)
    options = ("--audio", tmp_path / "long.wav", "--prompt", "What?", "--timeline", tmp_path / "t")
    result = run_sample(trained, *options)
    lines = [line for line in result.stderr.splitlines() if "max_num_window" in line]
    assert len(lines) == 1 and "7.0 s" in lines[0]  # 12 s, two windows of 2.5 s
    assert result.stdout == expected("What?", tmp_path / "long.wav") + "\n"
    with open(tmp_path / "t.json") as f:
        assert json.load(f)["prompt"] == "What?"
    assert "max_num_window" not in run_sample(trained, "--audio", f"{tiny_data}/3.wav").stderr


@pytest.mark.parametrize("line", ['{"path": "a.wav", "prompt": null}', '{"path": [], "prompt": "x"}', '["a"]',
                                  '{"path": 3, "prompt": "x"}', "{"])
def test_a_wrong_question_is_named_with_its_line(tmp_path, line):
    (tmp_path / "q.jsonl").write_text('{"path": "a.wav", "prompt": "x"}\n' + line)
    with pytest.raises(UserError, match="q.jsonl line 2"):
        options = [f"--input={tmp_path}/q.jsonl", "--init_from=none"]
        sample.main(config.load(options, "sample.py", sample.READS))


@pytest.mark.parametrize("options, name", [
    ([], "--audio"), (["--audio={clip}", "--serve"], "--serve"),
    (["--audio={clip}", "--output={tmp}"], "{tmp}"),
    (["--audio={clip}", "--output=/dev/null/x.jsonl"], "/dev/null"),
    (["--audio={clip}", "--timeline=/dev/null/x"], "/dev/null"), (["--export=/dev/null/x"], "/dev/null/x"),
    (["--audio={clip}", "--top_p=2"], "top_p"), (["--audio={clip}", "--temperature=-1"], "temperature"),
    (["--serve", "--port=70000"], "port"), (["--serve", "--port=-1"], "port"),
    (["--input={tmp}/none.jsonl"], "none.jsonl"), (["--audio={clip}"], "nowhere")])
def test_what_cannot_be_done_is_found_before_the_model_is_read(tiny_data, tmp_path, options, name):
    """The last: the model itself is not there."""
    names = {"clip": f"{tiny_data}/0.wav", "tmp": str(tmp_path)}
    argv = [option.format(**names) for option in options] + ["--init_from=nowhere"]
    with pytest.raises((UserError, OSError), match=name.format(**names)):
        sample.main(config.load(argv, "sample.py", sample.READS))
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_bad_clip_is_one_line(trained, tmp_path):
    (tmp_path / "clip.wav").write_text("text")
    fails_with_one_line("sample.py", f"--init_from={trained}/tiny", "--audio", tmp_path / "clip.wav",
                        saying="clip.wav")
