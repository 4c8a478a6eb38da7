"""A training run around its loop: processes, batches, its folder with lock, log and checkpoints, signals."""
import errno
import fcntl
import json
import math
import os
import re
import signal
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from glob import escape, glob

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

import config as settings
from tools.checkpoint.files import save_atomically
from tools.checkpoint.run_dir import checkpoints
from tools.common import UserError, check_folder_writable, check_writable, name_disk_errors, parse_json_line

# ------------------------------------------------------------------------------------------------------------
# Processes


def processes():
    """-> rank, world size and local rank that torchrun tells; 0, 1, 0 without it."""
    names, environment = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), os.environ
    if "WORLD_SIZE" not in environment and int(environment.get("SLURM_NTASKS") or 1) > 1:
        raise UserError(f"SLURM_NTASKS = {environment['SLURM_NTASKS']}, but no WORLD_SIZE: every task would "
                         f"train a run of its own; start one task a node, and torchrun in it")
    if "WORLD_SIZE" not in environment:
        return 0, 1, 0
    for name in ("WORLD_SIZE", *names):
        if not environment.get(name, "").isdigit():
            raise UserError(f"{name} = {environment.get(name)!r} in the environment: expected a number, as "
                             f"torchrun gives it, or no WORLD_SIZE at all")
    return [int(environment[name]) for name in names]


def join(backend, rank, world):
    """Start the process group, and one of the hosts, which is returned. torchrun starts again with the store
    of before, where addresses of dead processes stand: rank 0 gives each of us, by a word that is new, the
    name under which the new ones do."""
    store, *_ = next(rendezvous("env://"))
    word = uuid.uuid4().hex
    if rank:
        store.set(f"hello {rank}", word)
        name = store.get(f"name for {word}").decode()
        store.set(f"{name} {rank}", "heard")
    else:
        name = word
        while not store.check([f"{name} {r}" for r in range(1, world)]):
            for r in range(1, world):
                if store.check([f"hello {r}"]):  # may be a dead one's: harmless, and asked again
                    store.set(f"name for {store.get(f'hello {r}').decode()}", name)
            time.sleep(0.02)
    dist.init_process_group(backend, store=dist.PrefixStore(name, store), rank=rank, world_size=world)
    return dist.new_group(backend="gloo")


def all_gather_lists(some, control):
    """The lists of all ranks as one; control: their group on the host, None for one process."""
    if control is None:
        return some
    lists = [None] * dist.get_world_size(control)
    dist.all_gather_object(lists, some, control)
    return [x for part in lists for x in part]


def check_same_on_all_ranks(told, control):
    """ValueError where the ranks do not all tell the same {name: value}: every node was started by hand."""
    for other in all_gather_lists([told], control):
        for name in told:
            if told[name] != other.get(name):
                raise UserError(f"{name} = {told[name]!r} on one rank, {other.get(name)!r} on another: "
                                 f"expected the same settings, data and folder of the run on all of them")


def any_rank(flags, control):
    """[True where any rank says so] of a list of bools: host to host, no device waits."""
    flags = torch.tensor(flags, dtype=torch.int32)
    if control is not None:
        dist.all_reduce(flags, dist.ReduceOp.MAX, control)
    return [bool(flag) for flag in flags.numpy()]


def catch_signals():
    """-> a list to which SIGTERM, SIGUSR1 and Ctrl-C are added from now on: the loop saves and ends. A second
    Ctrl-C interrupts."""
    came = []

    def note(number, _):
        if number == signal.SIGINT and came:
            raise KeyboardInterrupt
        came.append(number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, note)
    return came


def release_signals():
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


# ------------------------------------------------------------------------------------------------------------
# Batches


def prefetch_to_gpu(batches, device):
    """The batches. CUDA: one more than is asked for, each copied from pinned memory by a stream of its own
    while those before are computed; arrived waits for it."""
    last, side = None, torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in batches:
        if side:
            with torch.cuda.stream(side):
                there = [batch[name].to(device, non_blocking=True) for name in ("input_ids", "windows")]
                batch["coming"] = there, side.record_event()
            batch, last = last, batch
        if batch:
            yield batch
    if last:
        yield last


def wait_for_copy(batch, device):
    """input_ids and windows of a batch on the device, once: they are computed with and forgotten."""
    if "coming" not in batch:
        return [batch[name].to(device, non_blocking=True) for name in ("input_ids", "windows")]
    (there, copied), now = batch.pop("coming"), torch.cuda.current_stream(device)
    now.wait_event(copied)
    for tensor in there:
        tensor.record_stream(now)  # their memory is the other stream's, which must not use it before
    return there


# ------------------------------------------------------------------------------------------------------------
# The folder


def forget(f, redone):
    """Take those lines out of a file of JSON objects, open to read and append bytes, that will come again,
    and what a crash tore; what stands before them is not written anew."""
    f.seek(0)
    lines, kept = f.read().splitlines(keepends=True), []
    for line in lines:
        entry = parse_json_line(line)
        if entry is not None and not redone(entry):
            kept.append(line.rstrip() + b"\n")
    if kept != lines:
        alike = next((i for i, pair in enumerate(zip(lines, kept)) if pair[0] != pair[1]), len(kept))
        f.truncate(sum(map(len, lines[:alike])))
        f.writelines(kept[alike:])


def at_least(value, least):
    return type(value) is int and value >= least


def locked(file, taken):
    """A file, open to read and append bytes; ValueError(taken) if another process has it. By process, not by
    file: what workers inherit does not hold it."""
    f = open(file, "ab+", buffering=0)
    try:
        fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise UserError(taken) from error
    except OSError as error:  # some file systems have none
        tqdm.write(f"note: {file} cannot be locked ({error}): start no second run with it", file=sys.stderr)
    return f


class Run:
    """expdir/run_name/ of one run: log.jsonl, which is also the lock, and checkpoints, which a thread writes.
    Only rank 0 touches it."""

    def __init__(self, c, rank):
        self.folder, self.rank = os.path.join(settings.resolve_path(c.expdir), c.run_name), rank
        self.name, self.waiting = c.run_name, {}  # {file: lines that there was no room for}
        self.copy = None  # of what the last checkpoint holds
        self.keep = 1 if c.delete_previous_checkpoint else c.keep_last
        self.keep_every, self.log, self.record_file, self.profiler = c.keep_every, None, None, None
        self.thread, self.pending, self.failed, self.news = ThreadPoolExecutor(1), None, None, None
        if rank:
            return
        check_folder_writable(self.folder)
        files = [os.path.join(self.folder, "log.jsonl"), *glob(f"{escape(self.folder)}/checkpoint_*.pt*")]
        record = c.dataset_blending_output and settings.resolve_path(c.dataset_blending_output)
        for file in files + [record] * bool(record):
            check_writable(file)
        os.makedirs(self.folder, exist_ok=True)
        self.log = locked(files[0], f"{self.folder}: another process trains in this folder; wait for it, or "
                                    f"give another --run_name")
        for file in glob(f"{escape(self.folder)}/*.pt.tmp"):  # of a process that was killed while it wrote
            os.remove(file)
        if record:
            os.makedirs(os.path.dirname(record), exist_ok=True)
            try:
                taken = f"dataset_blending_output = {record}: another run writes it"
                self.record_file = locked(record, taken)
            except ValueError:
                self.end()
                raise

    def begin(self, epoch, step):
        """What was logged after this step, and selected from this epoch on, will come again."""
        if self.log:
            forget(self.log, lambda entry: at_least(entry.get("step"), step + 1))
        if self.record_file:
            own = lambda entry: entry.get("run", self.name) == self.name
            forget(self.record_file, lambda entry: own(entry) and at_least(entry.get("epoch"), epoch))

    def validated(self, step):
        """Whether the log has the validation losses of this step."""
        self.log.seek(0)
        entries = filter(None, map(parse_json_line, self.log.read().splitlines()))
        return any("valid" in entry and entry.get("step") == step for entry in entries)

    def write(self, **entry):
        self.tell()
        if self.log:
            for name, value in entry.items():
                if isinstance(value, float) and not math.isfinite(value):  # JSON has no NaN
                    entry[name] = None
            self.put(self.log, entry)

    def write_blend(self, entries):
        if self.record_file:
            self.put(self.record_file, *({"run": self.name} | entry for entry in entries))  # others share it

    def put(self, f, *entries):
        """Lines to the end of a file, all or none: those that a full disk has no room for wait."""
        lines = self.waiting.pop(f, b"") + b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)
        end = os.fstat(f.fileno()).st_size
        try:
            with name_disk_errors(f.name):
                if os.write(f.fileno(), lines) < len(lines):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(f.fileno(), end)
            self.waiting[f], self.news = lines, str(error)

    def save(self, name, content):
        """Write a checkpoint in the background, from a copy in main memory, which takes the place of the one
        before: training waits for the copy alone."""
        self.wait()
        self.copy = on_host(content, self.copy)
        self.pending = self.thread.submit(self._save, name, self.copy)

    def wait(self):
        """Until the checkpoint that is being written is. Any error but the disk's is raised here."""
        if self.pending:
            self.pending.result()
            self.pending = None
        self.tell()

    def tell(self):
        """What the writer has to say, by the loop's thread: decoding, it may have silenced standard error."""
        if self.news:
            tqdm.write(f"WARNING: {self.news}; training goes on", file=sys.stderr)
            self.news = None

    def _save(self, name, content):
        path = os.path.join(self.folder, name)
        try:
            save_atomically(content, path)
        except OSError as error:  # a full disk may have room again; a long run goes on
            self.failed = self.news = f"{error}; earlier checkpoints are as they were"
            return
        self.failed, interim = None, os.path.join(self.folder, "checkpoint_interim.pt")
        if path == interim:
            return
        if os.path.exists(interim):
            os.remove(interim)
        number = lambda file: int(re.findall(r"\d+", os.path.basename(file))[0])
        # not those of later epochs, which may be there, damaged: this one is the newest
        older = [file for file in checkpoints(self.folder) if number(file) < number(path)]
        for old in older[self.keep - 1:] if self.keep else ():
            if not self.keep_every or (number(old) + 1) % self.keep_every:
                os.remove(old)

    def close(self):
        """Log and last checkpoint are on the disk, or ValueError says why not."""
        for f in list(self.waiting):
            self.put(f)
        lost = self.waiting and self.news
        self.wait()
        if self.profiler:
            self.profiler.stop()
            if not self.profiler.step_num > 2:
                tqdm.write("note: profile: the third and fourth step are traced, and there were fewer")
        if self.failed:
            raise UserError(self.failed)
        if lost:
            raise UserError(lost)

    def end(self):
        """However a run ends: what is being written is written, what it left empty is removed."""
        self.wait()
        self.thread.shutdown()
        for f in filter(None, (self.log, self.record_file)):
            f.close()
            if os.path.isfile(f.name) and not os.path.getsize(f.name):  # not of /dev/null
                os.remove(f.name)
        if self.log and not os.listdir(self.folder):
            os.rmdir(self.folder)


def on_host(x, before=None):
    """A copy in main memory that later steps do not change, of tensors in dicts and lists; in the memory of a
    copy made before, where it has the form: new memory takes several times as long."""
    if isinstance(x, torch.Tensor):
        fits = isinstance(before, torch.Tensor) and (before.shape, before.dtype) == (x.shape, x.dtype)
        return before.copy_(x.detach()) if fits else x.detach().to("cpu", copy=True)
    if isinstance(x, dict):
        before = before if isinstance(before, dict) else {}
        return {key: on_host(value, before.get(key)) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        before = before if isinstance(before, list) and len(before) == len(x) else [None] * len(x)
        return [on_host(*pair) for pair in zip(x, before)]
    return x


def profiler(folder, device):
    """Traces two steps after the first two, writes folder/trace.json and prints the operations that took
    most; its step() is to be called after every step."""
    from torch.profiler import ProfilerActivity, profile, schedule
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")

    def ready(p):
        p.export_chrome_trace(os.path.join(folder, "trace.json"))
        order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        tqdm.write(p.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60))

    p = profile(activities=activities, schedule=schedule(wait=1, warmup=1, active=2, repeat=1),
                on_trace_ready=ready)
    p.start()
    return p
