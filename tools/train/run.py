"""The surroundings of the training loop: processes, signals, and the run's folder with its lock, log and
checkpoints."""
import fcntl
import json
import math
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

import config as settings
from tools.checkpoint.devices import pick_compute, pick_device
from tools.checkpoint.files import save_atomically
from tools.checkpoint.run_dir import INTERIM, checkpoints
from tools.common import RANK_TIMEOUT, UserError, name_disk_errors

# ------------------------------------------------------------------------------------------------------------
# Processes


def init_process_group(device, rank, world):
    """-> the control group (gloo) of all ranks: for messages between hosts, which no device waits for."""
    # After a torchrun restart the store still holds the dead workers' addresses: take a fresh key prefix.
    store, _, _ = next(rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=RANK_TIMEOUT)
    return dist.new_group(backend="gloo", timeout=RANK_TIMEOUT)


def catch_signals():
    """-> a list that receives SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) from now on, so that the loop can save and
    stop. The second Ctrl-C interrupts."""
    received = []

    def receive(number, _):
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(signal.Signals(number))

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, receive)
    return received


# ------------------------------------------------------------------------------------------------------------
# The run's folder


def open_locked(file):
    """A log, opened to read and append bytes; UserError if another process holds it. The lock is this
    process's alone (lockf): DataLoader workers that outlive it do not hold it."""
    f = open(file, "ab+", buffering=0)
    try:
        fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{file}: another process trains in this folder; wait for it, or give another "
                        f"--run_name") from error
    except OSError as error:  # some cluster file systems have no locks
        tqdm.write(f"note: {file} cannot be locked ({error}): start no second run in its folder", sys.stderr)
    return f


class Run:
    """Where a run computes (rank, world, device, dtype), messages between its ranks, and its folder
    expdir/run_name/: log.jsonl, which is also the lock, and checkpoints, which a thread writes beside
    training. Only rank 0 writes."""

    def __init__(self, c):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(c.device)
        if self.world > 1:
            if self.device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            self.control = init_process_group(self.device, self.rank, self.world)
        self.dtype, compute = pick_compute(c, self.device)
        self.say(compute)
        self.folder = os.path.join(settings.resolve_path(c.expdir), c.run_name)
        self.keep_last = 1 if c.delete_previous_checkpoint else c.keep_last
        self.writer = ThreadPoolExecutor(1)
        self.pending = None  # the checkpoint that it writes
        self.log_file = None
        if self.rank == 0:
            os.makedirs(self.folder, exist_ok=True)
            self.log_file = open_locked(os.path.join(self.folder, "log.jsonl"))

    # --- all ranks

    def sum_over_ranks(self, tensor):
        """In place, on the device."""
        if self.world > 1:
            dist.all_reduce(tensor)

    def any_rank(self, *flags):
        """For each flag, whether it is true on any rank."""
        flags = torch.tensor(flags, dtype=torch.int32)
        if self.world > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX, self.control)
        return flags.bool().numpy()

    def gather_lists(self, items):
        """The lists of all ranks, concatenated in the order of ranks."""
        if self.world == 1:
            return items
        lists = [None] * self.world
        dist.all_gather_object(lists, items, self.control)
        return sum(lists, [])

    def check_same_on_all_ranks(self, values):
        """UserError where {name: value} differs: nodes were started by hand, or see other files."""
        for other in self.gather_lists([values]):
            for name, value in values.items():
                if value != other.get(name):
                    raise UserError(f"{name} = {value!r} on one rank, {other.get(name)!r} on another: "
                                    f"expected the same settings, data and run folder on all ranks")

    # --- log and checkpoints

    def say(self, text, file=None):
        """Print on rank 0, to standard output or a file."""
        if self.rank == 0:
            tqdm.write(text, file)

    def log_size(self):
        return os.fstat(self.log_file.fileno()).st_size

    def log(self, **entry):
        """Append an entry to log.jsonl."""
        for name, value in entry.items():
            if isinstance(value, float) and not math.isfinite(value):  # JSON has no NaN
                entry[name] = None
        if self.log_file:
            with name_disk_errors(self.log_file.name):
                self.log_file.write(json.dumps(entry).encode() + b"\n")

    def save(self, name, content):
        """Write a checkpoint in the background: training waits for the copy to host memory alone."""
        self.wait_for_checkpoint()
        copy = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), content)
        self.pending = self.writer.submit(self.write_checkpoint, os.path.join(self.folder, name), copy)

    def write_checkpoint(self, path, content):
        save_atomically(content, path)
        interim = os.path.join(self.folder, INTERIM)
        if path == interim:
            return
        for old in (interim, interim + ".tmp"):  # the second: of a run that was killed
            if os.path.exists(old):
                os.remove(old)
        if self.keep_last:
            files = checkpoints(self.folder)  # newest first; later ones than this can only be damaged
            for old in files[files.index(path) + self.keep_last:]:
                os.remove(old)

    def wait_for_checkpoint(self):
        """Wait for the one that is being written; raises what its writing raised."""
        if self.pending:
            self.pending.result()
