"""eval.py on a tiny model: the cache of answers, kills, two ranks, the report; answers of other systems."""
import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress

import numpy as np
import pytest
import soundfile
import torch

import config
import eval as scoring
from tests.helpers import ROOT, run, write_manifest
from tools.common import UserError

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.fixture
def evaluate(trained, capsys):
    """evaluate(*options) -> stdout, stderr of eval.py's main in this process."""
    def main(*options):
        argv = [f"--init_from={trained}/tiny", "--num_workers=0", "--max_new_tokens=2", *options]
        scoring.main(config.load(argv, "eval.py", scoring.READS))
        return capsys.readouterr()

    return main


def read_results(path):
    """-> header, items."""
    header, *items = [json.loads(line) for line in open(path)]
    return header, items


def test_scores_and_results(evaluate, tmp_path):
    out = evaluate("--split=toy-AQA/test", f"--results={tmp_path}", "--eval_batch_size=3",
                   f"--scores={tmp_path}/scores.json", "--report=false").out
    assert "toy-AQA/test: accuracy" in out and "exact_match" in out
    header, items = read_results(tmp_path / "toy-AQA--test.jsonl")
    assert header["identity"]["max_new_tokens"] == 2 and {"model", "manifest", "commit"} <= set(header)
    assert [item["id"] for item in items] == list(range(8))
    assert {"audio", "prompt", "output", "answer", "score"} <= set(items[0])
    row = json.load(open(tmp_path / "scores.json"))["tasks"]["toy-AQA/test"]
    expected = {"accuracy": np.mean([item["score"] for item in items]), "chance": 0.5, "n": 8}
    assert {key: row[key] for key in expected} == expected


def test_cached_answers_belong_to_model_settings_clip_and_prompt(evaluate, trained, tiny_data, tmp_path):
    shutil.copytree(f"{trained}/tiny", tmp_path / "run")
    shutil.copytree(tiny_data, tmp_path / "data")
    cache = tmp_path / "run/eval/toy-AQA--test.cache0.jsonl"

    def ask(*more):
        """-> answers and scores, what is printed about the cache."""
        err = evaluate("--split=toy-AQA/test", f"--init_from={tmp_path}/run", "--report=false",
                       f"--dataset_file_root={tmp_path}/data", f"--data_root={tmp_path}/data", *more).err
        _, items = read_results(tmp_path / "run/eval/toy-AQA--test.jsonl")
        note = [line for line in err.splitlines() if line.startswith("toy-AQA/test: asking")]
        return [item["answer"] for item in items], [item["score"] for item in items], "".join(note)

    answers, _, note = ask()
    assert not note
    entries = [json.loads(line) | {"answer": "kept"} for line in open(cache) if line.strip()]
    cache.write_text("\n".join(map(json.dumps, entries[:7])) + '\n{"key": "torn')
    again, _, note = ask()  # what is missing is asked, also after the torn line of a kill
    assert again == ["kept"] * 7 + answers[7:] and "1 of 8" in note
    _, _, note = ask("--max_new_tokens=1")
    assert "8 of 8" in note
    assert ask("--max_num_window=1")[0].count("kept") == 0
    assert ask()[0] == again  # back again: nothing is lost

    manifest = tmp_path / "data/toy-AQA/test.json"
    content = json.loads(manifest.read_text())
    content["data"]["0"]["output"] = "kept"  # references are those of now
    content["data"]["1"]["prompt"] = "Another question?"
    content["data"]["3"]["prompt"] = 600 * "too long "  # counts as wrong, the others are asked
    content["data"]["4"]["duration"] = 1.0
    manifest.write_text(json.dumps(content))
    soundfile.write(tmp_path / "data/2.wav", np.random.default_rng(5).standard_normal(50000) * 0.1, 16000)
    answers, scores, note = ask()
    assert [answer == "kept" for answer in answers] == [True, False, False, False, False, True, True, False]
    assert scores[0] == 1 and answers[3] == "" and "4 of 8" in note

    saved = torch.load(tmp_path / "run/checkpoint_0.pt", weights_only=True)
    saved["model_state_dict"]["xattn.0.attn_gate"] += 1
    torch.save(saved, tmp_path / "run/checkpoint_1.pt")
    answers, _, note = ask()
    assert "kept" not in answers and "8 of 8" in note


def kill_tree(pid):
    """SIGKILL for a process and its children."""
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    with suppress(ProcessLookupError):  # it may have ended by itself
        os.kill(pid, signal.SIGKILL)  # before its children, which torchrun would otherwise end in its own way
    for child in children:
        kill_tree(int(child))


@pytest.mark.slow
def test_kills_lose_and_repeat_nothing(trained, tiny_data, tmp_path):
    """SIGKILL after some answers, alone and with two ranks; then to the end: each item once, none asked
    twice, the same bytes."""
    items = [(f"{tiny_data}/{i % 8}.wav", f"Question {i}?", "noise") for i in range(24)]
    write_manifest(tmp_path, "toy-AQA/test", items)
    options = ["--split", "toy-AQA/test", f"--init_from={trained}/tiny", f"--dataset_file_root={tmp_path}",
               f"--data_root={tmp_path}", "--max_new_tokens=3", "--eval_batch_size=2", "--report=false"]
    whole = run("eval.py", *options, f"--results={tmp_path}/whole").stdout
    command = ("eval.py", *options, f"--results={tmp_path}/killed")

    def answered():
        lines = [line for file in tmp_path.glob("killed/*.cache*") for line in open(file)]
        return re.findall('"key": "(\\w+)", "answer"', "".join(lines))

    for enough, launcher in ((1, ()), (9, TORCHRUN)):
        process = subprocess.Popen([sys.executable, *launcher, *command], cwd=ROOT, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        while len(answered()) < enough and process.poll() is None:
            time.sleep(0.01)
        kill_tree(process.pid)
        process.wait()
    assert len(answered()) >= 9
    assert run(*TORCHRUN, *command).stdout == whole
    assert len(answered()) == len(set(answered())) == 24
    killed, straight = (tmp_path / folder / "toy-AQA--test.jsonl" for folder in ("killed", "whole"))
    assert killed.read_bytes() == straight.read_bytes()


def test_mistakes_are_found_before_weights_are_loaded(evaluate, tmp_path, capsys):
    (tmp_path / "list.json").write_text("[1]")
    cases = {"--split=toy-AQA/tset": "toy-AQA/tset.json", "--metric=x": "multiple_choice",
             "--split=,": "split", "--split=../x/q": "split", "--results=/dev/null/x": "/dev/null/x",
             f"--scores={tmp_path}": str(tmp_path), f"--scores={tmp_path}/list.json": "list.json",
             f"--labels={tmp_path}/none": "none"}
    for option, word in cases.items():
        with pytest.raises((UserError, OSError), match=word):
            evaluate("--split=toy-AQA/test", option)
        assert "cross-attention" not in capsys.readouterr().err, option
    assert os.listdir(tmp_path) == ["list.json"]


def test_report_plays_what_the_model_gets(evaluate, tiny_data, tmp_path):
    """Of a clip of 4.3 s two windows of 2.5 s, or the one of `duration`; of two clips both; an unreadable
    clip is wrong and counted; a truncated one is reported."""
    pytest.importorskip("matplotlib")
    names = [f"{tiny_data}/7.wav", f"{tiny_data}/1.wav"]
    items = [(names[0], "All?", "noise"), (names[0], "Its begin?", "noise", 1.0), (names, "Both?", "noise"),
             ("gone.wav", "None?", "noise")]
    write_manifest(tmp_path, "toy-AQA/test", items)
    options = ("--split=toy-AQA/test", f"--dataset_file_root={tmp_path}", f"--data_root={tmp_path}",
               f"--results={tmp_path}/r")
    assert "unreadable clips 1" in evaluate(*options).out
    seconds = {}
    for entry in (tmp_path / "r/report.html").read_text().split('class="item"')[1:]:
        prompt = next(prompt for _, prompt, *_ in items if prompt in entry)
        sound = re.search("data:audio/wav;base64,([^\"]+)", entry)
        if sound:
            seconds[prompt] = len(soundfile.read(io.BytesIO(base64.b64decode(sound[1])))[0]) / 16000
    assert seconds == {"All?": 5.0, "Its begin?": 2.5, "Both?": 7.5}
    out = evaluate(*options, "--max_num_window=1", "--report=false").out
    assert re.search("2 of 4 .*max_num_window = 1", out)


def test_mmaus_own_file(evaluate, tiny_data, tmp_path):
    (tmp_path / "MMAU").mkdir()
    file = tmp_path / "MMAU/test-mini.json"
    questions = [{"id": f"u{i}", "audio_id": f"./{i}.wav", "question": "Which \ud83d?", "category": np.nan,
                  "choices": ["tone", "noise"], "answer": ["tone", 0][i % 2],
                  "task": ["sound", "music"][i % 2]} for i in range(4)]
    options = ("--split", " MMAU/test-mini , ", f"--dataset_file_root={tmp_path}", f"--data_root={tiny_data}",
               f"--results={tmp_path}/r")
    file.write_text(json.dumps(questions))
    out = evaluate(*options, f"--scores={tmp_path}/scores.json").out
    assert "mark stripped" in out and "task: sound" in out and "published 3B 61.56" in out
    rows = json.load(open(tmp_path / "r/MMAU--test-mini.json"))
    assert [(row["id"], row["answer"]) for row in rows] == [(f"u{i}", "tone") for i in range(4)]
    assert "model_output" in rows[0] and (tmp_path / "scores.json").exists()
    assert json.loads(file.read_text())[1]["answer"] == 0  # as it was
    questions[2]["choices"] = {"A": "tone"}
    file.write_text(json.dumps(questions))
    with pytest.raises(UserError, match="test-mini.json: item 2.*'choices'"):
        evaluate(*options)


# ------------------------------------------------------------------------------------------------------------
# Answers of other systems

# Values in JSON, and the score of an item that has one under a key: 1, 0, n (no reference), -: refused.
VALUES = ('"" "cow" "(C)cow" "2" 0 2 2.0 9 true null NaN Infinity [] [2] ["2"] ["cow"] ["cow","ox"] '
          '[["cow"]] {"a":1} "[\\"dog\\",\\"ox\\"]" "[\'dog\'\\n\'ox\']" "cow\\ud83d" '
          '[1,9] "dog,cat" "2.0" ["1","2"]').split()
OUTCOMES = {"prompt": "1111---------------111-11-", "answer": "01110110-0000111---001-01-",
            "choices": "1--------1111---1--11-1--1"}
OUTCOMES |= dict.fromkeys(("output", "reference", "references"), "n111011--nnnn1111--001-011")
OUTCOMES |= dict.fromkeys(("audio", "path", "id", "start", "score", "category", "mine"), "1" * 26)
ITEM = {"prompt": "Which?", "choices": ["dog", "cat", "cow"], "output": "cow", "answer": "cow"}


def to_lines(items):
    return "".join(json.dumps(item) + "\n" for item in items)


@pytest.fixture
def score(tmp_path):
    """score(content of a file) -> its row and items by eval.py score."""
    path = tmp_path / "answers.jsonl"
    c = config.load([str(path), "--task=MMAU", "--report=false"], "eval.py", scoring.READS, files=True)

    def main(content, **settings):
        path.write_bytes(content.encode())
        vars(c).update({"results": f"{tmp_path}/out", "scores": f"{tmp_path}/scores.json"} | settings)
        try:
            scoring.score_file(c)
        finally:
            assert path.read_bytes() == content.encode()
        items = [json.loads(line) for line in open(tmp_path / f"out/{c.task}.jsonl")]
        return json.load(open(tmp_path / "scores.json"))["tasks"][c.task], items

    return main


def test_every_value_is_scored_right_or_refused_in_one_line(score):
    for key, outcomes in OUTCOMES.items():
        items, expected = [], []
        for value, outcome in zip(VALUES, outcomes, strict=True):
            item = ITEM | {key: json.loads(value)}
            if key in ("reference", "references"):
                del item["output"]
            if outcome == "-":
                with pytest.raises(UserError, match=f"answers.jsonl line 2: '{key}'"):
                    score(to_lines([ITEM, item]))
            else:
                items.append(item)
                expected.append({"n": None}.get(outcome, outcome == "1"))
        assert [item["score"] for item in score(to_lines(items))[1]] == expected, key
    for line in ("{", "[1]", '{"output": "x", "answer": "x"}', '{"prompt": "q", "output": "x"}',
                 '{"prompt": "q", "reference": "dog", "output": "cat", "answer": "cat"}',
                 '{"prompt": "① dog ② cat", "output": 1, "answer": "dog"}'):
        with pytest.raises(UserError, match="answers.jsonl line 2"):
            score(to_lines([ITEM]) + line)


# Ours, with indices, with references as a list and as a text, sample.py's of earlier, MMAU's, MuChoMusic's
FORMS = ('{"prompt": "Which?", "choices": <options>, "output": <name>, "answer": <answer>}',
         '{"prompt": "Which? (A) dog (B) cat (C) cow", "output": <right>, "answer": <index>}',
         '{"prompt": "Which? (A) dog (B) cat (C) cow", "output": "<right>.0", "answer": <answer>}',
         '{"prompt": "Which?", "choices": <options>, "references": [<name>], "answer": [<answer>]}',
         '{"prompt": "Which?", "choices": <cell>, "references": <list>, "answer": <answer>}',
         '{"prompt": "Which?", "choices": <options>, "reference": "<right>", "output": <answer>}',
         '{"question": "", "audio_id": "", "choices": <options>, "answer": <name>, "model_output": <answer>}',
         '{"prompt": "", "answers": <options>, "answer_orders": <order>, "model_output": <answer>}')


@pytest.mark.parametrize("form", FORMS)
def test_one_figure_from_every_form(score, form):
    """As lines, as a list, and as Windows writes lines, below a header."""
    options, lines = ITEM["choices"], ""
    for right, index in ((2, 2), (0, 0), (1, 0), (2, None)):
        name, answer = options[right], None if index is None else options[index]
        values = {"options": options, "cell": f" {options}", "right": right, "index": index, "name": name,
                  "list": str([name]), "order": [right, 1 - right, 2 - right], "answer": answer}
        lines += re.sub("<(.*?)>", lambda name: json.dumps(values[name[1]]), form) + "\n"
    windows = '\ufeff{"identity": {}}\r\n' + lines.replace("\n", "\r\n")
    for content in (lines, f"[{','.join(lines.splitlines())}]", windows):
        row, _ = score(content)
        assert (row["accuracy"], row["as read"], row["empty answers"]) == (0.5, 0.5, 1)


def test_compare_pairs_the_same_items(tmp_path, capsys):
    """By ids; by clip and prompt where they are line numbers; by order; not items of two benchmarks."""
    c = config.load(["--task=Toy-AQA"], "eval.py", scoring.READS, files=True)
    c.files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    items = [{"audio": f"{i}.wav", "prompt": "What?", "output": "dog", "answer": ["dog", "cat"][i % 7 > 2]}
             for i in range(60)]

    def numbered(items, **changes):
        return [{"id": i} | item | changes for i, item in enumerate(items)]

    named = [item | {"id": f"q{item['audio']}"} for item in items]
    bare = [item | {"audio": ""} for item in items]
    floats = [item | {"id": float(item["id"])} for item in numbered(bare)]
    changed = [item | {"prompt": item["prompt"] + " " * bool(item["id"])} for item in numbered(items)]
    for first, second, key in [(named, numbered(named[::-1], prompt="And?"), "id"),
                               (numbered(bare), floats[::-1], "id"),
                               (numbered(items), changed[::-1], "id"),
                               (numbered(items, start=5), numbered(items[::-1], start=5.0),
                                "clip and prompt"),
                               (numbered(items), numbered(items[::-1]), "clip and prompt"),
                               (items, numbered(items, audio="x.wav"), "order"),
                               (items, numbered(items, audio="x.wav", output="cat"), None)]:
        (tmp_path / "a.jsonl").write_text(to_lines(first))
        (tmp_path / "b.jsonl").write_text(to_lines(second))
        with nullcontext() if key else pytest.raises(UserError, match="a.jsonl"):
            scoring.compare_files(c)
            out = capsys.readouterr().out
            assert f"\n60 items scored in both, of 60 and 60, paired by {key}:" in out
            assert "| gained 0, lost 0" in out


def test_labels_that_a_file_lacks(score, tmp_path):
    lines = to_lines({"prompt": "?", "output": text, "answer": text} for text in ("Dog, bark", "cat", "owl"))
    labels = tmp_path / "labels.txt"
    cases = {b"dog\nbark": "2 .*cat, owl", b"cat\r\nowl": "2 .*bark, dog", b"": "4 .*owl",
             "dog\nbark".encode("utf-16"): "2 .*cat, owl", b"dog\n\xe9\0": " line 2: .*utf-8"}
    for content, missing in cases.items():
        labels.write_bytes(content)
        for task in ("FSD50k-EventClassification", "Toy-SceneClassification"):
            with pytest.raises(UserError, match=f"labels.txt.*{missing}"):
                score(lines, task=task, labels=str(labels))


def test_no_file_that_was_read_is_replaced(score, tmp_path):
    for settings in ({"task": "answers", "results": str(tmp_path)}, {"scores": f"{tmp_path}/answers.jsonl"}):
        with pytest.raises(UserError, match="answers.jsonl"):
            score(to_lines([ITEM]), **settings)
