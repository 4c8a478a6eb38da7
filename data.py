"""Sound, manifests, blending, batches, and the form of a prompt.

    python data.py check data/manifests/Clotho-AQA-AQA/test.json --data_root=data  # reads every file
    python data.py check a.json b.json --data_root=data --write=cleaned            # and writes cleaned copies

A manifest is <dataset_file_root>/<Name-Task>/<split>.json (README, "Reproduce"). Training draws from many of
them: each is an endless shuffled stream, and an epoch is a window of that stream (Manifest.epoch).
"""
import json
import os
import sys
from collections import Counter

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

import config as settings

SAMPLE_RATE = 16000  # Hz, unless an encoder of one's own says otherwise
HEARING = ("window_length", "window_overlap", "max_num_window")  # the settings of what is heard of a clip

# ------------------------------------------------------------------------------------------------------------
# Sound


def load_audio(path, start=0.0, *, window_length, window_overlap, max_num_window, sample_rate=SAMPLE_RATE):
    """One clip as windows: int16 (n, window_length * sample_rate), 1 <= n <= max_num_window; model.hearing
    gives the settings, all of them seconds but the last two.

    From `start` seconds on; first channel; resampled; peak 1 (silence stays silence); zero-padded to whole
    windows; 16 bits as in the published system. FileNotFoundError or ValueError name the file and what is
    wrong with it.
    """
    return read_clip(path, start, window_length, window_overlap, max_num_window, sample_rate)[0]


def read_clip(path, start, window_length, window_overlap, max_num_window, sample_rate=SAMPLE_RATE):
    """-> windows as load_audio gives them, and the seconds of the file after them, which are not heard."""
    import soundfile
    import soxr
    L, O = round(window_length * sample_rate), round(window_overlap * sample_rate)
    if not 0 <= O < L or max_num_window < 1 or start < 0:
        raise ValueError(f"{path}: start {start} s, {max_num_window} windows of {window_length} s, overlap "
                         f"{window_overlap} s: expected start >= 0, 0 <= overlap < length, 1 window or more")
    longest = max_num_window * L - (max_num_window - 1) * O
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such audio file")
    try:
        with soundfile.SoundFile(path) as f:
            rate, frames, first = f.samplerate, f.frames, int(start * f.samplerate)
            if 0 < first < frames:
                f.seek(first)
            x = f.read(-(-longest * rate // sample_rate), dtype="float32", always_2d=True)[:, 0]
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise ValueError(f"{path}: not readable as audio ({error})") from error
    if frames == 0 or len(x) == 0 or first >= frames:
        raise ValueError(f"{path}: no audio from {start} s on (the file has {frames / rate:.2f} s)")
    if not np.isfinite(x).all():
        raise ValueError(f"{path}: holds samples that are not finite numbers")
    if rate != sample_rate:
        x = soxr.resample(x, rate, sample_rate)  # HQ
    if len(x) == 0:  # less than one sample
        x = np.zeros(1, np.float32)
    peak = np.abs(x).max()
    if peak > 0:  # the published rule; all zeros would be 0/0 there
        x = 2 * x / x.max() - 1 if x.min() >= 0 else x / peak
    n = min(max_num_window, 1 + max(0, -(-(len(x) - L) // (L - O))))
    x = np.pad(x[:longest], (0, max(0, n * L - (n - 1) * O - len(x))))
    x = (np.clip(x, -1, 1) * 32767).astype(np.int16)
    windows = np.stack([x[i * (L - O):i * (L - O) + L] for i in range(n)])
    return windows, max(0.0, (frames - first) / rate - longest / sample_rate)


def unheard_note(clips, long, seconds, hearing):
    """One line for people about clips longer than what is heard of them; empty if there is none."""
    length, overlap, most = (hearing[name] for name in HEARING)
    heard = most * (length - overlap) + overlap
    return long and (f"note: {long} of {clips} clips are longer than the {heard:g} s that are heard "
                     f"(max_num_window = {most}): {seconds:.1f} s are left out")


# ------------------------------------------------------------------------------------------------------------
# Text: <audio> prompt sep output <|endofchunk|> eos

MARKS = ("<audio>", "<|endofchunk|>", "<|PAD_TOKEN|>", "<SEP>")


def add_marks(tokenizer):
    """A tokenizer with the marks of a prompt, in the published order; <SEP> only if it has no sep token. One
    that is there already stays where it is. ValueError if a mark is not read as one token, or eos lacks."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos token, which ends an answer: see its config")
    tokenizer.add_tokens(list(MARKS[:2]), special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": MARKS[2]})
    if tokenizer.sep_token is None:
        tokenizer.add_special_tokens({"sep_token": MARKS[3]})
    for mark in (*MARKS[:3], tokenizer.sep_token):
        ids = tokenizer(mark, add_special_tokens=False)["input_ids"]
        if ids != [tokenizer.convert_tokens_to_ids(mark)]:
            raise ValueError(f"the tokenizer reads its mark {mark} as {len(ids)} tokens")
    return tokenizer


def encode_text(tokenizer, texts):
    """Texts -> lists of token ids. Only we place marks: inside a text all are characters."""
    texts = [text.strip().lower() for text in texts]
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def encode_prompts(tokenizer, prompts, n_clips=None):
    """Prompts -> lists of ids: what the tokenizer begins with, <audio> for each clip, prompt, sep."""
    audio = tokenizer.convert_tokens_to_ids(MARKS[0])
    begin = tokenizer(MARKS[0])["input_ids"]
    begin = begin[:begin.index(audio)]
    texts, n_clips = encode_text(tokenizer, prompts), n_clips or [1] * len(prompts)
    return [begin + [audio] * n + ids + [tokenizer.sep_token_id] for ids, n in zip(texts, n_clips)]


def pad_rows(rows, pad_id):
    """Lists of ids -> (B, T) int64, padded on the right: causality keeps real tokens from seeing padding."""
    T = max(map(len, rows))
    return torch.tensor([row + [pad_id] * (T - len(row)) for row in rows])


def window_counts(clips):
    """Lists of the windows of each clip of a text -> (B,), or (B, K) where one has several; 0 for none."""
    counts = pad_rows(clips, 0)
    return counts[:, 0] if counts.shape[1] == 1 else counts


def make_labels(input_ids, sep_id, end_id, pad_id):
    """(B, T) ids -> labels: the tokens after the first sep, else -100; all -100 where the end was cut off."""
    after_sep = np.cumsum(input_ids == sep_id, 1) - (input_ids == sep_id) > 0
    finished = (input_ids == end_id).any(1, keepdims=True)
    return np.where(after_sep & (input_ids != pad_id) & finished, input_ids, -100)


# ------------------------------------------------------------------------------------------------------------
# Manifests


KEYS = {"split": str, "split_path": str, "flamingo_task": str, "total_num": int, "data": dict}


class Manifest:
    """One checked manifest. len(m), m[i] -> {"prompt", "output", "path", "paths", "start", "duration"},
    m.epoch(e, w).

    Raises FileNotFoundError, or ValueError with file, key and what was expected there.
    """

    def __init__(self, file, data_root="."):
        self.file = file
        self.name = "/".join(file.removesuffix(".json").split("/")[-2:])  # Name-Task/split
        if not os.path.isfile(file):
            raise FileNotFoundError(f"{file}: no such manifest")
        content = settings.read_json(file)
        if not isinstance(content, dict):
            raise ValueError(f"{file}: a {type(content).__name__}, expected an object with {', '.join(KEYS)}")
        for key, kind in KEYS.items():
            self._expect(content, key, kind, "")
        if content["split"] not in ("train", "val", "test") and not content["split"].startswith("test"):
            self._fail("split", content["split"], "train, val, test (or test_<something>)")
        data = content["data"]
        if content["total_num"] != len(data):
            self._fail("total_num", content["total_num"], f"the number of items in data, {len(data)}")
        folder = os.path.normpath(content["split_path"])
        self.folder = os.path.join(data_root, content["split_path"])
        for i, (key, item) in enumerate(data.items()):
            where = f"data[{key!r}]"
            if key != str(i):
                self._fail(f"data key {i}", key, f"{str(i)!r} (keys are '0' ... '{len(data) - 1}' in order)")
            if not isinstance(item, dict):
                self._fail(where, item, "an object with name, prompt, output")
            names = item.get("name")
            if type(names) is not list or len(names) < 2 or not all(type(name) is str for name in names):
                self._expect(item, "name", str, where)  # or two clips and more, of one question
                names = [names]
            for field in ("prompt", "output"):
                self._expect(item, field, str, where)
            for field in ("duration", "audio_start"):
                if field in item and (type(item[field]) not in (int, float) or item[field] < 0):
                    self._fail(f"{where} {field}", item[field], "seconds, not negative")
            for name in names:
                path = os.path.normpath(os.path.join(folder, name)) if ".." in name else folder
                if path.startswith("..") or (os.path.isabs(folder) and not path.startswith(folder)):
                    self._fail(f"{where} name", name, "a path inside data_root")
        if folder.startswith(".."):
            self._fail("split_path", content["split_path"], "a path inside data_root, or an absolute one")
        self.items = list(data.values())

    def _fail(self, where, value, expected):
        raise ValueError(f"{self.file}: {where} = {str(value)[:80]!r}, expected {expected}")

    def _expect(self, mapping, key, kind, where):
        if key not in mapping:
            where = f"{where} has" if where else "has"
            raise ValueError(f"{self.file}: {where} no {key!r}, expected a {kind.__name__}")
        if type(mapping[key]) is not kind:
            self._fail(f"{where} {key}".strip(), mapping[key], f"a {kind.__name__}")

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        item = self.items[i]
        names = [item["name"]] if type(item["name"]) is str else item["name"]
        paths = [os.path.join(self.folder, name) for name in names]
        return {"prompt": item["prompt"], "output": item["output"], "path": " + ".join(paths), "paths": paths,
                "start": float(item.get("audio_start", 0)), "duration": item.get("duration")}

    def epoch(self, e, weight):
        """Items of epoch e, (n,) int64, when an epoch takes w = `weight` passes: positions int(e N w) to
        int((e+1) N w) - 1 of an endless stream whose passes are shuffles of all items: each has each once."""
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
    folder, data_root = settings.place(config.dataset_file_root), settings.place(config.data_root)
    return {name: Manifest(os.path.join(folder, name + ".json"), data_root) for name in names}


# ------------------------------------------------------------------------------------------------------------
# Samples and batches


class Clips(Dataset):
    """Items as {"prompt", "output", "path", "windows" int16 (n, L), "n_windows" of each clip, "unheard"
    seconds}; where a file can't be read windows are None and "error" says why."""

    def __init__(self, manifests, rows, hearing, cache=False):
        """rows: (n, 2) int64 of (manifest, item), None for every item; hearing: that of the model."""
        if rows is None:
            every = [np.stack([np.full(len(m), i), np.arange(len(m))], 1) for i, m in enumerate(manifests)]
            rows = np.concatenate(every)
        self.manifests, self.rows, self.hearing = manifests, rows, hearing
        self.cache = {} if cache else None

    def __len__(self):
        return len(self.rows)

    def item(self, i):
        m, j = self.rows[i]
        return self.manifests[m][j]

    def __getitem__(self, i):
        item = self.item(i)
        sample = {"prompt": item["prompt"], "output": item["output"], "path": item["path"]}
        where = (item["path"], item["start"])
        if self.cache is not None and where in self.cache:
            return sample | self.cache[where]
        try:
            clips = [read_clip(path, item["start"], **self.hearing) for path in item["paths"]]
        except (FileNotFoundError, ValueError) as error:  # counted and reported by whoever asked
            return sample | {"windows": None, "error": str(error)}
        windows = np.concatenate([windows for windows, _ in clips])
        heard = {"windows": torch.from_numpy(windows), "n_windows": [len(windows) for windows, _ in clips],
                 "unheard": sum(more for _, more in clips)}
        if self.cache is not None:
            self.cache[where] = heard
        return sample | heard

    def sizes(self):
        """(n, 2): windows and text characters of every item, as manifests tell: what a step costs."""
        length, overlap, most = (self.hearing[name] for name in HEARING)
        sizes = np.empty((len(self), 2), np.int64)
        for i in range(len(self)):
            item = self.item(i)
            unknown = item["duration"] is None
            seconds = most * length if unknown else max(item["duration"] - item["start"], 0)
            windows = min(most, 1 + max(0, -int(-(seconds - length) // (length - overlap))))
            sizes[i] = windows, len(item["prompt"]) + len(item["output"])
        return sizes


class Batches(Sampler):
    """Index lists of one rank for one epoch: seeded, the same plan on every rank, from micro-step `start` on.

    The shuffled items are cut into pools of `pool` global batches; inside a pool, items of like size
    (windows, then text) share a batch, and the ranks share each global batch: little padding, equal work.
    Pool order stays random. The last optimizer step is filled up with the epoch's first items.
    """

    def __init__(self, sizes, batch_size, seed, rank=0, world=1, start=0, multiple=1, pool=64):
        order = np.random.default_rng(seed).permutation(len(sizes))  # seed: a list of integers
        step = batch_size * world
        steps = -(-len(order) // (step * multiple)) * multiple
        order = np.resize(order, steps * step) if len(order) else order
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


class Collate:
    """List of Clips items -> a batch: input_ids and labels (B, T), windows (sum W, L) int16, n_windows (B,),
    and what is to be reported: bad (why clips could not be read), cut (outputs beyond max_tokens), long
    (clips heard in part) and unheard (their seconds that are not)."""

    def __init__(self, tokenizer, max_tokens, window_samples):
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.silence = torch.zeros(1, window_samples, dtype=torch.int16)

    def encode(self, pairs, n_clips=None):
        """(prompt, output) pairs -> input_ids, labels (B, T) int64 and how many outputs max_tokens cut."""
        t = self.tokenizer
        end_id = t.convert_tokens_to_ids(MARKS[1])
        prompts = encode_prompts(t, [prompt for prompt, _ in pairs], n_clips)
        outputs = encode_text(t, [output for _, output in pairs])
        rows = [(p + o + [end_id, t.eos_token_id])[:self.max_tokens] for p, o in zip(prompts, outputs)]
        ids = pad_rows(rows, t.pad_token_id)
        labels = make_labels(ids.numpy(), t.sep_token_id, end_id, t.pad_token_id)
        return ids, torch.from_numpy(labels), int((labels == -100).all(1).sum())

    def __call__(self, items):
        good = [item for item in items if item["windows"] is not None]
        bad = [item["error"] for item in items if item["windows"] is None]
        unheard = [item["unheard"] for item in good if item["unheard"]]
        n_clips = [len(item["n_windows"]) for item in good] or [1]
        pairs = [(item["prompt"], item["output"]) for item in good] or [("", "")]
        ids, labels, cut = self.encode(pairs, n_clips)
        windows = [item["windows"] for item in good]
        n_windows = [item["n_windows"] for item in good]
        if not good:  # a rank whose whole batch is unreadable still takes part, with nothing to learn
            windows, n_windows, labels, cut = [self.silence], [[1]], torch.full_like(labels, -100), 0
        n_windows = window_counts(n_windows)
        return {"input_ids": ids, "labels": labels, "windows": torch.cat(windows), "n_windows": n_windows,
                "cut": cut, "bad": bad, "long": len(unheard), "unheard": sum(unheard)}


def make_loader(clips, batches, tokenizer, config):
    workers, hearing = config.num_workers, clips.hearing
    collate = Collate(tokenizer, config.max_tokens, round(hearing["window_length"] * hearing["sample_rate"]))
    return DataLoader(clips, batch_sampler=batches, collate_fn=collate, num_workers=workers,
                      pin_memory=torch.cuda.is_available(), worker_init_fn=_one_thread if workers else None)


def _one_thread(_):
    torch.set_num_threads(1)


def train_loader(manifests, config, tokenizer, hearing, epoch, rank=0, world=1, start=0):
    """Loader of this rank's micro-batches of one epoch, and what the blending record says of it."""
    rows, record = [], []
    for m, (name, manifest) in enumerate(manifests.items()):
        w = config.dataset_blending_global_weight * config.dataset_blending_config[name]
        chosen = manifest.epoch(epoch, w)
        rows.append(np.stack([np.full(len(chosen), m), chosen], 1))
        first = int(epoch * len(manifest) * w)
        record.append({"epoch": epoch, "dataset": name, "total_num": len(manifest), "weight": w,
                       "first": first, "stop": first + len(chosen)})
    rows = np.concatenate(rows)
    if not len(rows):
        raise ValueError(f"epoch {epoch} selects no item at all: dataset_blending_global_weight = "
                         f"{config.dataset_blending_global_weight} is too small for these manifests")
    clips = Clips(list(manifests.values()), rows, hearing, config.cache_audio)
    batches = Batches(clips.sizes(), config.batch_size, [config.seed, epoch], rank, world, start,
                      config.gradient_accumulation_steps, config.bucket_batches)
    return make_loader(clips, batches, tokenizer, config), record


def valid_loader(manifest, config, tokenizer, hearing, rank=0, world=1):
    """This rank's share of one validation manifest, in order."""
    clips = Clips([manifest], None, hearing, config.cache_audio)
    mine = np.arange(rank, len(clips), world)
    batches = np.split(mine, range(config.batch_size, len(mine), config.batch_size))
    return make_loader(clips, [b.tolist() for b in batches if len(b)], tokenizer, config)


# ------------------------------------------------------------------------------------------------------------
# python data.py check


def check(file, data_root, write):
    """Read every audio file of a manifest; print each problem and a summary; write a clean copy if asked."""
    import soundfile
    from tqdm import tqdm
    manifest, problems, good = Manifest(file, data_root), Counter(), []
    defaults = settings.defaults()
    hearing = {name: defaults[name] for name in HEARING}
    hearing["max_num_window"] = 30  # 5 min, the most that a stage hears
    for i in tqdm(range(len(manifest)), desc=manifest.name, unit="clip", disable=None):
        item, problem = manifest[i], None
        try:
            heard = [load_audio(path, item["start"], **hearing).any() for path in item["paths"]]
            infos = [soundfile.info(path) for path in item["paths"]]
            seconds = sum(info.frames / info.samplerate - item["start"] for info in infos)
            if not all(heard):
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
        data = {str(i): item for i, item in enumerate(good)}
        content = json.load(open(file)) | {"total_num": len(good), "data": data}
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
