"""Weight files, from this disk or the Hugging Face hub. Nothing inside a file is executed; what is written
replaces the old file or folder whole, or not at all."""
import os
import pickle
import shutil
import zipfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open

import config as settings
from tools.common import UserError, atomic_write, join_names, name_disk_errors, new_folder, shorten


def local_or_hub(path, patterns, cache_dir=None, setting="init_from"):
    """The folder that a setting names: one on this disk, else the snapshot of a hub id, from the hub or its
    cache. FileNotFoundError names the setting."""
    folder, repo = settings.resolve_path(path), path.rstrip("/")
    if os.path.isdir(folder):
        return folder
    from huggingface_hub import snapshot_download
    try:
        cache_dir = cache_dir and settings.resolve_path(cache_dir)
        return snapshot_download(repo, cache_dir=cache_dir, allow_patterns=patterns)
    except (OSError, ValueError) as error:  # the base classes of the client's errors
        raise FileNotFoundError(f"{setting} = {path!r}: no such folder here, and the hub has no such id, or "
                                f"did not answer ({shorten(error)})") from error


# ------------------------------------------------------------------------------------------------------------
# Reading


def load_tensors(file):
    """{name: tensor} of a safetensors file. Each tensor is mapped by itself: its pages are read when it is
    used and released with it, so a state never stands in memory twice."""
    try:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
        return {name: safe_open(file, "pt").get_tensor(name) for name in names}
    except SafetensorError as error:
        raise UserError(f"{file}: not a readable safetensors file; a download that was cut, or a page or "
                        f"pointer in its place? ({shorten(error)})") from error


def load_shards(folder, names_of, index):
    """{name: tensor} of {file: names}, which `index` lists; nothing else in the folder is read."""
    tensors = {}
    for file, names in names_of.items():
        path = os.path.join(folder, file)
        stored = load_tensors(path)
        if missing := [name for name in names if name not in stored]:
            raise UserError(f"{path}: tensors that {index} names are missing: {join_names(missing)}")
        tensors |= {name: stored[name] for name in names}
    return tensors


class NumpyStub:
    """Stands in for numpy objects in LAION's pickles: metadata that weights do not need."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


class TensorsOnly(pickle.Unpickler):
    """As strict as torch.load(weights_only=True), for pickles that it cannot read: of protocol 4, or with
    numpy scalars beside the weights. LAION's CLAP checkpoints are both."""
    ALLOWED = ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2",
               "torch._utils._rebuild_parameter")

    def find_class(self, module, name):
        if module.split(".")[0] in ("numpy", "_codecs"):
            return NumpyStub
        if f"{module}.{name}" not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which was not run")
        return super().find_class(module, name)


TENSORS_ONLY = SimpleNamespace(Unpickler=TensorsOnly, __name__="TensorsOnly")  # torch.load takes a module


def load_pickle(path):
    """The dict in a file of torch.save: of tensors, numbers, strings, lists, dicts; nothing in it is run."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    is_zip = zipfile.is_zipfile(path)
    read = partial(torch.load, path, map_location="cpu", mmap=is_zip)
    try:
        try:
            return read(weights_only=True)
        except pickle.UnpicklingError:
            if not is_zip:
                raise
            return read(weights_only=False, pickle_module=TENSORS_ONLY)
    except Exception as error:  # zip, pickle and storage errors of many classes, all raised inside torch.load
        raise UserError(f"{path}: not a readable checkpoint ({shorten(error)})") from error


def state_dict_of(saved, key, path):
    """{name: tensor} under a key of what load_pickle read from path."""
    if not isinstance(saved, dict) or not isinstance(saved.get(key), dict):
        raise UserError(f"{path}: no {key} {{name: tensor}} in it")
    return saved[key]


# ------------------------------------------------------------------------------------------------------------
# Writing


def save_atomically(content, path):
    """torch.save that leaves either the old file or the new one, also when the machine dies in between."""
    with name_disk_errors(path, RuntimeError), atomic_write(path, "wb") as f:  # torch's zip writer's error
        torch.save(content, f)


@contextmanager
def replace_folder(folder):
    """A new folder to fill, which replaces the one at `folder` when the block ends. Killed at any time, the
    old one is whole: in its place or, between two renamings, beside it as .<name>.old. UserError if the old
    one holds files that the new one does not: they would be lost."""
    parent, name = os.path.split(folder)
    new = os.path.join(parent, f".{name}.new")
    old = os.path.join(parent, f".{name}.old")
    shutil.rmtree(new, ignore_errors=True)
    with new_folder(new) as filled:
        yield filled
        files = {path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file()}
        if others := [file for file in sorted(files) if not os.path.exists(os.path.join(filled, file))]:
            raise UserError(f"{folder} holds other files, which would be lost: {join_names(others)}")
    if os.path.isdir(folder):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)
