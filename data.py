"""Sound, manifests, blending, batches, and the form of a prompt.

A manifest is <dataset_file_root>/<Name-Task>/<split>.json (README, "Reproduce"). Training draws from many of
them: each is an endless shuffled stream, and an epoch is a window of that stream (Manifest.epoch).
"""
import math
import os
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import config as settings
from model import AUDIO_SETTINGS, SAMPLE_RATE, SPECIAL_TOKENS
from tools.common import UserError
from tools.data import audio as sound
from tools.data.batches import Batches, about_tokens
from tools.data.index import open_items

MOST_SECONDS = 1e7  # a clip is shorter

# ------------------------------------------------------------------------------------------------------------
# Sound


def load_audio(path, start=0.0, *, window_length, window_overlap, max_num_window, sample_rate=SAMPLE_RATE):
    """One clip as windows: int16 (n, window_length * sample_rate), 1 <= n <= max_num_window; model.audio_config
    gives the settings, all of them seconds but the last two.

    From `start` seconds on; first channel; resampled; peak 1 (silence stays silence); zero-padded to whole
    windows; 16 bits as in the published system. FileNotFoundError or ValueError name the file and what is
    wrong with it.
    """
    return read_clip(path, start, window_length, window_overlap, max_num_window, sample_rate)[0]


def read_clip(path, start, window_length, window_overlap, max_num_window, sample_rate=SAMPLE_RATE,
              seconds=None):
    """-> windows as load_audio gives them, and how many seconds after them are not heard. `seconds`: all that
    the item hears from `start` on, if that is told: a manifest's duration."""
    y, unheard = read_heard(path, start, window_length, window_overlap, max_num_window, sample_rate, seconds)
    L, O = round(window_length * sample_rate), round(window_overlap * sample_rate)
    n = min(max_num_window, 1 + max(0, -(-(len(y) - L) // (L - O))))
    if silence := n * L - (n - 1) * O - len(y):
        y = np.concatenate([y, np.zeros(silence, np.int16)])
    return np.stack([y[i * (L - O):i * (L - O) + L] for i in range(n)]) if O else y.reshape(n, L), unheard


def read_heard(path, start, window_length, window_overlap, max_num_window, sample_rate, seconds=None):
    """What read_clip cuts into windows: int16 (n,), n > 0; and how many seconds after it are not heard."""
    L, O = round(window_length * sample_rate), round(window_overlap * sample_rate)
    if not (0 <= O < L and max_num_window >= 1 and 0 <= start < MOST_SECONDS):
        raise UserError(f"{path}: start {start} s, {max_num_window} windows of {window_length} s, overlap "
                         f"{window_overlap} s: expected start >= 0, 0 <= overlap < length, 1 window or more")
    longest = max_num_window * L - (max_num_window - 1) * O
    heard = min(longest / sample_rate, seconds or math.inf)
    x, low, high, rest = sound.read(path, start, heard, sample_rate)
    peak = max(high, -low)
    if low >= 0 < peak:  # the published rule
        x = 2 * x / high - 1
    elif peak > 0:  # all zeros would be 0/0 there
        x /= peak
    x *= 32767
    return x[:longest].astype(np.int16), max(0.0, min(rest, seconds or math.inf) - heard)


def truncation_warning(clips, long, seconds, audio_config):
    """One line for people about clips longer than what is heard of them; empty if there is none."""
    length, overlap, most = (audio_config[name] for name in AUDIO_SETTINGS)
    heard = most * (length - overlap) + overlap
    return long and (f"note: {long} of {clips} clips are longer than the {heard:g} s that are heard "
                     f"(max_num_window = {most}): {seconds:.1f} s are left out")


# ------------------------------------------------------------------------------------------------------------
# Text: <audio> prompt sep output <|endofchunk|> eos


def extend_tokenizer(tokenizer):
    """A tokenizer with the marks of a prompt, in the published order; <SEP> only if it has no sep token. One
    that is there already stays where it is. ValueError if a mark is not read as one token, or eos lacks."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos token, which ends an answer: see its config")
    tokenizer.add_tokens(list(SPECIAL_TOKENS[:2]), special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": SPECIAL_TOKENS[2]})
    if tokenizer.sep_token is None:
        tokenizer.add_special_tokens({"sep_token": SPECIAL_TOKENS[3]})
    for mark in (*SPECIAL_TOKENS[:3], tokenizer.sep_token):
        ids = tokenizer(mark, add_special_tokens=False)["input_ids"]
        if ids != [tokenizer.convert_tokens_to_ids(mark)]:
            raise UserError(f"the tokenizer reads its mark {mark} as {len(ids)} tokens")
    return tokenizer


def encode_text(tokenizer, texts):
    """Texts -> lists of token ids. Only we place marks: inside a text all are characters."""
    texts = [text.strip().lower() for text in texts]
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def encode_prompts(tokenizer, prompts, n_clips=None):
    """Prompts -> lists of ids: what the tokenizer begins with, <audio> for each clip, prompt, sep."""
    audio = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[0])
    begin = tokenizer(SPECIAL_TOKENS[0])["input_ids"]
    begin = begin[:begin.index(audio)]
    texts, n_clips = encode_text(tokenizer, prompts), n_clips or [1] * len(prompts)
    return [begin + [audio] * n + ids + [tokenizer.sep_token_id] for ids, n in zip(texts, n_clips)]


def pad_rows(rows, pad_id, multiple=1):
    """Lists of ids -> (B, T) int64, padded on the right: causality keeps real tokens from seeing padding. T
    is the longest, rounded up to a multiple: compiled graphs are made for few lengths."""
    T = -(-max(map(len, rows)) // multiple) * multiple
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


HALF = re.compile("[\ud800-\udfff]")  # JSON can spell one, UTF-8, tokenizers and file systems can't
KEYS = {"split": str, "split_path": str, "flamingo_task": str, "total_num": int, "data": dict}


class Manifest:
    """One checked manifest. len(m), m[i] -> {"prompt", "output", "path", "paths", "start", "duration"},
    m.items[i] -> all that the manifest says of item i, m.epoch(e, w). duration: the seconds from start on
    that the item hears, of all its clips together, or None.

    Raises FileNotFoundError, or ValueError with file, key and what was expected there.
    """

    def __init__(self, file, data_root=".", cache_dir=None):
        self.file = file
        self.name = "/".join(file.removesuffix(".json").split("/")[-2:])  # Name-Task/split
        if not os.path.isfile(file):
            raise FileNotFoundError(f"{file}: no such manifest")
        self.dotted = []  # (item, name): names with "..", which split_path tells the place of
        self.head, self.items = open_items(file, self._check_item, self._check_head, cache_dir)
        self.folder = os.path.join(data_root, self.head["split_path"])
        self.order = None, None  # the pass at hand and its order

    def _check_head(self, content, n):
        if not isinstance(content, dict):
            raise UserError(f"{self.file}: a {type(content).__name__}, expected an object with "
                             f"{', '.join(KEYS)}")
        for key, kind in KEYS.items():
            self._expect(content, key, kind)
        if content["split"] not in ("train", "val", "test") and not content["split"].startswith("test"):
            self._fail("split", content["split"], "train, val, test (or test_<something>)")
        if content["total_num"] != n:
            self._fail("total_num", content["total_num"], f"the number of items in data, {n}")
        folder = os.path.normpath(content["split_path"])
        outside = lambda path: path == ".." or path.startswith("../")
        if outside(folder):
            self._fail("split_path", content["split_path"], "a path inside data_root, or an absolute one")
        for i, name in self.dotted:
            path = os.path.normpath(os.path.join(folder, name))
            if outside(path) or (os.path.isabs(folder) and outside(os.path.relpath(path, folder))):
                self._fail("name", name, "a path inside data_root", i)

    def _check_item(self, i, key, item):
        """-> seconds heard, nan where that is not told; number of clips."""
        if key != str(i):
            self._fail(f"data key {i}", key, f"{str(i)!r} (keys are '0', '1', ... in order)")
        if type(item) is not dict:
            self._fail("", item, "an object with name, prompt, output", i)
        names = item.get("name")
        names = names if type(names) is list and len(names) > 1 else [self._expect(item, "name", str, i)]
        self._expect(item, "prompt", str, i)
        self._expect(item, "output", str, i)
        for field in ("duration", "audio_start"):
            if field in item and not (type(item[field]) in (int, float) and 0 <= item[field] < MOST_SECONDS):
                self._fail(field, item[field], f"seconds, not negative, below {MOST_SECONDS:g}", i)
        for name in names:
            if len(names) > 1:  # clips of one question
                self._expect({"name": name}, "name", str, i)
            if ".." in name:
                self.dotted.append((i, name))
        return item.get("duration") or math.nan, len(names)

    def _fail(self, key, value, expected, item=None):
        where = key if item is None else f"data['{item}'] {key}".strip()
        raise UserError(f"{self.file}: {where} = {str(value)[:80]!r}, expected {expected}")

    def _expect(self, mapping, key, kind, item=None):
        if key not in mapping:
            where = "has" if item is None else f"data['{item}'] has"
            raise UserError(f"{self.file}: {where} no {key!r}, expected a {kind.__name__}")
        value = mapping[key]
        if type(value) is not kind:
            self._fail(key, value, f"a {kind.__name__}", item)
        if kind is str and not value.isascii() and HALF.search(value):
            self._fail(key, ascii(value), "text, without halves of characters", item)
        return value

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
        parts = [np.arange(0)]
        for k in range(first // max(N, 1), -(-stop // max(N, 1))):
            parts.append(self._pass(k)[max(first - k * N, 0):stop - k * N])
        return np.concatenate(parts)

    def _pass(self, k):
        """The order of pass k, (N,); the latest is kept: 200 epochs are a few passes."""
        last, order = self.order
        if last != k:
            order = np.arange(len(self), dtype=np.int32)
            for text in [self.name] + [f"{self.name}-epoch-{k}"] * (k > 0):
                np.random.default_rng(sum(map(ord, text))).shuffle(order)
            self.order = k, order
        return order


def open_manifests(config, names):
    """{"Name-Task/split": Manifest} for the keys of a blending config."""
    folder, data_root = settings.resolve_path(config.dataset_file_root), settings.resolve_path(config.data_root)
    open_one = lambda name: Manifest(os.path.join(folder, name + ".json"), data_root, config.cache_dir)
    with ThreadPoolExecutor(4) as pool:  # most of it is hashing and reading, outside of Python's lock
        return dict(zip(names, pool.map(open_one, names)))


# ------------------------------------------------------------------------------------------------------------
# Samples and batches


class Clips(Dataset):
    """clips[row] or clips[manifest, item] -> {"prompt", "output", "path", "windows" int16 (n, L), "n_windows"
    of each clip, "unheard" seconds}; where a file can't be read windows are None and "error" says why."""

    def __init__(self, manifests, rows, audio_config, cache=False):
        """rows: (n, 2) int64 of (manifest, item), None for every item; audio_config: that of the model."""
        if rows is None:
            every = [np.stack([np.full(len(m), i), np.arange(len(m))], 1) for i, m in enumerate(manifests)]
            rows = np.concatenate(every)
        self.manifests, self.rows, self.audio_config = manifests, rows, audio_config
        self.cache = {} if cache else None

    def __len__(self):
        return len(self.rows)

    def item(self, i):
        m, j = i if type(i) is tuple else self.rows[i]
        return self.manifests[m][j]

    def __getitem__(self, i):
        item = self.item(i)
        sample = {"prompt": item["prompt"], "output": item["output"], "path": item["path"]}
        seconds = item["duration"] if len(item["paths"]) == 1 else None  # of several clips, their sum
        where = (item["path"], item["start"], seconds)
        if self.cache is not None and where in self.cache:
            return sample | self.cache[where]
        try:
            part = {"start": item["start"], "seconds": seconds} | self.audio_config
            clips = [read_clip(path, **part) for path in item["paths"]]
        except (FileNotFoundError, UserError) as error:  # counted and reported by whoever asked
            return sample | {"windows": None, "error": str(error)}
        windows = np.concatenate([windows for windows, _ in clips])
        heard = {"windows": torch.from_numpy(windows), "n_windows": [len(windows) for windows, _ in clips],
                 "unheard": sum(more for _, more in clips)}
        if self.cache is not None:
            self.cache[where] = heard
        return sample | heard

    def windows(self):
        """(n,) windows of every row, as manifests tell; the most where one tells no duration."""
        length, overlap, most = (self.audio_config[name] for name in AUDIO_SETTINGS)
        rate = self.audio_config.get("sample_rate", SAMPLE_RATE)
        windows = np.empty(len(self), np.int64)
        for m in np.unique(self.rows[:, 0]):
            mine, items = self.rows[:, 0] == m, self.manifests[m].items
            chosen = self.rows[mine, 1]
            clips, seconds = items.column("clips")[chosen], items.column("seconds")[chosen].astype(float)
            samples = np.nan_to_num(np.rint(seconds * rate), nan=math.inf)
            more = np.ceil((samples - clips * length * rate) / ((length - overlap) * rate))
            windows[mine] = np.minimum(most * clips, clips + np.maximum(0, more))
        return windows

    def sizes(self, tokenizer=None):
        """(n, 2): windows and text tokens (without a tokenizer: characters) of every row."""
        prompts, outputs = [""] * len(self), [""] * len(self)
        for m in np.unique(self.rows[:, 0]):
            mine = np.flatnonzero(self.rows[:, 0] == m)
            for i, item in zip(mine.tolist(), self.manifests[m].items.many(self.rows[mine, 1])):
                prompts[i], outputs[i] = item["prompt"].strip().lower(), item["output"].strip().lower()
        count = about_tokens(tokenizer, {*prompts, *outputs}).get if tokenizer else len
        texts = [count(prompt) + count(output) for prompt, output in zip(prompts, outputs)]
        return np.stack([self.windows(), np.array(texts, np.int64)], 1)


class Collate:
    """List of Clips items -> a batch: input_ids and labels (B, T), windows (sum W, L) int16, n_windows (B,),
    and what is to be reported: bad (why clips could not be read), cut (outputs beyond max_tokens), long
    (clips heard in part), unheard (their seconds that are not) and paths of the others."""

    def __init__(self, tokenizer, max_tokens, window_samples, multiple=1):
        self.tokenizer, self.max_tokens, self.multiple = tokenizer, max_tokens, multiple
        self.silence = torch.zeros(1, window_samples, dtype=torch.int16)

    def encode(self, pairs, n_clips=None):
        """(prompt, output) pairs -> input_ids, labels (B, T) int64 and how many outputs max_tokens cut."""
        t = self.tokenizer
        end_id = t.convert_tokens_to_ids(SPECIAL_TOKENS[1])
        prompts = encode_prompts(t, [prompt for prompt, _ in pairs], n_clips)
        outputs = encode_text(t, [output for _, output in pairs])
        rows = [(p + o + [end_id, t.eos_token_id])[:self.max_tokens] for p, o in zip(prompts, outputs)]
        ids = pad_rows(rows, t.pad_token_id, self.multiple)
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
                "cut": cut, "bad": bad, "long": len(unheard), "unheard": sum(unheard),
                "paths": [item["path"] for item in good]}


class EpochLoader(DataLoader):
    """A DataLoader that plans the epoch after its own in a thread, once its workers are there: training does
    not wait for that. Its batch_sampler is a list; plan(): what that becomes, or None."""
    plan, planned, thread = None, None, ThreadPoolExecutor(1)

    def __iter__(self):
        batches = super().__iter__()
        self.planned = self.plan and self.thread.submit(self.plan)
        return batches


def make_loader(clips, batches, tokenizer, config, live=False):
    """live: its workers wait for the next batches that are put into the list."""
    workers, audio_config = config.num_workers, clips.audio_config
    collate = Collate(tokenizer, config.max_tokens, round(audio_config["window_length"] * audio_config["sample_rate"]),
                      64 if config.compile else 1)
    ahead = {"prefetch_factor": 4, "worker_init_fn": _one_thread, "persistent_workers": live}
    return EpochLoader(clips, batch_sampler=batches, collate_fn=collate, num_workers=workers,
                       pin_memory=torch.cuda.is_available(), **(ahead if workers else {}))


def _one_thread(_):
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGUSR1):  # for the training process to answer
        signal.signal(number, signal.SIG_IGN)
    # clusters send it to every process, and the training process still saves: the second one ends a worker
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def plan_epoch(manifests, config, tokenizer, audio_config, epoch, rank=0, world=1, start=0, only=None):
    """One epoch (or `only` some of its rows) -> this rank's micro-batches, each a list of (manifest, item);
    all ranks': arrays of rows; stats of tools/data/batches.py; what the blending record says."""
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
        raise UserError(f"epoch {epoch} selects no item at all: dataset_blending_global_weight = "
                         f"{config.dataset_blending_global_weight} is too small for these manifests")
    only = np.arange(len(rows)) if only is None else np.array(only, np.int64)  # none left is none
    rows = rows[only]
    if config.max_windows_per_batch and config.max_windows_per_batch < audio_config["max_num_window"]:
        raise UserError(f"max_windows_per_batch = {config.max_windows_per_batch}: one clip may have "
                         f"max_num_window = {audio_config['max_num_window']}")
    sizes = Clips(list(manifests.values()), rows, audio_config).sizes(tokenizer)
    batches = Batches(sizes, config.batch_size, [config.seed, epoch], rank, world, start,
                      config.bucket_batches, config.max_windows_per_batch, config.gradient_accumulation_steps)
    mine = [list(map(tuple, rows[batch].tolist())) for batch in batches]  # an empty list stays one
    return mine, [only[part] for part in batches.plan], batches.stats, record


def train_loader(manifests, config, tokenizer, audio_config, epoch, rank=0, world=1, start=0, loader=None,
                 only=None):
    """Loader of this rank's micro-batches of one epoch, and what the blending record says of it. The loader
    of an epoch before, if given, goes on: its workers live, and so does what they cached. loader.rows: those
    of each micro-batch of all ranks, loader.stats: see tools/data/batches.py."""
    plan = lambda e, *part: plan_epoch(manifests, config, tokenizer, audio_config, e, rank, world, *part)
    planned = loader and loader.upcoming == epoch and not start and only is None and loader.planned
    mine, rows, stats, record = planned.result() if planned else plan(epoch, start, only)
    if loader is None:
        clips = Clips(list(manifests.values()), np.empty((0, 2), int), audio_config, config.cache_audio)
        loader = make_loader(clips, mine, tokenizer, config, live=True)
    loader.batch_sampler[:], loader.rows, loader.stats, loader.upcoming = mine, rows, stats, epoch + 1
    # without workers it is this process that uses the tokenizer, which two threads must not
    more = config.num_workers and epoch + 1 < config.num_epochs
    loader.plan, loader.planned = (lambda: plan(epoch + 1)) if more else None, None
    return loader, record


def valid_loader(manifest, config, tokenizer, audio_config, rank=0, world=1):
    """This rank's share of one validation manifest, in order."""
    clips = Clips([manifest], None, audio_config, config.cache_audio)
    mine = np.arange(rank, len(clips), world)
    batches = np.split(mine, range(config.batch_size, len(mine), config.batch_size))
    return make_loader(clips, [b.tolist() for b in batches if len(b)], tokenizer, config, config.cache_audio)


if __name__ == "__main__":
    command = sys.argv[1] if sys.argv[1:] else "check"
    sys.exit(print(f"error: python data.py {command}: this command is now python prepare/{command}.py",
                   file=sys.stderr) or 2)
