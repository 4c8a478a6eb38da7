"""Caption metrics by pycocoevalcap: CIDEr-D, BLEU-4, ROUGE-L; with Java METEOR, and SPICE with SPIDEr.

    pip install -r requirements-eval.txt; apt-get install default-jre-headless

A metric whose helper is missing or fails is named, and the others are computed. The PTB tokenizer of
published figures is Java too; without it a plain one stands in, and figures may differ a little.
"""
import contextlib
import importlib.util
import io
import os
import shutil

import numpy as np

from tools.common import UserError, shorten
from tools.eval.parsing import answer_text
from tools.eval.stats import clips_of, interval

TOKENIZER = "PTB tokenizer of published figures"
JAVA = "Java: apt-get install default-jre-headless"
JARS = "Stanford's jars: python -m pycocoevalcap.spice.get_stanford_models"
PUNCTUATION = str.maketrans("", "", ".?!,:;`'\"()[]{}-")


def captioning(items):
    """Items of one clip and prompt are one with several references: the corpus metrics of caption_scores."""
    groups = {}
    for clip, item in zip(clips_of(items), items):
        groups.setdefault((clip, item["prompt"]), []).append(item)
    answers, references = [], []
    for group in groups.values():
        answers.append([answer_text(group[0])])
        texts = [text for item in group for text in item.get("references") or [item["output"]]]
        if not all(any(map(str.isalnum, text)) for text in texts):
            raise UserError(f"{group[0].get('audio')}: a reference caption has no word: {texts}")
        references.append(texts)
    figures, per_clip, missing = caption_scores(answers, references)
    for group, score in zip(groups.values(), next(iter(per_clip.values()), [])):
        group[0]["score"] = float(score)  # CIDEr-D, or the first metric that has a score per clip
    return figures | {"captions": len(groups), "not computed": "; ".join(missing)}


def caption_scores(answers, references):
    """answers [[caption]], references [[caption, ...]] of each clip -> {metric: value or (value, interval)},
    {metric: [score per clip]}, ["metric: what is missing or failed"].

    An answer without a word scores 0."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        return {}, {}, ["caption metrics: pip install -r requirements-eval.txt"]
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.spice import spice
    scorers = {"CIDEr-D": Cider, "BLEU-4": Bleu, "ROUGE-L": Rouge, "METEOR": Meteor, "SPICE": spice.Spice}
    absent = {}  # metric: what is missing, or failed
    if len(answers) == 1:
        absent["CIDEr-D"] = "at least two clips, one alone has no document frequencies"
    if not os.path.exists(os.path.join(os.path.dirname(spice.__file__), "lib/stanford-corenlp-3.6.0.jar")):
        absent["SPICE"] = JARS  # which it would download
    if not shutil.which("java"):
        absent |= dict.fromkeys((TOKENIZER, "METEOR", "SPICE"), JAVA)
    texts = [tokenize(side, absent) for side in (references, answers)]
    figures, per_clip = {}, {}
    for metric, scorer in scorers.items():
        if metric in absent:
            continue
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints
                value, scores = scorer().compute_score(*texts)
        except Exception as error:  # of the library, or of the Java program that it starts
            absent[metric] = shorten(error)
            continue
        if metric in ("BLEU-4", "METEOR"):  # the corpus figure is not the mean of the clips: no interval
            figures[metric] = float(np.ravel(value)[-1])  # the last of BLEU-1 to 4
        else:
            per_clip[metric] = np.array([s["All"]["f"] if metric == "SPICE" else s for s in scores], float)
    if {"CIDEr-D", "SPICE"} <= set(per_clip):
        per_clip["SPIDEr"] = (per_clip["CIDEr-D"] + per_clip["SPICE"]) / 2
    means = {metric: interval(scores, range(len(scores)), None) for metric, scores in per_clip.items()}
    return means | figures, per_clip, [f"{metric}: {reason}" for metric, reason in absent.items()]


def tokenize(captions, absent):
    """[[caption]] -> {index: [caption]}, tokenized, lower case and without punctuation. First every caption
    is made one line: a break of any kind or "|||" in it would shift all later ones in the Java programs."""
    lines = {i: [" ".join(text.replace("|||", " ").split()) for text in texts]
             for i, texts in enumerate(captions)}
    if TOKENIZER not in absent:
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
        wrapped = {i: [{"caption": text} for text in texts] for i, texts in lines.items()}
        try:
            return PTBTokenizer().tokenize(wrapped)
        except OSError as error:  # it writes a temporary file into its own folder
            absent[TOKENIZER] = shorten(error)
    return {i: [" ".join(text.lower().translate(PUNCTUATION).split()) for text in texts]
            for i, texts in lines.items()}
