"""The index of a manifest: its items as JSON lines, and where each line begins.

A manifest of millions of items is parsed once. `<manifest>.index`, beside it or in cache_dir, then serves
every later start, rank and worker, while the manifest has the size and modification time that it holds:

    {"manifest": [version, size, mtime_ns], "items": n, "digest": ..., "head": the manifest's other keys}
    n + 1 offsets of lines, int64
    n lines of JSON, an item each

Items are read by pread, not through a memory map, so that a worker's memory does not grow with what it reads.
"""
import fcntl
import hashlib
import json
import math
import os
import socket
import struct
import sys
import zlib

import numpy as np

from tools.common import atomic_write, parse_json_line, read_json

VERSION = 2
SMALL = 1000  # fewer items are parsed faster than a file is worth leaving beside them
BLOCK = 10_000  # items encoded at a time


class Items:
    """items[i] -> dict, from an index in an open file."""

    def __init__(self, file):
        self.file = file
        file.seek(0)
        line = file.readline()
        self.header = parse_json_line(line) or {}
        self.n = self.header.get("items", 0)
        self.offsets = len(line)
        self.lines = len(line) + 8 * (self.n + 1)

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        fd = self.file.fileno()
        offset = self.offsets + 8 * range(self.n)[i]  # IndexError
        begin, end = struct.unpack("=2q", os.pread(fd, 16, offset))
        line = os.pread(fd, end - begin, self.lines + begin)
        item = json.loads(line)
        if b"\\ud" in line:  # a surrogate: half a pair, which JSON can spell, is no text for a tokenizer
            text = json.dumps(item, ensure_ascii=False).encode("utf-16", "surrogatepass")
            item = json.loads(text.decode("utf-16", "replace"))
        return item


def to_lines(items):
    """Dicts -> JSON, a string each. One json.dumps of all takes half the time of one per item; Infinity,
    which JSON does not have, separates them."""
    separated = [math.inf] * (2 * len(items) - 1)
    separated[::2] = items
    lines = json.dumps(separated)[1:-1].split(", Infinity, ")
    return lines if len(lines) == len(items) else [json.dumps(item) for item in items]


def write_index(f, content, stamp):
    """Write the index of a manifest, parsed from JSON, to an open file."""
    items = list(content["data"].values())
    lengths, digest, blocks = [0], 0, []
    for i in range(0, len(items), BLOCK):
        lines = to_lines(items[i:i + BLOCK])
        lengths += [len(line) + 1 for line in lines]
        blocks.append("\n".join([*lines, ""]).encode())
        digest = zlib.crc32(blocks[-1], digest)
    head = {key: value for key, value in content.items() if key != "data"}
    header = {"manifest": stamp, "items": len(items), "digest": f"{digest:08x}", "head": head}
    f.write(json.dumps(header).encode() + b"\n")
    f.write(np.cumsum(lengths, dtype=np.int64))
    f.writelines(blocks)


def open_items(file, check, cache_dir=None):
    """Items of a manifest, by its index, which is built where there is none: by one process at a time.
    items.header["head"]: the other keys of the manifest. check(JSON of the manifest) raises UserError."""
    path = file + ".index"
    if cache_dir:
        name = hashlib.sha256(os.path.abspath(file).encode()).hexdigest()[:16]
        path = os.path.join(cache_dir, f"{os.path.basename(file)}.{name}.index")
    suffix = ""
    with open(file, "rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the process ends, however it ends
        except OSError:  # a file system without locks: builders side by side, each with a file of its own
            suffix = f".{socket.gethostname()}-{os.getpid()}"
        stat = os.stat(file)
        stamp = [VERSION, stat.st_size, stat.st_mtime_ns]
        if os.path.isfile(path):
            items = Items(open(path, "rb"))
            if items.header.get("manifest") == stamp:
                return items
        content = read_json(file)
        check(content)
        if len(content["data"]) >= SMALL:
            try:
                os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
                with atomic_write(path + suffix, "wb") as f:
                    write_index(f, content, stamp)
                os.replace(path + suffix, path)
                return Items(open(path, "rb"))
            except OSError as error:
                if os.environ.get("RANK", "0") == "0":
                    print(f"Warning: {file}: its index is kept in memory ({error})", file=sys.stderr)
        in_memory = open(os.memfd_create("index"), "w+b")
        write_index(in_memory, content, stamp)
        return Items(in_memory)
