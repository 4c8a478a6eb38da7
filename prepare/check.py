"""Decode every audio file of manifests, and report what is wrong and what there is.

    python prepare/check.py config/pretrain.py                              # all manifests of a config
    python prepare/check.py a.json b.json --data_root=data --write=cleaned  # these, copies without bad items
    python prepare/check.py config/sft.py --page=out/check.html             # the report as a page, too

Nothing is changed in place. Exit code: 0 all items are good, 1 some are not, 2 an error.
"""
import os
import re
import sys
from collections import Counter, defaultdict
from functools import partial

import numpy as np
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import config as settings
from checkpoint import open_pretrained
from data import AUDIO_SETTINGS, SAMPLE_RATE, Clips, Manifest, open_manifests
from prepare.manifests import save_manifest
from tools.checkpoint.clap import clap_state
from tools.checkpoint.htsat import sample_rate_of_mel
from tools.common import (UserError, atomic_write, check_folder_writable, check_not_read, check_writable,
                          map_parallel, optional_import)
from tools.data.audio import SILENT, count_frames, missing_seconds, read_audio
from tools.html_page import clip_html, html_page, html_table

write: str | None = None  # folder for cleaned copies of the manifests; None: none are written
page: str | None = None  # HTML file of the report; None: the terminal alone
workers: int = 0  # processes; 0: one a core

EXAMPLES = 20  # of each cause, on the page


# ------------------------------------------------------------------------------------------------------------
# Shared with convert.py


def open_all_manifests(c):
    """The manifests named on the command line, or all that a config trains and validates with."""
    if c.files:
        root = settings.resolve_path(c.data_root)
        return [Manifest(file, root, c.cache_dir) for file in c.files]
    names = c.dataset_blending_config | c.valid_dataset_config
    if not names:
        raise UserError("name manifests, or a config file with a dataset_blending_config")
    return list(open_manifests(c, names).values())


def audio_config_of(c):
    """The model.audio_config that training starts with: that of pretrained_path where it is on this disk,
    else the config's, with the sample rate of its clap_checkpoint; 30 windows (5 min) where there is no
    config, or a hub id may have another number."""
    if c.pretrained_path and os.path.exists(settings.resolve_path(c.pretrained_path)):
        return open_pretrained(c, settings.overrides(c))[0].audio_config
    audio_config = {name: getattr(c, name) for name in AUDIO_SETTINGS} | {"sample_rate": SAMPLE_RATE}
    if c.clap_checkpoint and os.path.isfile(settings.resolve_path(c.clap_checkpoint)):
        audio_config["sample_rate"] = sample_rate_of_mel(clap_state(c.clap_checkpoint).get("clap.mel"))
    if "max_num_window" not in c.user_set and (c.files or c.pretrained_path):
        audio_config["max_num_window"] = 30
    return audio_config


def output_paths(folder, manifests):
    """Where new manifests are written: not over the old ones, and not over each other."""
    check_folder_writable(folder)
    paths = [os.path.join(folder, manifest.name + ".json") for manifest in manifests]
    for path in paths:
        check_not_read(path, [manifest.file for manifest in manifests])
        if paths.count(path) > 1:
            raise UserError(f"{path}: two manifests have this name")
    return paths


def map_items(work, manifests, workers, title):
    """Yield ((manifest, item), work((manifest, item))) of all items, in order of completion."""
    tasks = ((m, i) for m, manifest in enumerate(manifests) for i in range(len(manifest)))
    describe = lambda task: manifests[task[0]][task[1]]["path"]
    results = map_parallel(work, tasks, workers or os.cpu_count(), describe)
    return tqdm(results, total=sum(map(len, manifests)), desc=title, unit="item", disable=None)


# ------------------------------------------------------------------------------------------------------------
# Inspecting


def inspect_clip(path, start, duration, audio_config):
    """-> what is wrong with a file or None, seconds from `start` on."""
    length, overlap, most = (audio_config[name] for name in AUDIO_SETTINGS)
    longest = most * (length - overlap) + overlap
    try:
        x, _ = read_audio(path, start, longest, audio_config["sample_rate"])
        frames, rate = count_frames(path)
    except (FileNotFoundError, UserError) as error:
        return str(error).removeprefix(path + ": "), 0.0
    seconds = frames / rate - start
    if not duration:  # else it is compared with that
        seconds += missing_seconds(path)
    decoded = len(x) / audio_config["sample_rate"]
    if decoded < min(longest, seconds) - 0.1:
        return f"truncated: {decoded:.2f} s, its header says {seconds:.2f} s", seconds
    return "silent" if np.abs(x).max() <= SILENT else None, seconds


def inspect_item(manifests, audio_config, task):
    """(manifest, item) -> what is wrong or None, its seconds."""
    m, i = task
    item = manifests[m][i]
    duration, total, problem = item["duration"], 0, None
    for path in item["paths"]:
        problem_of_clip, seconds = inspect_clip(path, item["start"], duration, audio_config)
        problem = problem or problem_of_clip
        total += seconds
    if not problem and duration and abs(duration - total) > 0.5 + 0.01 * total:
        difference = f"{total:.2f} s, manifest says {duration:.2f} s"
        if total < duration:
            problem = f"truncated: {difference}"
        elif "audio_start" not in manifests[m].items[i]:  # with it, the item is a part of the file
            problem = f"wrong duration: {difference}"
    return problem, min(total, duration or total)


def cause_of(problem):
    """The class of a problem: its first words, without figures."""
    return re.split(r":| \(| from [\d.]+ s", problem)[0]


class Findings:
    """{item: problem} of a manifest, and the seconds of its good items, -1 elsewhere."""

    def __init__(self, manifest):
        self.manifest, self.problems, self.seconds = manifest, {}, np.full(len(manifest), -1.0)

    def good(self):
        return np.flatnonzero(self.seconds >= 0)


def inspect_manifests(manifests, audio_config, workers):
    """Decode the clips of all items -> Findings of each manifest."""
    findings = [Findings(manifest) for manifest in manifests]
    work = partial(inspect_item, manifests, audio_config)
    for (m, i), (problem, seconds) in map_items(work, manifests, workers, "check"):
        if problem:
            findings[m].problems[i] = problem
            tqdm.write(f"{manifests[m].name} {i}: {manifests[m][i]['path']}: {problem}")
        else:
            findings[m].seconds[i] = seconds
    return findings


# ------------------------------------------------------------------------------------------------------------
# Reporting

COLUMNS = ("manifest", "items", "good", "hours", "median seconds", "longest", "causes")


def summary_row(found):
    """The COLUMNS of a manifest."""
    seconds = found.seconds[found.good()]
    n, median = len(seconds), np.median(seconds) if len(seconds) else 0
    causes = Counter(map(cause_of, found.problems.values())).most_common()
    names = ", ".join(f"{cause} {n}" for cause, n in causes)
    figures = [f"{x:.4g}" for x in (seconds.sum() / 3600, median, seconds.max(initial=0))]
    return [found.manifest.name, len(found.manifest), n, *figures, names]


def write_check_page(path, findings, audio_config):
    """The causes, with examples, and items as the model gets them: windows to see and to hear, texts."""
    body, causes = [html_table(map(summary_row, findings), COLUMNS)], defaultdict(list)
    for found in findings:
        for i, problem in found.problems.items():
            row = f"{found.manifest.name} {i}", found.manifest[i]["path"], problem
            causes[cause_of(problem)].append(row)
    for cause, rows in sorted(causes.items()):
        body.append(f"<h2>{cause}: {len(rows)}</h2>")
        body.append(html_table(rows[:EXAMPLES], ("item", "file", "problem")))
    body.append("<h2>Items as the model sees them</h2>")
    for found in findings:
        for clip in Clips([found.manifest], [(0, i) for i in found.good()[:2]], audio_config):
            texts = html_table((name, clip[name]) for name in ("path", "n_windows", "prompt", "output"))
            sound = clip_html(clip["windows"], audio_config["sample_rate"])
            body.append(f'<div class="item">{texts}{sound}</div>')
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with atomic_write(path) as f:
        f.write(html_page("Data", "\n".join(body)))
    print(f"report: {path}")


def main(c):
    manifests, audio_config = open_all_manifests(c), audio_config_of(c)
    paths = output_paths(settings.resolve_path(c.write), manifests) if c.write else []
    page = c.page and settings.resolve_path(c.page)
    if page:
        check_writable(page)
        optional_import("matplotlib", "--page", "eval")
    findings = inspect_manifests(manifests, audio_config, c.workers)
    for found in findings:
        print(" | ".join(f"{name} {value}" for name, value in zip(COLUMNS, summary_row(found))))
    for path, found in zip(paths, findings):
        items = map(found.manifest.items.__getitem__, found.good())
        save_manifest(path, found.manifest.head["split_path"], items)
        print(f"wrote {path}")
    if page:
        write_check_page(page, findings, audio_config)
    return int(any(found.problems for found in findings))


if __name__ == "__main__":
    settings.run(main, "prepare/check.py", files=True)
