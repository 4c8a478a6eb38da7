"""Work for all cores that survives its workers: a file that kills or stalls a decoder is named."""
import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.connection import wait

import torch


def serve(work, pipe):
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # what is half-written is removed on the way out
    parent = os.getppid()
    while os.getppid() == parent:  # else nobody waits for us
        if pipe.poll(2):
            task = pipe.recv()
            if task is None:
                return
            pipe.send(work(task))


def spread(work, tasks, workers, limit=900):
    """Yield (task, work(task), None) as they come, or (task, None, why) where the process that had it is gone
    or took more than `limit` seconds. An exception of work ends its process."""
    tasks, busy = iter(tasks), {}  # pipe: process, task, when it began

    def start():
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.Process(target=serve, args=(work, theirs), daemon=True)
        process.start()
        theirs.close()
        return ours, process

    def give(pipe, process):
        task = next(tasks, None)
        pipe.send(task)
        if task is None:
            process.join()
        else:
            busy[pipe] = process, task, time.monotonic()

    for _ in range(workers):
        give(*start())
    try:
        while busy:
            for pipe in wait(list(busy), timeout=1):
                process, task, _ = busy.pop(pipe)
                try:
                    result, why = pipe.recv(), None
                except (EOFError, OSError):
                    process.join()
                    result, why = None, f"ended the process that read it (code {process.exitcode})"
                    pipe, process = start()
                yield task, result, why
                give(pipe, process)
            for process, _, since in busy.values():
                if time.monotonic() - since > limit:
                    process.kill()  # the next round finds its pipe at an end
    finally:
        for process, *_ in busy.values():
            process.terminate()
        for process, *_ in busy.values():
            process.join(2)
            process.kill()
