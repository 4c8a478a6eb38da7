"""tools/bench.py data: what data costs: index, items, plans, padding, decoding.

    python tools/bench.py data                       # a million items in 40 manifests, 2 minutes
    python tools/bench.py data --items=10000000      # as many as a pretraining blend; 3 GB of JSON, minutes
"""
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import soundfile
import soxr
import torch

import config
from data import Clips, Manifest, load_audio, open_manifests, plan_epoch
from tools.bench.common import ByteTokenizer, medians_in_turns, print_table
from tools.data.batches import padding_stats, plan_batches

items: int = 1_000_000  # of all manifests together

MANIFESTS, WORLD, EPOCH, READS = 40, 8, 50_000, 20_000
WINDOWS = {"window_length": 10.0, "window_overlap": 0.0, "max_num_window": 30}


def write_manifests(folder, total):
    """MANIFESTS files, the largest a quarter of all: clips of 1-300 s, texts of Python's manual."""
    from pydoc_data.topics import topics
    words, rng = " ".join(topics.values()).split(), np.random.default_rng(0)
    shares = 1 / np.arange(1, MANIFESTS + 1)
    names = [f"Set{i}-AQA/train" for i in range(MANIFESTS)]
    for name, share in zip(names, shares / shares.sum()):
        n = max(1, int(total * share))
        seconds = rng.uniform(1, 10 ** rng.uniform(0.5, 2.5, n)).round(3)
        first = rng.integers(0, len(words) - 40, n)
        data = {str(i): {"name": f"{i % 997}/clip-{i}.flac", "prompt": "Describe the sound.",
                         "duration": duration,
                         "output": " ".join(words[at:at + 3 + i % 37])}
                for i, (duration, at) in enumerate(zip(seconds.tolist(), first.tolist()))}
        os.makedirs(os.path.dirname(f"{folder}/{name}"))
        with open(f"{folder}/{name}.json", "w") as f:
            json.dump({"split": "train", "split_path": "a", "flamingo_task": name.split("/")[0],
                       "total_num": n,
                       "data": data}, f)
    return names


def in_new_process(function, *arguments):
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def resident_mb():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 20


def seconds_to_open(read, files):
    start = time.perf_counter()
    for file in files:
        read(file)
    return time.perf_counter() - start


def read_json_file(file):
    with open(file) as f:
        json.load(f)


# ------------------------------------------------------------------------------------------------------------
# A run that starts on manifests that are indexed already


class MemoryOfReads(torch.utils.data.Dataset):
    """Reads items without their sound; its samples are the resident MB of the process that reads."""

    def __init__(self, manifests):
        self.manifests = manifests

    def __len__(self):
        return READS

    def __getitem__(self, i):
        if self.manifests:
            manifest = self.manifests[i % MANIFESTS]
            manifest[i * 7919 % len(manifest)]
        return resident_mb()


def worker_mb(manifests):
    loader = torch.utils.data.DataLoader(MemoryOfReads(manifests), batch_size=100, num_workers=1)
    return max(batch.max().item() for batch in loader)


def start_training(folder, names, tokenizer, total):
    """-> seconds to open all manifests, microseconds an item, seconds to plan an epoch, resident MB."""
    bare_worker = worker_mb([])
    c = SimpleNamespace(**config.defaults() | {
        "dataset_file_root": folder, "data_root": folder, "max_windows_per_batch": 48, "batch_size": 16,
        "dataset_blending_config": dict.fromkeys(names, 1.0),
        "dataset_blending_global_weight": EPOCH / total})
    start = time.perf_counter()
    manifests = open_manifests(c, c.dataset_blending_config)
    opened = time.perf_counter()
    largest = manifests[names[0]]
    for i in np.random.default_rng(1).integers(0, len(largest), READS).tolist():
        largest[i]
    read = time.perf_counter()
    plan_epoch(manifests, c, tokenizer, WINDOWS | {"sample_rate": 16000}, 0, 0, WORLD)
    return {"restart_s": opened - start, "item_us": 1e6 * (read - opened) / READS,
            "plan_s": time.perf_counter() - read, "rss_main_mb": resident_mb(),
            "rss_worker_mb": worker_mb(list(manifests.values())) - bare_worker}


def plan_padding(file, tokenizer):
    """Shares of padding and the ranks' imbalance in batches of at most 48 windows; tokens as they are."""
    manifest = Manifest(file)
    chosen = np.random.default_rng(2).integers(0, len(manifest), EPOCH)
    rows = np.stack([np.zeros_like(chosen), chosen], 1)
    sizes = Clips([manifest], rows, WINDOWS).sizes(tokenizer)  # estimated, by which the batches are made
    plan = plan_batches(sizes, 16, [0, 0], WORLD, max_windows=48)
    items = [manifest.items[i] for i in chosen.tolist()]
    texts = [f"{item['prompt']}\n{item['output']}".lower() for item in items]
    sizes[:, 1] = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return padding_stats(sizes, plan)


def decode_over_bare(folder):
    """{file: our seconds to decode 30 s, over those of soundfile and soxr alone}."""
    sound = 0.1 * np.random.default_rng(0).standard_normal((30 * 48000, 2))
    ratios = {}
    for name, rate, channels in (("44k-stereo.flac", 44100, 2), ("48k.mp3", 48000, 2), ("16k.wav", 16000, 1),
                                 ("16k-mono.flac", 16000, 1)):
        path = f"{folder}/{name}"
        soundfile.write(path, soxr.resample(sound, 48000, rate)[:, :channels], rate)

        def bare():
            x, rate = soundfile.read(path, dtype="float32", always_2d=True)
            soxr.resample(x[:, 0], rate, 16000)

        runs = {"ours": lambda: load_audio(path, **WINDOWS), "bare": bare}
        seconds = medians_in_turns(runs, torch.device("cpu"))
        ratios[name] = seconds["bare"] / seconds["ours"]
    return ratios


def data(c):
    torch.set_num_threads(1)
    tokenizer = ByteTokenizer()
    if os.path.isdir(folder := config.resolve_path("data/smollm2")):
        from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as folder:
        names = write_manifests(folder, c.items)
        files = [f"{folder}/{name}.json" for name in names]
        json_s = in_new_process(seconds_to_open, read_json_file, files)
        index_s = in_new_process(seconds_to_open, Manifest, files)
        figures = {"items": c.items, "json_s": json_s, "index_s": index_s,
                   "index_over_json": index_s / json_s}
        figures |= in_new_process(start_training, folder, names, tokenizer, c.items)
        figures |= plan_padding(files[0], tokenizer)
        ratios = decode_over_bare(folder)
    print_table(["seconds of soundfile and soxr over ours", ""], ratios.items())
    return figures | {"decode_over_bare": min(ratios.values())}
