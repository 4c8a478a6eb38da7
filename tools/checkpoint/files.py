"""Files of weights, from this disk or the hub: read without running anything that they hold, written whole or
not at all. Errors are ValueError or FileNotFoundError, one line that names the file."""
import ctypes
import os
import pickle
import re
import shutil
import tempfile
import warnings
import zipfile
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import torch
from safetensors import SafetensorError

import config as settings
from tools.common import UserError, atomic_write, name_disk_errors, read_json


def shorten(error):
    """The beginning of an error of somebody else's, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def join_names(names):
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(name[:120] for name in names[:5]) + more


def local_or_hub(path, patterns, cache_dir=None, setting="init_from"):
    """A folder, relative to the project's, as it is; org/name from the hub (or its cache, offline)."""
    if os.path.isdir(settings.resolve_path(path)):
        return settings.resolve_path(path)
    cache_dir, path = cache_dir and settings.resolve_path(cache_dir), path.rstrip("/")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):
        raise FileNotFoundError(f"{setting} = {path!r}: no such folder, and not a hub id (org/name)")
    from huggingface_hub import snapshot_download
    try:
        return snapshot_download(path, cache_dir=cache_dir, allow_patterns=patterns)
    except Exception as error:  # the hub's client raises many kinds; to the user all of them mean "not there"
        raise FileNotFoundError(f"{setting} = {path!r} is not a folder here, and the hub did not give it: "
                                f"{shorten(error)}") from error


def inside(folder, name, by):
    """The path of folder/name, which `by` names. It must lie in the folder, and not behind a link that leads
    out of it; the links in a snapshot of the hub's cache lead to that repository's blobs."""
    path, home = os.path.join(folder, name), os.path.realpath(folder)
    if len(name) > 200 or not name.isprintable():  # a surrogate, a 0: no system call takes them
        raise UserError(f"{by} names {name[:60]!r}, which is no file's name")
    homes = [home, os.path.join(home.rpartition("/snapshots/")[0] or home, "blobs")]
    if not os.path.realpath(path).startswith(tuple(where + os.sep for where in homes)):
        raise UserError(f"{path}, which {by} names, leads out of {folder}")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file, but {by} names it")
    return path


def read_json_object(path):
    """{name: value} of a JSON file."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: a {type(content).__name__}, expected an object {{name: value}}")
    return content


# ------------------------------------------------------------------------------------------------------------
# Tensors


def load_tensor(file, name):
    """One tensor of a safetensors file, mapped by itself: in memory while it is used."""
    from safetensors import safe_open
    try:
        return safe_open(file, "pt").get_tensor(name)
    except Exception as error:  # the package has an error class of its own, beside OSError
        raise UserError(f"{file}: {name} is not readable ({shorten(error)})") from error


def load_tensors(file):
    """{name: function that maps its tensor} of a safetensors file."""
    from safetensors import safe_open
    try:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
    except Exception as error:
        raise UserError(f"{file}: not a readable safetensors file ({shorten(error)})") from error
    return {name: partial(load_tensor, file, name) for name in names}


class Inert:
    """What stands in for an object of numpy's: nothing that weights need."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


class TensorsOnly(pickle.Unpickler):
    """As strict as torch.load's weights_only=True, for pickles that it cannot read: of protocol 4, or with
    numpy's scalars beside the weights. LAION's checkpoints are both."""
    GIVEN = ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter")

    def find_class(self, module, name):
        if module.split(".")[0] in ("numpy", "_codecs"):
            return Inert
        if f"{module}.{name}" not in self.GIVEN:
            raise pickle.UnpicklingError(f"Weights only: GLOBAL {module}.{name}")
        return super().find_class(module, name)


TENSORS_ONLY = SimpleNamespace(Unpickler=TensorsOnly, __name__="TensorsOnly")  # torch.load takes a module


def load_zip_or_pickle(path):
    read = partial(torch.load, path, map_location="cpu", mmap=zipfile.is_zipfile(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the protocol
            return read(weights_only=True)
    except pickle.UnpicklingError as error:
        if not zipfile.is_zipfile(path) or not re.search(r"GLOBAL numpy|Unsupported operand", str(error)):
            raise
    return read(weights_only=False, pickle_module=TENSORS_ONLY)


def load_pickle(path):
    """The dict in a file of torch.save: of tensors, numbers, strings, lists, dicts; nothing in it is run."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        saved = load_zip_or_pickle(path)
    except Exception as error:  # zip, pickle and storage errors alike: the file is not what it should be
        code, kind = re.search(r"GLOBAL (\S+)", str(error)), "a pickle of more than tensors"
        why = kind if "Weights only" in str(error) else shorten(error)
        why = f"it asks for {code[1]}, which was not run" if code else why
        raise UserError(f"{path}: not a readable checkpoint ({why})") from error
    if not isinstance(saved, dict):
        raise UserError(f"{path}: a {type(saved).__name__}, expected a dict")
    return saved


def tensors_in(saved, key, path):
    """{name: tensor} under a key of what load_pickle gave."""
    state = saved.get(key)
    if not isinstance(state, dict) or not all(isinstance(n, str) for n in state):
        raise UserError(f"{path}: no {key} {{name: tensor}} in it")
    plain = lambda x: isinstance(x, torch.Tensor) and not x.is_meta and x.layout is torch.strided
    if wrong := [name for name, tensor in state.items() if not plain(tensor)]:
        raise UserError(f"{path}: {key} holds what is no tensor with numbers: {join_names(wrong)}")
    return state


def merged(pieces, our_name, source):
    """[(name, function that gives its tensor)] -> {our name: such a function} and the names of copies.

    The same tensor may stand in a file twice, under two names that mean one of ours; if the copies differ, no
    choice is right."""
    found, copies = {}, []
    for name, get in pieces:
        ours = our_name(name)
        if ours not in found:
            found[ours] = name, get
            continue
        if not same(found[ours][1](), get()):
            raise UserError(f"{source}: {found[ours][0]} and {name} should be copies, but differ")
        copies.append(name)
    return {ours: get for ours, (_, get) in found.items()}, copies


def same(a, b):
    """Bit by bit, in the longest integers that fit: a NaN is the same as its copy. Twice as fast."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    ends = [n * t.itemsize for t in (a, b) for n in (t.numel(), t.storage_offset())]
    kind = next(bits[size] for size in bits if not any(end % size for end in ends))
    return torch.equal(*(t.contiguous().flatten().view(kind) for t in (a, b)))


# ------------------------------------------------------------------------------------------------------------
# Writing


def save_atomically(content, path):
    """torch.save that leaves either the old file or the new one, also when the machine dies in between."""
    with name_disk_errors(path, RuntimeError), atomic_write(path, "wb") as f:  # torch's zip writer has such an error
        torch.save(content, f)


@contextmanager
def replaced(folder, mine):
    """A new folder to write to, which then takes the place of `folder`: whole, or not at all. Of the old one
    only those files go on that are not `mine`(relative path): the user's own."""
    folder = os.path.realpath(folder)
    parent, name = os.path.split(folder)
    try:
        os.makedirs(parent, exist_ok=True)
        beside = tempfile.mkdtemp(prefix=f".{name}-", dir=parent)
        new, old = os.path.join(beside, "new"), os.path.join(beside, "old")
        try:
            os.mkdir(new)
            yield new
            for path, _, files in os.walk(new):
                for file in files:
                    with open(os.path.join(path, file), "rb") as f:
                        os.fchmod(f.fileno(), os.stat(new).st_mode & 0o666)  # safetensors gives 0600
                        os.fsync(f.fileno())
            if os.path.isdir(folder):
                keep_others(folder, new, mine)
                if not exchanged(new, folder):  # then for a moment nothing stands there
                    os.rename(folder, old)
                    os.rename(new, folder)
            elif os.path.lexists(folder):
                raise OSError("it is not a folder")
            else:
                os.rename(new, folder)
        except BaseException:
            if os.path.isdir(old) and not os.path.isdir(folder):
                os.rename(old, folder)
            raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # no space, no permission, a file in the way
        raise UserError(f"{folder} is not written, what stood there is as it was ({error})") from error


def exchanged(a, b):
    """Let two folders change places, at once, where the system can; -> whether it did."""
    libc, here, exchange = ctypes.CDLL(None), -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h
    rename = getattr(libc, "renameat2", None)
    return rename is not None and rename(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


def keep_others(folder, new, mine):
    """Second names, in the folder `new`, of all files of `folder` but those that are mine. ValueError if one
    is where something new is."""
    def ours(path, names):
        goes = []
        for name in names:
            source = os.path.join(path, name)
            here = os.path.relpath(source, folder)
            is_folder, there = os.path.isdir(source) and not os.path.islink(source), os.path.join(new, here)
            if not is_folder and mine(here):
                goes.append(name)
            elif os.path.lexists(there) and not (is_folder and os.path.isdir(there)):
                raise UserError(f"{source} is in the way: nothing is written")
        return goes

    link = lambda source, target: os.link(source, target, follow_symlinks=False)
    shutil.copytree(folder, new, symlinks=True, ignore=ours, copy_function=link, dirs_exist_ok=True)
