"""The folder of a run and its checkpoints."""
import glob
import math
import os
import re
import sys
import zipfile

import config as settings


INTERIM = "checkpoint_interim.pt"  # saved inside an epoch, removed at its end


def checkpoints(run):
    """A run's checkpoints, newest first: the interim one is newer than any epoch's."""
    epochs = {}
    for name in os.listdir(run) if os.path.isdir(run) else []:
        if name == INTERIM:
            epochs[name] = math.inf
        elif match := re.fullmatch(r"checkpoint_(\d+)\.pt", name):
            epochs[name] = int(match[1])
    newest_first = sorted(epochs, key=epochs.get, reverse=True)
    return [os.path.join(run, name) for name in newest_first]


def is_whole(file):
    """Whether a checkpoint is what was written: torch.save keeps a CRC-32 of every tensor."""
    try:
        with zipfile.ZipFile(file) as f:
            return f.testzip() is None
    except (zipfile.BadZipFile, OSError):
        return False


def newest_checkpoint(run, say=lambda text: print(text, file=sys.stderr), is_usable=zipfile.is_zipfile):
    """The newest checkpoint of a run that is usable; None without one. is_zipfile finds files that were cut
    off: the table of a zip file stands at its end."""
    for file in checkpoints(run):
        if is_usable(file):
            return file
        say(f"note: {file} is damaged (cut, or its checksum differs): not used")
    return None


def newest_run(folders):
    """The run (a folder with a checkpoint) changed last; FileNotFoundError says how to get one."""
    files = []
    for folder in folders:  # a run's name may have a slash
        pattern = glob.escape(settings.resolve_path(folder)) + "/**/checkpoint_*.pt"
        files += glob.glob(pattern, recursive=True)
    if not files:
        where = " or ".join(f"{folder}/" for folder in folders)
        raise FileNotFoundError(f"no --init_from given and no run under {where}: train one (make demo, or "
                                f"python train.py config/sft.py) or give --init_from=nvidia/audio-flamingo-2")
    return os.path.dirname(max(files, key=os.path.getmtime))


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
