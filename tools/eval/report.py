"""A rule's figures as a results row, as printed lines, and as report.html: table, confusion, worst items."""
import importlib.util
import math
import re
import sys
from collections import Counter, defaultdict
from html import escape

from tools.common import atomic_write, optional_import
from tools.eval.parsing import answer_text, normalise, references_of
from tools.eval.records import GROUPS, to_list
from tools.eval.stats import clips_of, interval
from tools.html_page import html_page, html_table, image, new_figure, plain_label

NOT_PERCENT = ("CIDEr-D", "SPIDEr", "SPICE", "BLEU-4", "ROUGE-L", "METEOR")
# Figures of the published 3B model on test splits, reported by its authors, not measured here; MMAU's are of
# its first release. A pattern of Name-Task/split, the figure, its value.
PUBLISHED_3B = """
    Clotho-AQA | unanimous | 86.9
    Clotho-AQA | non-binary | 52.6
    Music-AVQA | accuracy | 72.3
    Clotho-v2.*Caption | CIDEr-D | 0.46
    AudioCaps.*Caption | CIDEr-D | 0.58
    FSD50k | mAP | 49.2
    CochlScene | accuracy | 82.1
    NonSpeech7k | accuracy | 84.3
    NSynth | source | 62.0
    NSynth | instrument | 71.1
    US8K|UrbanSound8K | accuracy | 68.0
    ESC-?50 | accuracy | 83.9
    GTZAN | accuracy | 69.1
    Medley-solos | accuracy | 85.8
    CREMA-?D | accuracy | 36.6
    RAVDESS | accuracy | 26.3
    MMAU.*mini | task: sound | 61.56
    MMAU.*mini | task: music | 73.95
    MMAU.*mini | task: speech | 30.93
    MMAU(?!.*mini) | task: sound | 65.1
    MMAU(?!.*mini) | task: music | 72.9
    MuChoMusic | accuracy | 56.5
    Entailment | dataset: clotho | 92.5
    Entailment | dataset: audiocaps | 93.3
    CMM | accuracy | 82.0"""


def published_score(name, figure):
    """" (published 3B 72.3)" for a figure of a test split, "" where none is known."""
    for line in PUBLISHED_3B.strip().splitlines():
        pattern, known, value = line.strip().split(" | ")
        if known.lower() == figure.lower() and re.search(pattern, name, re.I):
            return f" (published 3B {value})" if re.search(r"^[^/]*$|/test", name) else ""
    return ""


def results_row(figures, items, rule):
    """{figure: value, ..., "n", "rule", "intervals": {figure: [low, high]}, "groups": {...}} of a rule's
    figures: each a list of values per item, a value, or value and interval. A figure without a scored item is
    None."""
    clips, row, intervals = clips_of(items), {}, {}
    for figure, value in figures.items():
        if isinstance(value, list):
            value = interval(value, clips)
        if isinstance(value, tuple):
            value, intervals[figure] = value
        row[figure] = value
    groups = sub_categories(items, clips, None if next(iter(row)) in NOT_PERCENT else (0, 1))
    row |= {"n": len(items), "rule": rule, "intervals": intervals, "groups": groups}
    return row | Counter(filter(None, map(failure_of, items)))


def failure_of(item):
    """Why an item has no scored text; None if it has one."""
    if item.get("error"):
        return "unreadable clips"
    if not answer_text(item):
        return "no conclusion" if item["answer"].strip() else "empty answers"
    return None


def sub_categories(items, clips, bounds):
    """{"key: value": {"value", "interval", "n"}} of the items' scores, for every key with several values."""
    groups = {}
    for key in GROUPS:
        members = defaultdict(list)  # value: [(score, clip)]
        for item, clip in zip(items, clips):
            if item["score"] is not None:
                for value in to_list(item.get(key)):
                    members[str(value)].append((item["score"], clip))
        if len(members) > 1:
            for value, scored in sorted(members.items()):
                mean, spread = interval(*zip(*scored), bounds)
                groups[f"{key.lower()}: {value}"] = {"value": mean, "interval": spread, "n": len(scored)}
    return groups


def format_figure(name, figure, value, spread, percent):
    """A figure as text: "accuracy 62.5% [50.0, 73.2] (published 3B 72.3)"."""
    numbers = [f"{100 * x:.1f}" if percent else f"{x:.3f}" for x in (value, *(spread or ()))]
    text = f"{figure} {numbers[0]}" + "%" * percent
    if spread:
        text += f" [{numbers[1]}, {numbers[2]}]"
    return text + published_score(name, figure)


def result_lines(name, row):
    """The row as lines to print: the figures, then a line for each sub-category."""
    parts, lines = [], []
    for figure, value in row.items():
        if isinstance(value, float):
            spread = row["intervals"].get(figure)
            parts.append(format_figure(name, figure, value, spread, figure not in NOT_PERCENT))
        elif value is None:
            lines.append(f"    {figure}: no item to score")
        elif not isinstance(value, dict):
            parts.append(f"{figure} {value}")
    percent = next(iter(row)) not in NOT_PERCENT
    for group, found in row["groups"].items():
        text = format_figure(name, group, found["value"], found["interval"], percent)
        lines.append(f"    {text}, n {found['n']}")
    return [f"{name}: " + ", ".join(parts), *lines]


# ------------------------------------------------------------------------------------------------------------
# report.html


def confusion_matrix(items, most=100):
    """Predicted against right labels; "" for open answers, which have too many."""

    def labels_under(key):
        return [plain_label(normalise(item[key] or ""), 32) for item in items if "predicted" in item]

    right = labels_under("output")
    labels = set(right)
    if not 2 <= len(labels) <= most:
        return ""
    predicted = [label if label in labels else "(other)" for label in labels_under("predicted")]
    metrics = optional_import("sklearn.metrics", "a confusion matrix", "eval")
    figure = new_figure(3 + 0.3 * len(labels), 3 + 0.3 * len(labels))
    metrics.ConfusionMatrixDisplay.from_predictions(
        right, predicted, ax=figure.subplots(), normalize="true", include_values=False, colorbar=False,
        cmap="Blues", xticks_rotation="vertical")
    return image(figure)


def item_html(item, sound):
    """An item's sound, as HTML, and its texts."""
    texts = {"score": f"{item['score']:.3g}", "clip": item.get("audio"), "prompt": item["prompt"],
             "references": "\n".join(references_of(item)), "answer": item["answer"],
             "scored": answer_text(item), "error": item.get("error")}
    table = html_table([(key, text) for key, text in texts.items() if text])
    return f'<div class="item">{sound}{table}</div>'


def write_report(path, rows, items, sound_of):
    """rows and items by split; sound_of(split, item) -> HTML. Of a split the 4 worst items, 40 in all: 26 MB
    of sound at most."""
    if not all(map(importlib.util.find_spec, ("matplotlib", "sklearn"))):
        print("no report.html: pip install -r requirements-eval.txt", file=sys.stderr)
        return
    body = []
    for name, row in rows.items():
        lines = "\n".join(result_lines(name, row))
        body.append(f"<h2>{escape(name)}</h2><pre>{escape(lines)}</pre>{confusion_matrix(items[name])}")
        scored = [item for item in items[name] if item["score"] is not None]
        scored.sort(key=lambda item: item["score"])
        for item in scored[:min(4, math.ceil(40 / len(rows)))]:
            body.append(item_html(item, sound_of(name, item)))
    with atomic_write(path) as f:
        f.write(html_page("Scores", "\n".join(body)))
    print(f"report: {path}", file=sys.stderr)
