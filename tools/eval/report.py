"""report.html, a run of eval in one file: table, bars, confusion, the worst items to listen to."""
import base64
import html
import importlib.util
import io
import sys
import wave
from collections import Counter

import numpy as np

from tools.common import atomic_write
from tools.eval.parsing import mark_of, normalise, said
from tools.eval.results import lines_of, shown

WORST, MOST, SECONDS = 4, 40, 15  # items a split, items a report, seconds of sound: 26 MB at most
PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em }}
td, th {{ padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }}
.item {{ border-left: 3px solid #c33; padding: 0 1em; margin: 1em 0 }} audio {{ width: 100% }}
img {{ max-width: 100% }} pre {{ white-space: pre-wrap; margin: 0 }}</style><h1>{title}</h1>{body}"""


def canvas(width, height, rows=1):
    from matplotlib.figure import Figure  # an extra; the rest of eval does without
    figure = Figure((width, height), layout="tight")
    return figure, figure.subplots(rows, sharex=True, squeeze=False)[:, 0]


def picture(figure):
    figure.savefig(data := io.BytesIO(), format="png", dpi=90)
    return f'<img src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def tick(label):
    return label[:32].replace("\n", " ").replace("$", r"\$")  # matplotlib reads $ as mathematics


def bars(groups):
    """The headline by category, with its intervals."""
    figure, (axes,) = canvas(8, 0.8 + 0.25 * len(groups))
    values = np.array([[g["value"], *g["interval"]] for g in groups.values()])
    axes.barh(range(len(groups)), values[:, 0], xerr=np.abs(values[:, 1:] - values[:, :1]).T, color="#69c")
    axes.set_yticks(range(len(groups)), map(tick, groups))
    axes.invert_yaxis()
    return picture(figure)


def confusion(items, most=20):
    """What was said where what was right, for the `most` commonest labels; open answers have no matrix."""
    bare = lambda text: normalise(mark_of(text or "", 26)[1] or text or "")  # without an option's mark
    pairs = Counter((bare(item["output"]), bare(item["predicted"])) for item in items if "predicted" in item)
    truths = Counter(right for right, _ in pairs.elements())
    labels = [label for label, _ in truths.most_common(most)] if len(truths) <= 5 * most else []
    if len(labels) < 2:
        return ""
    shares = np.array([[pairs[right, told] / truths[right] for told in labels] for right in labels])
    figure, (axes,) = canvas(3 + 0.32 * len(labels), 3 + 0.32 * len(labels))
    axes.imshow(np.column_stack([shares, 1 - shares.sum(1)]), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels) + 1), [*map(tick, labels), "(other)"], rotation=90)
    axes.set_yticks(range(len(labels)), map(tick, labels))
    axes.set(ylabel="right", xlabel="said")
    return picture(figure)


def sound(windows, attention, rate):
    """Player, log-mel and attention (one weight per time step, or None) of windows (n, L), int16 or float, at
    `rate` Hz."""
    import torch
    from model import log_mel, to_float
    windows, data = to_float(torch.as_tensor(windows)), io.BytesIO()
    with wave.open(data, "wb") as f:
        f.setparams((1, 2, rate, 0, "NONE", ""))
        f.writeframes((windows.flatten()[:SECONDS * rate] * 32767).to(torch.int16).numpy().tobytes())
    figure, axes = canvas(8, 2, 1) if attention is None else canvas(8, 3, 2)
    seconds, mel = windows.numel() / rate, log_mel(windows, rate).flatten(0, 1).T  # (64, frames)
    axes[0].imshow(mel, origin="lower", aspect="auto", extent=(0, seconds, 0, 64), cmap="magma")
    if attention is not None:
        axes[1].stairs(np.asarray(attention), np.linspace(0, seconds, len(attention) + 1), fill=True)
        axes[1].set(ylabel="attention")
    heard = base64.b64encode(data.getvalue()).decode()
    return f'<audio controls src="data:audio/wav;base64,{heard}"></audio><br>{picture(figure)}'


def item_of(name, item, load, rate):
    """Sound, if it can be read, and texts of one item."""
    texts = {"score": f"{item['score']:.3g}", "clip": item.get("audio"), "prompt": item["prompt"],
             "references": "\n".join(item.get("references") or [item["output"]]), "answer": item["answer"],
             "counted": said(item), "error": item.get("error")}
    heard = ""
    if load is not None and item.get("audio") and not item.get("error"):
        try:
            heard = sound(*load(name, item), rate)
        except (OSError, ValueError) as error:  # the file is gone, or is none
            texts["error"] = str(error)
    table = "".join(f"<tr><th>{key}<td><pre>{html.escape(text)}</pre>" for key, text in texts.items() if text)
    return f'<div class="item">{heard}<table>{table}</table></div>'


def write_report(path, rows, items, load=None, title="Scores", rate=16000):
    """rows and items by split; load(split, item) -> windows (n, L) at `rate` Hz, and attention (time steps,)
    or None."""
    if importlib.util.find_spec("matplotlib") is None:
        return print("no report.html: pip install -r requirements-eval.txt (matplotlib)", file=sys.stderr)
    body, worst = ["<table><tr><th>split<th>figure<th>n"], min(WORST, -(-MOST // len(rows)))
    for name, row in rows.items():
        for figure, spread in row["intervals"].items():
            cells = name, shown(figure, row[figure], spread, name), str(row["n"])
            body.append("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in cells))
    body.append("</table>")
    for name, row in rows.items():
        what = lambda i: (i.get("audio", i["id"]), i.get("start"), i["prompt"])
        scored = {what(item): item for item in items[name] if item["score"] is not None}
        body += [f"<h2>{html.escape(name)}</h2>", *(f"<p>{html.escape(t)}</p>" for t in lines_of(name, row))]
        body += [bars(row["groups"]) if row["groups"] else "", confusion(items[name]), "<h3>worst items</h3>"]
        for item in sorted(scored.values(), key=lambda item: item["score"])[:worst]:
            body.append(item_of(name, item, load, rate))
    with atomic_write(path) as f:
        f.write(PAGE.format(title=html.escape(title), body="\n".join(body)))
    print(f"report: {path}", file=sys.stderr)
