"""From what a rule counts to a row of the table: means, intervals over clips, sub-categories, published
figures."""
import json
import os
import re

from tools.common import UserError, atomic_write, read_json
from tools.eval.stats import interval
from tools.eval.parsing import conclusion

# Keys of a manifest's items that make sub-categories: those of MMAU, MuChoMusic, CMM and Audio Entailment
GROUPS = ("task", "category", "sub-category", "sub_category", "granularity", "difficulty", "dataset",
          "Dataset", "genre", "music_knowledge", "music_reasoning")
NUMBERS = ("CIDEr-D", "SPIDEr", "SPICE", "BLEU-4", "ROUGE-L", "METEOR")  # not percentages
ABOUT = {"multiple_choice": "MMAU's official rule, the answer as it is"}
NEEDS = {"unanimous": "no question with three equal answers yes or no",
         "non-binary": "no question without a yes or no among its answers",
         "perception": "no item whose reference is yes",
         "hallucination resistance": "no item whose reference is no"}

# Published scores of the 3B model by a pattern of Name-Task/split, reported by its authors, not measured
# here. MMAU's are of its first release.
PUBLISHED = {
    "Clotho-AQA": {"unanimous": 86.9, "non-binary": 52.6}, "Music-AVQA": {"accuracy": 72.3},
    "Clotho-v2.*Caption": {"CIDEr-D": 0.46}, "AudioCaps.*Caption": {"CIDEr-D": 0.58}, "FSD50k": {"mAP": 49.2},
    "CochlScene": {"accuracy": 82.1}, "NonSpeech7k": {"accuracy": 84.3}, "ESC-?50": {"accuracy": 83.9},
    "NSynth": {"source": 62.0, "instrument": 71.1}, "US8K|UrbanSound8K": {"accuracy": 68.0},
    "GTZAN": {"accuracy": 69.1}, "Medley-solos": {"accuracy": 85.8}, "CREMA-?D": {"accuracy": 36.6},
    "RAVDESS": {"accuracy": 26.3},
    "MMAU.*mini": {"task: sound": 61.56, "task: music": 73.95, "task: speech": 30.93},
    "MMAU(?!.*mini)": {"task: sound": 65.1, "task: music": 72.9}, "MuChoMusic": {"accuracy": 56.5},
    "Entailment": {"dataset: clotho": 92.5, "dataset: audiocaps": 93.3}, "CMM": {"accuracy": 82.0}}


def clips_of(items):
    """The clip of every item: its file and start; an item without one is a clip of its own."""
    return [(item["audio"], item.get("audio_start", 0)) if item.get("audio") else number
            for number, item in enumerate(items)]


def row_of(figures, items, rule):
    """{figure: value, …, "n", "rule", "intervals": {figure: [low, high]}, "groups": {…}, "missing": [what has
    nothing to score]} of a rule's figures."""
    clips, row, spreads, missing = clips_of(items), {}, {}, []
    for figure, counted in figures.items():
        if isinstance(counted, list):
            counted = interval(counted, clips)
        if counted is None:
            why = NEEDS.get(figure, "no item counts") if items else "no item has a reference answer"
            missing.append(f"{figure}: nothing to score, {why}")
        if isinstance(counted, tuple):
            counted, spreads[figure] = float(counted[0]), counted[1]
        row[figure] = counted
    row |= {"n": len(items), "rule": rule, "intervals": spreads, "missing": missing,
            "groups": groups_of(items, clips, None if next(iter(figures), None) in NUMBERS else (0, 1))}
    counts = {"unreadable clips": 0, "empty answers": 0, "no conclusion": 0}
    for item in items:
        if item.get("error"):
            counts["unreadable clips"] += 1
        elif not (item["answer"] or "").strip():
            counts["empty answers"] += 1
        elif not conclusion(item["answer"]):
            counts["no conclusion"] += 1
    return row | {what: count for what, count in counts.items() if count}


def groups_of(items, clips, bounds):
    """{"key: value": {"value", "interval", "n"}} of the items' scores for every key that tells items
    apart."""
    members = {}
    for number, item in enumerate(items):
        for key in GROUPS if item.get("score") is not None else ():
            values = item.get(key)
            for value in values if isinstance(values, list) else [values]:
                if value not in (None, "", "[]"):
                    members.setdefault(key, {}).setdefault(str(value), []).append(number)
    groups = {}
    for key, values in members.items():
        for value, chosen in sorted(values.items()) if len(values) > 1 else ():
            mean, spread = interval([items[i]["score"] for i in chosen], [clips[i] for i in chosen], bounds)
            groups[f"{key.lower()}: {value}"] = {"value": mean, "interval": spread, "n": len(chosen)}
    return groups


def published(name, figure):
    """The published figure of a test split as a number, or None."""
    if not re.search(r"(?:^[^/]*|/test[^/]*)$", name):
        return None
    found = [figures for pattern, figures in PUBLISHED.items() if re.search(pattern, name, re.I)]
    return found[0].get(figure.lower() if ":" in figure else figure) if found else None


def shown(figure, value, spread, name):
    """A figure as text: "accuracy 62.5% [50.0, 73.2] (published 3B 72.3)"."""
    scale, digits, sign = (1, 3, "") if figure in NUMBERS else (100, 1, "%")
    text = f"{figure} {scale * value:.{digits}f}{sign}"
    if spread:
        text += f" [{scale * spread[0]:.{digits}f}, {scale * spread[1]:.{digits}f}]"
    known = published(name, figure)
    return text + (f" (published 3B {known})" if known is not None else "")


def lines_of(name, row):
    """The row as lines to print."""
    parts = []
    for figure, value in row.items():
        if isinstance(value, float):
            parts.append(shown(figure, value, row["intervals"].get(figure), name))
        elif isinstance(value, (str, int)):
            about = f" ({ABOUT[value]})" if figure == "rule" and value in ABOUT else ""
            parts.append(f"{figure} {value}{about}")
    yield f"{name}: " + ", ".join(parts)
    for text in row["missing"]:
        yield f"    {text}"
    for group, found in row["groups"].items():
        yield "    " + shown(group, found["value"], found["interval"], name) + f", n {found['n']}"


def read_scores(path):
    """{"tasks": {split: row}} of a JSON file that rows can be added to; ValueError where none can."""
    kept = read_json(path) if os.path.exists(path) else {}
    if type(kept) is not dict or type(kept.setdefault("tasks", {})) is not dict:
        raise UserError(f'{path}: not a file of scores, expected {{"tasks": {{split: row}}}}')
    return kept


def add_scores(path, rows):
    """Add the rows to a file of scores, whole or not at all."""
    kept = read_scores(path)
    kept["tasks"].update(rows)
    with atomic_write(path) as f:
        json.dump(kept, f, indent=1, allow_nan=False)
