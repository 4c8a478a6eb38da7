"""Scoring: every rule on cases worked out by hand, captions by the library, intervals, files, the report."""

import json
import random
import re
import shutil
import sys
import time

import numpy as np
import pytest

import eval as scoring
from tests.helpers import fails_with_one_line, run
from tools.eval import captions
from tools.eval import rules as closed_sets
from tools.eval import compare
from tools.eval import stats as intervals
from tools.eval import records
from tools.eval import report
from tools.eval import results as table
from tools.eval.parsing import normalise, options_of

MC = "Which? (A) dog. (B) big dog. (C) cat."
VOICE = "Who speaks? (A) A male voice. (B) A female voice. (C) A child. Answer with the letter."
WOMAN = "Who? (A) woman and child (B) two men (C) two women (D) a man and a child"
METER = "Which?\n(A) 4/4 (common time)\n(B) 3.5 kHz\n(C) 3/4"
KEYS = "Key? (A) C# minor (B) C minor (C) A minor"
COT = (
    "<SUMMARY> s </SUMMARY> <CAPTION> c </CAPTION> <REASONING> not a cat </REASONING> "
    "<CONCLUSION> {} </CONCLUSION>"
)
MMAU, MUCHO, CLOTHO, OPEN = "MMAU", "MuChoMusic", "Clotho-AQA-AQA", "Music-AVQA-AQA_All"
CLOSED, ENTAIL, CMM = "GTZAN-GenreClassification", "AudioEntailmentQA", "CMM-AQA"
TASKS = [MMAU, MUCHO, CLOTHO, OPEN, CLOSED, "NSynth-MIR", "FSD50k-EventClassification", ENTAIL, CMM]

# task, prompt, reference, answer, verdict (None: does not count), why
CASES = [
    (MMAU, MC, "(C) cat", "(C) cat", 1, "mark and text, as the manifest has it"),
    (MMAU, MC, "(C) cat", "cat", 1, "the letter of the reference is a mark, not a word to be said"),
    (MMAU, MC, "cat", "(c) cat", 1, "a reference without its letter; lower case"),
    (MMAU, MC, "C", "cat", 1, "a reference that is the mark alone"),
    (MMAU, MC, "(C) cat.", "it is a cat.", 1, "a sentence that says all tokens"),
    (MMAU, MC, "(C) cat", "c", 0, "the official rule wants the text"),
    (MMAU, MC, "(C) cat", "", 0, "empty"),
    (MMAU, MC, "(C) cat", "...", 0, "no token"),
    (MMAU, MC, "(C) cat", "cat, not a dog", 0, "a token that only another option has"),
    (MMAU, MC, "(C) cat", "cats", 0, "another token"),
    (MMAU, MC, "(A) dog", "dog", 1, "big is another option's word, and is not said"),
    (MMAU, MC, "(A) dog", "big dog", 0, "big is said"),
    (MMAU, MC, "(B) big dog", "dog", 0, "big is missing"),
    (MMAU, MC, "(B) big dog", "a dog that is big", 1, "order does not matter to tokens"),
    (MMAU, WOMAN, "(A) woman and child", "woman and child", 1, "text alone"),
    (MMAU, WOMAN, "(A) woman and child", "(a) woman and child", 0, "the mark is the word that only (D) has"),
    (MMAU, VOICE, "(B) A female voice", "a female voice", 1, "the instruction after (C) is no option"),
    (MMAU, VOICE, "(C) A child", "a child", 1, "the last option ends before the instruction"),
    (MMAU, VOICE, "A child", "a child with the letter", 1, "words of the instruction are no option's"),
    (MMAU, METER, "4/4 (common time)", "4/4 (common time)", 1, "brackets in an option are its text"),
    (MMAU, METER, "(B) 3.5 kHz", "3.5 khz", 1, "a full stop in an option"),
    (MMAU, METER, "(C) 3/4", "3/4", 1, "the tokens 3 and 4 are the right option's too"),
    (MMAU, METER, "(C) 3/4", "4/4", 0, "3 is missing"),
    (MMAU, "Which?\nA. dog\nB. cat\nAnswer in a word.", "B", "cat", 1, "A. on lines"),
    (MMAU, "Which? a) dog b) cat", "b) cat", "cat", 1, "a) in one line"),
    (MMAU, "Which? A) dog B) cat", "dog", "dog", 1, "A) in one line"),
    (MMAU, MC, "(C) cat", COT.format("cat"), 1, "the conclusion counts; 'not a cat' is the reasoning"),
    (MMAU, MC, "(C) cat", COT.format("(C) cat").lower(), 1, "tags in lower case"),
    (MMAU, MC, "(C) cat", "<summary> cat </summary> <reasoning> a cat", 0, "reasoning without a conclusion"),
    (MMAU, MC, "(C) cat", "<conclusion> cat", 1, "a conclusion that is not closed"),
    (MMAU, "Which? (A) rain (B) rain (C) sun", "rain", "rain", 1, "a choice that is repeated"),
    ("GM-FamilyMC-AQA", MC, "(C) cat", "cat", 1, "any prompt with options goes by this rule"),
    ("US8K-EventClassification", MC, "(C) cat", "(c) cat", 1, "closed sets with options too"),
    (MUCHO, MC, "(C) cat", "C", 1, "the letter"),
    (MUCHO, MC, "(C) cat", "(c)", 1, "the letter as this system writes it"),
    (MUCHO, MC, "(C) cat", "c.", 1, "lower case with a full stop"),
    (MUCHO, MC, "(C) cat", "The correct answer is: C", 1, "in a sentence"),
    (MUCHO, MC, "(C) cat", "A or C: a cat", 1, "two letters: the text decides"),
    (MUCHO, MC, "(C) cat", "a cat", 1, "an article is not a letter"),
    (MUCHO, MC, "(A) dog", "I hear a dog", 1, "I is the speaker"),
    (MUCHO, MC, "(A) dog", "who knows", 0, "unanswered"),
    (MUCHO, MC, "(A) dog", "", 0, "empty"),
    (MUCHO, MC, "(B) big dog", "B", 1, "letter"),
    (MUCHO, MC, "(B) big dog", "it is a big dog", 0, "the first option that is contained is dog"),
    (MUCHO, MC, "(B) big dog", "big dog", 1, "the whole answer is an option's text"),
    (MUCHO, VOICE, "(B) A female voice", "A female voice", 1, "the A of a label is not the letter"),
    (MUCHO, VOICE, "(A) A male voice", "A female voice", 0, "nor does it make (A) right"),
    (MUCHO, VOICE, "(C) A child", "D", 0, "there is no option D"),
    (MUCHO, MC, "(C) cat", "D", 0, "a letter without an option, no text"),
    (MUCHO, KEYS, "(C) A minor", "a minor", 1, "a key, not an article"),
    (CLOTHO, "Is it?", "yes, yes, yes", "Yes.", 1, "unanimous"),
    (CLOTHO, "Is it?", "no, no, no", "yes", 0, "unanimous"),
    (CLOTHO, "Is it?", "yes, no, yes", "yes", None, "not unanimous: in neither group"),
    (CLOTHO, "What?", "yes, dog, dog", "dog", None, "someone said yes: in neither group"),
    (CLOTHO, "What?", "dog, a cat, bird", "cat", 1, "any of the three; articles do not count"),
    (CLOTHO, "What?", "rain,wind,sea", "Wind!", 1, "without spaces"),
    (CLOTHO, "What?", "rain, wind, sea", "rain, wind", 0, "one answer is asked for"),
    (CLOTHO, "What?", "rain, wind, sea", "", 0, "empty"),
    (CLOTHO, "What?", "a, the, an", "", 0, "articles alone are not nothing"),
    (OPEN, "What?", "The Dog", "dog!", 1, "case, punctuation, article"),
    (OPEN, "What?", "two", "too", 0, "another word"),
    (OPEN, "Letter?", "A", "", 0, "an empty answer is not the label A"),
    (OPEN, "Letter?", "A", "a", 1, "the label A"),
    (OPEN, "Letter?", "A", "the", 0, "two articles are two labels"),
    (OPEN, "What?", "?", "", 0, "nor the label ?"),
    (OPEN, "What?", "?", "?", 1, "a label without letters"),
    (OPEN, "Key?", "c# minor", "c minor", 0, "sharp"),
    (OPEN, "Key?", "C♯ minor", "c# minor", 1, "one sign, two spellings"),
    (OPEN, "Key?", "A minor", "minor", 0, "the A of a key is its name"),
    (OPEN, "Level?", "-3 dB", "3 dB", 0, "minus"),
    (OPEN, "Level?", "−3 dB", "-3 db.", 1, "the minus sign of typesetters"),
    (OPEN, "Level?", "3 dB", "3dB", 1, "a number and its unit"),
    (OPEN, "Language?", "c++", "c", 0, "plus"),
    (OPEN, "Share?", "50%", "50", 0, "per cent"),
    (OPEN, "Tempo?", "3.5", "35", 0, "decimal point"),
    (OPEN, "Rate?", "1,000 Hz", "1000 hz", 1, "thousands"),
    (OPEN, "Tempo?", "> 120", "< 120", 0, "greater and less"),
    (OPEN, "What?", "hip-hop", "Hip hop", 1, "a hyphen inside a word"),
    (OPEN, "What?", "acoustic_guitar", "acoustic guitar", 1, "an underscore joins words"),
    (OPEN, "What?", "bark, dog", "dog, bark", 1, "several labels in any order"),
    (OPEN, "What?", "bark; dog", "Dog, bark.", 1, "and with another separator"),
    (OPEN, "What?", "bark, dog", "dog", 0, "one of two"),
    (OPEN, "What?", "acoustic guitar", "guitar acoustic", 0, "the words of one label keep their order"),
    (OPEN, "What?", "cat", COT.format("A cat."), 1, "conclusion"),
    (OPEN, "What?", "cat", "<caption> cat", 0, "no conclusion"),
    (CLOSED, "Genre?", "rock", "Rock.", 1, "normalised"),
    (CLOSED, "Genre?", "rock", "rock music", 0, "exact without a text encoder"),
    (CLOSED, "Genre?", "rock", "", 0, "empty"),
    ("NSynth-MIR", "What?", "acoustic", "acoustic", 1, "one field"),
    (ENTAIL, "So?", "neutral", "it is neutral", 1, "named in a sentence"),
    (ENTAIL, "So?", "entailment", "contradiction", 0, "the other"),
    (ENTAIL, "So?", "contradiction", "not entailment but contradiction", 1, "what is denied is not named"),
    (ENTAIL, "So?", "entailment", "The audio entails the text.", 1, "the verb"),
    (ENTAIL, "So?", "neutral", "", 0, "empty"),
    (CMM, "Is there?", "yes", "Yes, there is", 1, "yes in front"),
    (CMM, "Is there?", "no", "there is no", 0, "no after the fifth character"),
    (CMM, "Is there?", "no", "No.", 1, "no in front"),
    (CMM, "Is there?", "yes", "", 0, "empty"),
    (CMM, "Is there?", "yes", " \n yes", 1, "white space does not count"),
]



@pytest.mark.parametrize("task, prompt, reference, answer, verdict, why", CASES)
def test_case(task, prompt, reference, answer, verdict, why):
    items = [{"prompt": prompt, "output": reference, "answer": answer}]
    scoring.choose_rule(task, items)(items)
    assert items[0]["score"] == verdict, why


def test_there_are_enough_cases():
    assert len(CASES) >= 80 and len({case[:4] for case in CASES}) == len(CASES)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "silent", [{"answer": ""}, {"answer": None}, {"answer": " \n"}, {"answer": "A", "error": "gone"}]
)
def test_empty_and_unreadable_are_never_right(task, silent):
    if task.startswith("FSD50k"):
        pytest.importorskip("sklearn")
    right = {CLOTHO: "yes, yes, yes", ENTAIL: "neutral", CMM: "no"}.get(task, "A")
    items = [{"prompt": VOICE, "output": right} | silent for _ in range(2)]
    items.append({"prompt": VOICE, "output": right, "answer": right})
    scoring.choose_rule(task, items)(items)
    assert [item["score"] for item in items[:2]] == [0, 0]


def official(answer, prediction, choices):
    """MMAU's rule written down once more from its description, word by word."""

    def words(text):
        found, word = [], ""
        for letter in text.lower() + " ":
            if letter.isalnum() or letter == "_":
                word += letter
            elif word:
                found, word = found + [word], ""
        return found

    said = words(prediction)
    for word in words(answer):
        if word not in said:
            return False
    for choice in choices:
        for word in words(choice):
            if word in said and word not in words(answer):
                return False
    return len(said) > 0


def test_the_official_rule_is_mmaus():
    rng, vocabulary = (
        random.Random(0),
        "a the man woman child two men and dog 4 3.5 c# rock-n-roll (live) A".split(),
    )
    phrase = lambda: " ".join(rng.choices(vocabulary, k=rng.randint(1, 3)))
    for _ in range(3000):
        choices = [phrase() for _ in range(rng.randint(2, 8))]
        right = rng.choice(choices)
        answer = rng.choice([right, phrase(), f"(A) {right}", f"it is {right}.", "", phrase() + " " + right])
        item = {"prompt": "", "choices": choices, "output": right, "answer": answer}
        scoring.multiple_choice([item])
        assert item["score"] == official(right, answer, choices), (choices, right, answer)


@pytest.mark.parametrize(
    "answer, plain, bare, read",
    [
        ("(a) woman and child", 0, 1, 1),
        ("woman and child", 1, 1, 1),
        ("a", 0, 0, 1),
        ("(A)", 0, 0, 1),
        ("A.", 0, 0, 1),
        ("A. woman and child", 0, 1, 1),
        ("the answer is (a)", 0, 0, 1),
        ("two men", 0, 0, 0),
        ("(b) woman and child", 1, 1, 0),
        ("a woman and child", 0, 0, 1),
        ("", 0, 0, 0),
    ],
)
def test_figures_of_multiple_choice(answer, plain, bare, read):
    figures = scoring.multiple_choice([{"prompt": WOMAN, "output": "(A) woman and child", "answer": answer}])
    assert [figures[name] for name in ("accuracy", "mark stripped", "as read")] == [[plain], [bare], [read]]


@pytest.mark.parametrize(
    "prompt, options",
    [
        (MC, ["dog", "big dog", "cat"]),
        (METER, ["4/4 (common time)", "3.5 kHz", "3/4"]),
        (VOICE, ["A male voice", "A female voice", "A child"]),
        (VOICE.lower(), ["a male voice", "a female voice", "a child"]),
        ("Is it (A) dog or (B) cat?", ["dog", "cat"]),
        ("pick: A: dog, B: cat, or C: bird", ["dog", "cat", "bird"]),
        ("[A] x [B] y", ["x", "y"]),
        ("1) dog 2) cat", ["dog", "cat"]),
        ("(a)dog (b)cat", ["dog", "cat"]),
        ("\n".join(f"({c}) {c}{c}" for c in "ABCDEFGHIJ"), [c + c for c in "ABCDEFGHIJ"]),
        (
            "Choose (A), (B) or (C). (A) dog (B) cat (C) cow. Reply with (A), (B) or (C).",
            ["dog", "cat", "cow"],
        ),
        (
            "Whose? A. J. S. Bach B. Mozart C. Dr. Dre. Please choose one.",
            ["J. S. Bach", "Mozart", "Dr. Dre"],
        ),
        (
            "(A) It rains. It blows. (B) A dog barks. It runs. Respond with the letter.",
            ["It rains. It blows", "A dog barks. It runs"],
        ),
        (
            "(A) he will answer the phone (B) she plays. answer with the letter",
            ["he will answer the phone", "she plays"],
        ),
        ("Which of these? (A) Yes (B) No. What do you hear?", ["Yes", "No"]),
        ("(A) ?\n(B) !", ["?", "!"]),
        (KEYS, ["C# minor", "C minor", "A minor"]),
        ("(A) dog | (B) cat | (C) cow", ["dog", "cat", "cow"]),
        ("Is it the piano (A) or the violin (B)?", []),
        ("What is that?", []),
        ("Only (A) one.", []),
    ],
)
def test_options(prompt, options):
    assert list(options_of(prompt)) == options


def test_normalisation_never_empties():
    for text in ["A", "the", "a an the", "?", "...", "#", "-", "♪", "日本", "ö", "_", ",", "(a)"]:
        assert normalise(text), text
    assert normalise(" ") == ""


@pytest.mark.parametrize(
    "task, prompt, rule",
    [
        ("Clotho-AQA-AQA", "Is it?", "clotho_aqa"),
        ("MMAU", MC, "multiple_choice"),
        ("Music-AVQA-AQA_All", "What?", "exact_match"),
        ("CochlScene-SceneClassification", "Where?", "closed_set"),
        ("NSynth-MIR", "What?", "nsynth"),
        ("FSD50k-EventClassification", "What?", "multi_label"),
        ("GTZAN-GenreClassification", MC, "multiple_choice"),
        ("MuChoMusic", MC, "muchomusic"),
        ("AudioEntailmentQA", "So?", "entailment"),
        ("CMM-AQA", "Is it?", "cmm"),
        ("audiocaps-AudioCaptioning", "Say.", "captioning"),
    ],
)
def test_rule_by_task_name(task, prompt, rule):
    assert scoring.choose_rule(task, [{"prompt": prompt}]).__name__ == rule


def rows(*texts):
    return [{"prompt": "q", "output": output, "answer": answer} for output, answer in texts]


def test_groups_of_clotho_cmm_and_muchomusic():
    items = rows(
        ("yes, yes, yes", "Yes."),
        ("yes, no, yes", "no"),
        ("dog, a cat, bird", "cat"),
        ("a, b, c", "d"),
        ("no, no, no", "yes"),
    )
    row = table.row_of(scoring.clotho_aqa(items), items, "clotho_aqa")
    assert (row["accuracy"], row["unanimous"], row["non-binary"]) == (0.5, 0.5, 0.5)
    items = rows(("yes", "Yes, it is"), ("no", "there is no"), ("no", "No."))
    row = table.row_of(scoring.cmm(items), items, "cmm")
    assert (row["perception"], row["hallucination resistance"]) == (1.0, 0.5)
    items = [
        {"prompt": MC, "output": "(C) cat", "answer": answer} for answer in ("C", "who knows", "", "a cat")
    ]
    assert table.row_of(scoring.muchomusic(items), items, "muchomusic")["unanswered"] == 0.5


def test_nothing_to_score_is_told_without_nan():
    items = rows(("yes, no, yes", "no"))
    row = table.row_of(scoring.clotho_aqa(items), items, "clotho_aqa")
    lines = "\n".join(table.lines_of("Clotho-AQA-AQA/test", row))
    assert (
        "unanimous: nothing to score, no question with three equal answers" in lines and "nan%" not in lines
    )
    assert row["accuracy"] is None and json.dumps(row, allow_nan=False)


def test_closed_sets_labels_and_retrieval():
    label_file = ["Male speech, man speaking", "Dog", "Rain"]
    items = rows(
        ("Male speech, man speaking", "male speech, man speaking"), ("Dog", "rain"), ("Rain", "a dog")
    )
    figures = scoring.closed_set(items, label_file)
    assert figures["accuracy"] == [1, 0, 0] and figures["chance"] == 1 / 3 and figures["matching"] == "exact"
    assert items[2]["predicted"] == "Dog"
    space = {
        "Dog": [1, 0, 0],
        "Rain": [0, 1, 0],
        "Male speech, man speaking": [0, 0, 1],
        "a hound barks": [0.8, 0.6, 0],
    }
    embed = lambda texts: np.array([space[text] for text in texts], float)
    items = rows(("Dog", "a hound barks"), ("Rain", "a hound barks"), ("Dog", ""), ("Dog", " "))
    figures = scoring.closed_set(items, label_file, embed)
    assert figures["accuracy"] == [1, 0, 0, 0] and figures["matching"] == "retrieval"
    items = rows(
        (
            "produced by guitar, pitch 60, velocity 50, source acoustic, and bright",
            "produced by a guitar, source electronic.",
        )
    )
    figures = scoring.nsynth(items)
    assert (figures["source"], figures["instrument"], figures["accuracy"]) == ([0], [1], [0.5])


def test_multi_label_is_scikit_learns_map():
    average_precision_score = pytest.importorskip("sklearn.metrics").average_precision_score
    items = rows(
        ("dog, bark", "bark, dog"),
        ("rain", "wind"),
        ("rain, wind", "rain"),
        ("dog", ""),
        ("wind", "wind, dog"),
    )
    figures = scoring.multi_label(items)
    names = ["bark", "dog", "rain", "wind"]
    truth, said = (np.array([[n in i[k] for n in names] for i in items], float) for k in ("output", "answer"))
    assert figures["mAP"][0] == pytest.approx(average_precision_score(truth, said, average="macro"))
    assert [item["score"] for item in items] == [1, 0, 0.5, 0, 0]
    comma = rows(("Male speech, man speaking, dog", "dog, male speech, man speaking"))
    assert scoring.multi_label(comma, ["Male speech, man speaking", "Dog", "Rain"])["mAP"][0] == 1
    rng = np.random.default_rng(
        0
    )  # the draws of its interval are scikit-learn's with sample weights, ties included
    truth = rng.random((60, 3)) < 0.3
    scores, kept = np.round(rng.random((60, 3)) + 0.5 * truth, 1), []
    original, intervals.spread = intervals.spread, lambda draws, value: kept.append(draws)
    try:
        intervals.mean_average_precision(truth, scores, range(60))
    finally:
        intervals.spread = original
    for draw, weights in zip(kept[0][:5], intervals.weights(np.ones(60), 200)):
        expected = [average_precision_score(y, s, sample_weight=weights) for y, s in zip(truth.T, scores.T)]
        assert draw == pytest.approx(np.mean(expected), rel=1e-5)


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


def caption_items():
    return [
        {"audio": clip, "prompt": "Say.", "output": text, "answer": ANSWERS[clip]}
        for clip, texts in REFERENCES.items()
        for text in texts
    ]


def test_captions_are_the_librarys():
    pytest.importorskip("pycocoevalcap")
    items = caption_items()
    found = scoring.captioning(items)
    assert found["captions"] == 6
    for name in ("CIDEr-D", "ROUGE-L", "BLEU-4") + (("METEOR",) if shutil.which("java") else ()):
        value, (low, high) = found[name]
        assert value == pytest.approx(STORED[name], rel=1e-9) and low <= value <= high
    assert [items[i]["score"] for i in (0, 2, 4, 7, 8, 10)] == pytest.approx(EACH, abs=1e-7)
    if shutil.which("java"):
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        texts = [
            {k: [{"caption": t} for t in v] for k, v in side.items()}
            for side in (REFERENCES, {k: [a] for k, a in ANSWERS.items()})
        ]
        assert found["CIDEr-D"][0] == Cider().compute_score(*map(PTBTokenizer().tokenize, texts))[0]


def test_captions_do_not_shift():
    pytest.importorskip("pycocoevalcap")
    texts = {0: ["a dog barks"]} | {
        i: [f"a{evil} dog{evil}barks loudly", "rain"]
        for i, evil in enumerate(("\r", "\v", "\f", "\u2028", "\x85", "|||", "\n"), 1)
    }
    for java in {False, shutil.which("java") is not None}:
        tokens = captions.tokenise(texts, java)
        assert tokens[0] == ["a dog barks"] and all(
            tokens[i] == ["a dog barks loudly", "rain"] for i in range(1, 8)
        )
    broken = {k: v.replace(" ", " ||| \u2028") for k, v in ANSWERS.items()}
    same, _ = captions.caption_scores(broken, REFERENCES)
    assert {k: v[0] for k, v in same.items()} == pytest.approx({k: STORED[k] for k in same}, rel=1e-9)


def test_captions_without_java_or_package(monkeypatch):
    monkeypatch.setattr(captions.shutil, "which", lambda _: None)
    pytest.importorskip("pycocoevalcap")
    found, missing = captions.caption_scores(ANSWERS, REFERENCES)
    assert (
        set(found) == {"CIDEr-D", "BLEU-4", "ROUGE-L"}
        and "METEOR" in missing[0]
        and "default-jre-headless" in missing[0]
    )
    one, missing = captions.caption_scores({"a": "a dog"}, {"a": ["a dog"]})
    assert "CIDEr-D" not in one and any("at least two clips" in text for text in missing)
    with pytest.raises(ValueError, match="reference caption is empty"):
        captions.caption_scores({"a": "a dog", "b": "x"}, {"a": ["a dog"], "b": ["  "]})
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu_scorer", None)
    found, missing = captions.caption_scores(ANSWERS, REFERENCES)
    assert found == {} and "requirements-eval.txt" in missing[0]


# ------------------------------------------------------------------------------------------------------------
# Intervals


@pytest.mark.parametrize("clips, questions, a, b", [(200, 1, 6, 4), (60, 5, 3, 2), (100, 1, 9, 1)])
def test_intervals_cover_the_truth(clips, questions, a, b):
    rng, hits = np.random.default_rng(0), 0
    for _ in range(1000):
        chance = rng.beta(a, b, clips)  # questions about one clip are easy or hard together
        right = (rng.random((clips, questions)) < chance[:, None]).ravel()
        _, (low, high) = intervals.interval(right.tolist(), np.repeat(np.arange(clips), questions).tolist())
        hits += low <= a / (a + b) <= high
    assert 0.93 <= hits / 1000 <= 0.97, hits


def test_intervals_at_the_ends_and_their_speed():
    value, (low, high) = intervals.interval([1.0] * 20, range(20))
    assert (value, high) == (1, 1) and 0.8 < low < 0.95
    assert intervals.interval([], []) is None and intervals.interval([None], ["a"]) is None
    _, (low, high) = intervals.interval([0.0], ["a"])
    assert low == 0 and high > 0.5
    one, many = [1.0, 0.0] * 50, np.repeat(np.arange(10), 10).tolist()
    wide = np.diff(
        intervals.interval([float(c < 5) for c in many], many)[1]
    )  # ten clips, each all right or all wrong
    assert wide > 2 * np.diff(intervals.interval(one, range(100))[1])
    values = np.random.default_rng(0).random(10000).tolist()
    start = time.time()
    assert intervals.interval(values, range(10000), None) == intervals.interval(values, range(10000), None)
    assert time.time() - start < 10


def test_paired_tests():
    assert intervals.mcnemar(0, 0) == 1 and intervals.mcnemar(5, 5) == 1
    assert intervals.mcnemar(6, 0) == pytest.approx(2 / 64) and intervals.mcnemar(9, 1) == pytest.approx(
        22 / 1024
    )
    assert intervals.mcnemar(6000, 4000) < 1e-80
    assert (
        intervals.bootstrap_p([1] * 20, range(20)) < 0.01
        and intervals.bootstrap_p([1, -1] * 20, range(40)) > 0.5
    )


# ------------------------------------------------------------------------------------------------------------
# Files and commands


def write_answers(path, n=60, better=0, seed=0):
    rng = random.Random(seed)
    with open(path, "w") as f:
        for i in range(n):
            right = rng.choice(["dog", "cat"])
            answer = right if rng.random() < 0.5 or i < better else "rain"
            f.write(
                json.dumps(
                    {
                        "audio": f"{i // 2}.wav",
                        "prompt": f"What {i}?",
                        "reference": right,
                        "answer": answer,
                        "category": ["a", "b"][i % 2],
                    }
                )
                + "\n"
            )


def test_score_and_compare_commands(tmp_path):
    write_answers(tmp_path / "a.jsonl")
    write_answers(tmp_path / "b.jsonl", better=30)
    printed = [
        run(
            "eval.py",
            "score",
            tmp_path / f"{x}.jsonl",
            "--task=Toy-AQA",
            f"--results={tmp_path}/{x}",
            f"--scores={tmp_path}/scores.json",
        )
        for x in "ab"
    ]
    assert re.match(
        r"Toy-AQA: accuracy \d+\.\d% \[\d+\.\d, \d+\.\d\], chance 50.0%, n 60, rule exact_match",
        printed[0].stdout,
    )
    assert "category: a" in printed[0].stdout
    row = json.load(open(tmp_path / "scores.json"))["tasks"]["Toy-AQA"]
    assert {"accuracy", "chance", "n", "intervals", "groups"} <= set(row)
    first = (tmp_path / "a/Toy-AQA.jsonl").read_bytes(), (tmp_path / "scores.json").read_bytes()
    again = run(
        "eval.py", "score", "--task", "Toy-AQA", tmp_path / "a/Toy-AQA.jsonl", f"--results={tmp_path}/a"
    )
    assert again.stdout == printed[0].stdout and (tmp_path / "a/Toy-AQA.jsonl").read_bytes() == first[0]
    result = run("eval.py", "compare", tmp_path / "a/Toy-AQA.jsonl", tmp_path / "b/Toy-AQA.jsonl")
    gained = sum(a != b for a, b in zip(open(tmp_path / "a.jsonl"), open(tmp_path / "b.jsonl")))
    assert "60 items in both" in result.stdout and f"gained {gained}, lost 0" in result.stdout
    assert "McNemar" in result.stdout and result.stdout.count("\ngained | ") == gained
    run("eval.py", "compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--task=Toy-AQA")


def test_what_is_wrong_with_a_file_of_answers_is_one_line(tmp_path):
    lines = [
        ('{"prompt": "q", "output": "x"}', "'answer'"),
        ('{"prompt": "q", "answer": "x"}', "'reference'"),
        ('{"output": "q", "answer": "x"}', "'prompt'"),
        ("{", "not JSON"),
        ("[1]", "list"),
        ('{"prompt": "q", "output": 3, "answer": "x"}', "int"),
    ]
    for line, saying in lines:
        (tmp_path / "bad.jsonl").write_text('{"prompt": "q", "output": "x", "answer": "x"}\n' + line + "\n")
        with pytest.raises(ValueError, match="bad.jsonl line 2") as error:
            records.read_answers(str(tmp_path / "bad.jsonl"))
        assert saying in str(error.value)
    fails_with_one_line(
        "eval.py", "score", tmp_path / "bad.jsonl", "--task=Toy-AQA", saying=["line 2", "int"]
    )
    fails_with_one_line("eval.py", "score", tmp_path / "bad.jsonl", saying="--task")
    fails_with_one_line("eval.py", "score", tmp_path / "none.jsonl", "--task=x", saying="none.jsonl")
    fails_with_one_line("eval.py", "compare", tmp_path / "bad.jsonl", saying="usage")
    (tmp_path / "kept.jsonl").write_text(
        '{"checkpoint": "x", "seed": 1}\n{"prompt": "q", "output": "x", "answer": null}\n'
    )
    assert [i["answer"] for i in records.read_answers(str(tmp_path / "kept.jsonl"))] == [
        ""
    ]  # a header is not an item


def test_ten_thousand_answers_in_ten_seconds(tmp_path):
    with open(tmp_path / "a.jsonl", "w") as f:
        for i in range(10000):
            f.write(
                json.dumps(
                    {
                        "audio": f"{i // 3}.wav",
                        "prompt": f"{i} {WOMAN}",
                        "output": "(B) two men",
                        "answer": ["(b) two men", "two women", "b"][i % 3],
                        "task": "sound",
                    }
                )
                + "\n"
            )
    start = time.time()
    assert "n 10000" in run("eval.py", "score", tmp_path / "a.jsonl", "--task=MMAU").stdout
    assert time.time() - start < 20  # 5 s alone; the machine may be shared


QUESTIONS = [
    {
        "id": f"u{i}",
        "audio_id": f"./test-mini-audios/u{i}.wav",
        "question": "Who?",
        "answer": answer,
        "choices": ["Man", "Woman", "A child"],
        "task": ["sound", "music"][i % 2],
        "split": "test-mini",
        "category": ["x", "y"],
    }
    for i, answer in enumerate(["Man", "A child", "Woman"])
]


def test_mmau_question_file_and_results(tmp_path):
    (tmp_path / "mmau.json").write_text(json.dumps(QUESTIONS))
    from data import Manifest

    file = str(tmp_path / "mmau.json")
    manifest = records.open_questions(file, "MMAU/test-mini", lambda copy: Manifest(copy, "root"))
    assert len(manifest) == 3 and manifest[1]["output"] == "A child" and manifest.name == "MMAU/test-mini"
    assert manifest[1]["path"].endswith("root/./test-mini-audios/u1.wav")
    assert manifest[0]["prompt"] == (
        "Who? Choose the correct option from the following options:\n(A) Man\n(B) Woman\n(C) A child"
    )
    items = [{"answer": "(a) man", "prompt": q["prompt"]} for q in manifest.items]
    records.write_official(str(tmp_path / "out.json"), manifest.items, items)
    rows = json.load(open(tmp_path / "out.json"))
    assert [set(row) - set(QUESTIONS[0]) for row in rows] == [{"model_output", "model_prediction"}] * 3
    result = run("eval.py", "score", tmp_path / "out.json", "--task=MMAU/test-mini").stdout
    assert "accuracy 0.0%" in result and "mark stripped 33.3%" in result and "published 3B 61.56" in result
    unanswered = [{k: v for k, v in q.items() if k != "answer"} | {"model_output": "man"} for q in QUESTIONS]
    (tmp_path / "test.json").write_text(json.dumps(unanswered))
    assert (
        "without a reference 3" in run("eval.py", "score", tmp_path / "test.json", "--task=MMAU/test").stdout
    )
    (tmp_path / "broken.json").write_text('[{"question": "x", "audio_id": "y"}]')
    fails_with_one_line(
        "eval.py", "score", tmp_path / "broken.json", "--task=MMAU", saying=["item 0", "choices"]
    )


def test_text_tower_is_the_t5_encoder(tmp_path):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel
    from tools.eval.clap_text import load_text_tower, text_tower

    words = "<pad> </s> <unk> dog cat rain loud".split()
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(tmp_path / "tokenizer")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=7, d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8, feed_forward_proj="gated-gelu"
    )
    encoder = T5EncoderModel(config).eval()
    project = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32))
    state = {f"module.text_branch.{n}": t for n, t in encoder.state_dict().items()}
    state |= {f"module.text_projection.{n}": t for n, t in project.state_dict().items()}
    embed = load_text_tower(state, str(tmp_path / "tokenizer"))
    texts = ["dog", "loud cat rain", "dog dog"]
    ids = fast(texts, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        expected = project(
            encoder(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"])[0].mean(1)
        )
    expected = torch.nn.functional.normalize(expected, dim=-1).numpy()
    np.testing.assert_allclose(embed(texts), expected, atol=1e-6)
    np.testing.assert_allclose(
        closed_sets.similarities(embed, ["dog", "", "dog dog"], texts)[[0, 2]],
        expected[[0, 2]] @ expected.T,
        atol=1e-5,
    )
    assert (
        load_text_tower({"module.text_branch.embeddings.word_embeddings.weight": torch.zeros(2, 2)}) is None
    )
    torch.save({"state_dict": state}, tmp_path / "clap.pt")
    with open(tmp_path / "a.jsonl", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows(("dog", "dog dog"), ("cat", "loud cat rain")))
    options = [
        "--task=X-EventClassification",
        f"--clap_checkpoint={tmp_path}/clap.pt",
        f"--text_tokenizer={tmp_path}/tokenizer",
    ]
    assert "matching retrieval" in run("eval.py", "score", tmp_path / "a.jsonl", *options).stdout
    assert (
        "matching exact" in run("eval.py", "score", tmp_path / "a.jsonl", *options, "--matching=exact").stdout
    )
    c = scoring.settings.load([], "eval.py")
    c.matching = "retrieval"
    with pytest.raises(ValueError, match="retrieval"):
        text_tower(None, c)


def test_report_is_whole_and_escaped(tmp_path):
    pytest.importorskip("matplotlib")
    evil = "<script>alert('$x$')</script>"
    items = [
        {
            "id": i,
            "audio": f"{i}.wav",
            "prompt": evil,
            "output": ["dog", evil][i % 2],
            "answer": evil,
            "category": ["a", evil][i % 2],
        }
        for i in range(12)
    ]
    row = table.row_of(scoring.closed_set(items), items, "closed_set")
    windows = np.random.default_rng(0).uniform(-1, 1, (2, 160000)).astype(np.float32)

    def load(name, item):
        if item["audio"] == "0.wav":
            raise FileNotFoundError("0.wav: no such audio file")
        return windows, np.ones(64) / 64

    report.write_report(
        str(tmp_path / "report.html"),
        {evil: row},
        {evil: items},
        load,
    )
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "http" not in page.replace("http-equiv", "")
    assert page.count("<audio") == report.WORST - 1 and page.count("data:image/png") == report.WORST - 1 + 2
    assert "no such audio file" in page and len(page) < 12e6


def test_compare_in_python(capsys):
    first = [
        {"audio": f"{i}.wav", "prompt": "q", "output": "x", "answer": "", "score": score}
        for i, score in enumerate([0.2, 0.5, 0.1])
    ]
    second = [item | {"score": item["score"] + 0.3} for item in first]
    found = compare.compare(first, second)
    assert found["gained"] == 3 and found["lost"] == 0 and found["difference"] == pytest.approx(0.3)
    assert "paired bootstrap" in capsys.readouterr().out
    with pytest.raises(ValueError, match="share no scored item"):
        compare.compare(first, [item | {"audio": "other"} for item in first])
    parts = [first[0] | {"start": start, "score": start} for start in (0.0, 1.0)]  # of one clip, in any order
    assert compare.compare(parts, parts[::-1])["difference"] == 0
