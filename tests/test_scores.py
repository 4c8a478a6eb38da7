"""Scoring: every rule on cases worked out by hand, captions by the library, intervals, files, the report."""
import json
import random
import shutil

import numpy as np
import pytest

import config
import eval as scoring
from tests.helpers import fails_with_one_line
from tools.common import UserError
from tools.eval import captions, records, report, rules, stats
from tools.eval.parsing import normalise, options_of

MC = "Which? (A) dog. (B) big dog. (C) cat."
VOICE = "Who speaks? (A) A male voice. (B) A female voice. (C) A child. Answer with the letter."
WOMAN = "Who? (A) woman and child (B) two men (C) two women (D) a man and a child"
METER = "Which?\n(A) 4/4 (common time)\n(B) 3.5 kHz\n(C) 3/4"
KEYS = "Key? (A) C# minor (B) C minor (C) A minor"
COT = ("<SUMMARY> s </SUMMARY> <CAPTION> c </CAPTION> <REASONING> not a cat </REASONING> "
       "<CONCLUSION> {} </CONCLUSION>")
MMAU, MUCHO, CLOTHO, OPEN = "MMAU", "MuChoMusic", "Clotho-AQA-AQA", "Music-AVQA-AQA_All"
CLOSED, ENTAIL, CMM = "GTZAN-GenreClassification", "AudioEntailmentQA", "CMM-AQA"
TASKS = [MMAU, MUCHO, CLOTHO, OPEN, CLOSED, "NSynth-MIR", "FSD50k-EventClassification", ENTAIL, CMM]

# task: (prompt, reference, answer, verdict; None: does not count)
CASES = {
    MMAU: [
        (MC, "(C) cat", "(C) cat", 1),  # mark and text, as the manifest has it
        (MC, "(C) cat", "cat", 1),  # the letter of the reference is a mark, not a word to be said
        (MC, "cat", "(c) cat", 1),  # a reference without its letter; lower case
        (MC, "C", "cat", 1),  # a reference that is the mark alone
        (MC, "(C) cat.", "it is a cat.", 1),  # a sentence that says all tokens
        (MC, "(C) cat", "c", 0),  # the official rule wants the text
        (MC, "(C) cat", "", 0),  # empty
        (MC, "(C) cat", "...", 0),  # no token
        (MC, "(C) cat", "cat, not a dog", 0),  # a token that only another option has
        (MC, "(C) cat", "cats", 0),  # another token
        (MC, "(A) dog", "dog", 1),  # big is another option's word, and is not said
        (MC, "(A) dog", "big dog", 0),  # big is said
        (MC, "(B) big dog", "dog", 0),  # big is missing
        (MC, "(B) big dog", "a dog that is big", 1),  # order does not matter to tokens
        (WOMAN, "(A) woman and child", "woman and child", 1),  # text alone
        (WOMAN, "(A) woman and child", "(a) woman and child", 0),  # the mark is the word that only (D) has
        (VOICE, "(B) A female voice", "a female voice", 1),  # the instruction after (C) is no option
        (VOICE, "(C) A child", "a child", 1),  # the last option ends before the instruction
        (VOICE, "A child", "a child with the letter", 1),  # words of the instruction are no option's
        (METER, "4/4 (common time)", "4/4 (common time)", 1),  # brackets in an option are its text
        (METER, "(B) 3.5 kHz", "3.5 khz", 1),  # a full stop in an option
        (METER, "(C) 3/4", "3/4", 1),  # the tokens 3 and 4 are the right option's too
        (METER, "(C) 3/4", "4/4", 0),  # 3 is missing
        ("Which?\nA. dog\nB. cat\nAnswer in a word.", "B", "cat", 1),  # A. on lines
        ("Which? a) dog b) cat", "b) cat", "cat", 1),  # a) in one line
        ("Which? A) dog B) cat", "dog", "dog", 1),  # A) in one line
        (MC, "(C) cat", COT.format("cat"), 1),  # the conclusion counts; 'not a cat' is the reasoning
        (MC, "(C) cat", COT.format("(C) cat").lower(), 1),  # tags in lower case
        (MC, "(C) cat", "<summary> cat </summary> <reasoning> a cat", 0),  # reasoning without a conclusion
        (MC, "(C) cat", "<conclusion> cat", 1),  # a conclusion that is not closed
        ("Which? (A) rain (B) rain (C) sun", "rain", "rain", 1),  # a choice that is repeated
    ],
    "GM-FamilyMC-AQA": [
        (MC, "(C) cat", "cat", 1),  # any prompt with options goes by this rule
    ],
    "US8K-EventClassification": [
        (MC, "(C) cat", "(c) cat", 1),  # closed sets with options too
    ],
    MUCHO: [
        (MC, "(C) cat", "C", 1),  # the letter
        (MC, "(C) cat", "(c)", 1),  # the letter as this system writes it
        (MC, "(C) cat", "c.", 1),  # lower case with a full stop
        (MC, "(C) cat", "The correct answer is: C", 1),  # in a sentence
        (MC, "(C) cat", "A or C: a cat", 1),  # two letters: the text decides
        (MC, "(C) cat", "a cat", 1),  # an article is not a letter
        (MC, "(A) dog", "I hear a dog", 1),  # I is the speaker
        (MC, "(A) dog", "who knows", 0),  # unanswered
        (MC, "(A) dog", "", 0),  # empty
        (MC, "(B) big dog", "B", 1),  # letter
        (MC, "(B) big dog", "it is a big dog", 0),  # the first option that is contained is dog
        (MC, "(B) big dog", "big dog", 1),  # the whole answer is an option's text
        (VOICE, "(B) A female voice", "A female voice", 1),  # the A of a label is not the letter
        (VOICE, "(A) A male voice", "A female voice", 0),  # nor does it make (A) right
        (VOICE, "(C) A child", "D", 0),  # there is no option D
        (MC, "(C) cat", "D", 0),  # a letter without an option, no text
        (KEYS, "(C) A minor", "a minor", 1),  # a key, not an article
    ],
    CLOTHO: [
        ("Is it?", "yes, yes, yes", "Yes.", 1),  # unanimous
        ("Is it?", "no, no, no", "yes", 0),  # unanimous
        ("Is it?", "yes, no, yes", "yes", None),  # not unanimous: in neither group
        ("What?", "yes, dog, dog", "dog", None),  # someone said yes: in neither group
        ("What?", "dog, a cat, bird", "cat", 1),  # any of the three; articles do not count
        ("What?", "rain,wind,sea", "Wind!", 1),  # without spaces
        ("What?", "rain, wind, sea", "rain, wind", 0),  # one answer is asked for
        ("What?", "rain, wind, sea", "", 0),  # empty
        ("What?", "a, the, an", "", 0),  # articles alone are not nothing
    ],
    OPEN: [
        ("What?", "The Dog", "dog!", 1),  # case, punctuation, article
        ("What?", "two", "too", 0),  # another word
        ("Letter?", "A", "", 0),  # an empty answer is not the label A
        ("Letter?", "A", "a", 1),  # the label A
        ("Letter?", "A", "the", 0),  # two articles are two labels
        ("What?", "?", "", 0),  # nor the label ?
        ("What?", "?", "?", 1),  # a label without letters
        ("Key?", "c# minor", "c minor", 0),  # sharp
        ("Key?", "C♯ minor", "c# minor", 1),  # one sign, two spellings
        ("Key?", "A minor", "minor", 0),  # the A of a key is its name
        ("Level?", "-3 dB", "3 dB", 0),  # minus
        ("Level?", "−3 dB", "-3 db.", 1),  # the minus sign of typesetters
        ("Level?", "3 dB", "3dB", 1),  # a number and its unit
        ("Language?", "c++", "c", 0),  # plus
        ("Share?", "50%", "50", 0),  # per cent
        ("Tempo?", "3.5", "35", 0),  # decimal point
        ("Rate?", "1,000 Hz", "1000 hz", 1),  # thousands
        ("Tempo?", "> 120", "< 120", 0),  # greater and less
        ("What?", "hip-hop", "Hip hop", 1),  # a hyphen inside a word
        ("What?", "acoustic_guitar", "acoustic guitar", 1),  # an underscore joins words
        ("What?", "bark, dog", "dog, bark", 1),  # several labels in any order
        ("What?", "bark; dog", "Dog, bark.", 1),  # and with another separator
        ("What?", "bark, dog", "dog", 0),  # one of two
        ("What?", "acoustic guitar", "guitar acoustic", 0),  # the words of one label keep their order
        ("What?", "cat", COT.format("A cat."), 1),  # conclusion
        ("What?", "cat", "<caption> cat", 0),  # no conclusion
    ],
    CLOSED: [
        ("Genre?", "rock", "Rock.", 1),  # normalised
        ("Genre?", "rock", "rock music", 0),  # exact without a text encoder
        ("Genre?", "rock", "", 0),  # empty
    ],
    "NSynth-MIR": [
        ("What?", "acoustic", "acoustic", 1),  # one field
    ],
    ENTAIL: [
        ("So?", "neutral", "it is neutral", 1),  # named in a sentence
        ("So?", "entailment", "contradiction", 0),  # the other
        ("So?", "contradiction", "not entailment but contradiction", 1),  # what is denied is not named
        ("So?", "entailment", "The audio entails the text.", 1),  # the verb
        ("So?", "neutral", "", 0),  # empty
    ],
    CMM: [
        ("Is there?", "yes", "Yes, there is", 1),  # yes in front
        ("Is there?", "no", "there is no", 0),  # no after the fifth character
        ("Is there?", "no", "No.", 1),  # no in front
        ("Is there?", "yes", "", 0),  # empty
        ("Is there?", "yes", " \n yes", 1),  # white space does not count
    ],
}


def score(task, items):
    """-> the results row; sets "score" on the items."""
    c = config.load([], "eval.py")
    return scoring.score_split(task, items, c)


@pytest.mark.parametrize("task, case", [(task, case) for task, cases in CASES.items() for case in cases])
def test_case(task, case):
    prompt, reference, answer, verdict = case
    items = [{"prompt": prompt, "output": reference, "answer": answer}]
    score(task, items)
    assert items[0]["score"] == verdict


@pytest.mark.parametrize("task", TASKS)
def test_empty_and_unreadable_are_never_right(task):
    if task.startswith("FSD50k"):
        pytest.importorskip("sklearn")
    right = {CLOTHO: "yes, yes, yes", ENTAIL: "neutral", CMM: "no"}.get(task, "A")
    silent = [{"answer": ""}, {"answer": " \n"}, {"answer": right, "error": "gone"}, {"answer": "<summary> A"}]
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


@pytest.mark.parametrize("answer, official, mark_stripped, as_read", [
    ("(a) woman and child", 0, 1, 1), ("woman and child", 1, 1, 1), ("a", 0, 0, 1), ("(A)", 0, 0, 1),
    ("A.", 0, 0, 1), ("A. woman and child", 0, 1, 1), ("the answer is (a)", 0, 0, 1), ("two men", 0, 0, 0),
    ("(b) woman and child", 1, 1, 0), ("a woman and child", 0, 0, 1), ("", 0, 0, 0)])
def test_figures_of_multiple_choice(answer, official, mark_stripped, as_read):
    row = score(MMAU, [{"prompt": WOMAN, "output": "(A) woman and child", "answer": answer}])
    assert (row["accuracy"], row["mark stripped"], row["as read"]) == (official, mark_stripped, as_read)


@pytest.mark.parametrize("prompt, options", [
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
    ("Choose (A), (B) or (C). (A) dog (B) cat (C) cow. Reply with (A), (B) or (C).", ["dog", "cat", "cow"]),
    ("Whose? A. J. S. Bach B. Mozart C. Dr. Dre. Please choose one.", ["J. S. Bach", "Mozart", "Dr. Dre"]),
    ("(A) It rains. It blows. (B) A dog barks. It runs. Respond with the letter.",
     ["It rains. It blows", "A dog barks. It runs"]),
    ("(A) he will answer the phone (B) she plays. answer with the letter",
     ["he will answer the phone", "she plays"]),
    ("Which of these? (A) Yes (B) No. What do you hear?", ["Yes", "No"]),
    ("(A) ?\n(B) !", ["?", "!"]),
    (KEYS, ["C# minor", "C minor", "A minor"]),
    ("(A) dog | (B) cat | (C) cow", ["dog", "cat", "cow"]),
    ("Is it the piano (A) or the violin (B)?", []),
    ("What is that?", []),
    ("Only (A) one.", [])])
def test_options(prompt, options):
    assert list(options_of(prompt)) == options


def test_normalisation_never_empties():
    for text in ["A", "the", "a an the", "?", "...", "#", "-", "♪", "日本", "ö", "_", ",", "(a)"]:
        assert normalise(text), text
    assert normalise(" ") == ""


@pytest.mark.parametrize("task, prompt, rule", [
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
    ("audiocaps-AudioCaptioning", "Say.", "captioning")])
def test_rule_by_task_name(task, prompt, rule):
    assert scoring.choose_rule(task, [{"prompt": prompt}]).__name__ == rule
    assert scoring.choose_rule("Other-AQA", [{"prompt": "What?"}], rule).__name__ == rule


def rows(*texts):
    return [{"prompt": "q", "output": output, "answer": answer} for output, answer in texts]


def test_figures_of_clotho_cmm_and_muchomusic():
    row = score(CLOTHO, rows(("yes, yes, yes", "Yes."), ("yes, no, yes", "no"), ("dog, a cat, bird", "cat"),
                             ("a, b, c", "d"), ("no, no, no", "yes")))
    assert (row["accuracy"], row["unanimous"], row["non-binary"]) == (0.5, 0.5, 0.5)
    row = score(CMM, rows(("yes", "Yes, it is"), ("no", "there is no"), ("no", "No.")))
    assert (row["perception"], row["hallucination resistance"]) == (1.0, 0.5)
    answers = ("C", "who knows", "", "a cat")
    row = score(MUCHO, [{"prompt": MC, "output": "(C) cat", "answer": answer} for answer in answers])
    assert row["unanswered"] == 0.5


def test_a_figure_without_items_is_named(capsys):
    row = score(CLOTHO, rows(("yes, no, yes", "no")))
    assert row["accuracy"] is None and set(row["missing"]) == {"accuracy", "unanimous", "non-binary"}
    assert "unanimous" in capsys.readouterr().out and json.dumps(row, allow_nan=False)


def test_closed_sets_labels_and_retrieval():
    labels = ["Male speech, man speaking", "Dog", "Rain"]
    items = rows(("Male speech, man speaking", "male speech, man speaking"), ("Dog", "rain"), ("Rain", "a dog"))
    figures = rules.closed_set(items, labels)
    assert figures == {"accuracy": [1, 0, 0], "chance": 1 / 3, "labels": 3, "matching": "exact"}
    assert items[2]["predicted"] == "Dog"
    space = {"Dog": [1, 0, 0], "Rain": [0, 1, 0], "Male speech, man speaking": [0, 0, 1],
             "a hound barks": [0.8, 0.6, 0]}
    embed = lambda texts: np.array([space.get(text, [1, 1, 1]) for text in texts], float)
    items = rows(("Dog", "a hound barks"), ("Rain", "a hound barks"), ("Dog", ""), ("Dog", " "))
    figures = rules.closed_set(items, labels, embed)
    assert figures["accuracy"] == [1, 0, 0, 0] and figures["matching"] == "retrieval"
    figures = rules.nsynth(rows(("produced by guitar, pitch 60, velocity 50, source acoustic, and bright",
                                 "produced by a guitar, source electronic.")))
    assert (figures["source"], figures["instrument"], figures["accuracy"]) == ([0], [1], [0.5])


def test_multi_label_is_scikit_learns_map():
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
    rng = np.random.default_rng(0)  # the interval is that of draws by sample weights, with equal scores
    truth = rng.random((60, 3)) < 0.3
    scores = np.round(rng.random((60, 3)) + 0.5 * truth, 1)
    drawn = [average_precision(truth, scores, sample_weight=weights)
             for weights in stats.dirichlet_weights(np.ones(60), 200)]
    _, interval = stats.mean_average_precision(truth, scores, range(60))
    assert interval == pytest.approx(np.percentile(drawn, (2.5, 97.5)), rel=1e-4)


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
    items = caption_items(answers={clip: text.replace(" ", " ||| \u2028\r", 1) for clip, text in ANSWERS.items()})
    row = score("x-AudioCaptioning", items)
    assert row["captions"] == 6 and "SPIC" in row["not computed"]
    for name in ("CIDEr-D", "ROUGE-L", "BLEU-4") + (("METEOR",) if shutil.which("java") else ()):
        assert row[name] == pytest.approx(STORED[name], rel=1e-9)
    low, high = row["intervals"]["CIDEr-D"]
    assert low < row["CIDEr-D"] < high
    assert [items[i]["score"] for i in (0, 2, 4, 7, 8, 10)] == pytest.approx(EACH, abs=1e-7)


def test_a_caption_metric_without_its_helper_is_named(monkeypatch):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setenv("PATH", "")  # no Java
    texts = [[text] for text in ANSWERS.values()], list(REFERENCES.values())
    figures, _, missing = captions.caption_scores(*texts)
    assert set(figures) == {"CIDEr-D", "BLEU-4", "ROUGE-L"}
    assert any("METEOR" in text and "Java" in text for text in missing)
    figures, _, missing = captions.caption_scores([["a dog"]], [["a dog"]])
    assert "CIDEr-D" not in figures and any("CIDEr-D" in text for text in missing)
    with pytest.raises(UserError, match="1.wav"):
        scoring.captioning(caption_items({"0.wav": ["a dog"], "1.wav": ["x", " "]}))
    monkeypatch.setitem(captions.SCORERS, "ROUGE-L", "rouge.rouge.Gone")
    figures, _, missing = captions.caption_scores(*texts)
    assert set(figures) == {"CIDEr-D", "BLEU-4"} and any("ROUGE-L" in text for text in missing)


# ------------------------------------------------------------------------------------------------------------
# Intervals


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
    value, (low, high) = stats.interval([1.0] * 20, range(20))
    assert (value, high) == (1, 1) and 0.8 < low < 0.95
    assert stats.interval([], []) is None and stats.interval([None], ["a"]) is None
    _, (low, high) = stats.interval([0.0], ["a"])
    assert low == 0 and high > 0.5
    ten_clips = np.repeat(np.arange(10), 10).tolist()  # each all right or all wrong
    wide = np.diff(stats.interval([float(clip < 5) for clip in ten_clips], ten_clips)[1])
    assert wide > 2 * np.diff(stats.interval([1.0, 0.0] * 50, range(100))[1])
    values = np.random.default_rng(0).random(10000).tolist()
    assert stats.interval(values, range(10000), None) == stats.interval(values, range(10000), None)


def test_mcnemar():
    pytest.importorskip("scipy")
    assert stats.mcnemar(0, 0) == 1 and stats.mcnemar(5, 5) == 1
    assert stats.mcnemar(6, 0) == pytest.approx(2 / 64) and stats.mcnemar(9, 1) == pytest.approx(22 / 1024)
    assert stats.mcnemar(6000, 4000) < 1e-80


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
    printed = {name: command(scoring.score_file, tmp_path / f"{name}.jsonl", "--task=Toy-AQA",
                             f"--results={tmp_path}/{name}", f"--scores={tmp_path}/scores.json") for name in "ab"}
    assert "Toy-AQA: accuracy" in printed["a"] and "category: a" in printed["a"]
    row = json.load(open(tmp_path / "scores.json"))["tasks"]["Toy-AQA"]
    assert row["n"] == 60 and row["chance"] == 0.5 and {"accuracy", "intervals", "groups"} <= set(row)
    first = results["a"].read_bytes()
    again = command(scoring.score_file, "--task", "Toy-AQA", results["a"], f"--results={tmp_path}/a")
    assert again == printed["a"] and results["a"].read_bytes() == first
    gained = sum(a != b for a, b in zip(open(tmp_path / "a.jsonl"), open(tmp_path / "b.jsonl")))
    unscored = command(scoring.compare_files, tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--task=Toy-AQA")
    for compared in (command(scoring.compare_files, *results.values()), unscored):
        assert f"gained {gained}, lost 0" in compared and "McNemar" in compared
        assert compared.count("\ngained | ") == gained


@pytest.mark.parametrize("line, key", [
    ('{"prompt": "q", "output": "x"}', "answer"), ('{"prompt": "q", "answer": "x"}', "output"),
    ('{"output": "q", "answer": "x"}', "prompt"), ("{", "JSON"), ("[1]", "list"),
    ('{"prompt": "q", "output": 3, "answer": "x"}', "output"),
    ('{"prompt": "q", "output": "x", "answer": "x", "choices": ["a", 1]}', "choices"),
    ('{"prompt": "q", "output": "x", "answer": "x", "references": "x"}', "references")])
def test_a_wrong_line_of_answers_is_named(tmp_path, line, key):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "q", "output": "x", "answer": "x"}\n' + line + "\n")
    with pytest.raises(UserError, match=f"bad.jsonl line 2.*{key}"):
        records.read_answers(str(tmp_path / "bad.jsonl"))


def test_answers_by_other_names(tmp_path):
    """A header is no item; references stand for the output; a null answer is an empty one."""
    lines = [{"identity": {}, "seed": 1}, {"prompt": "q", "references": ["x", "y"], "answer": None},
             {"prompt": "q", "reference": ["x"], "answer": "a", "path": "a.wav", "mine": 1}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    first, second = records.read_answers(str(tmp_path / "a.jsonl"))
    assert (first["output"], first["references"], first["answer"]) == ("x", ["x", "y"], "")
    assert (second["output"], second["audio"], second["mine"], second["id"]) == ("x", "a.wav", 1, 1)


@pytest.mark.slow
def test_wrong_commands_are_one_line(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "q", "output": 3, "answer": "x"}\n')
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
    unanswered = [{key: value for key, value in question.items() if key != "answer"} for question in QUESTIONS]
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
    fast.save_pretrained(tmp_path / "tokenizer")
    torch.manual_seed(0)
    encoder = T5EncoderModel(T5Config(vocab_size=7, d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8,
                                      feed_forward_proj="gated-gelu")).eval()
    project = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32))
    state = {f"module.text_branch.{n}": t for n, t in encoder.state_dict().items()}
    state |= {f"module.text_projection.{n}": t for n, t in project.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "clap.pt")
    torch.save({"state_dict": {"module.text_branch.embeddings.x": torch.ones(2)}}, tmp_path / "laion.pt")
    c = config.load([f"--text_tokenizer={tmp_path}/tokenizer", "--device=cpu"], "eval.py")
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


def test_report_page(tmp_path):
    """One file without links: confusion matrix, the worst items with sound; markup in texts is escaped."""
    pytest.importorskip("matplotlib")
    items = [{"id": i, "audio": f"{i}.wav", "prompt": f"<b>What {i}?", "output": ["dog", "cat"][i % 2],
              "answer": "dog", "genre": ["a", "b"][i % 2]} for i in range(12)]
    row = score("Toy-AQA", items)
    path = str(tmp_path / "report.html")
    load = lambda name, item: (np.zeros((1, 16000), np.int16), np.ones(8) / 8 if item["id"] else None)
    report.write_report(path, {"Toy-AQA": row}, {"Toy-AQA": items}, load)
    page = open(path).read()
    assert page.count("<audio") == 4 and page.count("data:image/png") == 5 and page.count("data:audio/wav") == 4
    assert "<b>" not in page and "&lt;b&gt;What 1?" in page and "genre: a" in page and "http" not in page
