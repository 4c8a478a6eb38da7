"""How sure a score is: 95 % bootstrap intervals over clips, and the paired tests of two systems.

Questions about one clip are right or wrong together, so clips are resampled, not questions. The resampling is
the Bayesian bootstrap (Rubin 1981): a draw weighs the clips by a Dirichlet instead of by whole counts. Scores
with bounds get two pseudo-clips, one at each bound, so that 20 right answers of 20 do not claim to be sure:
there the plain percentile bootstrap says [100 %, 100 %], and near the ends it covers the truth far too
seldom.
"""
import math

import numpy as np

from tools.common import UserError

SEED = 0
PRIOR = 0.75  # of a clip at each bound; with Jeffreys' 0.5, coverage near the ends falls under 90 %


def weights(counts, draws=None):
    """(draws, K) Dirichlet weights of K kinds of clips that occur `counts` times each. Always the same draws:
    10,000, of many kinds fewer, 2,000 at least."""
    draws = draws or int(np.clip(4_000_000 // len(counts), 2_000, 10_000))
    gammas = np.random.default_rng(SEED).standard_gamma(counts, (draws, len(counts)))
    return gammas / gammas.sum(1, keepdims=True)


def per_clip(clips, *columns):
    """Sums of the columns (n,) over the items of each clip: (C, columns), clips in order of appearance."""
    numbers = {clip: i for i, clip in enumerate(dict.fromkeys(clips))}
    index = [numbers[clip] for clip in clips]
    return np.stack([np.bincount(index, column, len(numbers)) for column in columns], 1)


def interval(values, clips, bounds=(0, 1)):
    """(mean, [low, high]) of the values that are not None; None if nothing is left. clips: a name per value.

    bounds: what a value can lie between, None where that says nothing (CIDEr)."""
    counted = [(float(value), clip) for value, clip in zip(values, clips) if value is not None]
    if not counted:
        return None
    values, clips = zip(*counted)
    rows = per_clip(clips, values, np.ones(len(values)))  # (C, 2): a clip's sum and its number of values
    kinds, counts = np.unique(rows, axis=0, return_counts=True)  # clips alike are one kind: few columns
    if bounds is not None:
        size = len(values) / len(rows)
        kinds = np.concatenate([kinds, [[bound * size, size] for bound in bounds]])
        counts = np.append(counts, [PRIOR, PRIOR])
    sums = weights(counts) @ kinds
    mean = math.fsum(values) / len(values)
    return mean, spread(sums[:, 0] / sums[:, 1], mean)


def spread(draws, value):
    """[low, high]: the middle 95 % of the draws, widened to hold the value itself."""
    low, high = np.percentile(draws, (2.5, 97.5))
    return [float(min(low, value)), float(max(high, value))]


def mcnemar(gained, lost):
    """Two-sided p of the exact McNemar test: a fair coin's chance to split the changed items so unevenly."""
    n, few = gained + lost, min(gained, lost)
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
            for k in range(few + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def bootstrap_p(differences, clips):
    """Two-sided p of the paired bootstrap: how often the mean difference of the drawn clips has the other
    sign."""
    rows, counts = np.unique(per_clip(clips, differences), axis=0, return_counts=True)
    sums = (weights(counts) @ rows)[:, 0]
    other = min((sums <= 0).sum(), (sums >= 0).sum())
    return float(min(1.0, 2 * (1 + other) / (1 + len(sums))))


def mean_average_precision(truth, scores, clips, draws=200):
    """(mAP, [low, high]) of truth and scores (n, labels): scikit-learn's average precision, mean over the
    labels that occur."""
    try:
        from sklearn.metrics import average_precision_score
    except ModuleNotFoundError as error:
        raise UserError("mAP needs scikit-learn: pip install -r requirements-eval.txt") from error
    truth, scores = truth[:, truth.any(0)], scores[:, truth.any(0)]
    value = float(average_precision_score(truth, scores, average="macro"))
    numbers = {clip: i for i, clip in enumerate(dict.fromkeys(clips))}
    w = weights(np.ones(len(numbers)), draws).T[[numbers[clip] for clip in clips]]  # (n, draws)
    w, total = w.astype(np.float32), np.zeros(draws)
    for y, s in zip(truth.T, scores.T):
        order = np.argsort(-s, kind="stable")
        y, s, rising = y[order].astype(bool), s[order], w[order].cumsum(0)
        last = np.searchsorted(-s, -s[y], side="right") - 1  # equal scores: precision at their end
        hits = np.concatenate([np.zeros((1, draws)), w[order][y].cumsum(0)])
        found = hits[np.searchsorted(np.flatnonzero(y), last, side="right")]
        total += (w[order][y] * found / rising[last]).sum(0) / hits[-1]
    return value, spread(total / truth.shape[1], value)
