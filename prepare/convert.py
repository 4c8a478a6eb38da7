"""Copies of what the model hears: mono FLAC at its sample rate (16 kHz, or that of pretrained_path or
clap_checkpoint), cut to its length, and manifests that point at them.

    python prepare/convert.py config/pretrain.py --to=packed             # all manifests of a config
    python prepare/convert.py a.json b.json --data_root=data --to=packed
    python train.py config/pretrain.py --dataset_file_root=packed

A copy decodes four to five times as fast as 44.1 kHz stereo. Its windows are compared with those of the
original before it counts: they are equal within one 16-bit step. Started again, it makes what is missing or
stale. Copies suit the window settings of the config, or fewer windows. Exit code: 0 done, 1 done but for
clips that were left out and named, 2 an error.
"""
import glob
import hashlib
import os
import sys
from functools import partial

import numpy as np
import soundfile
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import config as settings
from data import cut_windows, read_clip, read_samples
from prepare.check import audio_config_of, map_items, open_all_manifests, output_paths
from prepare.manifests import save_manifest
from tools.common import UserError, check_folder_writable, name_disk_errors
from tools.data.audio import find_file

to: str | None = None  # folder of the copies and their manifests
workers: int = 0  # processes; 0: one a core


def copy_name(path, start, duration, audio_config):
    """Name of a copy: another one for another content, part or audio_config."""
    stat = os.stat(find_file(path))
    key = [os.path.realpath(path), stat.st_size, stat.st_mtime_ns, start, duration, *audio_config.values()]
    digest = hashlib.sha256(repr(key).encode()).hexdigest()
    stem = os.path.splitext(os.path.basename(path))[0][:100]
    return f"{digest[:2]}/{stem}-{digest[2:16]}.flac"


def remove_leftovers(folder):
    """Remove the temporaries of processes that have ended."""
    for file in glob.glob(f"{glob.escape(folder)}/*/*.tmp"):
        pid = file.split(".")[-2]
        if not os.path.exists(f"/proc/{pid}"):
            os.remove(file)


def count_whole(path):
    """Samples of a copy that is there and whole, up to its last one, else 0: a crash may cut it."""
    try:
        with soundfile.SoundFile(path) as f:
            f.seek(f.frames - 1)
            return f.frames * len(f.read(1))
    except soundfile.LibsndfileError:
        return 0


def as_stored(samples):
    """int16 samples -> those that read_samples turns into them again: what is never negative becomes
    2 x / max - 1 there."""
    if samples.min() < 0 or not samples.any():
        return samples
    return ((samples.astype(np.int32) + 32768) // 2).astype(np.int16)


def make_copy(path, start, duration, folder, audio_config):
    """Write the copy of a clip, unless it is there whole -> its name in `folder`, its seconds."""
    name, rate = copy_name(path, start, duration, audio_config), audio_config["sample_rate"]
    copy = os.path.join(folder, name)
    frames = count_whole(copy)
    if frames:
        return name, frames / rate
    os.makedirs(os.path.dirname(copy), exist_ok=True)
    samples, _ = read_samples(path, start, duration, **audio_config)
    temporary = f"{copy}.{os.getpid()}.tmp"
    try:
        with name_disk_errors(copy, soundfile.LibsndfileError):
            soundfile.write(temporary, as_stored(samples), rate, format="FLAC", subtype="PCM_16")
        windows = cut_windows(samples, **audio_config).astype(int)
        copied, _ = read_clip(temporary, **audio_config)
        if windows.shape != copied.shape or np.abs(windows - copied).max() > 1:
            raise UserError(f"{path}: its copy does not give the same windows")
        os.replace(temporary, copy)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return name, len(samples) / rate


def convert_item(manifests, folder, audio_config, task):
    """(manifest, item) -> its copies as make_copy returns them, or why there are none."""
    m, i = task
    item = manifests[m][i]
    duration = item["duration"] if len(item["paths"]) == 1 else None  # of several clips: of all together
    part = item["start"], duration
    try:
        return [make_copy(path, *part, folder, audio_config) for path in item["paths"]], None
    except (UserError, FileNotFoundError) as error:
        return None, str(error)


def converted_items(manifest, copies):
    """The manifest's items, with names and durations of the copies; copies: {item: [(name, seconds)]}."""
    for i in sorted(copies):
        item = manifest.items[i]
        item.pop("audio_start", None)
        names = [name for name, _ in copies[i]]
        item["name"] = names if len(names) > 1 else names[0]
        item["duration"] = round(sum(seconds for _, seconds in copies[i]), 4)
        yield item


def main(c):
    if not c.to:
        raise UserError("--to is missing: the folder of the copies")
    folder = os.path.abspath(settings.resolve_path(c.to))
    audio = os.path.join(folder, "audio")
    check_folder_writable(audio)
    remove_leftovers(audio)
    manifests, audio_config = open_all_manifests(c), audio_config_of(c)
    paths = output_paths(folder, manifests)
    copies = [{} for _ in manifests]
    work = partial(convert_item, manifests, audio, audio_config)
    for (m, i), (made, problem) in map_items(work, manifests, c.workers, "convert"):
        if problem:
            tqdm.write(f"left out: {manifests[m].name} {i}: {problem}", file=sys.stderr)
        else:
            copies[m][i] = made
    for path, manifest, made in zip(paths, manifests, copies):
        save_manifest(path, audio, converted_items(manifest, made))
        print(f"{manifest.name}: {len(made)} of {len(manifest)} items: {path}")
    return int(sum(map(len, copies)) < sum(map(len, manifests)))


if __name__ == "__main__":
    settings.run(main, "prepare/convert.py", files=True)
