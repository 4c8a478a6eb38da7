"""Manifests, blending, audio, batches.

    python data.py check data/manifests/Clotho-AQA-AQA/test.json --data_root=data     # every file of a manifest, read
    python data.py check a.json b.json --data_root=data --write=cleaned              # and cleaned copies in cleaned/

A manifest is <dataset_file_root>/<Name-Task>/<split>.json (README, "Your own sounds"). Training draws from many of them:
each is an endless shuffled stream, and an epoch is a window of that stream (Manifest.epoch).
"""
import json
import os
import sys
from collections import Counter

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

SAMPLE_RATE = 16000  # Hz

# ----------------------------------------------------------------------------------------------------------------------
# Sound


def load_audio(path, start=0.0, window_length=10.0, window_overlap=0.0, max_num_window=12):
    """One clip as windows: float32 (n, window_length * 16000) in [-1, 1], 1 <= n <= max_num_window.

    From `start` seconds on; first channel; 16 kHz; peak 1 (silence stays silence); zero-padded to whole windows; rounded
    to 16 bits as the published system does. FileNotFoundError or ValueError name the file and what is wrong with it.
    """
    import soundfile
    import soxr
    L, O = round(window_length * SAMPLE_RATE), round(window_overlap * SAMPLE_RATE)
    if not 0 <= O < L or max_num_window < 1 or start < 0:
        raise ValueError(f"{path}: start {start} s, windows of {window_length} s, overlap {window_overlap} s, at most "
                         f"{max_num_window}: expected start >= 0, 0 <= overlap < length, at least one window")
    longest = max_num_window * L - (max_num_window - 1) * O
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such audio file")
    try:
        with soundfile.SoundFile(path) as f:
            rate, first = f.samplerate, int(start * f.samplerate)
            if 0 < first < f.frames:
                f.seek(first)
            x = f.read(-(-longest * rate // SAMPLE_RATE), dtype="float32", always_2d=True)[:, 0]
            frames = f.frames
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise ValueError(f"{path}: not readable as audio ({error})") from error
    if frames == 0 or len(x) == 0 or first >= frames:
        raise ValueError(f"{path}: no audio from {start} s on (the file has {frames / rate:.2f} s)")
    if not np.isfinite(x).all():
        raise ValueError(f"{path}: holds samples that are not finite numbers")
    if rate != SAMPLE_RATE:
        x = soxr.resample(x, rate, SAMPLE_RATE)  # HQ
    if len(x) == 0:  # less than one sample at 16 kHz
        x = np.zeros(1, np.float32)
    peak = np.abs(x).max()
    if peak > 0:  # the published rule; all zeros would be 0/0 there
        x = 2 * x / x.max() - 1 if x.min() >= 0 else x / peak
    n = min(max_num_window, 1 + max(0, -(-(len(x) - L) // (L - O))))
    x = np.pad(x[:longest], (0, max(0, n * L - (n - 1) * O - len(x))))
    x = (np.clip(x, -1, 1) * 32767).astype(np.int16).astype(np.float32) / 32767
    return np.stack([x[i * (L - O):i * (L - O) + L] for i in range(n)])


# ----------------------------------------------------------------------------------------------------------------------
# Manifests


class Manifest:
    """One checked manifest. len(m), m[i] -> {"name", "prompt", "output", "path", "start", "duration"}, m.epoch(e, w).

    Raises FileNotFoundError, or ValueError with file, key and what was expected there.
    """

    def __init__(self, file, data_root="."):
        self.file = file
        self.name = "/".join(file.removesuffix(".json").split("/")[-2:])  # Name-Task/split
        if not os.path.isfile(file):
            raise FileNotFoundError(f"{file}: no such manifest")
        try:
            content = json.load(open(file))
        except ValueError as error:
            raise ValueError(f"{file}: not JSON ({error})") from error
        if not isinstance(content, dict):
            raise ValueError(f"{file}: a {type(content).__name__}, expected an object with split, split_path, "
                             f"flamingo_task, total_num, data")
        for key, kind in (("split", str), ("split_path", str), ("flamingo_task", str), ("total_num", int), ("data", dict)):
            self._expect(content, key, kind, "")
        if content["split"] not in ("train", "val", "test") and not content["split"].startswith("test"):
            self._fail("split", content["split"], "train, val, test (or test_<something>)")
        data = content["data"]
        if content["total_num"] != len(data):
            self._fail("total_num", content["total_num"], f"the number of items in data, {len(data)}")
        self.folder = os.path.join(data_root, content["split_path"])
        absolute = os.path.isabs(content["split_path"])
        for i, (key, item) in enumerate(data.items()):
            where = f"data[{key!r}]"
            if key != str(i):
                self._fail(f"data key {i}", key, f"{str(i)!r} (keys are '0' ... '{len(data) - 1}' in order)")
            if not isinstance(item, dict):
                self._fail(where, item, "an object with name, prompt, output")
            for field in ("name", "prompt", "output"):
                self._expect(item, field, str, where)
            for field in ("duration", "audio_start"):
                if field in item and (type(item[field]) not in (int, float) or item[field] < 0):
                    self._fail(f"{where} {field}", item[field], "seconds, not negative")
            if ".." in item["name"]:  # cheap first look; the full rule only where it can matter
                inside = os.path.normpath(os.path.join(content["split_path"], item["name"]))
                if inside.startswith("..") or (absolute and not inside.startswith(os.path.normpath(content["split_path"]))):
                    self._fail(f"{where} name", item["name"], "a path inside data_root")
        if os.path.normpath(content["split_path"]).startswith(".."):
            self._fail("split_path", content["split_path"], "a path inside data_root, or an absolute one")
        self.items = list(data.values())

    def _fail(self, where, value, expected):
        raise ValueError(f"{self.file}: {where} = {str(value)[:80]!r}, expected {expected}")

    def _expect(self, mapping, key, kind, where):
        if key not in mapping:
            raise ValueError(f"{self.file}: {where} has no {key!r}, expected a {kind.__name__}".replace("  ", " "))
        if type(mapping[key]) is not kind:
            self._fail(f"{where} {key}".strip(), mapping[key], f"a {kind.__name__}")

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        item = self.items[i]
        return {"name": item["name"], "prompt": item["prompt"], "output": item["output"],
                "path": os.path.join(self.folder, item["name"]), "start": float(item.get("audio_start", 0)),
                "duration": item.get("duration")}

    def epoch(self, e, weight):
        """Items of epoch e, (n,) int64, when an epoch takes `weight` passes: positions int(e N w) ... int((e+1) N w) - 1
        of an endless stream whose pass k is a shuffle of all items, so that every pass visits each item once."""
        N = len(self)
        first, stop = int(e * N * weight), int((e + 1) * N * weight)
        shuffled = self._shuffle(np.arange(N), self.name)
        parts = []
        for k in range(first // max(N, 1), -(-stop // max(N, 1))):
            order = shuffled if k == 0 else self._shuffle(shuffled, f"{self.name}-epoch-{k}")
            parts.append(order[max(first - k * N, 0):stop - k * N])
        return np.concatenate(parts) if parts else np.arange(0)

    @staticmethod
    def _shuffle(items, seed_text):
        items = items.copy()
        np.random.default_rng(sum(map(ord, seed_text))).shuffle(items)
        return items


def open_manifests(config, names):
    """{"Name-Task/split": Manifest} for the keys of a blending config."""
    return {name: Manifest(os.path.join(config.dataset_file_root, name + ".json"), config.data_root) for name in names}


# ----------------------------------------------------------------------------------------------------------------------
# Samples and batches


class Clips(Dataset):
    """Items as (windows int16 (n, L), prompt, output, path), or (None, prompt, cause, path) if a file can't be read."""

    def __init__(self, manifests, rows, config):
        """manifests: list; rows: (n, 2) int64 of (manifest, item), None for every item."""
        if rows is None:
            rows = np.concatenate([np.stack([np.full(len(m), i), np.arange(len(m))], 1) for i, m in enumerate(manifests)])
        self.manifests, self.rows = manifests, rows
        self.window = (config.window_length, config.window_overlap, config.max_num_window)
        self.cache = {} if config.cache_audio else None

    def __len__(self):
        return len(self.rows)

    def item(self, i):
        m, j = self.rows[i]
        return self.manifests[m][j]

    def __getitem__(self, i):
        item = self.item(i)
        if self.cache is not None and (item["path"], item["start"]) in self.cache:
            return self.cache[item["path"], item["start"]], item["prompt"], item["output"], item["path"]
        try:
            windows = load_audio(item["path"], item["start"], *self.window)
        except (FileNotFoundError, ValueError) as error:  # counted and reported by whoever asked
            return None, item["prompt"], str(error), item["path"]
        windows = torch.from_numpy(np.rint(windows * 32767).astype(np.int16))  # exact: load_audio rounded to 16 bits
        if self.cache is not None:
            self.cache[item["path"], item["start"]] = windows
        return windows, item["prompt"], item["output"], item["path"]

    def sizes(self):
        """(n, 2): windows and text characters of every item, as the manifests tell: what a step's cost depends on."""
        length, overlap, most = self.window
        sizes = np.empty((len(self), 2), np.int64)
        for i in range(len(self)):
            item = self.item(i)
            seconds = most * length if item["duration"] is None else max(item["duration"] - item["start"], 0)
            windows = min(most, 1 + max(0, -int(-(seconds - length) // (length - overlap))))
            sizes[i] = windows, len(item["prompt"]) + len(item["output"])
        return sizes


class Batches(Sampler):
    """Index lists of one rank for one epoch: seeded, the same plan on every rank, from micro-step `start` on.

    The shuffled items are cut into pools of `pool` global batches; inside a pool, items of like size (windows, then text)
    share a batch, and the ranks share each global batch: little padding, equal work. Pool order stays random.
    The last optimizer step is filled up with the epoch's first items.
    """

    def __init__(self, sizes, batch_size, seed, rank=0, world=1, start=0, multiple=1, pool=64):
        order = np.random.default_rng(seed).permutation(len(sizes))  # seed: a list of integers
        step = batch_size * world
        order = np.resize(order, -(-len(order) // (step * multiple)) * step * multiple) if len(order) else order
        plan = []
        for part in np.split(order, range(pool * step, len(order), pool * step)):
            part = part[np.lexsort(sizes[part].T[::-1])]
            plan.extend(np.split(part, len(part) // step) if len(part) else [])
        plan = [plan[i] for i in np.random.default_rng([*seed, 1]).permutation(len(plan))]
        self.mine = [batch[rank::world].tolist() for batch in plan[start:]]

    def __len__(self):
        return len(self.mine)

    def __iter__(self):
        return iter(self.mine)


def make_labels(input_ids, sep_id, end_id, pad_id):
    """(B, T) ids -> labels: the tokens after the first sep, -100 elsewhere; all -100 where the end was cut off."""
    after_sep = np.cumsum(input_ids == sep_id, 1) - (input_ids == sep_id) > 0
    finished = (input_ids == end_id).any(1, keepdims=True)
    return np.where(after_sep & (input_ids != pad_id) & finished, input_ids, -100)


class Collate:
    """List of Clips items -> {input_ids, labels (B, T), windows (sum W, L) int16, n_windows (B,), cut, bad}."""

    def __init__(self, tokenizer, max_tokens, window_samples):
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.silence = torch.zeros(1, window_samples, dtype=torch.int16)

    def texts(self, pairs):
        t = self.tokenizer
        return [f"<audio>{prompt.strip().lower()}{t.sep_token}{output.strip().lower()}<|endofchunk|>{t.eos_token}"
                for prompt, output in pairs]

    def encode(self, pairs):
        """(prompt, output) pairs -> input_ids, labels (B, T) int64 and how many outputs max_tokens cut."""
        t = self.tokenizer
        ids = t(self.texts(pairs), truncation=True, max_length=self.max_tokens, padding=True, padding_side="right",
                return_tensors="np")["input_ids"]
        labels = make_labels(ids, t.sep_token_id, t.convert_tokens_to_ids("<|endofchunk|>"), t.pad_token_id)
        return torch.from_numpy(ids), torch.from_numpy(labels), int((labels == -100).all(1).sum())

    def __call__(self, items):
        good = [item for item in items if item[0] is not None]
        bad = [cause for windows, _, cause, _ in items if windows is None]
        ids, labels, cut = self.encode([(prompt, output) for _, prompt, output, _ in good] or [("", "")])
        if not good:  # a rank whose whole batch is unreadable still takes part in the step, with nothing to learn
            good, labels = [(self.silence, "", "", "")], torch.full_like(labels, -100)
        return {"input_ids": ids, "labels": labels, "windows": torch.cat([item[0] for item in good]),
                "n_windows": torch.tensor([len(item[0]) for item in good]), "cut": cut, "bad": bad}


def make_loader(clips, batches, tokenizer, config, workers=None):
    workers = config.num_workers if workers is None else workers
    collate = Collate(tokenizer, config.max_tokens, round(config.window_length * SAMPLE_RATE))
    return DataLoader(clips, batch_sampler=batches, collate_fn=collate, num_workers=workers,
                      pin_memory=torch.cuda.is_available(), worker_init_fn=_one_thread if workers else None)


def _one_thread(_):
    torch.set_num_threads(1)


def train_loader(manifests, config, tokenizer, epoch, rank=0, world=1, start=0):
    """Loader of this rank's micro-batches of one epoch, and [(name, first, stop, items)] for the blending record."""
    rows, record = [], []
    for m, (name, manifest) in enumerate(manifests.items()):
        w = config.dataset_blending_global_weight * config.dataset_blending_config[name]
        chosen = manifest.epoch(epoch, w)
        rows.append(np.stack([np.full(len(chosen), m), chosen], 1))
        first = int(epoch * len(manifest) * w)
        record.append({"epoch": epoch, "dataset": name, "total_num": len(manifest), "weight": w, "first": first,
                       "stop": first + len(chosen)})
    rows = np.concatenate(rows)
    if not len(rows):
        raise ValueError(f"epoch {epoch} selects no item at all: dataset_blending_global_weight = "
                         f"{config.dataset_blending_global_weight} is too small for these manifests")
    clips = Clips(list(manifests.values()), rows, config)
    batches = Batches(clips.sizes(), config.batch_size, [config.seed, epoch], rank, world, start,
                      config.gradient_accumulation_steps, config.bucket_batches)
    return make_loader(clips, batches, tokenizer, config), record


def valid_loader(manifest, config, tokenizer, rank=0, world=1):
    """This rank's share of one validation manifest, in order."""
    clips = Clips([manifest], None, config)
    mine = np.arange(rank, len(clips), world)
    batches = np.split(mine, range(config.batch_size, len(mine), config.batch_size))
    return make_loader(clips, [b.tolist() for b in batches if len(b)], tokenizer, config)


# ----------------------------------------------------------------------------------------------------------------------
# python data.py check


def check(file, data_root, write):
    """Read every audio file of a manifest; print each problem and a summary; optionally write a cleaned copy."""
    import soundfile
    from tqdm import tqdm
    manifest, problems, good = Manifest(file, data_root), Counter(), []
    for i in tqdm(range(len(manifest)), desc=manifest.name, unit="clip", disable=None):
        item, problem = manifest[i], None
        try:
            windows = load_audio(item["path"], item["start"])
            info = soundfile.info(item["path"])
            seconds = info.frames / info.samplerate - item["start"]
            if not windows.any():
                problem = "silent"
            elif item["duration"] is not None and abs(item["duration"] - seconds) > 0.5 + 0.01 * seconds:
                problem = "truncated" if seconds < item["duration"] else "wrong duration"
                problem += f": {seconds:.2f} s, manifest says {item['duration']:.2f} s"
        except (FileNotFoundError, ValueError) as error:
            problem = str(error).removeprefix(item["path"] + ": ")
        if problem:
            problems[problem.split(":")[0].split(" (")[0]] += 1
            tqdm.write(f"{manifest.name} {i}: {item['path']}: {problem}")
        else:
            good.append(manifest.items[i])
    print(f"{manifest.name}: {len(manifest)} items, {len(good)} good" +
          "".join(f", {n} {what}" for what, n in problems.items()))
    if write:
        content = json.load(open(file)) | {"total_num": len(good), "data": {str(i): item for i, item in enumerate(good)}}
        path = os.path.join(write, manifest.name + ".json")
        if os.path.realpath(path) == os.path.realpath(file):
            raise ValueError(f"--write={write} would overwrite {file}; name another folder")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path + ".tmp", "w") as f:
            json.dump(content, f, indent=1)
        os.replace(path + ".tmp", path)
        print(f"wrote {path}")
    return not problems


def main():
    options = dict(arg[2:].partition("=")[::2] for arg in sys.argv[1:] if arg.startswith("--"))
    words = [arg for arg in sys.argv[1:] if not arg.startswith("--")]
    if len(words) < 2 or words[0] != "check" or set(options) - {"data_root", "write"}:
        raise ValueError("usage: python data.py check MANIFEST.json ... [--data_root=DIR] [--write=DIR]")
    clean = [check(file, options.get("data_root", "data"), options.get("write")) for file in words[1:]]
    sys.exit(0 if all(clean) else 1)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
