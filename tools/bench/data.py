"""tools/bench.py data: what data costs: index, items, plans, padding, decoding.

    python tools/bench.py data                       # a million items in 40 manifests, 2 minutes
    python tools/bench.py data --items=10000000      # as many as a pretraining blend; 3 GB of JSON, minutes
"""
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import numpy as np
import soundfile
import soxr
import torch

import config as settings
from data import Clips, Manifest, load_audio, plan_epoch, train_loader
from tools.data.batches import padding_stats, plan_batches

MANIFESTS, WORLD, EPOCH = 40, 8, 50_000
AUDIO_SETTINGS = {"window_length": 10.0, "window_overlap": 0.0, "max_num_window": 30}


def sentences():
    """English of the standard library's manual, in sentences."""
    from pydoc_data.topics import topics
    words = [" ".join(text.split()).lower() for text in topics.values()]
    return [s for text in words for s in text.split(". ") if 15 < len(s) < 300 and s.isascii()]


def write_manifests(folder, items):
    """MANIFESTS files of together `items` items: the largest a fifth of all, clips of 1-30 s and 30-300 s."""
    rng, text = np.random.default_rng(0), sentences()
    shares = 1 / np.arange(1, MANIFESTS + 1)
    counts = np.maximum(1, (items * shares / shares.sum()).astype(int))
    for m, n in enumerate(counts.tolist()):
        name = f"Set{m}-AQA"
        os.makedirs(f"{folder}/{name}")
        picks, parts = rng.integers(0, len(text), (n, 3)).tolist(), rng.integers(1, 4, n).tolist()
        seconds = np.where(rng.random(n) < 0.5, rng.uniform(1, 30, n), rng.uniform(30, 300, n)).tolist()
        with open(f"{folder}/{name}/train.json", "w") as f:
            head = {"split": "train", "split_path": "a", "flamingo_task": name, "total_num": n}
            f.write(json.dumps(head)[:-1] + ', "data": {')
            for i in range(n):
                output = ". ".join(text[k] for k in picks[i][:parts[i] - 1] + picks[i][2:])[:200]
                item = {"name": f"{i % 997}/clip-{i}.flac", "prompt": "Describe the sound.", "output": output,
                        "duration": round(seconds[i], 3)}
                f.write((", " if i else "") + f'"{i}": ' + json.dumps(item))
            f.write("}}")
    return [f"{folder}/Set{m}-AQA/train.json" for m in range(MANIFESTS)]


def memory(peak=False):
    """Resident MB of this process, or its most so far; getrusage's includes what its parent had."""
    with open("/proc/self/status") as f:
        told = dict(line.split(":", 1) for line in f)
    return int(told["VmHWM" if peak else "VmRSS"].split()[0]) / 1024


def alone(function, *arguments):
    """The result of a function in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def load_json(files):
    before, start = memory(), time.perf_counter()
    for file in files:
        with open(file) as f:
            json.load(f)
    return time.perf_counter() - start, memory(peak=True) - before


def build(files):
    before, start = memory(), time.perf_counter()
    for file in files:
        Manifest(file)
    return time.perf_counter() - start, memory(peak=True) - before


class Read(torch.utils.data.Dataset):
    """Items without their sound; what it gives is the resident MB of the process that reads."""

    def __init__(self, manifests):
        self.manifests = manifests

    def __len__(self):
        return 20_000

    def __getitem__(self, i):
        if self.manifests:
            manifest = self.manifests[i % len(self.manifests)]
            manifest[i * 7919 % len(manifest)]
        return memory()


def worker_memory(manifests):
    loader = torch.utils.data.DataLoader(Read(manifests), batch_size=100, num_workers=1)
    return max(batch.max().item() for batch in loader)


def start_again(folder, names, tokenizer_path, items):
    """Seconds to open all, MB, microseconds an item, seconds of an epoch's plan and of waiting for it, MB of
    a worker."""
    from data import open_manifests
    empty = worker_memory([])
    c = SimpleNamespace(**settings.defaults())
    c.dataset_file_root, c.data_root, c.num_workers, c.seed = folder, folder, 0, 0
    c.max_windows_per_batch, c.batch_size = 48, 16
    c.dataset_blending_config, c.dataset_blending_global_weight = dict.fromkeys(names, 1.0), EPOCH / items
    start = time.perf_counter()
    manifests = open_manifests(c, c.dataset_blending_config)
    restart = time.perf_counter() - start
    rng, largest = np.random.default_rng(1), manifests[names[0]]
    order = rng.integers(0, len(largest), 20_000).tolist()
    start = time.perf_counter()
    for i in order:
        largest[i]
    item = (time.perf_counter() - start) / len(order)
    tokenizer = None
    if tokenizer_path:
        from transformers import AutoTokenizer

        from data import extend_tokenizer
        tokenizer = extend_tokenizer(AutoTokenizer.from_pretrained(tokenizer_path))
    audio_config, plans = AUDIO_SETTINGS | {"sample_rate": 16000}, []
    for epoch in (0, 1, 300):  # the first pass, again, another pass
        start = time.perf_counter()
        plan_epoch(manifests, c, tokenizer, audio_config, epoch, 0, WORLD)
        plans.append(time.perf_counter() - start)
    c.num_workers = 1
    loader, _ = train_loader(manifests, c, tokenizer, audio_config, 1, 0, WORLD)
    next(iter(loader))
    time.sleep(5)  # of the half minute that an epoch takes
    start = time.perf_counter()
    train_loader(manifests, c, tokenizer, audio_config, 2, 0, WORLD, loader=loader)
    wait = time.perf_counter() - start
    return {"restart_s": restart, "rss_main_mb": memory(), "peak_main_mb": memory(peak=True),
            "item_us": item * 1e6, "plan_s": max(plans), "plans_s": plans, "wait_s": wait,
            "rss_worker_mb": worker_memory(list(manifests.values())) - empty}


def padding(files, tokenizer_path):
    """Shares of padding and the ranks' imbalance, with tokens as the tokenizer counts them."""
    manifest = Manifest(files[0])
    rng = np.random.default_rng(2)
    rows = np.stack([np.zeros(EPOCH, int), rng.integers(0, len(manifest), EPOCH)], 1)
    clips = Clips([manifest], rows, AUDIO_SETTINGS)
    tokenizer = None
    if tokenizer_path:
        from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    sizes = clips.sizes(tokenizer)
    true = sizes.copy()
    if tokenizer:
        items = [manifest.items[j] for _, j in rows.tolist()]
        texts = [item["prompt"].lower() + "\n" + item["output"].lower() for item in items]
        true[:, 1] = list(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
    figures = {}
    pool = settings.defaults()["bucket_batches"]
    for name, options in {"by size": {"max_windows": 48}, "by count": {}, "random": None}.items():
        if name == "random":
            order = rng.permutation(EPOCH)[:EPOCH // 128 * 128].reshape(-1, 16, WORLD)
            figures[name] = padding_stats(true, [list(batch.T) for batch in order])
            continue
        plan = plan_batches(sizes, 16, [0, 0], WORLD, pool, **options)
        figures[name] = padding_stats(true, plan)
    return figures


def decode(folder):
    """{format: our windows a second, and over those of a bare soundfile read and soxr call}."""
    t = np.arange(30 * 48000) / 48000
    noise = np.random.default_rng(0).standard_normal((len(t), 2)) * 0.05
    music = (sum(np.sin(2 * np.pi * 220 * k * t) / k for k in range(1, 9)) * 0.2)[:, None] + noise
    forms = {"44.1 kHz stereo flac": ("a.flac", 44100, 2), "48 kHz mp3": ("b.mp3", 48000, 2),
             "16 kHz wav": ("c.wav", 16000, 1), "16 kHz mono flac": ("d.flac", 16000, 1)}

    def bare(path):
        x, rate = soundfile.read(path, dtype="float32", always_2d=True)
        return soxr.resample(x[:, 0], rate, 16000) if rate != 16000 else x

    figures, audio_config = {}, AUDIO_SETTINGS | {"max_num_window": 3}
    for name, (file, rate, channels) in forms.items():
        path = os.path.join(folder, file)
        soundfile.write(path, soxr.resample(music, 48000, rate)[:, :channels], rate)
        ours = lambda path: load_audio(path, **audio_config)
        times = {function: [] for function in (bare, ours)}
        for _ in range(25):  # side by side
            for function, seconds in times.items():
                start = time.perf_counter()
                function(path)
                seconds.append(time.perf_counter() - start)
        a, b = (float(np.median(seconds)) for seconds in times.values())
        figures[name] = {"over_bare": a / b, "windows_s": 3 / b}
    return figures


def data():
    options = dict(arg[2:].partition("=")[::2] for arg in sys.argv[2:])
    if set(options) - {"items"} or not options.get("items", "1").isdigit():
        raise SystemExit("usage: tools/bench.py data [--items=1000000]")
    items = int(options.get("items", 1_000_000))
    tokenizer = settings.resolve_path("data/smollm2")
    tokenizer = tokenizer if os.path.isdir(tokenizer) else None
    print(f"{items:,} items in {MANIFESTS} manifests; texts in " +
          ("tokens of SmolLM2" if tokenizer else "characters: data/smollm2 is not there"))
    torch.set_num_threads(1)
    figures = {"mode": "data", "items": items}
    with tempfile.TemporaryDirectory() as folder:
        files = write_manifests(folder, items)
        names = [file.removeprefix(folder + "/").removesuffix(".json") for file in files]
        figures["json_mb"] = sum(map(os.path.getsize, files)) / 1e6
        json_s, _ = alone(load_json, files)
        _, json_mb = alone(load_json, files[:1])
        build_s, _ = alone(build, files)
        os.remove(files[0] + ".index") if os.path.exists(files[0] + ".index") else None
        _, build_mb = alone(build, files[:1])
        figures |= {"index_over_json": build_s / json_s, "build_memory_over_json": build_mb / json_mb,
                    "json_s": json_s, "build_s": build_s}
        figures |= alone(start_again, folder, names, tokenizer, items)
        wasted = padding(files, tokenizer)
        figures |= wasted["by size"] | {"padding": wasted}
        figures["decode"] = decode(folder)
    figures["decode_over_bare"] = min(form["over_bare"] for form in figures["decode"].values())
    rates = {name: form["windows_s"] for name, form in figures["decode"].items()}
    figures["converted_over_original"] = rates["16 kHz mono flac"] / rates["44.1 kHz stereo flac"]
    for name, value in figures.items():
        print(f"{name:24} {value:.4g}" if isinstance(value, float) else f"{name:24} {value}")
    return figures
