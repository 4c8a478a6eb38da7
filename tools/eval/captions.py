"""Caption metrics by pycocoevalcap: CIDEr-D, BLEU-4, ROUGE-L; with Java METEOR, and SPICE with SPIDEr.

    pip install -r requirements-eval.txt; apt-get install default-jre-headless

Its tokenizer is Java too; without Java a plain one stands in, and figures may differ a little from published
ones.
"""
import os
import shutil
import subprocess

import numpy as np

from tools.common import UserError
from tools.eval.stats import interval, spread, weights
from tools.eval.parsing import said
from tools.eval.results import clips_of

PACKAGE = "pip install -r requirements-eval.txt"
JAVA = "apt-get install default-jre-headless"
SPICE = "python -m pycocoevalcap.spice.get_stanford_models"


def captioning(items):
    """Items of one clip and prompt are one with several references: the corpus metrics of caption_scores."""
    groups = {}
    for clip, item in zip(clips_of(items), items):
        groups.setdefault((clip, item["prompt"]), []).append(item)
    answers = {key: said(group[0]) for key, group in groups.items()}
    references = {key: [text for item in group for text in item.get("references") or [item["output"]]]
                  for key, group in groups.items()}
    found, missing = caption_scores(answers, references)
    for number, group in enumerate(groups.values()):
        for item in group:  # the first metric that has a score per item, CIDEr-D where it can be
            item["score"] = next((each[number] for _, _, each in found.values() if each), None)
    return {name: (value, spread) for name, (value, spread, _) in found.items()} | {
        "captions": len(groups), "not computed": "; ".join(missing)}


def fold(text):
    """One line: a break of any kind or "|||" inside a caption would shift all later ones in the Java
    programs."""
    return " ".join(text.replace("|||", " ").split())


def tokenise(texts, java):
    """{key: [caption]} -> the same, tokenised, lower case and without punctuation."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    texts = {key: [fold(text) for text in group] for key, group in texts.items()}
    if not java:
        dropped = str.maketrans("", "", ".?!,:;`'\"()[]{}-")
        return {key: [" ".join(text.lower().translate(dropped).split()) for text in group]
                for key, group in texts.items()}
    try:
        return PTBTokenizer().tokenize({key: [{"caption": t} for t in group] for key, group in texts.items()})
    except OSError as error:  # it writes a temporary file beside its own
        raise UserError(f"pycocoevalcap has to write into its own folder and cannot: {error}") from error


def caption_scores(answers, references):
    """answers {key: str}, references {key: [str]}, the same keys, one a clip.

    -> {metric: (value, [low, high], [score per key] or None)}, [what is missing and how to get it].
    An answer without a word scores 0; a reference without one is refused."""
    try:
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ModuleNotFoundError:
        return {}, [f"CIDEr-D, SPIDEr, SPIDEr-FL, BLEU-4, ROUGE-L, METEOR: {PACKAGE}"]
    java = shutil.which("java") is not None
    missing = [] if java else [f"METEOR, SPIDEr, and the tokens of the published figures: {JAVA}"]
    for key, group in references.items():
        if not group or not all(any(map(str.isalnum, text)) for text in group):
            raise UserError(f"{key}: a reference caption is empty, expected words")
    said, truth = tokenise({key: [text] for key, text in answers.items()}, java), tokenise(references, java)
    empty = np.array([not said[key][0] for key in truth])
    scores = {}

    def keep(name, each):
        each = np.where(empty, 0.0, each)
        scores[name] = *interval(each, range(len(each)), None), each.tolist()

    if len(truth) > 1:
        keep("CIDEr-D", Cider().compute_score(truth, said)[1])  # the corpus figure is the mean
    else:
        missing.append("CIDEr-D: at least two clips (one alone has no document frequencies)")
    bleu = BleuScorer(n=4)
    for key in truth:
        bleu += (said[key][0], truth[key])
    value = bleu.compute_score(option="closest", verbose=0)[0][3]
    nearest = [min((abs(n - c["testlen"]), n) for n in c["reflen"])[1] for c in bleu.ctest]
    counts = [[*c["correct"], *c["guess"], c["testlen"], n] for c, n in zip(bleu.ctest, nearest)]
    draws = weights(np.ones(len(truth))) @ np.array(counts, float) * len(truth)  # BLEU is a function of sums
    precision = np.exp(np.log((draws[:, :4] + 1e-15) / (draws[:, 4:8] + 1e-9)).mean(1))
    brevity = np.exp(np.minimum(0, 1 - draws[:, 9] / (draws[:, 8] + 1e-9)))
    scores["BLEU-4"] = value, spread(precision * brevity, value), None
    keep("ROUGE-L", Rouge().compute_score(truth, said)[1])
    if java:
        scores["METEOR"] = meteor(said, truth, len(empty))
        _spice(said, truth, scores, keep, missing)
    missing.append("SPIDEr-FL: wants aac-metrics' fluency detector, which cannot be installed as published")
    return scores, missing


def meteor(said, truth, n):
    """METEOR of the corpus is a function of summed statistics, not a mean; so is that of every bootstrap
    draw."""
    from pycocoevalcap.meteor.meteor import Meteor

    class Kept(Meteor):
        def _stat(self, answer, references):
            kept.append(super()._stat(answer, references))
            return kept[-1]

    kept, scorer = [], Kept()
    value, each = scorer.compute_score(truth, said)
    sums = weights(np.ones(n), 500) @ np.array([line.split() for line in kept], float) * n
    draws = []
    for row in sums:
        scorer.meteor_p.stdin.write(("EVAL ||| " + " ".join(map(repr, row.tolist())) + "\n").encode())
        scorer.meteor_p.stdin.flush()
        scorer.meteor_p.stdout.readline()  # the score of the one segment, then that of the corpus
        draws.append(float(scorer.meteor_p.stdout.readline()))
    return value, spread(draws, value), each


def _spice(said, truth, scores, keep, missing):
    """SPICE, and SPIDEr = its mean with CIDEr-D, where Stanford's jars lie in the package; they are a
    download."""
    from pycocoevalcap.spice import spice
    if not os.path.exists(os.path.join(os.path.dirname(spice.__file__), "lib/stanford-corenlp-3.6.0.jar")):
        return missing.append(f"SPICE, SPIDEr: {SPICE}")
    try:
        numbers = {i: key for i, key in enumerate(truth)}  # it sorts the keys
        _, each = spice.Spice().compute_score({i: truth[k] for i, k in numbers.items()},
                                              {i: said[k] for i, k in numbers.items()})
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        return missing.append(f"SPICE, SPIDEr: Stanford's program failed ({error}); it wants Java 8")
    keep("SPICE", np.nan_to_num([scores_of["All"]["f"] for scores_of in each]))
    if "CIDEr-D" in scores:
        keep("SPIDEr", (np.array(scores["CIDEr-D"][2]) + scores["SPICE"][2]) / 2)
