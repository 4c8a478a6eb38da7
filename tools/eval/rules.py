"""Rules for closed sets of labels (the nearest label, or the equal one), and for fixed answer words.

A rule takes items and returns figures, see eval.py. labels: those of a label file; None: those of the
references. embed(texts) -> (n, d): "retrieval", as in the paper; None: "exact", the normalised answer.
"""
import functools
import statistics
from itertools import chain

import numpy as np
import regex as re

from tools.common import UserError
from tools.eval.parsing import answer_text, labels_of, normalise, references_of
from tools.eval.stats import clips_of, mean_average_precision

# The fields of NSynth's "produced by X, pitch P, velocity V, source S, and having qualities like …"
NSYNTH = {"source": r"\bsource:? ([^,.\n]+)", "instrument": r"\bproduced by (?:an? |the )?([^,.\n]+)"}


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
    references = [references_of(item) for item in items]
    names = sorted(set(labels or chain.from_iterable(references)))
    with_comma = {normalise(name) for name in labels or () if "," in name}
    known = {labels_of(name, with_comma): name for name in names}  # spellings of one label are one
    answers = [answer_text(item) for item in items]
    if embed is not None:
        cosines = similarities(embed, answers, names)
        answers = [names[row.argmax()] if row.max() > -1 else "" for row in cosines]
    accuracy, n_right = [], []
    for item, answer, texts in zip(items, answers, references):
        right, answer = {labels_of(text, with_comma) for text in texts}, labels_of(answer, with_comma)
        item["predicted"] = known.get(answer)
        accuracy.append(answer in right)
        n_right.append(len(right & set(known)))
    return {"accuracy": accuracy, "chance": statistics.fmean(n_right) / len(known)}


def exact_match(items):
    """The same labels in any order, after folding case and dropping punctuation and articles."""
    return closed_set(items)


def nsynth(items, labels=None, embed=None):
    """NSynth's sentences by source and instrument, two closed sets; other items as one closed set."""
    fields = {}
    for name, pattern in NSYNTH.items():
        rows = []
        for item in items:
            references = re.findall(pattern, "\n".join(references_of(item)), re.I)
            answer = re.findall(pattern, answer_text(item), re.I) or [answer_text(item)]
            rows.append({"output": "", "references": references, "answer": answer[0]})
        if all(row["references"] for row in rows):
            fields[name] = closed_set(rows, None, embed)["accuracy"]
    if not fields:
        return closed_set(items, labels, embed)
    return {"accuracy": np.mean(list(fields.values()), 0).tolist()} | fields


def multi_label(items, labels=None, embed=None):
    """Several labels, all those of all references: mAP over the labels. The scores are the similarities of
    the answer to every label, or 1 for the labels that it lists. An item's own score: the share of its labels
    that rank above all others."""
    texts = [references_of(item) for item in items]
    listed = [text for several in texts if len(several) > 1 for text in several]  # each is one label
    with_comma = {normalise(label) for label in [*(labels or ()), *listed] if "," in label}
    references = [labels_of("\n".join(several), with_comma) for several in texts]
    names = sorted(frozenset(map(normalise, labels or ())) or frozenset().union(*references))
    truth = indicators(references, names) > 0
    answers = [answer_text(item) for item in items]
    if embed is None:
        scores = indicators([labels_of(answer, with_comma) for answer in answers], names)
    else:
        scores = similarities(embed, answers, names)
    for item, answer, row, mask in zip(items, answers, scores, truth):
        ranks = (row >= row[mask][:, None]).sum(1)  # of its labels; equal scores rank last
        item["score"] = float((ranks <= len(ranks)).mean()) if answer and len(ranks) else 0.0
    try:
        return {"mAP": mean_average_precision(truth, scores, clips_of(items))}
    except UserError as error:  # no scikit-learn
        return {"mAP": None, "not computed": str(error)}


def indicators(label_sets, names):
    """(items, names): 1 where the item's set holds the name."""
    return np.array([[name in labels for name in names] for labels in label_sets], float)


CLASS = r"(?:entail|contradict|neutral)"
NOT = (r"(?:\b(?:not|never|cannot)\b|"
       r"\b(?:is|are|was|were|do|does|did|ca|could|wo|would|should|must|need|has|have|had|ai)n['’]?t\b|"
       r"\b(?:nicht|kein\w*|non|pas)\b)")
# What ends the reach of a denial: "not X; but Y", "no rain, so X", "not X (Y)", "not X, Y" (not "not X, Y or
# Z"), and not "does not, however, X"
BOUNDARY = (rf"[.;:!\n—–→]|\s-+>?\s|\((?=\W?(?:an?\s+)?{CLASS})|"
            rf"\band\s+(?=(?:is|it|this|that|the)\b|{CLASS}s\b)|(?<!{NOT}(?:\s|,[^,]{{,60}}))"
            r"(?:\b(?:but|however|instead(?! of)|rather(?! than)|so|therefore|thus|hence|because|since|"
            r"whereas|yet)\b|,\s*(?=(?:it|its|this|that|the|they|there|which|an?)\b|"
            rf"(?:\w+\s+)?{CLASS}(?![^.;:!\n]*\bn?or\b)))")
NEGATOR = (rf"{NOT}(?!\s+only)|\b(?:non|un)-?(?={CLASS})|"
           r"\b(?:no|neither|nor|nothing|none|without|hardly|barely|scarcely|rarely|seldom|doubt|rather than|"
           r"instead of|opposed to|opposite of|anything but|too (?:little|few)|(?:hard|difficult|stretch) to|"
           r"exclud\w*|reject\w*|avoid\w*|fail\w*|lack\w*|insufficient|unable|unlikely|impossible|absence|"
           r"far from|rul\w+ out|"
           r"(?:false|untrue|wrong|incorrect) (?:that|to))\b")
LINK = r"(?:because|since|as|so|but|and|or|if|when|while|though|although|for|rather|yet)\b"
CLAIMS = re.compile(
    rf"(?P<boundary>{BOUNDARY})|(?P<negator>{NEGATOR})|(?P<unclear>\b(?:whether|if|sure|certain)\b)|"
    rf"(?P<named>{CLASS})\w*(?P<denied_after>(?:\s+(?:relation\w*|label))?(?:\s+(?!{LINK})\w+)?\s*(?:{NOT}"
    rf"(?!\s+(?:an?\s+)?{CLASS})|"
    r"\s(?:(?:can|must|should) be|is|was|are|seems?|appears?|looks?)(?:\s+\w+)?\s+(?:ruled out|excluded|"
    r"rejected|unlikely|improbable|impossible|absent|wrong|incorrect|false)\b|"
    r"\s*[:=–-]\s*(?:no|none|not|false)(?=\s*(?:[,.;)|\n]|$))|\s+(?:nothing|would\s+(?:require|need|mean))\b))?")


def entailment_named(text):
    """The class that a text affirms, or the third where it denies two; None where that is not decided: two
    affirmed, one denied, a double denial, a question."""
    text = re.sub(r"[^.!?\n]*\?", " ", text.lower().replace("_", " "))
    names = {"entail": "entailment", "neutral": "neutral", "contradict": "contradiction"}
    affirmed, denied = set(), set()
    negations = new = 0  # that reach the next class named, those since the last one
    for claim in CLAIMS.finditer(text):
        if claim["boundary"]:
            negations = new = 0
        elif claim["named"]:
            negations, new = new or negations, 0
            total = negations + bool(claim["denied_after"])
            if total < 2:
                (denied if total else affirmed).add(names[claim["named"]])
        else:
            new += 2 if claim["unclear"] else 1
    if len(denied) == 2:
        affirmed |= set(names.values()) - denied
    return affirmed.pop() if len(affirmed) == 1 and not affirmed & denied else None


@per_item
def entailment(item):
    """The class that the answer affirms and does not deny; unanswered where its wording does not decide."""
    right = set(map(entailment_named, references_of(item))) - {None}
    item["predicted"] = entailment_named(answer_text(item))
    return {"accuracy": item["predicted"] in right, "unanswered": item["predicted"] is None,
            "chance": max(len(right), 1) / 3}


@per_item
def cmm(item):
    """CMM: yes or no within the first five characters. Yes items measure perception, no items resistance to
    hallucination."""
    words = {normalise(text).partition(" ")[0] for text in references_of(item)}
    right = any(word in answer_text(item).lower()[:5] for word in words)
    return {"accuracy": right, "perception": right if words == {"yes"} else None,
            "hallucination resistance": right if words == {"no"} else None, "chance": len(words) / 2}
