"""tools/bench.py data: what data costs: index, items, plans, padding, decoding.

    python tools/bench.py data                       # a million items in 40 manifests, 2 minutes
    python tools/bench.py data --items=10000000      # as many as a pretraining blend; 3 GB of JSON, minutes

Padding and the ranks' imbalance are those that the plan of an epoch counts on.
"""
import json
import os
import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import soundfile
import soxr
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

import config
from data import Manifest, load_audio, open_manifests, plan_epoch
from tools.bench.common import byte_tokenizer, seconds_of, time_in_turns
from tools.common import read_json

items: int = 1_000_000  # of all manifests together

CPU = torch.device("cpu")
MANIFESTS, WORLD, EPOCH, READS = 40, 8, 50_000, 20_000
WINDOWS = {"window_length": 10.0, "window_overlap": 0.0, "max_num_window": 30}
SOUNDS = {  # sample rate, channels
    "44k-stereo.flac": (44100, 2),
    "48k.mp3": (48000, 2),
    "16k.wav": (16000, 1),
    "16k-mono.flac": (16000, 1)}


def write_manifests(folder, total):
    """-> names of MANIFESTS files, the largest a quarter of all: clips of 1-300 s, texts of Python's manual.
    """
    from pydoc_data.topics import topics
    text = " ".join(topics.values())
    rng = random.Random(0)
    names = []
    for k in range(1, MANIFESTS + 1):
        data = {}
        for i in range(1 + int(total * 0.2337 / k)):  # 1 / the sum of all 1 / k
            first = rng.randrange(len(text) - 300)
            data[i] = {
                "name": f"{i % 997}/clip-{i}.flac",
                "prompt": "Describe the sound.",
                "duration": round(rng.uniform(1, 10 ** rng.uniform(0.5, 2.5)), 3),
                "output": text[first:first + 20 + i % 251]}
        head = {"split": "train", "split_path": "a", "flamingo_task": f"Set{k}-AQA", "total_num": len(data)}
        os.mkdir(f"{folder}/Set{k}-AQA")
        with open(f"{folder}/Set{k}-AQA/train.json", "w") as f:
            json.dump(head | {"data": data}, f)
        names.append(f"Set{k}-AQA/train")
    return names


def resident_mb():
    with open("/proc/self/statm") as f:
        pages = f.read().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2 ** 20


# ------------------------------------------------------------------------------------------------------------
# A run that starts on manifests that are indexed already


def read_items(manifests, rows):
    """Read items without their sound -> resident MB of this process."""
    for i in rows if manifests else []:
        manifest = manifests[i % MANIFESTS]
        manifest[i * 7919 % len(manifest)]
    return resident_mb()


def worker_mb(manifests):
    read = partial(read_items, manifests)
    return max(DataLoader(range(READS), batch_size=100, num_workers=1, collate_fn=read))


def start_training(folder, names, total):
    """-> seconds to open all manifests, microseconds an item, seconds to plan an epoch, its padding, MB."""
    smollm2 = config.resolve_path("data/smollm2")
    tokenizer = AutoTokenizer.from_pretrained(smollm2) if os.path.isdir(smollm2) else byte_tokenizer()
    c = SimpleNamespace(**config.defaults() | {
        "dataset_file_root": folder,
        "batch_size": 16,
        "max_windows_per_batch": 48,
        "dataset_blending_config": dict.fromkeys(names, 1.0),
        "dataset_blending_global_weight": EPOCH / total})
    bare_worker = worker_mb([])
    start = time.perf_counter()
    manifests = open_manifests(c, names)
    opened = time.perf_counter()
    largest = manifests[names[0]]
    for i in range(READS):
        largest[i * 7919 % len(largest)]
    read = time.perf_counter()
    _, _, padding = plan_epoch(manifests, c, tokenizer, WINDOWS, epoch=0, world=WORLD)
    return padding | {
        "plan_s": time.perf_counter() - read,
        "restart_s": opened - start,
        "item_us": 1e6 * (read - opened) / READS,
        "rss_main_mb": resident_mb(),
        "rss_worker_mb": worker_mb(list(manifests.values())) - bare_worker}


# ------------------------------------------------------------------------------------------------------------


def decode_over_bare(folder):
    """{file: seconds of soundfile and soxr alone to decode 30 s, over ours}."""
    rng, ratios = np.random.default_rng(0), {}
    for name, (rate, channels) in SOUNDS.items():
        path = f"{folder}/{name}"
        sound = 0.1 * rng.standard_normal((30 * rate, channels))
        soundfile.write(path, sound, rate)

        def bare():
            x, rate = soundfile.read(path, dtype="float32", always_2d=True)
            soxr.resample(x[:, 0], rate, 16000)

        runs = {"ours": lambda: load_audio(path, **WINDOWS), "bare": bare}
        seconds = time_in_turns(runs, CPU)
        ratios[name] = seconds["bare"] / seconds["ours"]
    return ratios


def data(c):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        names = write_manifests(folder, c.items)
        files = [f"{folder}/{name}.json" for name in names]
        json_s = sum(seconds_of(partial(read_json, file), CPU) for file in files)
        index_s = sum(seconds_of(partial(Manifest, file), CPU) for file in files)
        figures = {
            "items": c.items,
            "json_s": json_s,
            "index_s": index_s,
            "index_over_json": index_s / json_s}
        with ProcessPoolExecutor(1, get_context("spawn")) as process:  # with its own memory
            figures |= process.submit(start_training, folder, names, c.items).result()
        ratios = decode_over_bare(folder)
    return figures | {"decoding": ratios, "decode_over_bare": min(ratios.values())}
