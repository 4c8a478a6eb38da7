"""Rules for closed sets of labels: the label whose text is nearest to the answer's, or the one that it is.

Rules as in eval.py: items -> figures. labels: those of a label file; None: those of the references.
embed(texts) -> (n, d): "retrieval", the way of the paper; None: "exact", the normalised answer.
"""
import re

import numpy as np

from tools.eval.stats import mean_average_precision
from tools.eval.parsing import labels_of, normalise, said
from tools.eval.results import clips_of

# The fields of NSynth's "produced by X, pitch P, velocity V, source S, and having qualities like …"
NSYNTH = {"source": r"\bsource:? ([^,.]+)", "instrument": r"\bproduced by (?:an? |the )?([^,.]+)"}


def similarities(embed, texts, labels):
    """(texts, labels) cosines; a text without a word is like no label: -1."""
    known = sorted({text for text in texts if normalise(text) != text.strip() or any(map(str.isalnum, text))})
    row = {text: i for i, text in enumerate(known)}
    near = embed(known) @ embed(labels).T if known else np.zeros((0, len(labels)))
    near = np.concatenate([near, np.full((1, len(labels)), -1.0)])
    return near[[row.get(text, len(known)) for text in texts]]


def closed_set(items, labels=None, embed=None):
    """One label, or the same several in any order."""
    names = sorted(set(labels or [item["output"] for item in items]))
    known = {normalise(name) for name in names if "," in name}
    label = {frozenset(labels_of(name, known)): name for name in names}  # spellings of one label are one
    near = None if embed is None else similarities(embed, [said(item) for item in items], names)
    for i, item in enumerate(items):
        item["predicted"] = label.get(frozenset(labels_of(said(item), known)))
        if near is not None:
            best = names[near[i].argmax()]
            item["predicted"] = label[frozenset(labels_of(best, known))] if near[i].max() > -1 else None
        right = label.get(frozenset(labels_of(item["output"], known)))
        item["score"] = float(right is not None and item["predicted"] == right)
    return {"accuracy": [item["score"] for item in items], "chance": 1 / len(label), "labels": len(label),
            "matching": "exact" if embed is None else "retrieval"}


def nsynth(items, labels=None, embed=None):
    """NSynth's sentences by source and instrument, two closed sets; other items as one closed set."""
    fields = {}
    for name, pattern in NSYNTH.items():
        told = [re.search(pattern, item["output"], re.I) for item in items]
        if all(told):
            answers = [re.search(pattern, said(item), re.I) for item in items]
            fields[name] = [{"output": right[1], "answer": answer[1] if answer else said(item)}
                            for right, answer, item in zip(told, answers, items)]
    if not fields:
        return closed_set(items, labels, embed)
    scored = {name: closed_set(rows, None, embed) for name, rows in fields.items()}
    for item, *values in zip(items, *(found["accuracy"] for found in scored.values())):
        item["score"] = sum(values) / len(values)
    return {"accuracy": [item["score"] for item in items]} | {
        name: found["accuracy"] for name, found in scored.items()} | {
        "matching": "exact" if embed is None else "retrieval"}


def multi_label(items, labels=None, embed=None):
    """Several labels: mAP over the labels. The scores are the similarities of the answer to every label, or 1
    for the labels that it lists. An item's own score: the share of its labels that rank above all others."""
    known = {normalise(label) for label in labels or () if "," in label}
    names = {normalise(label) for label in labels or ()}
    names = sorted(names or set().union(*(labels_of(item["output"]) for item in items)))
    truth = indicator([labels_of(item["output"], known) for item in items], names)
    if embed is None:
        scores = indicator([labels_of(said(item), known) for item in items], names)
    else:
        scores = similarities(embed, [said(item) for item in items], names)
    for item, row, right in zip(items, scores, truth > 0):
        ranks = (row >= row[right][:, None]).sum(1)  # of its labels; equal scores rank last
        item["score"] = float((ranks <= len(ranks)).mean()) if said(item) and len(ranks) else 0.0
    return {"mAP": mean_average_precision(truth > 0, scores, clips_of(items)), "labels": len(names),
            "matching": "exact" if embed is None else "retrieval"}


def indicator(sets, names):
    """(items, names): 1 where the item's set holds the name."""
    return np.array([[name in found for name in names] for found in sets], float)


def entailment(items):
    """The first of entailment, neutral, contradiction that the answer names and does not deny."""
    name = re.compile(r"(?<!not )(?<!not an )(?<!not a )(?<!no )(?:entail|neutral|contradict)")
    whole = {"entail": "entailment", "contradict": "contradiction"}
    for item in items:
        told, right = (name.search(text.lower()) for text in (said(item), item["output"]))
        item["predicted"] = whole.get(told[0], told[0]) if told else None
        item["score"] = float(bool(told and right) and told[0] == right[0])
    return {"accuracy": [item["score"] for item in items], "chance": 1 / 3}


def cmm(items):
    """CMM: yes or no within the first five characters. Yes items tell perception, no items hallucination."""
    words = [normalise(item["output"]) for item in items]
    for word, item in zip(words, items):
        item["score"] = float(word in said(item).lower()[:5])
    right = [item["score"] for item in items]
    return {"accuracy": right, "perception": [s if word == "yes" else None for s, word in zip(right, words)],
            "hallucination resistance": [s if word == "no" else None for s, word in zip(right, words)],
            "chance": 0.5}
