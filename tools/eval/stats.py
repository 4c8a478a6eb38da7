"""95 % bootstrap intervals over clips, and the paired comparison of two systems.

Questions about one clip are right or wrong together, so clips are resampled, not questions. The resampling is
the Bayesian bootstrap (Rubin 1981): a draw weighs the clips by a Dirichlet instead of by whole counts. Scores
with bounds get two pseudo-clips, one at each bound, so that 20 right answers of 20 give [86 %, 100 %]: there
the plain percentile bootstrap gives [100 %, 100 %], and near the bounds it covers the truth far too seldom.
"""
import math
from collections import defaultdict

import numpy as np

from tools.common import UserError, optional_import
from tools.eval.parsing import answer_text

SEED = 0  # the same answers always give the same intervals
PRIOR = 0.75  # of a clip at each bound; with Jeffreys' 0.5, coverage near the bounds falls under 90 %


def clips_of(items):
    """The clip of every item, its file and start; an item without a file is a clip of its own."""
    return [(str(item["audio"]), start_of(item)) if item.get("audio") else number
            for number, item in enumerate(items)]


def start_of(item):
    """As text, 5.0 as "5": tables with an empty cell have no whole numbers."""
    return str(item.get("start") or 0).removesuffix(".0")


def dirichlet_weights(counts, draws=None):
    """(draws, K) weights of K kinds of clips that occur `counts` times each: 10,000 draws, of many kinds
    fewer."""
    draws = draws or int(np.clip(4_000_000 // len(counts), 2_000, 10_000))
    rng = np.random.default_rng(SEED)
    gammas = rng.standard_gamma(counts, (draws, len(counts)))
    return gammas / gammas.sum(1, keepdims=True)


def clip_index(clips):
    """(n,) the number of each item's clip, in order of appearance."""
    numbers = {clip: i for i, clip in enumerate(dict.fromkeys(clips))}
    return np.array([numbers[clip] for clip in clips])


def interval(values, clips, bounds=(0, 1)):
    """(mean, [low, high]) of the values that are not None; None if nothing is left. clips: a name per value.

    bounds: the range of a value, None where there is none (CIDEr)."""
    values = np.array(values, float)  # None becomes nan
    counted = ~np.isnan(values)
    if not counted.any():
        return None
    index, values = clip_index(clips)[counted], values[counted]
    rows = np.stack([np.bincount(index, values), np.bincount(index)], 1)  # (C, 2): sum and number of values
    rows = rows[rows[:, 1] > 0]
    kinds, counts = np.unique(rows, axis=0, return_counts=True)  # equal clips are one kind: fewer columns
    if bounds is not None:
        size = len(values) / len(rows)
        kinds = np.concatenate([kinds, [[bound * size, size] for bound in bounds]])
        counts = np.append(counts, [PRIOR, PRIOR])
    sums = dirichlet_weights(counts) @ kinds
    mean = math.fsum(values) / len(values)
    low, high = np.percentile(sums[:, 0] / sums[:, 1], (2.5, 97.5))
    return mean, [float(min(low, mean)), float(max(high, mean))]


def mean_average_precision(truth, scores, clips):
    """(mAP, [low, high]) of truth and scores (n, labels): scikit-learn's average precision, mean over the
    labels that occur. The interval is that of a normal distribution, because a draw takes up to 2 s (10,000
    clips)."""
    average_precision = optional_import("sklearn.metrics", "mAP", "eval").average_precision_score
    occurs = truth.any(0)
    truth, scores = truth[:, occurs], scores[:, occurs]
    index = clip_index(clips)
    drawn = []
    for weights in dirichlet_weights(np.ones(index.max() + 1), 50):
        drawn.append(average_precision(truth, scores, sample_weight=weights[index]))
    value = float(average_precision(truth, scores))
    margin = 1.96 * float(np.std(drawn))
    return value, [max(0.0, value - margin), min(1.0, value + margin)]


# ------------------------------------------------------------------------------------------------------------
# Two systems on the same items


def question_of(item):
    """What identifies an item of a benchmark: clip (without one, the reference), start and prompt."""
    return str(item.get("audio") or item["output"]), start_of(item), item["prompt"]


def id_of(item):
    return str(item.get("id")).removesuffix(".0")


def pair_by(key, first, second):
    """Pairs of items with the same key; items that share one are paired in their order."""
    groups = defaultdict(lambda: ([], []))
    for side, items in enumerate((first, second)):
        for item in items:
            groups[key(item)][side].append(item)
    return [pair for group in groups.values() for pair in zip(*group)]


def pair_items(first, second):
    """-> [(item of the first, item of the second)], and what they are paired by. Ids count where both files
    have unique ones, and none stands at two questions that are in both files, as numbers of lines may."""
    by_question, by_id = pair_by(question_of, first, second), pair_by(id_of, first, second)
    unique = all(len(set(map(id_of, items)) - {"None"}) == len(items) for items in (first, second))
    asked = set(map(question_of, second))
    changed = [a for a, b in by_id if question_of(a) != question_of(b)]
    if unique and len(by_id) >= len(by_question) and asked.isdisjoint(map(question_of, changed)):
        return by_id, "id"
    if by_question:
        return by_question, "clip and prompt"
    if [item["output"] for item in first] != [item["output"] for item in second]:
        return [], "order"
    return list(zip(first, second)), "order"


def compare_systems(first, second, names):
    """Print the difference of the mean scores with its interval over clips, and the items that changed."""
    scored = [[item for item in items if isinstance(item.get("score"), (int, float))]
              for items in (first, second)]
    pairs, key = pair_items(*scored)
    if not pairs:
        raise UserError(f"{' and '.join(names)} share no scored item (same id, or same clip and prompt); "
                        f"--task=Name-Task scores them first")
    clips = clips_of([a for a, _ in pairs])
    before, after = np.array([[item["score"] for item in pair] for pair in pairs], float).T
    changes = after - before
    value, (low, high) = interval(changes, clips, bounds=None)
    print(f"{len(pairs)} items scored in both, of {len(first)} and {len(second)}, paired by {key}: "
          f"{names[0]} {before.mean():.4f}, {names[1]} {after.mean():.4f} | "
          f"difference {value:+.4f} [{low:+.4f}, {high:+.4f}] over {len(set(clips))} clips | "
          f"gained {sum(changes > 0)}, lost {sum(changes < 0)}")
    for (a, b), change in zip(pairs, changes):
        if change:
            word = "gained" if change > 0 else "lost"
            print(f"{word} | {a.get('audio', '')} | {a['prompt']!r} | {a['output']!r} | "
                  f"{answer_text(a)!r} -> {answer_text(b)!r}")
