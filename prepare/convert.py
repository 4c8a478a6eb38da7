"""Copies of what the model hears: mono FLAC at its rate (16 kHz; the one of clap_checkpoint, where that is
here), cut to its length, and manifests that point at them.

    python prepare/convert.py config/pretrain.py --to=packed             # all manifests of a config
    python prepare/convert.py a.json b.json --data_root=data --to=packed
    python train.py config/pretrain.py --dataset_file_root=packed

A copy is decoded four to five times as fast as 44.1 kHz stereo. Its windows are those of the original within
one 16-bit step, which is checked for every copy before it counts. Started again, it goes on where it was.
Copies suit the window_length, window_overlap and max_num_window of the config, or fewer windows (where louder
parts are then not heard, 16 bits are a little coarser). Exit code: 0 done, 1 done but for clips that were
left out and named, 2 not done.
"""
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
from prepare.check import audio_config_of, open_all, targets_of, write_manifest
from tools.common import UserError, check_folder_writable, map_parallel

to: str | None = None  # folder of the copies and their manifests
workers: int = 0  # processes; 0: one a core


def name_of(path, start, seconds, audio_config):
    """Where a copy lies in the folder of copies: another one for other content, part or audio_config."""
    about = os.stat(path)
    key = [os.path.realpath(path), about.st_size, about.st_mtime_ns, start, seconds, *audio_config.values()]
    key = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    stem = os.path.splitext(os.path.basename(path))[0][:100]
    return f"{key[:2]}/{stem}-{key[2:]}.flac"


def clips_of(item):
    """(path, start, seconds) of an item's clips."""
    seconds = item["duration"] if len(item["paths"]) == 1 else None
    return [(path, item["start"], seconds) for path in item["paths"]]


def quantised(y):
    """int16 samples as a copy holds them: its own peak rule, which takes what is never negative for another
    signal, gives them back."""
    if y.min() < 0 or not y.any():
        return y
    zeros = np.flatnonzero(y == 0)
    if len(zeros):
        y[zeros[0]] = -1  # one step
        return y
    return ((y.astype(np.int32) + 32768) // 2).astype(np.int16)  # 2 y / max - 1 is to come


def frames_of(copy):
    """Samples of a copy that is there and whole to its last one, else 0: disks lose what was just written."""
    try:
        with soundfile.SoundFile(copy) as f:
            f.seek(f.frames - 1)
            return f.frames * len(f.read(1))
    except soundfile.LibsndfileError:
        return 0


def make_copy(clip, folder, audio_config):
    """-> seconds of the copy, made and checked if it is not there whole. ValueError names what is wrong."""
    path, start, seconds = clip
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such audio file")
    copy, rate = os.path.join(folder, name_of(*clip, audio_config)), audio_config["sample_rate"]
    if not (frames := frames_of(copy)):
        os.makedirs(os.path.dirname(copy), exist_ok=True)
        y, _ = read_samples(path, start, seconds, **audio_config)
        windows = cut_windows(y, **audio_config)
        part = f"{copy}.{os.getpid()}.tmp"
        try:
            soundfile.write(part, quantised(y), rate, format="FLAC", subtype="PCM_16")
            again, _ = read_clip(part, **audio_config)
            if again.shape != windows.shape or np.abs(again.astype(int) - windows).max() > 1:
                raise UserError(f"{path}: its copy does not give the same windows")
            os.replace(part, copy)
        finally:
            if os.path.exists(part):
                os.remove(part)
        frames = frames_of(copy)
    return frames / rate


def convert(manifests, folder, audio_config, task):
    """(manifest, item) -> seconds of its copies, why there are none, whether the disk is the reason."""
    m, i = task
    try:
        return sum(make_copy(clip, folder, audio_config) for clip in clips_of(manifests[m][i])), None, False
    except (UserError, FileNotFoundError) as error:
        return None, str(error), False
    except (OSError, soundfile.LibsndfileError) as error:  # of the copy: the original's are ValueErrors
        return None, str(error), True


def main(c):
    if not c.to:
        raise UserError("usage: data.py convert CONFIG.py or manifests --to=DIR")
    folder = settings.resolve_path(c.to)
    audio = os.path.join(os.path.abspath(folder), "audio")
    check_folder_writable(audio)
    manifests = list(open_all(c, c.files).values())
    audio_config, targets = audio_config_of(c), targets_of(folder, manifests)
    seconds = [np.full(len(manifest), np.nan) for manifest in manifests]
    tasks = ((m, i) for m, manifest in enumerate(manifests) for i in range(len(manifest)))
    bar = tqdm(total=sum(map(len, manifests)), desc="convert", unit="item", disable=None)
    converted = map_parallel(partial(convert, manifests, audio, audio_config), tasks,
                             c.workers or os.cpu_count(), lambda task: manifests[task[0]][task[1]]["path"])
    for (m, i), (length, problem, disk) in converted:
        if disk:
            raise OSError(f"{audio}: could not be written, is the disk full? ({problem})")
        if problem:
            tqdm.write(f"left out: {manifests[m].name} {i}: {problem}", file=sys.stderr)
        else:
            seconds[m][i] = length
        bar.update()
    bar.close()
    for manifest, lengths, path in zip(manifests, seconds, targets):
        def items(manifest=manifest, lengths=lengths):
            for i in np.flatnonzero(np.isfinite(lengths)).tolist():
                told = manifest.items[i]
                names = [name_of(*clip, audio_config) for clip in clips_of(manifest[i])]
                if not all(os.path.exists(os.path.join(audio, name)) for name in names):
                    raise UserError(f"{manifest[i]['path']}: changed while it was converted, start again")
                told["name"] = names if len(names) > 1 else names[0]
                told.pop("audio_start", None)
                yield told | {"duration": round(float(lengths[i]), 4)}

        n = write_manifest(path, manifest.head | {"split_path": audio}, items())
        print(f"{manifest.name}: {n} of {len(manifest)} items, {np.nansum(lengths) / 3600:.4g} h "
              f"at {audio_config['sample_rate']:,} Hz: {path}")
    sys.exit(1 if any(np.isnan(lengths).any() for lengths in seconds) else 0)


if __name__ == "__main__":
    settings.run(main, "prepare/convert.py", files=True)
