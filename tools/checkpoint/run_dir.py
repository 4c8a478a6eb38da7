"""The folder of a run and its checkpoints."""
import os
import re
import sys
import zipfile

import config as settings


def checkpoints(run):
    """A run's checkpoints, newest first: the interim one is newer than any epoch's."""
    names = os.listdir(run) if os.path.isdir(run) else []
    epochs = [int(m[1]) for name in names if (m := re.fullmatch(r"checkpoint_(\d+)\.pt", name))]
    found = ["checkpoint_interim.pt"] if "checkpoint_interim.pt" in names else []
    found += [f"checkpoint_{epoch}.pt" for epoch in sorted(epochs, reverse=True)]
    return [os.path.join(run, name) for name in found]


def checksums_hold(file):
    """Whether a checkpoint is what was written: torch.save keeps a CRC-32 of every tensor."""
    try:
        with zipfile.ZipFile(file) as f:
            return f.testzip() is None
    except (zipfile.BadZipFile, OSError):
        return False


def newest_checkpoint(run, say=lambda text: print(text, file=sys.stderr), is_whole=zipfile.is_zipfile):
    """The newest checkpoint of a run that is whole; None without one. is_zipfile finds files that were cut
    off: the table of a zip file stands at its end."""
    for file in checkpoints(run):
        if is_whole(file):
            return file
        say(f"note: {file} is damaged (cut, or its checksum differs): not used")
    return None


def newest_whole(run, say):
    """The checkpoint to resume from: every tensor is read and checked."""
    return newest_checkpoint(run, say, checksums_hold)


def newest_run(folders):
    """The run (a folder with a checkpoint) changed last; FileNotFoundError says how to get one."""
    newest = {}
    for folder in map(settings.resolve_path, folders):
        for run, _, _ in os.walk(folder):  # a run's name may have a slash
            for file in checkpoints(run)[:1]:
                newest[run] = os.path.getmtime(file)
    if not newest:
        where = " or ".join(f"{folder}/" for folder in folders)
        raise FileNotFoundError(f"no --init_from given and no run under {where}: train one (make demo, or "
                                f"python train.py config/sft.py) or give --init_from=nvidia/audio-flamingo-2")
    return max(newest, key=newest.get)


def moved_parts(config, run):
    """{setting: path} of the parts (a language model, an encoder) that lay inside the run when it was saved
    and lie inside its folder `run` now: a run may be moved or renamed."""
    saved_as = os.path.join(config.get("expdir", ""), config.get("run_name", ""), "")
    saved_as = settings.resolve_path(saved_as)
    found = {}
    for name in settings.PATHS:
        path = os.path.normpath(settings.resolve_path(config.get(name) or ""))
        moved = os.path.join(os.path.abspath(run), path.removeprefix(saved_as))
        if path.startswith(saved_as) and os.path.exists(moved):
            found[name] = moved
    return found
