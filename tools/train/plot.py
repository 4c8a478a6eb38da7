"""Plot training runs over each other: loss, gates per layer, gradient norm, rate, speed, padding, memory.

    python tools/train/plot.py exp/pretrain                                    # exp/pretrain/plot.png
    python tools/train/plot.py exp/pretrain exp/other --output=both.png
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import config as settings
from tools.common import UserError, atomic_write, check_writable, optional_import, parse_json_line

output: str | None = None  # the PNG to write; None: plot.png in the first run's folder

PANELS = {"loss": "loss (o: validation)", "gates": "tanh of attention gates", "ff_gates": "tanh of ff gates",
          "gnorm": "gradient norm", "lr": "learning rate", "tok_s": "tokens / s", "pad": "padding (text)",
          "mem_gb": "memory (GiB)"}


def read_run(run):
    """-> folder of a run, its logged steps, its validations: lists of dicts."""
    folder = run if os.path.isdir(run) else settings.resolve_path(run)
    file = os.path.join(folder, "log.jsonl")
    with open(file, "rb") as f:  # the last line may be on its way
        entries = [parse_json_line(line) or {} for line in f]
    steps = [entry for entry in entries if "gnorm" in entry]
    if not steps:
        raise UserError(f"{file}: no step is logged yet")
    return folder, steps, [entry for entry in entries if "valid" in entry]


def plot_steps(axes, name, steps, color, label):
    """A line of one value; of gates, a line per layer, light to dark."""
    x = [entry["step"] for entry in steps]
    y = [entry[name] for entry in steps]
    if "gates" not in name:
        axes.plot(x, [float("nan") if value is None else value for value in y], color=color, label=label)
        return
    for layer, values in enumerate(zip(*y), 1):
        axes.plot(x, values, color=color, alpha=0.25 + 0.75 * layer / len(y[0]))


def plot_validations(axes, validations, color):
    for k, split in enumerate(sorted({split for entry in validations for split in entry["valid"]})):
        points = [(entry["step"], entry["valid"][split]) for entry in validations if split in entry["valid"]]
        axes.plot(*zip(*points), "os^vD"[k % 5] + ":", color=color, markersize=4)


def main(c):
    if not c.files:
        raise UserError("usage: python tools/train/plot.py RUN [RUN ...] [--output=FILE.png]")
    optional_import("matplotlib", "tools/train/plot.py", "eval")
    from matplotlib.figure import Figure
    runs = [read_run(name) for name in c.files]
    path = c.output or os.path.join(runs[0][0], "plot.png")
    check_writable(path)
    figure = Figure(figsize=(18, 8), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 4).flat, PANELS.items()):
        for i, (folder, steps, validations) in enumerate(runs):
            plot_steps(axes, name, steps, f"C{i}", folder)
            if name == "loss":
                plot_validations(axes, validations, f"C{i}")
                axes.legend(fontsize="small")
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with atomic_write(path, "wb") as f:
        figure.savefig(f, format="png", dpi=100)
    print(f"wrote {path}")


if __name__ == "__main__":
    settings.run(main, "tools/train/plot.py", files=True)
