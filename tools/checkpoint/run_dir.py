"""What lies in the folder of a run: its checkpoints, whole or cut off, and parts that moved along with it."""
import json
import os
import re
import zipfile

import config as settings


def checkpoints(run):
    """A run's checkpoints, newest first: the interim one is newer than any epoch's."""
    names = os.listdir(run) if os.path.isdir(run) else []
    epochs = [int(m[1]) for name in names if (m := re.fullmatch(r"checkpoint_(\d+)\.pt", name))]
    names = ["checkpoint_interim.pt"] * ("checkpoint_interim.pt" in names)
    names += [f"checkpoint_{epoch}.pt" for epoch in sorted(epochs, reverse=True)]
    return [os.path.join(run, name) for name in names]


def parse_json_line(line):
    """The object of a line of a log or of kept answers; None where it has none: torn, or somebody else's."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def newest_checkpoint(run):
    """The newest that is not cut off; of files that all are, the newest, which load_pickle refuses."""
    files = checkpoints(run)
    return next(filter(zipfile.is_zipfile, files), files[0] if files else None)


def whole(file):
    """Whether a checkpoint is what was written: torch.save keeps a checksum (CRC-32) of every tensor."""
    try:
        with zipfile.ZipFile(file) as f:
            return f.testzip() is None
    except (zipfile.BadZipFile, OSError):
        return False


def newest_whole(folder, say):
    """The newest checkpoint of a run that is not damaged; None if there is none."""
    for file in checkpoints(folder):
        if whole(file):
            return file
        say(f"{file} is damaged (cut, or its checksum differs): not used")
    return None


def newest_run(folders):
    """The run (a folder with a checkpoint) changed last; FileNotFoundError says how to get one."""
    runs = []
    for folder in filter(os.path.isdir, map(settings.place, folders)):
        runs += [run for run, _, _ in os.walk(folder)]  # a run's name may have a slash
    files = {run: file for run in runs if (file := newest_checkpoint(run))}
    if not files:
        where = " or ".join(f"{folder}/" for folder in folders)
        raise FileNotFoundError(f"no --init_from given and no run under {where}: train one (make demo, or "
                                f"python train.py config/sft.py) or give --init_from=nvidia/audio-flamingo-2")
    return max(files, key=lambda run: os.path.getmtime(files[run]))


def own_parts(own, folder):
    """Settings whose path lay inside the run when it was saved and is in this folder now: runs move."""
    home, moved = settings.resolve_path(os.path.join(own.get("expdir", ""), own.get("run_name", ""))) + os.sep, {}
    for name, value in own.items():
        path = os.path.normpath(settings.resolve_path(value)) if name in settings.PATHS and value else ""
        inside = os.path.join(os.path.abspath(folder), path.removeprefix(home))
        if path.startswith(home) and os.path.exists(inside):
            moved[name] = inside
    return moved
