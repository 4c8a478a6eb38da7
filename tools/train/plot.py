"""Pictures of training runs, several over each other: loss, gates per layer, gradient norm, rate, throughput,
padding.

    python tools/train/plot.py exp/pretrain                                    # exp/pretrain/plot.png
    python tools/train/plot.py exp/pretrain exp/other --output=both.png
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import config as settings
from tools.common import UserError, atomic_write, check_writable, parse_json_line

output: str | None = None  # the PNG to write; None: plot.png in the first run's folder

PANELS = {"loss": "loss (o: validation)", "gates": "tanh of attention gates", "ff_gates": "tanh of ff gates",
          "gnorm": "gradient norm", "lr": "learning rate", "tok_s": "tokens / s", "pad": "padding (text)",
          "mem_gb": "memory (GiB)"}


def read_log(run):
    """-> logged steps and validations of a run, a folder with log.jsonl: lists of dicts."""
    folder = next((f for f in (settings.resolve_path(run), run) if os.path.isdir(f)), run)
    file = os.path.join(folder, "log.jsonl")
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{run}: not a run, no log.jsonl in it")
    with open(file, "rb") as f:  # the last line may be on its way
        rows = [row for row in map(parse_json_line, f) if row and type(row.get("step")) is int]
    steps = [row for row in rows if "gnorm" in row]
    if not steps:
        raise UserError(f"{file}: no step is logged yet")
    return steps, [row for row in rows if isinstance(row.get("valid"), dict)]


def draw(runs, path):
    """One PNG of {name: (steps, validations)}. Gates: a line per layer, light to dark."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(18, 8), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 4).flat, PANELS.items()):
        for i, (run, (steps, validations)) in enumerate(runs.items()):
            x, color = [row["step"] for row in steps], f"C{i}"
            y = [row.get(name) for row in steps]
            if "gates" in name:
                y = [row if isinstance(row, list) else [] for row in y]
                for layer in range(layers := max(map(len, y))):
                    values = [row[layer] if layer < len(row) else None for row in y]
                    axes.plot(x, to_numbers(values), color=color, alpha=0.25 + 0.75 * (layer + 1) / layers)
            else:  # a legend leaves out what begins with _, and reads what stands between two $ as a formula
                axes.plot(x, to_numbers(y), color=color, label=" " + run.replace("$", r"\$"))
            if name == "loss":
                for k, split in enumerate(sorted({split for row in validations for split in row["valid"]})):
                    rows = [row for row in validations if split in row["valid"]]
                    points = [row["step"] for row in rows], to_numbers(row["valid"][split] for row in rows)
                    axes.plot(*points, "os^vD"[k % 5] + ":", color=color, markersize=4)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if name == "loss":
            axes.legend(fontsize="small")
    with atomic_write(path, "wb") as f:
        figure.savefig(f, format="png", dpi=100)


def to_numbers(values):
    """What is no number, where a run has none, is a gap."""
    return [value if type(value) in (int, float) else float("nan") for value in values]


def main(c):
    names = c.files
    if not names:
        raise UserError("usage: python tools/train/plot.py RUN [RUN ...] [--output=FILE.png]")
    runs = {name: read_log(name) for name in names}
    first = next(f for f in (settings.resolve_path(names[0]), names[0]) if os.path.isdir(f))
    path = c.output or os.path.join(first, "plot.png")
    check_writable(path)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        draw(runs, path)
    except ModuleNotFoundError as error:
        raise UserError("matplotlib is missing: pip install -r requirements-eval.txt") from error
    print(f"wrote {path}")


if __name__ == "__main__":
    settings.run(main, "tools/train/plot.py", files=True)
