"""Rules for closed sets of labels (the nearest label, or the equal one), and for fixed answer words.

A rule takes items and returns figures, see eval.py. labels: those of a label file; None: those of the
references. embed(texts) -> (n, d): "retrieval", as in the paper; None: "exact", the normalised answer.
"""
import functools
import re
import statistics

import numpy as np

from tools.common import UserError
from tools.eval.parsing import answer_text, labels_of, normalise
from tools.eval.stats import clips_of, mean_average_precision

# The fields of NSynth's "produced by X, pitch P, velocity V, source S, and having qualities like …"
NSYNTH = {"source": r"\bsource:? ([^,.]+)", "instrument": r"\bproduced by (?:an? |the )?([^,.]+)"}


def per_item(rule):
    """A rule for one item, item -> {figure: value}, as a rule for items; chance is averaged."""

    @functools.wraps(rule)
    def of_items(items):
        rows = [rule(item) for item in items]
        figures = {figure: [row[figure] for row in rows] for figure in rows[0]}
        if "chance" in figures:
            figures["chance"] = statistics.fmean(figures["chance"])
        return figures

    return of_items


def similarities(embed, texts, labels):
    """(texts, labels) cosines; -1 to every label for a text without letters and digits."""
    distinct, index = np.unique(texts, return_inverse=True)
    cosines = embed(distinct.tolist()) @ embed(labels).T
    cosines[[not any(map(str.isalnum, text)) for text in distinct]] = -1
    return cosines[index]


def closed_set(items, labels=None, embed=None):
    """One label, or the same several in any order."""
    names = sorted(set(labels or [item["output"] for item in items]))
    with_comma = {normalise(name) for name in names if "," in name}
    known = {labels_of(name, with_comma): name for name in names}  # spellings of one label are one

    def find(text):
        return known.get(labels_of(text, with_comma))

    answers = [answer_text(item) for item in items]
    if embed is not None:
        cosines = similarities(embed, answers, names)
        answers = [names[row.argmax()] if row.max() > -1 else "" for row in cosines]
    right = []
    for item, answer in zip(items, answers):
        item["predicted"] = find(answer)
        reference = find(item["output"])
        right.append(reference is not None and item["predicted"] == reference)
    return {"accuracy": right, "chance": 1 / len(known)}


def nsynth(items, labels=None, embed=None):
    """NSynth's sentences by source and instrument, two closed sets; other items as one closed set."""
    fields = {}
    for name, pattern in NSYNTH.items():
        references = [re.search(pattern, item["output"], re.I) for item in items]
        if not all(references):
            continue
        rows = []
        for reference, item in zip(references, items):
            answer = answer_text(item)
            found = re.search(pattern, answer, re.I)
            rows.append({"output": reference[1], "answer": found[1] if found else answer})
        fields[name] = closed_set(rows, None, embed)["accuracy"]
    if not fields:
        return closed_set(items, labels, embed)
    accuracy = np.mean(list(fields.values()), 0).tolist()
    return {"accuracy": accuracy} | fields


def multi_label(items, labels=None, embed=None):
    """Several labels: mAP over the labels. The scores are the similarities of the answer to every label, or 1
    for the labels that it lists. An item's own score: the share of its labels that rank above all others."""
    with_comma = {normalise(label) for label in labels or () if "," in label}
    references = [labels_of(item["output"], with_comma) for item in items]
    names = sorted(frozenset(map(normalise, labels or ())) or frozenset().union(*references))
    truth = indicators(references, names)
    answers = [answer_text(item) for item in items]
    if embed is None:
        scores = indicators([labels_of(answer, with_comma) for answer in answers], names)
    else:
        scores = similarities(embed, answers, names)
    for item, answer, row, mask in zip(items, answers, scores, truth > 0):
        ranks = (row >= row[mask][:, None]).sum(1)  # of its labels; equal scores rank last
        item["score"] = float((ranks <= len(ranks)).mean()) if answer and len(ranks) else 0.0
    try:
        return {"mAP": mean_average_precision(truth > 0, scores, clips_of(items))}
    except UserError as error:  # no scikit-learn
        return {"mAP": None, "not computed": str(error)}


def indicators(label_sets, names):
    """(items, names): 1 where the item's set holds the name."""
    return np.array([[name in labels for name in names] for labels in label_sets], float)


@per_item
def entailment(item):
    """The first of entailment, neutral, contradiction that the answer names and does not deny."""

    def named(text):
        not_denied = r"(?<!not )(?<!not an )(?<!not a )(?<!no )"
        found = re.search(not_denied + "(?:entail|neutral|contradict)", text.lower())
        names = ("entailment", "neutral", "contradiction")
        return next(name for name in names if name.startswith(found[0])) if found else None

    item["predicted"] = named(answer_text(item))
    right = named(item["output"])
    return {"accuracy": right is not None and item["predicted"] == right, "chance": 1 / 3}


@per_item
def cmm(item):
    """CMM: yes or no within the first five characters. Yes items measure perception, no items resistance to
    hallucination."""
    word = normalise(item["output"])
    right = word in answer_text(item).lower()[:5]
    return {"accuracy": right, "perception": right if word == "yes" else None,
            "hallucination resistance": right if word == "no" else None, "chance": 0.5}
