"""Audio, prompts, manifests, blending, batches.

A manifest is <dataset_file_root>/<Name-Task>/<split>.json (README, "Reproduce"). Training draws from many of
them: each is an endless shuffled stream, and an epoch is a window of that stream (Manifest.epoch).
"""
import math
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch.utils.data import BatchSampler, DataLoader, Dataset

import config as settings
from model import AUDIO_SETTINGS, SAMPLE_RATE, SPECIAL_TOKENS
from tools.common import UserError
from tools.data.audio import read_audio
from tools.data.batches import estimate_tokens, padding_stats, plan_batches
from tools.data.index import open_items

planning_thread = ThreadPoolExecutor(1)
MAX_SECONDS = 1e7  # bound of a manifest's duration and audio_start

# ------------------------------------------------------------------------------------------------------------
# Audio


def load_audio(path, start=0.0, **audio_config):
    """A clip as windows: int16 (n, window_length * sample_rate), 1 <= n <= max_num_window. audio_config: that
    of the model: window_length and window_overlap in seconds, max_num_window, sample_rate in Hz.

    From `start` seconds on; first channel; resampled; scaled to peak 1 (silence stays silence); zero-padded
    to whole windows; 16 bits, as in the published system. FileNotFoundError or UserError name the file and
    what is wrong with it.
    """
    return read_clip(str(path), start, **audio_config)[0]


def read_clip(path, start=0.0, duration=None, **audio_config):
    """-> windows as load_audio gives them, and the seconds cut off after them. duration: seconds from `start`
    on that belong to the item; None: to the end of the file."""
    samples, truncated_seconds = read_samples(path, start, duration, **audio_config)
    return cut_windows(samples, **audio_config), truncated_seconds


def read_samples(path, start, duration, window_length, window_overlap, max_num_window,
                 sample_rate=SAMPLE_RATE):
    """-> samples that fill at most max_num_window windows, int16 (n,), n > 0; seconds cut off after them."""
    if not 0 <= window_overlap < window_length:
        raise UserError(f"window_overlap = {window_overlap}, expected less than window_length")
    duration = duration or math.inf
    max_seconds = max_num_window * (window_length - window_overlap) + window_overlap
    x, seconds_left = read_audio(path, start, min(max_seconds, duration), sample_rate)
    low, high = x.min(), x.max()
    if low >= 0 < high:  # the published rule
        x = 2 * (x / high) - 1
    elif low < 0:  # all zeros would be 0/0 there
        x /= max(high, -low)
    samples = (x[:round(max_seconds * sample_rate)] * 32767).astype(np.int16)
    return samples, max(0.0, min(seconds_left, duration) - max_seconds)


def cut_windows(samples, window_length, window_overlap, max_num_window, sample_rate=SAMPLE_RATE):
    """(n,) -> windows (W, window_length * sample_rate), zero-padded."""
    L = round(window_length * sample_rate)
    overlap = round(window_overlap * sample_rate)
    step = L - overlap
    n = min(max_num_window, 1 + max(0, math.ceil((len(samples) - L) / step)))
    padded = np.zeros(n * step + overlap, np.int16)
    padded[:len(samples)] = samples[:len(padded)]
    return sliding_window_view(padded, L)[::step].copy()


def truncation_warning(n_clips, n_truncated, seconds, audio_config):
    """Warning for clips longer than max_num_window; "" if there are none."""
    if not n_truncated:
        return ""
    length, overlap, most = (audio_config[name] for name in AUDIO_SETTINGS)
    return (f"Warning: {n_truncated} of {n_clips} clips are longer than max_num_window = {most} windows "
            f"({most * (length - overlap) + overlap:g} s): {seconds:.1f} s are cut off")


# ------------------------------------------------------------------------------------------------------------
# Text: <audio> prompt sep output <|endofchunk|> eos


def extend_tokenizer(tokenizer):
    """Add the special tokens in the published order, <SEP> only if the tokenizer has no sep token. A token
    that it already holds keeps its id."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos token, which ends an answer: see its config")
    tokenizer.add_tokens(list(SPECIAL_TOKENS[:2]), special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": SPECIAL_TOKENS[2]})
    if tokenizer.sep_token is None:
        tokenizer.add_special_tokens({"sep_token": SPECIAL_TOKENS[3]})
    return tokenizer


def encode_text(tokenizer, texts):
    """Texts -> lists of token ids. Special tokens inside a text are tokenized as plain text."""
    texts = [text.strip().lower() for text in texts]
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def encode_prompts(tokenizer, prompts, n_clips=None):
    """Prompts -> lists of ids: [BOS] <audio>*n prompt <sep>. n_clips: of each prompt; None: one."""
    audio = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[0])
    # Never without split_special_tokens: a tokenizer keeps that as its state, which all threads share
    begin = tokenizer("a", split_special_tokens=True)["input_ids"]
    begin = begin[:begin.index(encode_text(tokenizer, ["a"])[0][0])]  # BOS, if the tokenizer adds one
    texts = encode_text(tokenizer, prompts)
    n_clips = n_clips or [1] * len(prompts)
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


# ------------------------------------------------------------------------------------------------------------
# Manifests


MANIFEST_KEYS = {
    "split": str,
    "split_path": str,
    "flamingo_task": str,
    "total_num": int,
    "data": dict}


class Manifest:
    """A checked manifest. len(m); m[i] -> {"prompt", "output", "path", "paths", "start", "duration"};
    m.items[i] -> item i as the file has it; m.head: the file's other keys; m.epoch(e, weight).

    duration: seconds from start on that belong to the item, of all its clips together, or None.
    Raises FileNotFoundError, or UserError with file, item, key and what was expected.
    """

    def __init__(self, file, data_root=".", cache_dir=None):
        self.file = file
        folders = file.removesuffix(".json").split("/")
        self.name = "/".join(folders[-2:])  # Name-Task/split
        if not os.path.isfile(file):
            raise FileNotFoundError(f"{file}: no such manifest")
        self.items = open_items(file, self._check, cache_dir)
        self.head = self.items.header["head"]
        self.digest = self.items.header["digest"]  # of the items
        self.folder = os.path.join(data_root, self.head["split_path"])

    def _check(self, content):
        mistake = find_mistake(content)
        if mistake:
            key, value, expected = mistake
            raise UserError(f"{self.file}: {key} = {str(value)[:80]!r}, expected {expected}")

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        item = self.items[i]
        names = item["name"] if type(item["name"]) is list else [item["name"]]
        paths = [os.path.join(self.folder, name) for name in names]
        return {
            "prompt": item["prompt"],
            "output": item["output"],
            "path": " + ".join(paths),
            "paths": paths,
            "start": float(item.get("audio_start", 0)),
            "duration": item.get("duration")}

    def epoch(self, e, weight):
        """Items of epoch e, (n,) int64, when an epoch takes w = `weight` passes: positions int(e N w) to
        int((e+1) N w) - 1 of an endless stream whose passes are shuffles of all items: each has each once."""
        N = len(self)
        first = int(e * N * weight)
        stop = int((e + 1) * N * weight)
        parts = [np.arange(0)]
        for k in range(first // max(N, 1), -(-stop // max(N, 1))):
            order = pass_order(self.name, N, k)
            parts.append(order[max(first - k * N, 0):stop - k * N])
        return np.concatenate(parts)


def find_mistake(content):
    """-> key, value and what was expected, of the first mistake in a manifest; None if there is none."""
    if type(content) is not dict:
        return "JSON", content, f"an object with {', '.join(MANIFEST_KEYS)}"
    for key, kind in MANIFEST_KEYS.items():
        if type(content.get(key)) is not kind:
            return key, content.get(key, "missing"), f"a {kind.__name__}"
    data = content["data"]
    folder = content["split_path"]
    if content["total_num"] != len(data):
        return "total_num", content["total_num"], f"the number of items in data, {len(data)}"
    if leaves_root(folder):
        return "split_path", folder, "a path inside data_root, or an absolute one"
    for i, (key, item) in enumerate(data.items()):
        if key != str(i):
            return f"data key {i}", key, f"{str(i)!r} (keys are '0', '1', ... in order)"
        if type(item) is not dict:
            return f"data['{i}']", item, "an object with name, prompt, output"
        mistake = find_mistake_in_item(item, folder)
        if mistake:
            key, expected = mistake
            return f"data['{i}'] {key}", item.get(key, "missing"), expected
    return None


def find_mistake_in_item(item, folder):
    """-> a key and what was expected there, or None."""
    names = item.get("name")
    if type(names) is not list or len(names) < 2:  # a list: several clips of one question
        names = [names]
    texts = [item.get("prompt"), item.get("output"), *names]
    if set(map(type, texts)) != {str}:
        wrong = [key for key, text in zip(("prompt", "output"), texts) if type(text) is not str]
        return [*wrong, "name"][0], "a text"
    choices = item.get("choices")
    if choices and (type(choices) is not list or set(map(type, choices)) != {str}):
        return "choices", "a list of texts"
    for key in "duration", "audio_start":
        seconds = item.get(key, 0)
        if type(seconds) not in (int, float) or not 0 <= seconds < MAX_SECONDS:
            return key, f"seconds, not negative, below {MAX_SECONDS:g}"
    if ".." in "".join(names) and any(leaves_root(folder, name) for name in names):
        return "name", "a path inside data_root"
    return None


@lru_cache(maxsize=64)  # 200 epochs are a few passes
def pass_order(name, n, k):
    """The order of the n items of a manifest in pass k: the published seeds."""
    order = np.arange(n, dtype=np.int32)
    for text in [name] + [f"{name}-epoch-{k}"] * (k > 0):
        np.random.default_rng(sum(map(ord, text))).shuffle(order)
    return order


def leaves_root(folder, name=""):
    """Whether ".." leads a path out of data_root, or out of an absolute folder."""
    root = folder if os.path.isabs(folder) else "."
    path = os.path.relpath(os.path.join(".", folder, name), root)
    return path == ".." or path.startswith("../")


def open_manifests(config, names):
    """{"Name-Task/split": Manifest} for the keys of a blending config."""
    folder = settings.resolve_path(config.dataset_file_root)
    data_root = settings.resolve_path(config.data_root)
    return {name: Manifest(f"{folder}/{name}.json", data_root, config.cache_dir) for name in names}


# ------------------------------------------------------------------------------------------------------------
# Samples and batches


def decode_clips(audio_config, paths, start, duration):
    """The clips of an item -> {"windows": int16 (n, L), "n_windows": of each, "truncated_seconds"}."""
    clips = [read_clip(path, start, duration, **audio_config) for path in paths]
    windows, truncated_seconds = zip(*clips)
    return {
        "windows": torch.from_numpy(np.concatenate(windows)),
        "n_windows": list(map(len, windows)),
        "truncated_seconds": sum(truncated_seconds)}


class Clips(Dataset):
    """clips[row] or clips[manifest, item] -> Manifest[item] with what decode_clips returns; where a file
    can't be read, windows are None and "error" says why."""

    def __init__(self, manifests, rows, audio_config, cache=False):
        """rows: (n, 2) int64 of (manifest, item), None for every item; audio_config: that of the model."""
        if rows is None:
            rows = [(m, j) for m, manifest in enumerate(manifests) for j in range(len(manifest))]
        self.manifests = manifests
        self.rows = np.array(rows).reshape(-1, 2)
        self.audio_config = audio_config
        decode = partial(decode_clips, audio_config)
        self.decode = lru_cache(maxsize=None)(decode) if cache else decode

    def __len__(self):
        return len(self.rows)

    def item(self, i):
        m, j = i if type(i) is tuple else self.rows[i].tolist()
        return self.manifests[m][j]

    def __getitem__(self, i):
        item = self.item(i)
        duration = item["duration"] if len(item["paths"]) == 1 else None  # of several clips: their sum
        try:
            return item | self.decode(tuple(item["paths"]), item["start"], duration)
        except (FileNotFoundError, UserError) as error:  # counted and reported by the caller
            return item | {"windows": None, "error": str(error)}

    def sizes(self, tokenizer):
        """(n, 2): windows, by the manifests' durations, and text tokens of every row."""
        windows, texts = [], []
        for i in range(len(self)):
            item = self.item(i)
            windows.append(count_windows(item["duration"], len(item["paths"]), self.audio_config))
            texts += [item["prompt"].strip().lower(), item["output"].strip().lower()]
        n_tokens = estimate_tokens(tokenizer, texts).reshape(-1, 2).sum(1)
        return np.stack([windows, n_tokens], 1).astype(np.int64)


def count_windows(duration, n_clips, audio_config):
    """Windows of clips of so many seconds together; max_num_window each if the duration is not known."""
    length, overlap, most = (audio_config[name] for name in AUDIO_SETTINGS)
    if not duration:
        return most * n_clips
    more = math.ceil(round(duration - n_clips * length, 4) / (length - overlap))  # than one for each clip
    return min(most * n_clips, n_clips + max(0, more))


class Collate:
    """A list of Clips items -> a batch: input_ids and labels (B, T), windows (sum W, L) int16, n_windows (B,)
    and, to be reported, errors (of clips that could not be read), unfinished (outputs cut by max_tokens),
    truncated_clips, truncated_seconds (longer than max_num_window) and paths of the clips that were read."""

    def __init__(self, tokenizer, max_tokens, window_samples, multiple=1):
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.multiple = multiple  # of the length of texts
        silence = torch.zeros(1, window_samples, dtype=torch.int16)
        self.silent_clip = {
            "prompt": "",
            "output": "",
            "windows": silence,
            "n_windows": [1]}

    def encode(self, pairs, n_clips=None):
        """(prompt, output) pairs -> input_ids, labels (B, T) int64 and how many outputs max_tokens cut: those
        have no labels, as in the published code."""
        t = self.tokenizer
        prompts = encode_prompts(t, [prompt for prompt, _ in pairs], n_clips)
        outputs = encode_text(t, [output for _, output in pairs])
        end = [t.convert_tokens_to_ids(SPECIAL_TOKENS[1]), t.eos_token_id]
        rows, labels, unfinished = [], [], 0
        for prompt, output in zip(prompts, outputs):
            row = (prompt + output + end)[:self.max_tokens]
            finished = len(prompt) + len(output) < len(row)
            unfinished += not finished
            rows.append(row)
            labels.append([-100] * len(prompt) + row[len(prompt):] if finished else [-100])
        ids = pad_rows(rows, t.pad_token_id, self.multiple)
        return ids, pad_rows(labels, -100, ids.shape[1]), unfinished

    def __call__(self, items):
        good = [item for item in items if item["windows"] is not None]
        clips = good or [self.silent_clip]  # a rank without a readable clip takes part, with nothing to learn
        n_windows = [clip["n_windows"] for clip in clips]
        pairs = [(clip["prompt"], clip["output"]) for clip in clips]
        ids, labels, unfinished = self.encode(pairs, list(map(len, n_windows)))
        if not good:
            labels.fill_(-100)
        truncated = [clip["truncated_seconds"] for clip in good if clip["truncated_seconds"]]
        return {
            "input_ids": ids,
            "labels": labels,
            "windows": torch.cat([clip["windows"] for clip in clips]),
            "n_windows": window_counts(n_windows),
            "paths": [clip["path"] for clip in good],
            "errors": [item["error"] for item in items if item["windows"] is None],
            "unfinished": unfinished,
            "truncated_clips": len(truncated),
            "truncated_seconds": sum(truncated)}


def make_loader(clips, batches, tokenizer, config, persistent_workers):
    """DataLoader over a list of batches, each a list of indices of clips."""
    audio_config = clips.audio_config
    window_samples = round(audio_config["window_length"] * audio_config["sample_rate"])
    collate = Collate(tokenizer, config.max_tokens, window_samples, 64 if config.compile else 1)
    workers = config.num_workers
    return DataLoader(
        clips,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=init_worker,
        persistent_workers=persistent_workers and workers > 0,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available())


def init_worker(_):
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGUSR1):  # handled by the training process
        signal.signal(number, signal.SIG_IGN)
    # clusters send it to every process, and the training process still saves: the second one ends a worker
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def select_rows(manifests, config, epoch):
    """-> (n, 2) rows (manifest, item) that an epoch takes of the blend."""
    rows = []
    for m, (name, manifest) in enumerate(manifests.items()):
        weight = config.dataset_blending_global_weight * config.dataset_blending_config[name]
        items = manifest.epoch(epoch, weight)
        of_manifest = np.full(len(items), m)
        rows.append(np.stack([of_manifest, items], 1))
    return np.concatenate(rows)


def plan_epoch(manifests, config, tokenizer, audio_config, epoch, rank=0, world=1, start=0, only=None):
    """Plan one epoch, or `only` some of its rows (an array of row numbers), from micro-step `start` on.

    -> this rank's micro-batches, lists of (manifest, item); the row numbers of every micro-step, of all ranks
    and from 0 on; padding_stats."""
    rows = select_rows(manifests, config, epoch)
    if not len(rows):
        raise UserError(f"epoch {epoch} selects no item: dataset_blending_global_weight = "
                        f"{config.dataset_blending_global_weight} is too small for these manifests")
    max_windows = config.max_windows_per_batch
    if max_windows and max_windows < audio_config["max_num_window"]:
        raise UserError(f"max_windows_per_batch = {max_windows}, expected at least max_num_window")
    only = np.arange(len(rows)) if only is None else np.array(only, np.int64)
    rows = rows[only]
    sizes = Clips(list(manifests.values()), rows, audio_config).sizes(tokenizer)
    plan = plan_batches(
        sizes,
        config.batch_size,
        seed=[config.seed, epoch],
        world=world,
        pool=config.bucket_batches,
        max_windows=max_windows,
        multiple=config.gradient_accumulation_steps)
    mine = [micro[(rank + k) % world] for k, micro in enumerate(plan)]  # ranks take turns
    mine = [list(map(tuple, rows[batch].tolist())) for batch in mine[start:]]
    all_ranks = [only[np.concatenate(micro)] for micro in plan]
    return mine, all_ranks, padding_stats(sizes, plan)


def train_loader(manifests, config, tokenizer, audio_config, epoch, rank=0, world=1, start=0, loader=None,
                 only=None):
    """-> DataLoader of this rank's micro-batches of an epoch.

    loader: the one of the epoch before, which goes on: its workers and what they cached stay, its list of
    batches is replaced. loader.rows: row numbers of each micro-step of all ranks; loader.stats:
    padding_stats. The next epoch is planned in a thread while this one is read: 50,000 items take a
    second."""
    plan = partial(plan_epoch, manifests, config, tokenizer, audio_config, rank=rank, world=world)
    if loader is None:
        no_rows = np.empty((0, 2), int)
        clips = Clips(list(manifests.values()), no_rows, audio_config, config.cache_audio)
        loader = make_loader(clips, [], tokenizer, config, persistent_workers=True)
        iter(loader)  # forks the workers now: not while the thread holds a lock of the tokenizer
        loader.planned = {}  # {epoch: its plan, perhaps on its way}
    if epoch in loader.planned and start == 0 and only is None:
        batches, loader.rows, loader.stats = loader.planned[epoch].result()
    else:
        batches, loader.rows, loader.stats = plan(epoch, start=start, only=only)
    loader.batch_sampler[:] = batches
    if config.num_workers and epoch + 1 < config.num_epochs:  # else this process uses the tokenizer itself
        loader.planned = {epoch + 1: planning_thread.submit(plan, epoch + 1)}
    return loader


def valid_loader(manifest, config, tokenizer, audio_config, rank=0, world=1):
    """This rank's share of one validation manifest, in order."""
    clips = Clips([manifest], None, audio_config, config.cache_audio)
    batches = BatchSampler(range(rank, len(clips), world), config.batch_size, drop_last=False)
    return make_loader(clips, batches, tokenizer, config, config.cache_audio)


if __name__ == "__main__":
    print("error: these commands are now python prepare/check.py and prepare/convert.py", file=sys.stderr)
    sys.exit(2)
