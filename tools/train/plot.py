"""Plot training runs over each other: loss, gates per layer, gradient norm, rate, speed, padding, memory.

    python tools/train/plot.py exp/pretrain                                    # exp/pretrain/plot.png
    python tools/train/plot.py exp/pretrain exp/other --output=both.png
"""
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import config as settings
from tools.common import UserError, optional_import, parse_json_line

output: str | None = None  # the PNG to write; None: plot.png in the first run's folder

PANELS = ("loss", "gates", "ff_gates", "gnorm", "lr", "tok_s", "pad", "mem_gb")  # as log.jsonl has them


def read_log(run):
    """-> logged steps and validations of a run: lists of dicts."""
    file = os.path.join(settings.resolve_path(run), "log.jsonl")
    with open(file, "rb") as f:  # the last line may be on its way
        entries = [parse_json_line(line) or {} for line in f]
    steps = [entry for entry in entries if "gnorm" in entry]
    if not steps:
        raise UserError(f"{file}: no step is logged yet")
    return steps, [entry for entry in entries if "valid" in entry]


def plot_entries(axes, entries, name, *style, **options):
    steps = [entry["step"] for entry in entries]
    values = [entry.get(name) for entry in entries]  # of gates a list: a column per layer
    axes.plot(steps, np.array(values, float), *style, **options)


def main(c):
    if not c.files:
        raise UserError("usage: python tools/train/plot.py RUN [RUN ...] [--output=FILE.png]")
    figures = optional_import("matplotlib.figure", "tools/train/plot.py", "eval")
    figure = figures.Figure(figsize=(18, 8), layout="constrained")
    all_axes = list(figure.subplots(2, 4).flat)
    for i, run in enumerate(c.files):
        steps, validations = read_log(run)
        for axes, name in zip(all_axes, PANELS):
            plot_entries(axes, steps, name, color=f"C{i}", label=run)
            axes.set(title=name, xlabel="step")
            axes.grid(alpha=0.3)
        losses = [{"step": entry["step"]} | entry["valid"] for entry in validations]
        for split in set().union(*losses) - {"step"}:
            plot_entries(all_axes[0], losses, split, "o:", color=f"C{i}")  # dotted: validation
    all_axes[0].legend(fontsize="small")
    path = c.output or os.path.join(settings.resolve_path(c.files[0]), "plot.png")
    figure.savefig(path, dpi=100)
    print(f"wrote {path}")


if __name__ == "__main__":
    settings.run(main, "tools/train/plot.py", files=True)
