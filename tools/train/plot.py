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

PANELS = {
    "loss": "loss (dotted: validation)",
    "gates": "tanh of attention gates",
    "ff_gates": "tanh of feed-forward gates",
    "gnorm": "gradient norm",
    "lr": "learning rate",
    "tok_s": "tokens / s",
    "pad": "padding (text)",
    "mem_gb": "memory (GiB)",
}


def read_run(run):
    """-> folder of a run, its logged steps and its validations: lists of dicts."""
    folder = settings.resolve_path(run)
    file = os.path.join(folder, "log.jsonl")
    with open(file, "rb") as f:  # the last line may be on its way
        entries = [parse_json_line(line) or {} for line in f]
    steps = [entry for entry in entries if "gnorm" in entry]
    if not steps:
        raise UserError(f"{file}: no step is logged yet")
    return folder, steps, [entry for entry in entries if "valid" in entry]


def main(c):
    if not c.files:
        raise UserError("usage: python tools/train/plot.py RUN [RUN ...] [--output=FILE.png]")
    optional_import("matplotlib", "tools/train/plot.py", "eval")
    from matplotlib.figure import Figure
    runs = [read_run(name) for name in c.files]
    path = c.output or os.path.join(runs[0][0], "plot.png")
    figure = Figure(figsize=(18, 8), layout="constrained")
    all_axes = figure.subplots(2, 4).flat
    for axes, (name, title) in zip(all_axes, PANELS.items()):
        for i, (folder, entries, _) in enumerate(runs):
            steps = [entry["step"] for entry in entries]
            values = np.array([entry[name] for entry in entries], float)  # gates: a column per layer
            axes.plot(steps, values, color=f"C{i}", label=folder)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    for i, (_, _, validations) in enumerate(runs):
        steps = [entry["step"] for entry in validations]
        for split in {split for entry in validations for split in entry["valid"]}:
            losses = [entry["valid"].get(split, np.nan) for entry in validations]
            all_axes[0].plot(steps, losses, "o:", color=f"C{i}", markersize=4)
    all_axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=100)
    print(f"wrote {path}")


if __name__ == "__main__":
    settings.run(main, "tools/train/plot.py", files=True)
