"""Reports as one file: an HTML page, tables, the log-mel of a clip as a picture, a player for its sound.

Everything is embedded as data URIs, so that a page can be sent as it is. Pictures need matplotlib, which is
imported when the first one is drawn. (Not named html.py: `python tools/bench.py` searches tools/ first, and
the standard library's html would be hidden.)
"""
import base64
import io
from html import escape

from tools.common import optional_import

STYLE = """body { font: 15px/1.45 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em }
td, th { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
.item { border-left: 3px solid #c33; padding: 0 1em; margin: 1em 0 }
audio { width: 100% } img { max-width: 100% } pre { white-space: pre-wrap; margin: 0 }
"""


def html_page(title, body):
    """A page: `body` is HTML, `title` text."""
    title = escape(title)
    head = f'<!doctype html><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f"{head}<h1>{title}</h1>\n{body}\n"


def html_table(rows, header=()):
    """A table of values, whose texts are escaped."""
    lines = ["".join(f"<th>{escape(name)}" for name in header)]
    for row in rows:
        cells = [f"<td><pre>{escape(str(value))}</pre>" for value in row]
        lines.append("".join(cells))
    return "<table><tr>" + "\n<tr>".join(lines) + "</table>"


def data_uri(data, kind):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def clip_html(windows, sample_rate):
    """Windows (n, L), int16 or float in [-1, 1], to hear (the first 15 s, as 16-bit WAV) and to see."""
    import soundfile
    import torch

    from model import to_float
    samples = to_float(torch.as_tensor(windows)).flatten()
    data = io.BytesIO()
    soundfile.write(data, samples[:15 * sample_rate].numpy(), sample_rate, format="WAV")
    player = f'<audio controls src="{data_uri(data.getvalue(), "audio/wav")}"></audio>'
    return player + image(log_mel_figure(windows, sample_rate))


# ------------------------------------------------------------------------------------------------------------
# Pictures


def new_figure(width, height):
    """A matplotlib Figure, inches; without pyplot, so that no window system is looked for."""
    matplotlib = optional_import("matplotlib.figure", "a picture", "eval")
    return matplotlib.Figure((width, height), layout="constrained")


def png_bytes(figure, dpi=90):
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=dpi)
    return data.getvalue()


def image(figure):
    """An <img> element of a figure."""
    return f'<img src="{data_uri(png_bytes(figure), "image/png")}">'


def plain_label(text, most=60):
    """A label of a picture: one line, and no formulas (matplotlib reads $ as mathematics)."""
    return text[:most].replace("\n", " ").replace("$", r"\$")


def draw_log_mel(axes, windows, sample_rate):
    """The log-mel of windows (n, L), int16 or float, over seconds; -> seconds."""
    import torch

    from model import log_mel, to_float
    windows = to_float(torch.as_tensor(windows))
    seconds = windows.numel() / sample_rate
    mel = log_mel(windows, sample_rate).flatten(0, 1).T.numpy()  # (64, frames)
    axes.imshow(mel, origin="lower", aspect="auto", extent=(0, seconds, 0, 64), cmap="magma")
    axes.set(ylabel="mel band")
    return seconds


def draw_attention(axes, weights, seconds):
    """Attention over time under a log-mel: weights (steps,) as a curve."""
    import numpy as np
    weights = np.asarray(weights)
    edges = np.linspace(0, seconds, len(weights) + 1)
    axes.stairs(weights, edges, fill=True)
    axes.set(xlabel="seconds", ylabel="attention", xlim=(0, seconds))


def log_mel_figure(windows, sample_rate, weights=(), words=()):
    """-> matplotlib Figure of windows (n, L), int16 or float: the log-mel, and under it the attention weights
    (words, steps) as a map, if there are any."""
    n = len(weights)
    if not n:
        figure = new_figure(8, 2)
        draw_log_mel(figure.subplots(), windows, sample_rate)
        return figure
    height = max(1, 0.25 * n)
    figure = new_figure(9, 2 + height)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, height])
    seconds = draw_log_mel(above, windows, sample_rate)
    below.imshow(weights, aspect="auto", extent=(0, seconds, n, 0), cmap="viridis")
    labels = [plain_label(word) for word in words]
    below.set(xlabel="seconds", yticks=[i + 0.5 for i in range(n)], yticklabels=labels)
    return figure
