"""The surroundings of the training loop: process groups, copies to the GPU, signals, and the run's folder with
its lock, log and checkpoints."""
import errno
import fcntl
import json
import math
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

import config as settings
from tools.checkpoint.devices import pick_device, pick_precision
from tools.checkpoint.files import save_atomically
from tools.checkpoint.run_dir import checkpoints
from tools.common import UserError, check_folder_writable, check_writable, name_disk_errors, parse_json_line

INTERIM = "checkpoint_interim.pt"  # saved inside an epoch; removed when the epoch has its own

# ------------------------------------------------------------------------------------------------------------
# Processes


def init_distributed(device):
    """-> rank, world size, this rank's device and its control group, from torchrun's environment.

    The control group (gloo) is for messages between hosts, which no device waits for; None for one process.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return 0, 1, device, None
    backend = "gloo"
    if device.type == "cuda":
        backend = "nccl"
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # After a torchrun restart the store still holds the dead workers' addresses: take a fresh key prefix.
    store, *_ = next(rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return rank, world, device, dist.new_group(backend="gloo")


def all_gather_lists(items, control):
    """The lists of all ranks, concatenated in the order of ranks."""
    if control is None:
        return items
    lists = [None] * dist.get_world_size(control)
    dist.all_gather_object(lists, items, control)
    return [item for part in lists for item in part]


def any_rank(flags, control):
    """A list of bools -> for each, whether it is true on any rank."""
    flags = torch.tensor(flags, dtype=torch.int32)
    if control is not None:
        dist.all_reduce(flags, dist.ReduceOp.MAX, control)
    return [bool(flag) for flag in flags.numpy()]


def check_same_on_all_ranks(values, control):
    """UserError where {name: value} differs between ranks: nodes were started by hand, or see other files."""
    for other in all_gather_lists([values], control):
        for name, value in values.items():
            if value != other.get(name):
                raise UserError(f"{name} = {value!r} on one rank, {other.get(name)!r} on another: expected the "
                                f"same settings, data and run folder on all ranks")


@contextmanager
def catch_signals():
    """A list that receives SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) instead of the process, which can then save and
    stop. The second Ctrl-C interrupts."""
    received = []

    def receive(number, _):
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    previous = [signal.signal(number, receive) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, previous):
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------------
# Copies to the GPU


def prefetch_to_gpu(batches, device):
    """The same batches. On CUDA each is copied from pinned memory by a stream of its own while the one before
    it is computed; wait_for_copy gives the copies."""
    if device.type != "cuda":
        yield from batches
        return
    stream, previous = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(stream):
            copies = copy_inputs(batch, device)
            batch["copies"] = copies, stream.record_event()
        if previous:
            yield previous
        previous = batch
    if previous:
        yield previous


def copy_inputs(batch, device):
    return [batch[name].to(device, non_blocking=True) for name in ("input_ids", "windows")]


def wait_for_copy(batch, device):
    """-> input_ids and windows of a batch on the device."""
    if "copies" not in batch:
        return copy_inputs(batch, device)
    tensors, copied = batch.pop("copies")
    stream = torch.cuda.current_stream(device)
    stream.wait_event(copied)
    for tensor in tensors:
        tensor.record_stream(stream)  # allocated by the copying stream, which must not reuse the memory yet
    return tensors


# ------------------------------------------------------------------------------------------------------------
# The run's folder


def open_locked(file):
    """The log of a run, opened to read and append bytes; UserError if another process holds it. The lock is this
    process's alone (lockf): DataLoader workers that outlive it do not hold it."""
    f = open(file, "ab+", buffering=0)
    try:
        fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise UserError(f"{file}: another process trains in this folder; wait for it, or give another "
                        f"--run_name") from error
    except OSError as error:  # some cluster file systems have no locks
        tqdm.write(f"note: {file} cannot be locked ({error}): start no second run in its folder", file=sys.stderr)
    return f


def truncate_log(f, key, last):
    """Truncate a JSON-lines file after the entries whose `key` is at most `last`, and drop a torn last line."""
    f.seek(0)
    end = 0
    for line in f.read().splitlines(keepends=True):
        entry = parse_json_line(line) or {}
        if entry.get(key, last) > last or not line.endswith(b"\n"):
            break
        end += len(line)
    f.truncate(end)


def append_json(f, entry):
    """Append a line; OSError names the file where the disk is full."""
    line = json.dumps(entry).encode() + b"\n"
    with name_disk_errors(f.name):
        if f.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Run:
    """Where a run computes (rank, world, device, dtype, control group) and its folder expdir/run_name/: log.jsonl,
    which is also the lock, and checkpoints, which a thread writes beside training. Only rank 0 writes."""

    def __init__(self, c):
        self.rank, self.world, self.device, self.control = init_distributed(pick_device(c.device))
        self.dtype, reason = pick_precision(c.precision, self.device)
        self.say(f"products in {self.dtype} ({reason})")
        self.folder = os.path.join(settings.resolve_path(c.expdir), c.run_name)
        self.keep_last = 1 if c.delete_previous_checkpoint else c.keep_last
        self.writer, self.pending = ThreadPoolExecutor(1), None
        self.log_file = self.blend_file = None
        if self.rank > 0:
            return
        check_folder_writable(self.folder)
        blend = c.dataset_blending_output and settings.resolve_path(c.dataset_blending_output)
        if blend:
            check_writable(blend)
            os.makedirs(os.path.dirname(blend), exist_ok=True)
            self.blend_file = open(blend, "ab+", buffering=0)
        os.makedirs(self.folder, exist_ok=True)
        self.log_file = open_locked(os.path.join(self.folder, "log.jsonl"))

    def say(self, text):
        if self.rank == 0:
            tqdm.write(text)

    def warn(self, text):
        if self.rank == 0:
            tqdm.write(text, file=sys.stderr)

    def truncate(self, state):
        """Drop what a resumed run will log again."""
        if self.log_file:
            truncate_log(self.log_file, "step", state.step)
        if self.blend_file:
            started = state.step_in_epoch > 0 or state.remaining is not None
            truncate_log(self.blend_file, "epoch", state.epoch if started else state.epoch - 1)

    def has_validation(self, step):
        """Whether the log has the validation losses of a step."""
        if self.rank > 0:
            return False
        self.log_file.seek(0)
        entries = [parse_json_line(line) or {} for line in self.log_file.read().splitlines()]
        return any("valid" in entry and entry.get("step") == step for entry in entries)

    def log(self, **entry):
        """Append an entry to log.jsonl. A checkpoint that could not be written ends the run here."""
        if self.pending and self.pending.done():
            self.wait()
        for name, value in entry.items():
            if isinstance(value, float) and not math.isfinite(value):  # JSON has no NaN
                entry[name] = None
        if self.log_file:
            append_json(self.log_file, entry)

    def log_blend(self, entries):
        """Append what an epoch selects to dataset_blending_output."""
        for entry in entries if self.blend_file else ():
            append_json(self.blend_file, entry)

    def save(self, name, content):
        """Write a checkpoint in the background: training waits for the copy to host memory alone."""
        self.wait()
        copy = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), content)
        self.pending = self.writer.submit(self._write, name, copy)

    def _write(self, name, content):
        path, interim = os.path.join(self.folder, name), os.path.join(self.folder, INTERIM)
        save_atomically(content, path)
        if name == INTERIM:
            return
        if os.path.exists(interim):
            os.remove(interim)
        if self.keep_last:
            files = checkpoints(self.folder)  # newest first; later ones than this can only be damaged
            for old in files[files.index(path) + self.keep_last:]:
                os.remove(old)

    def wait(self):
        """Wait for the checkpoint that is being written; raises what its writing raised."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()

    def close(self):
        self.writer.shutdown()
        for f in (self.log_file, self.blend_file):
            if f:
                f.close()
        self.wait()
