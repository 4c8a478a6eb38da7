"""Read every audio file of manifests, and tell what is wrong and what there is.

    python prepare/check.py config/pretrain.py                              # all manifests of a config
    python prepare/check.py a.json b.json --data_root=data --write=cleaned  # these; copies without the bad items
    python prepare/check.py config/sft.py --page=out/check.html             # the report as a page, too

Nothing is changed in place. Exit code: 0 all good, 1 some are not, 2 not done.
"""
import html
import json
import os
import re
import sys
from collections import Counter, defaultdict
from functools import partial

import numpy as np
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import config as settings
from data import AUDIO_SETTINGS, SAMPLE_RATE, Clips, Collate, Manifest, open_manifests
from tools.data.audio import SILENT, count_frames, missing_seconds, read_audio
from tools.data.batches import estimate_tokens
from tools.checkpoint.htsat import sample_rate_of_mel
from tools.common import UserError, atomic_write, check_folder_writable, check_writable, map_parallel

write: str | None = None  # folder for cleaned copies of the manifests; None: none are written
page: str | None = None  # HTML file of the report; None: the terminal alone
workers: int = 0  # processes; 0: one a core
examples: int = 20  # of each cause of failure, on the page


def open_all(c, files):
    """{name: Manifest} of the files named, or of all that a config trains and validates with."""
    if files:
        root = settings.resolve_path(c.data_root)
        return {file: Manifest(file, root, c.cache_dir) for file in files}
    names = {**c.dataset_blending_config, **c.valid_dataset_config}
    if not names:
        raise UserError("name manifests, or a config file with a dataset_blending_config")
    return open_manifests(c, names)


def audio_config_of(c):
    """What is heard of a clip, by the config; 5 minutes, the most that a stage hears, where none tells; at
    the rate of its clap_checkpoint, where that is here."""
    rate = SAMPLE_RATE
    if c.clap_checkpoint and os.path.isfile(settings.resolve_path(c.clap_checkpoint)):
        from tools.checkpoint.clap import clap_state
        rate = sample_rate_of_mel(clap_state(c.clap_checkpoint).get("clap.mel"))
    audio_config = {name: getattr(c, name) for name in AUDIO_SETTINGS} | {"sample_rate": rate}
    return audio_config if "max_num_window" in c.user_set else audio_config | {"max_num_window": 30}


def inspect(manifests, audio_config, task):
    """(manifest, item) -> what is wrong or None, its seconds, the first clip's sample rate."""
    m, i = task
    item, told = manifests[m][i], manifests[m].items[i]
    length, overlap, most = (audio_config[name] for name in AUDIO_SETTINGS)
    longest = most * (length - overlap) + overlap
    problem, total, rate = None, 0.0, 0
    for path in item["paths"]:
        try:
            x, _ = read_audio(path, item["start"], longest, audio_config["sample_rate"])
            frames, here = count_frames(path)
            rest, lacking = frames / here - item["start"], missing_seconds(path)
        except (FileNotFoundError, UserError) as error:
            problem = problem or str(error).removeprefix(path + ": ")
            continue
        held, rate = len(x) / audio_config["sample_rate"], rate or here
        rest += 0 if item["duration"] else lacking
        if held < min(longest, rest) - 0.1:  # the sound ends before the header says so
            problem = problem or f"truncated: {held:.2f} s, its header says {rest:.2f} s"
        elif np.abs(x).max() <= SILENT:
            problem = problem or "silent"
        total += rest
    duration = item["duration"]
    if not problem and duration and abs(duration - total) > 0.5 + 0.01 * total:
        if total < duration:
            problem = f"truncated: {total:.2f} s, manifest says {duration:.2f} s"
        elif "audio_start" not in told:  # with it, the item is a part of the file
            problem = f"wrong duration: {total:.2f} s, manifest says {duration:.2f} s"
    return problem, min(total, duration or total), rate


def cause_of(problem):
    return re.sub(r"[\d.]+ s\b", "... s", problem.split(":")[0].split(" (")[0])


def describe(values, unit=""):
    """A line of quantiles."""
    if not len(values):
        return "none"
    names, shares = ("least", "10 %", "median", "90 %", "most"), (0, 0.1, 0.5, 0.9, 1)
    shares = dict(zip(names, np.quantile(values, shares)))
    return ", ".join(f"{name} {value:.6g}{unit}" for name, value in shares.items())


def write_manifest(path, head, items):
    """A manifest with the keys of another and these items, whole or not at all; -> their number."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with atomic_write(path) as f:
        n = 0
        f.write('{"data": {')
        for n, item in enumerate(items, 1):
            f.write(("," if n > 1 else "") + f'\n"{n - 1}": ' + json.dumps(item))
        head = {key: value for key, value in head.items() if key != "data"} | {"total_num": n}
        f.write("\n},\n" + json.dumps(head)[1:] + "\n")
    return n


def targets_of(folder, manifests):
    """Where manifests made of others go: not over these, and not over each other."""
    paths = {}
    for manifest in manifests:
        path = os.path.join(folder, manifest.name + ".json")
        if os.path.realpath(path) == os.path.realpath(manifest.file):
            raise UserError(f"{folder}: would overwrite {manifest.file}; name another folder")
        if path in paths:
            raise UserError(f"{paths[path]} and {manifest.file} are both called {manifest.name}, one would "
                             f"be written over the other: take them one by one, into two folders")
        paths[path] = manifest.file
    return list(paths)


def tokenizer_of(c):
    """The config's tokenizer, or None where it can't be had or no language model is named."""
    if "lang_encoder_path" not in c.user_set and "tokenizer_path" not in c.user_set:
        return None
    from tools.checkpoint.language_models import load_lm_config_and_tokenizer
    try:
        return load_lm_config_and_tokenizer(c)[2]
    except (ValueError, OSError, ImportError) as error:
        print(f"note: texts are counted in characters: no tokenizer ({error})", file=sys.stderr)


def main(c):
    manifests = open_all(c, c.files)
    audio_config, tokenizer = audio_config_of(c), tokenizer_of(c)
    folder, page = (path and settings.resolve_path(path) for path in (c.write, c.page))
    targets = targets_of(folder, manifests.values()) if folder else []
    if folder:
        check_folder_writable(folder)
    if page:
        check_writable(page)
    opened = list(manifests.values())
    tasks = ((m, i) for m, manifest in enumerate(opened) for i in range(len(manifest)))
    found = [Found(len(manifest)) for manifest in opened]
    bar = tqdm(total=sum(map(len, opened)), desc="check", unit="clip", disable=None)
    inspected = map_parallel(partial(inspect, opened, audio_config), tasks, c.workers or os.cpu_count(),
                             lambda task: opened[task[0]][task[1]]["path"])
    for (m, i), (problem, found[m].seconds[i], found[m].rate[i]) in inspected:
        if problem:
            found[m].problems[i] = problem
            tqdm.write(f"{opened[m].name} {i}: {opened[m][i]['path']}: {problem}")
        bar.update()
    bar.close()
    for m, manifest in enumerate(opened):
        causes, good = Counter(map(cause_of, found[m].problems.values())), found[m].good()
        hours = found[m].seconds[good].sum() / 3600
        print(f"{manifest.name}: {len(manifest)} items, {len(good)} good" +
              "".join(f", {n} {what}" for what, n in causes.most_common()) + f"; {hours:.4g} h")
        if folder:
            write_manifest(targets[m], manifest.head, manifest.items.select(good))
            print(f"wrote {targets[m]}")
    told = summary(opened, found, audio_config, tokenizer)
    for what, (values, unit) in told.items():
        print(f"{what}: {describe(values, unit)}")
    if page:
        write_page(page, opened, found, told, audio_config, tokenizer, c)
    sys.exit(1 if any(of_one.problems for of_one in found) else 0)


class Found:
    """What inspect tells of a manifest's items: 12 bytes each, and the problems' words."""

    def __init__(self, n):
        self.seconds, self.rate, self.problems = np.zeros(n), np.zeros(n, np.int32), {}

    def good(self):
        return np.setdiff1d(np.arange(len(self.seconds)), list(self.problems))


def summary(opened, found, audio_config, tokenizer):
    """{what: (values, unit)} of the good items; texts: of about 100,000 of them."""
    good = [of_one.good() for of_one in found]
    seconds = np.concatenate([of_one.seconds[rows] for of_one, rows in zip(found, good)])
    rates = np.concatenate([of_one.rate[rows] for of_one, rows in zip(found, good)])
    length, overlap, most = (audio_config[name] for name in AUDIO_SETTINGS)
    windows = np.clip(1 + np.ceil((seconds - length) / (length - overlap)), 1, most)
    shares = [rows[::max(1, len(seconds) // 100_000)] for rows in good]
    items = (item for manifest, rows in zip(opened, shares) for item in manifest.items.select(rows))
    texts = [(item["prompt"].strip().lower(), item["output"].strip().lower()) for item in items]
    count = (lambda texts: estimate_tokens(tokenizer, texts)) if tokenizer else lambda texts: np.array(list(map(len, texts)))
    unit = " tokens" if tokenizer else " characters"
    return {"duration": (seconds, " s"), "windows a clip": (windows, ""),
            "prompt": (count([p for p, _ in texts]), unit),
            "output": (count([o for _, o in texts]), unit),
            "sample rate": (rates, " Hz")}


# ------------------------------------------------------------------------------------------------------------
# The page


def bars(values, unit, most=16):
    """A histogram: a bar for every value, or for ranges where there are many."""
    if not len(values):
        return "<p>none</p>"
    kinds, counts = np.unique(values, return_counts=True)
    labels = [f"{kind:.6g}" for kind in kinds]
    if len(kinds) > most:
        counts, edges = np.histogram(values, most)
        labels = [f"{a:.4g} to {b:.4g}" for a, b in zip(edges, edges[1:])]
    rows = (f'<tr><td>{label}{unit}<td><div class="bar" style="width:{40 * n / counts.max():.2f}em"></div>{n}'
            for label, n in zip(labels, counts))
    return f"<table>{''.join(rows)}</table>"


def seen(manifest, i, audio_config, tokenizer, max_tokens):
    """An item as the model gets it: windows to listen to, tokens with those that are learnt marked."""
    from tools.html_page import audio_player, image, log_mel_figure
    clip = Clips([manifest], np.array([[0, i]]), audio_config)[0]
    if clip["windows"] is None:
        return ""
    heard = f"<p>{html.escape(clip['path'])}: {' + '.join(map(str, clip['n_windows']))} windows</p>"
    try:
        rate = audio_config["sample_rate"]
        heard += audio_player(clip["windows"], rate) + image(log_mel_figure(clip["windows"], rate))
    except UserError as error:  # no matplotlib
        heard += f"<p>{html.escape(str(error))}</p>"
    pair = clip["prompt"], clip["output"]
    if tokenizer is None:
        return heard + f"<pre>{html.escape(pair[0])}\n<b>{html.escape(pair[1])}</b></pre>"
    ids, labels, _ = Collate(tokenizer, max_tokens, 1).encode([pair], [len(clip["n_windows"])])
    tokens = [html.escape(tokenizer.decode([token])) for token in ids[0].tolist()]
    marked = (f'<span class="{"learnt" if label != -100 else "given"}">{token}</span>'
              for token, label in zip(tokens, labels[0].tolist()))
    return heard + f"<p>{' '.join(marked)}</p>"


STYLE = """<style>.bar { background: #69c; height: 1em; display: inline-block; margin-right: .5em }
.given, .learnt { border: 1px solid #ccc; padding: 0 .2em; white-space: pre-wrap }
.learnt { background: #fd9 }
</style>"""


def write_page(path, opened, found, told, audio_config, tokenizer, c):
    from tools.html_page import html_page
    body, causes = [STYLE, "<table><tr><th>manifest<th>items<th>good<th>hours"], defaultdict(list)
    for manifest, of_one in zip(opened, found):
        for i, problem in sorted(of_one.problems.items()):
            causes[cause_of(problem)].append(f"{manifest.name} {i}: {manifest[i]['path']}: {problem}")
        good = of_one.good()
        body.append(f"<tr><td>{html.escape(manifest.name)}<td>{len(manifest)}<td>{len(good)}"
                    f"<td>{of_one.seconds[good].sum() / 3600:.4g}")
    body.append("</table><h2>Causes of failure</h2>" if causes else "</table>")
    for cause, lines in sorted(causes.items(), key=lambda pair: -len(pair[1])):
        shown = "\n".join(map(html.escape, lines[:c.examples]))
        body.append(f"<h3>{html.escape(cause)}: {len(lines)}</h3><pre>{shown}</pre>")
    for what, (values, unit) in told.items():
        body.append(f"<h2>{what}</h2><p>{describe(values, unit)}</p>{bars(values, unit)}")
    good = [of_one.good() for of_one in found]
    ends = np.cumsum([len(rows) for rows in good])
    body.append('<h2>As the model sees them</h2><p><span class="learnt">learnt</span> '
                '<span class="given">given</span></p>')
    for k in np.linspace(0, ends[-1] - 1, min(5, ends[-1])).astype(int):
        m = np.searchsorted(ends, k, "right")
        i = int(good[m][k - ends[m]])  # from its end
        told = seen(opened[m], i, audio_config, tokenizer, c.max_tokens)
        body.append(f'<div class="item"><h3>{html.escape(opened[m].name)} {i}</h3>{told}</div>')
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with atomic_write(path) as f:
        f.write(html_page("Data", "\n".join(body)))
    print(f"report: {path}")


if __name__ == "__main__":
    settings.run(main, "prepare/check.py", files=True)
