"""Caption metrics by pycocoevalcap: CIDEr-D, BLEU-4, ROUGE-L; with Java METEOR, and SPICE with SPIDEr.

    pip install -r requirements-eval.txt; apt-get install default-jre-headless

Each is computed in a process of its own: one that is missing, fails or hangs is named, and the others are
computed. The PTB tokenizer of published figures is Java too; without it a plain one stands in, and figures
may differ a little.
"""
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from itertools import chain

import numpy as np
import regex as re

from tools.common import UserError, parse_json_line
from tools.eval.parsing import answer_text, fold, spaced
from tools.eval.stats import clips_of, interval

TOKENIZER = "PTB tokenizer of published figures"
METRICS = {"CIDEr-D": "cider.cider.Cider",
           "BLEU-4": "bleu.bleu.Bleu",
           "ROUGE-L": "rouge.rouge.Rouge",
           "METEOR": "meteor.meteor.Meteor",
           "SPICE": "spice.spice.Spice"}
JAVA = "Java: apt-get install default-jre-headless"
JARS = "Stanford's jars: python -m pycocoevalcap.spice.get_stanford_models"
# In a German locale Java prints 0,5; in the C locale it writes ASCII. _JAVA_OPTIONS come before all others.
JAVA_OPTIONS = "-Duser.language=en -Duser.country=US -Dfile.encoding=UTF-8"


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
    absent = {}  # metric: what is missing, or failed
    if len(answers) == 1:
        absent["CIDEr-D"] = "at least two clips, one alone has no document frequencies"
    if not shutil.which("java"):
        absent |= dict.fromkeys((TOKENIZER, "METEOR", "SPICE"), JAVA)
    folder = os.path.dirname(importlib.util.find_spec("pycocoevalcap.spice").origin)
    if not os.path.exists(os.path.join(folder, "lib/stanford-corenlp-3.6.0.jar")):
        absent["SPICE"] = JARS  # which it would download
    texts = tokenize(references, answers, absent)
    figures, per_clip = {}, {}
    for metric, name in METRICS.items():
        if metric in absent:
            continue
        outcome = run_library(name, "compute_score", *texts)
        if "failed" in outcome:
            absent[metric] = outcome["failed"]
            continue
        value, scores = outcome["result"]
        if metric == "SPICE":
            scores = [score["All"]["f"] for score in scores]
        if metric in ("BLEU-4", "METEOR"):  # the corpus figure is not the mean of the clips: no interval
            figures[metric] = float(np.ravel(value)[-1])  # the last of BLEU-1 to 4
        else:
            per_clip[metric] = np.array(scores, float)
    if {"CIDEr-D", "SPICE"} <= set(per_clip):
        per_clip["SPIDEr"] = (per_clip["CIDEr-D"] + per_clip["SPICE"]) / 2
    means = {metric: interval(scores, range(len(scores)), None) for metric, scores in per_clip.items()}
    missing = [f"{metric}: {reason}" for metric, reason in absent.items()]
    return means | figures, per_clip, missing


def run_library(name, method, *arguments):
    """{"result"} of a method of a class of pycocoevalcap, or {"failed": reason}, from metric_process.py."""
    seconds = 90 + len(arguments[0]) // 2
    options = f"{os.environ.get('_JAVA_OPTIONS', '')} {JAVA_OPTIONS}"
    command = [sys.executable, os.path.join(os.path.dirname(__file__), "metric_process.py")]
    task = json.dumps([seconds, f"pycocoevalcap.{name}", method, arguments])
    process = subprocess.run(command, env=os.environ | {"_JAVA_OPTIONS": options}, input=task.encode(),
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    lines = process.stdout.splitlines() or [""]
    killed = f"killed, or its Java program was not done after {seconds} s"
    return parse_json_line(lines[-1]) or {"failed": killed}


def tokenize(references, answers, absent):
    """[[caption]] of both sides -> {clip: [caption]} of both, tokenized, lower case and without punctuation.
    First every caption is made one line: a break of any kind or "|||" in it would shift all later ones in the
    Java programs. Scripts without spaces are tokenized by character."""
    captions, outcome = {}, {}
    for i, texts in enumerate(zip(references, answers)):
        captions[f"{i:07}"] = [spaced(text.replace("|||", " ")) for text in chain(*texts)]
    if TOKENIZER not in absent:
        wrapped = {clip: [{"caption": text} for text in texts] for clip, texts in captions.items()}
        outcome = run_library("tokenizer.ptbtokenizer.PTBTokenizer", "tokenize", wrapped)
    tokens, last = outcome.get("result", {}), max(captions)
    if len(tokens.get(last, ())) < len(captions[last]):
        absent.setdefault(TOKENIZER, outcome.get("failed", "its Java program lost captions"))
        for clip, texts in captions.items():
            plain = [re.findall(r"\w+", re.sub("['’-]", "", fold(text))) for text in texts]
            tokens[clip] = list(map(" ".join, plain))
    references = {clip: texts[:-1] for clip, texts in tokens.items()}
    return references, {clip: texts[-1:] for clip, texts in tokens.items()}
