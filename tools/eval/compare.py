"""Two systems on the same items: who is better, how sure that is, and which items changed."""
from collections import Counter

import numpy as np

from tools.common import UserError
from tools.eval.stats import bootstrap_p, interval, mcnemar
from tools.eval.parsing import said


def pair(first, second):
    """[(item of the first, item of the second)] of the same clip, where both tell it from the same start, the
    same prompt and, where they recur, turn."""
    starts = all("start" in item for item in [*first, *second])

    def keyed(items):
        turns, found = Counter(), {}
        for item in items:
            what = item["prompt"], item.get("audio") or item["output"], starts and item["start"]
            found[what, turns[what]] = item
            turns[what] += 1
        return found
    a, b = keyed(first), keyed(second)
    return [(a[key], b[key]) for key in a if key in b]


def compare(first, second, names=("a", "b")):
    """Print the difference of the mean scores with its interval over clips, the paired test, the items that
    changed; return these numbers."""
    both = pair(first, second)
    pairs = [(a, b) for a, b in both if a.get("score") is not None and b.get("score") is not None]
    if not pairs:
        raise UserError(f"{names[0]} and {names[1]} share no scored item, the same clip and "
                         f"prompt in both; --task=Name-Task scores them first")
    before, after = (np.array([float(item["score"]) for item in side]) for side in zip(*pairs))
    change = after - before
    clips = [a.get("audio") or i for i, (a, _) in enumerate(pairs)]
    value, (low, high) = interval(change.tolist(), clips, bounds=None)
    gained = [pair for pair, up in zip(pairs, change > 0) if up]
    lost = [pair for pair, down in zip(pairs, change < 0) if down]
    tests = []
    if set(before) | set(after) <= {0.0, 1.0}:
        tests.append(f"exact McNemar p = {mcnemar(len(gained), len(lost)):.4g}")
    if not tests or len(set(clips)) < len(clips):  # McNemar takes questions about one clip for independent
        tests.append(f"paired bootstrap over {len(set(clips))} clips p = {bootstrap_p(change, clips):.4g}")
    print(f"{len(pairs)} items in both: {names[0]} {before.mean():.4f}, {names[1]} {after.mean():.4f}, "
          f"difference {value:+.4f} [{low:+.4f}, {high:+.4f}] | {', '.join(tests)} | "
          f"gained {len(gained)}, lost {len(lost)}")
    alone = len(first) + len(second) - 2 * len(both)
    if alone or len(pairs) < len(both):
        print(f"left out: {alone} items in one file alone, {len(both) - len(pairs)} that are not scored")
    for word, changed in (("gained", gained), ("lost", lost)):
        for a, b in changed:
            print(f"{word} | {a.get('audio', '')} | {a['prompt']!r} | {a['output']!r} | "
                  f"{said(a)!r} -> {said(b)!r}")
    return {"n": len(pairs), "difference": value, "interval": [low, high], "gained": len(gained),
            "lost": len(lost)}
