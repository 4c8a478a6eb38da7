"""sample.py as a user runs it, most of it in this process."""
import io
import json
import os
import resource
import shutil
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
import sample
from data import load_audio
from model import AudioFlamingo
from tests.helpers import ROOT
from tools.common import UserError

OPTIONS = ("--max_new_tokens=4", "--precision=fp32")


def save_model(folder, settings, seed):
    """A release of random weights, large enough that answers differ."""
    torch.manual_seed(seed)
    model = checkpoint.new_model(SimpleNamespace(**(config.defaults() | settings)))
    with torch.no_grad():
        for p in model.lm.parameters():
            p.mul_(12 if p.ndim == 2 else 1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def release(tiny_settings, tmp_path_factory):
    return save_model(str(tmp_path_factory.mktemp("release") / "tiny"), tiny_settings, 1)


@pytest.fixture
def ask(release, capsys):
    """ask(*options) -> exit code, stdout and stderr of the script's main."""
    def main(*options):
        argv = [f"--init_from={release}", *OPTIONS, *map(str, options)]
        code = sample.main(config.load(argv, "sample.py", sample.READS))
        return code or 0, *capsys.readouterr()
    return main


@pytest.fixture(scope="module")
def expected(release):
    """The answer in Python to a prompt about clips."""
    model = AudioFlamingo.from_pretrained(release)

    def generate(prompt, *paths):
        clips = [torch.from_numpy(load_audio(str(path), **model.audio_config)) for path in paths]
        n_windows = torch.tensor([[len(clip) for clip in clips]])
        return model.generate([prompt], torch.cat(clips), n_windows, max_new_tokens=4)[0]
    return generate


def write_lines(path, questions):
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    return path


def read_lines(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def test_a_line_of_output_for_every_line_of_input(ask, expected, tiny_data, tmp_path):
    """In order, with all keys of the question. The file as Windows writes it, with blank lines."""
    (tmp_path / "text.wav").write_text("no audio")
    one, beside = f"{tiny_data}/1.wav", "2.wav"
    shutil.copy(f"{tiny_data}/2.wav", tmp_path)
    cases = [  # path, prompt, word of an error
        (beside, "Ça? 何?", ""),
        ([one, beside], "Two?", ""),
        (one, "long " * 600, "tokens"),
        (one, "\ud83d", "surrogate"),
        ("text.wav", "?", "text.wav"),
        ("\udfff", "?", "no such"),
        (one, "twice", ""),
        (one, "twice", ""),
        ([one, "gone.wav"], "?", "gone.wav")]
    questions = []
    for i, (path, prompt, _) in enumerate(cases):
        questions.append({"output": f"right {i}", "path": path, "prompt": prompt, "choices": ["a", "b"]})
    old = questions[0] | {"answer": "old", "error": "of an earlier run"}
    lines = "\r\n\r\n".join(map(json.dumps, [old, *questions[1:]]))
    (tmp_path / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    files = "--input", tmp_path / "q.jsonl", "--output", tmp_path / "a.jsonl"
    code, out, err = ask(*files, "--batch_size=1000000000")
    answers = read_lines(tmp_path / "a.jsonl")
    assert list(map(json.loads, out.splitlines())) == answers
    assert code == 1 and "q.jsonl" in err
    for (path, prompt, word), question, answer in zip(cases, questions, answers, strict=True):
        if word:
            assert word in answer.pop("error")
        names = [path] if isinstance(path, str) else path
        paths = [os.path.join(tmp_path, name) for name in names]
        assert answer == question | {"answer": None if word else expected(prompt, *paths)}
    for name in ("q.jsonl", "2.wav"):
        with pytest.raises(UserError, match=name):
            ask(*files[:2], "--output", tmp_path / name)
    assert {f.name for f in tmp_path.glob("*.jsonl*")} == {"a.jsonl", "q.jsonl"}


class Interrupted(io.StringIO):
    def write(self, text):
        if "Question 4" in text:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_killed_run_goes_on(ask, tiny_settings, tmp_path, monkeypatch):
    """With the answers that depend on nothing that changed. The disk's name of the clip is decomposed."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder")
    soundfile.write("e\u0301.wav", np.ones(8000) * 0.1, 16000)
    questions = [{"path": "\xe9.wav", "prompt": f"Question {i}?", "id": i} for i in range(5)]
    file = tmp_path / "folder" / "q.jsonl"
    files = "--input", write_lines(file, questions), "--output", tmp_path / "a.jsonl"
    part = tmp_path / "a.jsonl.part"
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(sys, "stdout", Interrupted())
        ask(*files)
    kept = [json.dumps(line | {"answer": "kept"}) for line in read_lines(part) if line["id"] != 2]
    text = "\n".join(["[1]", '{"key": [3]}', *kept, '{"key": "to'])

    def asked_again(*options):
        part.write_text(text)
        code, _, err = ask(*files, *options)
        assert code == 0 and str(part) in err and not part.exists()
        return [line["id"] for line in read_lines(tmp_path / "a.jsonl") if line["answer"] != "kept"]

    assert asked_again() == asked_again("--batch_size=1") == [2]
    other = save_model(str(tmp_path / "other"), tiny_settings, 2)
    for option in (f"--init_from={other}", "--max_new_tokens=3", "--temperature=0.1", "--seed=1",
                   "--answer_prefix=a", "--window_length=2"):
        assert asked_again(option) == [0, 1, 2, 3, 4]
    questions[4]["prompt"] = "Another?"
    write_lines(file, questions)
    assert asked_again() == [2, 4]
    soundfile.write("e\u0301.wav", np.ones(9000) * 0.1, 16000)
    assert asked_again() == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_sigkill(release, ask, expected, tiny_data, tmp_path):
    questions = [{"path": f"{tiny_data}/0.wav", "prompt": f"Question {i}?"} for i in range(150)]
    files = "--input", write_lines(tmp_path / "q.jsonl", questions), "--output", tmp_path / "a.jsonl"
    command = [sys.executable, "sample.py", f"--init_from={release}", *OPTIONS, *map(str, files)]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}  # a terminal that cannot print the answers
    output = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=env)
    part = tmp_path / "a.jsonl.part"
    while not part.exists() or part.read_text().count("\n") < 20:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "a.jsonl").exists()
    assert str(part) in ask(*files)[2]
    answers = [line["answer"] for line in read_lines(tmp_path / "a.jsonl")]
    assert len(answers) == 150
    assert answers[::29] == [expected(question["prompt"], question["path"]) for question in questions[::29]]


def test_a_full_disk_is_named_and_leaves_no_half_file(ask, tiny_data, tmp_path):
    questions = [{"path": f"{tiny_data}/0.wav", "prompt": f"{i}?", "more": "x" * 30000} for i in range(3)]
    files = "--input", write_lines(tmp_path / "q.jsonl", questions), "--output", tmp_path / "a.jsonl"
    _, limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (70000, limit))
    try:
        with pytest.raises(OSError, match="a.jsonl.part"):
            ask(*files)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    assert not (tmp_path / "a.jsonl").exists()
    assert ask(*files)[0] == 0 and len(read_lines(tmp_path / "a.jsonl")) == 3


def test_a_chat(ask, expected, tiny_data, tmp_path, monkeypatch):
    """Each question is answered as if it were asked alone; one that cannot be does not end the chat."""
    clips = [f"{tiny_data}/1.wav", f"{tiny_data}/4.wav"]
    terminal, keyboard = os.openpty()
    os.write(terminal, b"Two?\n\n" + b"long " * 600 + b"\n\xff?\nThree?\n\x04")
    monkeypatch.setattr(sys, "stdin", open(keyboard))
    output, audio = tmp_path / "a.jsonl", [f"--audio={clip}" for clip in clips]
    output.write_text('{"torn": ')
    code, out, err = ask(*audio, "--chat", "--prompt=One?", "--output", output)
    answers = [expected(prompt, *clips) for prompt in ("One?", "Two?", "Three?")]
    assert code == 1 and out == "".join(answer + "\n" for answer in answers)
    assert "tokens" in err and "surrogate" in err and err.count("> ") == 6
    assert [json.loads(line)["answer"] for line in output.read_text().splitlines()[1:]] == answers


def test_a_truncated_clip_is_reported_once_with_its_seconds(ask, expected, tiny_data, tmp_path):
    """Beside its timeline."""
    clip = tmp_path / "long.wav"
    sound = np.random.default_rng(2).standard_normal(12 * 16000)
    soundfile.write(clip, sound * 0.1, 16000)
    _, out, err = ask("--audio", clip, "--prompt=What?", "--timeline", tmp_path / "t")
    (line,) = [line for line in err.splitlines() if "max_num_window" in line]
    assert "7.0 s" in line  # of 12 s, two windows of 2.5 s are kept
    assert out == expected("What?", clip) + "\n"
    assert read_lines(tmp_path / "t.json")[0]["prompt"] == "What?" and (tmp_path / "t.png").exists()
    assert "max_num_window" not in ask("--audio", f"{tiny_data}/0.wav")[2]


@pytest.mark.parametrize("line, key", [
    ('{"path": "a.wav", "prompt": null}', "prompt"), ('{"path": "a.wav", "prompt": 3}', "prompt"),
    ('{"path": "a.wav"}', "prompt"), ('{"path": [], "prompt": "x"}', "path"), ('{"prompt": "x"}', "path"),
    ('{"path": {"path": "a.wav"}, "prompt": "x"}', "path"), ('{"path": ["a.wav", 3], "prompt": "x"}', "path"),
    ('["a"]', "JSON"), ("{", "JSON"), ("caf\xe9", "JSON")])
def test_a_wrong_question_is_named_with_its_line(tmp_path, line, key):
    """Before the model is looked for."""
    (tmp_path / "q.jsonl").write_bytes(b'{"path": "a.wav", "prompt": "x"}\n\r\n' + line.encode("latin-1"))
    with pytest.raises(UserError, match=f"q.jsonl line 3.*{key}"):
        options = [f"--input={tmp_path}/q.jsonl", "--init_from=none"]
        sample.main(config.load(options, "sample.py", sample.READS))


@pytest.mark.parametrize("options, name", [
    ([], "--audio"), (["--audio={clip}", "--serve"], "--serve"),
    (["--audio={clip}", "--output={tmp}"], "{tmp}"), (["--audio={clip}", "--output={clip}"], "{clip}"),
    (["--audio={clip}", "--output=/dev/null/x.jsonl"], "/dev/null"),
    (["--export=/dev/null/x"], "/dev/null/x"),
    (["--audio={clip}", "--top_p=2"], "top_p"), (["--audio={clip}", "--temperature=-1"], "temperature"),
    (["--audio={clip}", "--max_new_tokens=0"], "max_new_tokens"),
    (["--audio={clip}", "--prompt=\udcff"], "surrogate"),
    (["--serve", "--answer_prefix=\ud83d"], "surrogate"),
    (["--serve", "--port=70000"], "port"),
    (["--input={tmp}/none.jsonl"], "none.jsonl"), (["--input=/dev/null"], "/dev/null"),
    (["--audio={clip}"], "nowhere")])
def test_what_cannot_be_done_is_found_before_the_model_is_read(tiny_data, tmp_path, options, name):
    """The last: the model itself is not there."""
    names = {"clip": f"{tiny_data}/0.wav", "tmp": str(tmp_path)}
    argv = [option.format(**names) for option in options] + ["--init_from=nowhere"]
    with pytest.raises((UserError, OSError), match=name.format(**names)):
        sample.main(config.load(argv, "sample.py", sample.READS))
    assert os.listdir(tmp_path) == []
