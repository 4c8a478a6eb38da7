"""Scoring: every rule on cases worked out by hand, captions by the library, intervals, files, the report."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from operator import itemgetter

import numpy as np
import pytest

import config
import eval as scoring
from tests.helpers import ROOT, fails_with_one_line
from tools.common import UserError
from tools.eval import captions, records, report, rules, stats
from tools.eval.parsing import normalise, options_of

MC = "Which? (A) dog. (B) big dog. (C) cat."
VOICE = "Who speaks? (A) A male voice. (B) A female voice. (C) A child. Answer with the letter."
MMAU, MUCHO, CLOTHO, OPEN = "MMAU", "MuChoMusic", "Clotho-AQA-AQA", "Music-AVQA-AQA_All"
CLOSED, ENTAIL, CMM = "GTZAN-GenreClassification", "AudioEntailmentQA", "CMM-AQA"
TASKS = [MMAU, MUCHO, CLOTHO, OPEN, CLOSED, "NSynth-MIR", "FSD50k-EventClassification", ENTAIL, CMM]

with open(os.path.join(ROOT, "tests/score_cases.jsonl")) as f:
    CASES = [json.loads(line) for line in f]


def score(task, items, c=config.load([], "eval.py")):
    """-> the results row; sets "score" on the items."""
    return scoring.score_split(task, items, c)


def rows(*texts):
    return [{"prompt": "q", "output": output, "answer": answer} for output, answer in texts]


@pytest.mark.parametrize("case", [case for case in CASES if "task" in case], ids=itemgetter("why"))
def test_case(case):
    """Worked out by hand: the score of an item (null: it does not count), figures of one or several."""
    items = [{"prompt": "q"} | item for item in case.get("items", [case])]
    figures = case.get("figures", {})
    row = score(case["task"], items)
    assert {name: row[name] for name in figures} == pytest.approx(figures)
    assert items[0]["score"] == case.get("score", items[0]["score"])


@pytest.mark.parametrize("case", [case for case in CASES if "options" in case], ids=itemgetter("prompt"))
def test_options(case):
    assert list(options_of(case["prompt"])) == case["options"]


@pytest.mark.parametrize("task", TASKS)
def test_empty_and_unreadable_are_never_right(task):
    if task.startswith("FSD50k"):
        pytest.importorskip("sklearn")
    right = {CLOTHO: "yes, yes, yes", ENTAIL: "neutral", CMM: "no"}.get(task, "A")
    silent = [{"answer": ""}, {"answer": " \n"}, {"answer": right, "error": "x"}, {"answer": "<caption> A"}]
    items = [{"prompt": VOICE, "output": right} | answer for answer in (*silent, {"answer": right})]
    row = score(task, items)
    assert [item["score"] for item in items[:-1]] == [0] * 4
    assert (row["empty answers"], row["unreadable clips"], row["no conclusion"]) == (2, 1, 1)


def mmau_rule(answer, prediction, choices):
    """MMAU's rule written down once more from its description, word by word."""

    def words(text):
        kept = "".join(letter if letter.isalnum() or letter == "_" else " " for letter in text.lower())
        return kept.split()

    predicted = words(prediction)
    if not predicted or any(word not in predicted for word in words(answer)):
        return False
    others = [word for choice in choices for word in words(choice)]
    return not any(word in predicted and word not in words(answer) for word in others)


def test_the_official_rule_is_mmaus():
    rng = random.Random(0)
    vocabulary = "a the man woman child two men and dog 4 3.5 c# rock-n-roll (live) A".split()
    phrase = lambda: " ".join(rng.choices(vocabulary, k=rng.randint(1, 3)))
    for _ in range(3000):
        choices = [phrase() for _ in range(rng.randint(2, 8))]
        right = rng.choice(choices)
        answer = rng.choice([right, phrase(), f"(A) {right}", f"it is {right}.", "", phrase() + " " + right])
        item = {"prompt": "", "choices": choices, "output": right, "answer": answer}
        official = scoring.multiple_choice([item])["accuracy"]
        assert official == [mmau_rule(right, answer, choices)], (choices, right, answer)


def test_normalisation_never_empties():
    for text in ["A", "the", "a an the", "?", "...", "#", "-", "♪", "日本", "ö", "_", ",", "(a)"]:
        assert normalise(text), text
    assert normalise(" ") == ""


def test_rule_by_task_name():
    rule_of = {"Clotho-AQA-AQA": "clotho_aqa", "MMAU": "multiple_choice", "Music-AVQA-AQA_All": "exact_match",
               "CochlScene-SceneClassification": "closed_set", "NSynth-MIR": "nsynth", "CMM-AQA": "cmm",
               "FSD50k-EventClassification": "multi_label", "MuChoMusic": "muchomusic",
               "AudioEntailmentQA": "entailment", "audiocaps-AudioCaptioning": "captioning"}
    for task, rule in rule_of.items():
        assert scoring.choose_rule(task, [{"prompt": "What?"}]).__name__ == rule
        assert scoring.choose_rule("Other-AQA", [{"prompt": "What?"}], rule).__name__ == rule
    for task in ("GTZAN-GenreClassification", "GM-FamilyMC-AQA"):  # prompts with options
        assert scoring.choose_rule(task, [{"prompt": MC}]).__name__ == "multiple_choice"


def test_a_figure_without_items_is_named(capsys):
    row = score(CLOTHO, rows(("yes, no, yes", "no")))
    assert row["accuracy"] is row["unanimous"] is row["non-binary"] is None
    assert "unanimous" in capsys.readouterr().out and json.dumps(row, allow_nan=False)


def test_closed_sets_labels_and_retrieval():
    labels = ["Male speech, man speaking", "Dog", "Rain"]
    items = rows(("Male speech, man speaking", "male speech, man speaking"), ("Dog", "rain"),
                 ("Rain", "a dog"))
    figures = rules.closed_set(items, labels)
    assert figures == {"accuracy": [1, 0, 0], "chance": 1 / 3}
    assert items[2]["predicted"] == "Dog"
    assert rules.closed_set(rows(("Dog, rain", "rain; dog")), labels)["accuracy"] == [1]
    space = {"Dog": [1, 0, 0], "Rain": [0, 1, 0], "Male speech, man speaking": [0, 0, 1],
             "a hound barks": [0.8, 0.6, 0]}
    embed = lambda texts: np.array([space.get(text, [1, 1, 1]) for text in texts], float)
    items = rows(("Dog", "a hound barks"), ("Rain", "a hound barks"), ("Dog", ""))
    figures = rules.closed_set(items, labels, embed)
    assert figures["accuracy"] == [1, 0, 0]
    figures = rules.nsynth(rows(("produced by guitar, pitch 60, velocity 50, source acoustic, and bright",
                                 "produced by a guitar, source electronic.")))
    assert (figures["source"], figures["instrument"], figures["accuracy"]) == ([0], [1], [0.5])


def test_multi_label_is_scikit_learns_map(monkeypatch):
    average_precision = pytest.importorskip("sklearn.metrics").average_precision_score
    items = rows(("dog, bark", "bark, dog"), ("rain", "wind"), ("rain, wind", "rain"), ("dog", ""),
                 ("wind", "wind, dog"))
    figures = rules.multi_label(items)
    names = ["bark", "dog", "rain", "wind"]
    truth, scores = (np.array([[n in i[key] for n in names] for i in items]) for key in ("output", "answer"))
    assert figures["mAP"][0] == pytest.approx(average_precision(truth, scores.astype(float)))
    assert [item["score"] for item in items] == [1, 0, 0.5, 0, 0]
    with_comma = rows(("Male speech, man speaking, dog", "dog, male speech, man speaking"))
    assert rules.multi_label(with_comma, ["Male speech, man speaking", "Dog", "Rain"])["mAP"][0] == 1
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)  # not installed: named
    assert "sklearn" in rules.multi_label(items)["not computed"]


# ------------------------------------------------------------------------------------------------------------
# Captions

REFERENCES = {
    "0.wav": ["A dog barks loudly in the street.", "A dog is barking; cars pass by"],
    "1.wav": ["Rain falls on a tin roof", "Heavy rain is falling"],
    "2.wav": ["A man speaks, then music plays", "Someone talks before a song starts", "A man is talking"],
    "3.wav": ["Birds sing in a forest"],
    "4.wav": ["An engine idles and then revs", "A car engine runs"],
    "5.wav": ["People applaud", "A crowd claps and cheers"],
}
ANSWERS = {
    "0.wav": "a dog barks in the street",
    "1.wav": "rain is falling on a roof",
    "2.wav": "a man speaks and music plays",
    "3.wav": "... !",
    "4.wav": "an engine runs and revs",
    "5.wav": "a crowd is clapping and cheering",
}
STORED = {
    "CIDEr-D": 1.7960300397062456,
    "ROUGE-L": 0.6212198939107688,
    "METEOR": 0.33072832825170145,
    "BLEU-4": 4.484462862586433e-05,
}
EACH = [3.04855469, 2.80503405, 1.93063311, 0, 2.224644, 0.76731439]


def caption_items(references=REFERENCES, answers=ANSWERS):
    return [{"audio": clip, "prompt": "Say.", "output": text, "answer": answers[clip]}
            for clip, texts in references.items() for text in texts]


@pytest.mark.slow
def test_captions_are_the_librarys():
    """Also where line breaks and "|||" would shift all later captions in the Java programs."""
    pytest.importorskip("pycocoevalcap")
    broken = {clip: text.replace(" ", " ||| \u2028\r", 1) for clip, text in ANSWERS.items()}
    items = caption_items(answers=broken)
    row = score("x-AudioCaptioning", items)
    assert row["captions"] == 6 and "SPIC" in row["not computed"]
    for name in ("CIDEr-D", "ROUGE-L", "BLEU-4") + (("METEOR",) if shutil.which("java") else ()):
        assert row[name] == pytest.approx(STORED[name], rel=1e-9)
    low, high = row["intervals"]["CIDEr-D"]
    assert low < row["CIDEr-D"] < high
    assert [items[i]["score"] for i in (0, 2, 4, 7, 8, 10)] == pytest.approx(EACH, abs=1e-7)


TEXTS = list(REFERENCES.values()), [[text] for text in ANSWERS.values()]


def test_a_caption_metric_without_its_helper_is_named(monkeypatch, tmp_path):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setenv("PATH", "")  # no Java
    (tmp_path / "pycocoevalcap/rouge").mkdir(parents=True)  # fails, in the library's place
    (tmp_path / "pycocoevalcap/rouge/rouge.py").write_text("1 / 0")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    references, answers = TEXTS
    figures, _, missing = captions.caption_scores(answers, references)
    assert set(figures) == {"CIDEr-D", "BLEU-4"}
    for metric, reason in (("METEOR", "Java"), ("PTB", "Java"), ("ROUGE-L", "ZeroDivisionError")):
        assert any(metric in text and reason in text for text in missing)
    with pytest.raises(UserError, match="1.wav"):
        scoring.captioning(caption_items({"0.wav": ["a dog"], "1.wav": ["x", " "]}))


def fake_java(monkeypatch, folder, script):
    java = shutil.which("java") or pytest.skip("no Java: apt-get install default-jre-headless")
    (folder / "java").write_text(f"#!/bin/sh\n{script.replace('JAVA', java)}\n")
    (folder / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.slow
@pytest.mark.parametrize("script, works", [
    ("exit 1", False), ("echo 0,5; echo 0,5; cat", False),
    ('JAVA "$@" & (sleep 0.2; kill -9 $!) > /dev/null; wait', False),
    ('exec JAVA -Duser.language=de "$@"', True)])
def test_java_that_fails_costs_its_own_figure(monkeypatch, tmp_path, script, works):
    pytest.importorskip("pycocoevalcap")
    fake_java(monkeypatch, tmp_path, script)
    references, answers = TEXTS
    figures, _, missing = captions.caption_scores(answers, references)
    assert ("METEOR" in figures) == works and {"CIDEr-D", "BLEU-4", "ROUGE-L"} <= set(figures)
    assert works or any("METEOR" in text and "Java" in text for text in missing)


@pytest.mark.slow
def test_java_that_hangs_is_killed(monkeypatch, tmp_path):
    """With its Java program, of which no more than a zombie is left."""
    pytest.importorskip("pycocoevalcap")
    fake_java(monkeypatch, tmp_path, f"echo $$ > {tmp_path}/pid; sleep 1000; true")
    task = [3, "pycocoevalcap.meteor.meteor.Meteor", "compute_score", [{"0": ["a dog"]}, {"0": ["a dog"]}]]
    command = [sys.executable, os.path.join(ROOT, "tools/eval/metric_process.py")]
    process = subprocess.run(command, input=json.dumps(task), text=True, capture_output=True, timeout=100)
    assert process.returncode == -signal.SIGKILL and not process.stdout
    command = ["ps", "-o", "stat=", "-p", (tmp_path / "pid").read_text().strip()]
    assert subprocess.run(command, capture_output=True, text=True).stdout[:1] in ("", "Z")


@pytest.mark.parametrize("text, tokens", [
    ("Don't stop, well-known (dog)!", "dont stop wellknown dog"), ("狗叫。人说话", "狗 叫 人 说 话"),
    ("Straße — “café”…", "strasse café"), ("कुत्ता भौंकता है।", "कुत्ता भौंकता है"), ("٣ dogs", "3 dogs")])
def test_the_plain_tokenizer_of_captions(text, tokens):
    references, _ = captions.tokenize([[text]], [["x"]], {captions.TOKENIZER: "absent"})
    assert references == {"0000000": [tokens]}


# ------------------------------------------------------------------------------------------------------------
# Intervals


@pytest.mark.slow
@pytest.mark.parametrize("clips, questions, a, b", [(200, 1, 6, 4), (60, 5, 3, 2), (100, 1, 9, 1)])
def test_intervals_cover_the_truth(clips, questions, a, b):
    rng, hits = np.random.default_rng(0), 0
    for _ in range(1000):
        chance = rng.beta(a, b, clips)  # questions about one clip are easy or hard together
        right = (rng.random((clips, questions)) < chance[:, None]).ravel()
        _, (low, high) = stats.interval(right.tolist(), np.repeat(np.arange(clips), questions).tolist())
        hits += low <= a / (a + b) <= high
    assert 0.93 <= hits / 1000 <= 0.97, hits


def test_intervals_at_the_bounds_and_of_clips():
    value, (low, high) = stats.interval([1] * 20, range(20))
    assert (value, high) == (1, 1) and 0.8 < low < 0.95
    assert stats.interval([], []) is None and stats.interval([None], ["a"]) is None
    ten_clips = np.repeat(np.arange(10), 10).tolist()  # each all right or all wrong
    wide = np.diff(stats.interval([float(clip < 5) for clip in ten_clips], ten_clips)[1])
    assert wide > 2 * np.diff(stats.interval([1.0, 0.0] * 50, range(100))[1])


# ------------------------------------------------------------------------------------------------------------
# Files and commands


def write_answers(path, n=60, better=0):
    rng = random.Random(0)
    with open(path, "w") as f:
        for i in range(n):
            right = rng.choice(["dog", "cat"])
            answer = right if rng.random() < 0.5 or i < better else "rain"
            f.write(json.dumps({"audio": f"{i // 2}.wav", "prompt": f"What {i}?", "reference": right,
                                "answer": answer, "category": ["a", "b"][i % 2]}) + "\n")


def test_score_and_compare_commands(tmp_path, capsys):
    """The same answers give the same bytes; compared files show each item gained and lost."""

    def command(function, *argv):
        function(config.load([*map(str, argv), "--report=false"], "eval.py", scoring.READS, files=True))
        return capsys.readouterr().out

    write_answers(tmp_path / "a.jsonl")
    write_answers(tmp_path / "b.jsonl", better=30)
    results = {name: tmp_path / name / "Toy-AQA.jsonl" for name in "ab"}
    printed = {}
    for name in "ab":
        printed[name] = command(scoring.score_file, tmp_path / f"{name}.jsonl", "--task=Toy-AQA",
                                f"--results={tmp_path}/{name}", f"--scores={tmp_path}/scores.json")
    assert "Toy-AQA: accuracy" in printed["a"] and "category: a" in printed["a"]
    row = json.load(open(tmp_path / "scores.json"))["tasks"]["Toy-AQA"]
    assert row["n"] == 60 and row["chance"] == 0.5 and {"accuracy", "intervals", "groups"} <= set(row)
    first = results["a"].read_bytes()
    again = command(scoring.score_file, "--task", "Toy-AQA", results["a"], f"--results={tmp_path}/again")
    assert again == printed["a"] and (tmp_path / "again/Toy-AQA.jsonl").read_bytes() == first
    gained = sum(a != b for a, b in zip(open(tmp_path / "a.jsonl"), open(tmp_path / "b.jsonl")))
    unscored = command(scoring.compare_files, tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--task=Toy-AQA")
    for compared in (command(scoring.compare_files, *results.values()), unscored):
        assert f"gained {gained}, lost 0" in compared
        assert compared.count("\ngained | ") == gained


@pytest.mark.slow
def test_wrong_commands_are_one_line(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": 3, "output": "x", "answer": "x"}\n')
    fails_with_one_line("eval.py", "score", tmp_path / "bad.jsonl", "--task=Toy-AQA", saying="line 1")
    fails_with_one_line("eval.py", "compare", tmp_path / "bad.jsonl", saying="usage")


QUESTIONS = [{"id": f"u{i}", "audio_id": f"./test-mini-audios/u{i}.wav", "question": "Who?", "answer": answer,
              "choices": ["Man", "Woman", "A child"], "task": ["sound", "music"][i % 2], "split": "test-mini",
              "category": ["x", "y"]} for i, answer in enumerate(["Man", "A child", "Woman"])]


def test_mmau_question_file_and_results(tmp_path):
    file, results = str(tmp_path / "mmau.json"), str(tmp_path / "out.json")
    (tmp_path / "mmau.json").write_text(json.dumps(QUESTIONS))
    manifest = records.open_questions(file, "MMAU/test-mini", "root")
    assert len(manifest) == 3 and manifest[1]["output"] == "A child" and manifest.name == "MMAU/test-mini"
    assert manifest[1]["path"].endswith("root/./test-mini-audios/u1.wav")
    assert manifest[0]["prompt"] == (
        "Who? Choose the correct option from the following options:\n(A) Man\n(B) Woman\n(C) A child")
    items = [{"answer": "(a) man", "prompt": question["prompt"]} for question in manifest.items]
    records.write_official(results, manifest.items, items)
    assert [set(row) - set(QUESTIONS[0]) for row in json.load(open(results))] == [
        {"model_output", "model_prediction"}] * 3
    items = records.read_answers(results)
    row = score("MMAU/test-mini", items)
    assert row["accuracy"] == 0 and row["mark stripped"] == pytest.approx(1 / 3)
    assert "published 3B 61.56" in "".join(report.result_lines("MMAU/test-mini", row))
    unanswered = [question | {"answer": None} for question in QUESTIONS]
    (tmp_path / "test.json").write_text(json.dumps(unanswered))
    assert score("MMAU/test", records.read_answers(str(tmp_path / "test.json")))["without a reference"] == 3
    (tmp_path / "broken.json").write_text('[{"question": "x", "audio_id": "y"}]')
    with pytest.raises(UserError, match="item 0.*choices"):
        records.read_answers(str(tmp_path / "broken.json"))


def test_the_text_encoder_is_claps(tmp_path):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    from tools.eval.clap_text import pick_text_encoder
    words = "<pad> </s> <unk> dog cat rain loud".split()
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                                   unk_token="<unk>")
    fast.save_pretrained(tmp_path / "t5")
    torch.manual_seed(0)
    shape = T5Config(vocab_size=7, d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8,
                     feed_forward_proj="gated-gelu")
    shape.save_pretrained(tmp_path / "t5")
    encoder = T5EncoderModel(shape).eval()
    project = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32))
    state = {f"module.text_branch.{n}": t for n, t in encoder.state_dict().items()}
    state |= {f"module.text_projection.{n}": t for n, t in project.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "clap.pt")
    torch.save({"state_dict": {"module.text_branch.embeddings.x": torch.ones(2)}}, tmp_path / "laion.pt")
    c = config.load([f"--text_encoder={tmp_path}/t5", "--device=cpu"], "eval.py")
    embed = pick_text_encoder(f"{tmp_path}/clap.pt", c)
    texts = ["dog", "loud cat rain", "dog dog"]
    ids = fast(texts, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        states = encoder(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"])[0]
        expected = torch.nn.functional.normalize(project(states.mean(1)), dim=-1).numpy()
    np.testing.assert_allclose(embed(texts), expected, atol=1e-6)
    cosines = rules.similarities(embed, ["dog", "", "dog dog"], texts)
    np.testing.assert_allclose(cosines[[0, 2]], expected[[0, 2]] @ expected.T, atol=1e-6)
    assert (cosines[1] == -1).all()
    assert pick_text_encoder(f"{tmp_path}/laion.pt", c) is None
    c.matching = "retrieval"
    with pytest.raises(UserError, match="laion.pt"):
        pick_text_encoder(f"{tmp_path}/laion.pt", c)


def test_report_escapes_markup(tmp_path):
    """One file without links: confusion matrix, sub-categories, the worst items."""
    pytest.importorskip("matplotlib")
    items = [{"id": i, "prompt": f"<b>What {i}?", "output": ["dog", "cat"][i % 2], "answer": "dog",
              "genre": ["a", "b"][i % 2]} for i in range(12)]
    rows = {"Toy-AQA": score("Toy-AQA", items)}
    report.write_report(str(tmp_path / "r.html"), rows, {"Toy-AQA": items}, lambda name, item: "")
    page = (tmp_path / "r.html").read_text()
    assert page.count("data:image/png") == 1 and page.count('class="item"') == 4 and "genre: a" in page
    assert "<b>" not in page and "&lt;b&gt;What 1?" in page and "http" not in page
