"""The items of a manifest without an object each: its text as it is, and a few numbers an item, in one file.

    head, items = open_items("train.json", check_item, check_head)    # items[i] -> the item as a dict

A manifest is parsed once. <manifest>.index, beside it or in cache_dir, then holds its text, where every item
lies in that, and what planning an epoch needs; it counts as long as it is what was written, of these bytes.
Processes read items by pread and share the system's pages: none grows with what it has read.
"""
import contextlib
import hashlib
import io
import json
import math
import mmap
import os
import re
import socket
import struct
import sys
import weakref
from array import array
from collections.abc import Sequence

import numpy as np

from tools.common import UserError, read_json

ODD = np.random.default_rng(0).integers(0, 2 ** 63, 2 ** 17, np.uint64) * 2 + 1  # of the fingerprint
SMALL = 1000  # items that are parsed faster than a file is worth leaving beside them: 5 ms
MAGIC = "items of a manifest 3 "
COLUMNS = {"place": "2i8", "seconds": "f4", "clips": "i4"}  # from where to where; nan: no duration is told

KEY = re.compile(r'([ \t\n\r]*)"([^"\\]*(?:\\.[^"\\]*)*)"([ \t\n\r]*:[ \t\n\r]*)')
COLON = re.compile(r'"[ \t\n\r]*:')
EMPTY = re.compile(r"{[ \t\n\r]*}")
SPACE = re.compile(r"[ \t\n\r]*")
scan = json.JSONDecoder().scan_once  # (text, where a value begins) -> value, where it ends
pairs = json.JSONDecoder(object_pairs_hook=list).scan_once  # an object's (key, value)s, repeated ones too


class Items(Sequence):
    """items[i] -> dict; items.column("seconds") -> (n,). Holds the index's file open, or its bytes."""

    def __init__(self, image, path=None):
        """image: bytes, or the number of the open file at a path."""
        self.image, self.path = image, path
        if path:
            weakref.finalize(self, os.close, image)
        first = self._read(0, 64)
        size = os.fstat(image).st_size if path else len(image)
        if not first.startswith(MAGIC.encode()):
            raise UserError("not an index")
        start, self.sum = first[len(MAGIC):].split()
        self.start = int(start)  # of the columns
        if not 64 <= self.start <= size:
            raise UserError("not whole")
        self.told = json.loads(self._read(64, self.start - 64))
        self.n = self.told["items"]
        ends = np.cumsum([0, *(self.n * np.dtype(kind).itemsize for kind in COLUMNS.values())]) + self.start
        *begins, self.text = map(int, ends)
        self.begin = dict(zip(COLUMNS, begins))
        if size != self.text + self.told["bytes"]:
            raise UserError("not whole")

    def _read(self, at, n):
        return os.pread(self.image, n, at) if self.path else self.image[at:at + n]

    def column(self, name):
        image = mmap.mmap(self.image, 0, access=mmap.ACCESS_READ) if self.path else self.image
        return np.frombuffer(image, COLUMNS[name], self.n, self.begin[name])

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if not -self.n <= i < self.n:
            raise IndexError(f"item {i} of {self.n}")
        i = int(i) % self.n
        at, end = struct.unpack("<2q", self._read(self.begin["place"] + 16 * i, 16))
        return json.loads(self._read(self.text + at, end - at))

    def many(self, chosen):
        """The items of an array of numbers, one after the other."""
        for at, end in self.column("place")[chosen].tolist():
            yield json.loads(self._read(self.text + at, end - at))

    def __reduce__(self):  # to a worker that is not forked
        if self.path:
            return open_index, (self.path, self.told["digest"])
        return Items, (self.image,)


def walk(text, at, visit):
    """Call visit(i, key, where its value begins) -> where it ends, for every member of the object at `at`;
    -> the object's end. ValueError where the text is no JSON."""
    if empty := EMPTY.match(text, at):
        return empty.end()
    at, i, gap, colon = at + 1, 0, "", ""
    while True:
        usual = f'{gap}"{i}"{colon}'  # most members are like the one before
        if colon and text.startswith(usual, at):
            name, at = str(i), at + len(usual)
        else:
            key = KEY.match(text, at)
            if not key:
                raise UserError(f"no key at {at}")
            gap, name, colon, at = key[1], key[2], key[3], key.end()
            if "\\" in name or not (name.isascii() and name.isprintable()):
                name = json.loads(f'"{name}"'.encode("latin-1").decode())  # its characters, not its bytes
        at = visit(i, name, at)
        i += 1
        if text[at:at + 1] != ",":
            at = SPACE.match(text, at).end()
            if text[at:at + 1] == "}":
                return at + 1
            if text[at:at + 1] != ",":
                raise UserError(f"no end of {name!r}")
        at += 1


def parse(raw, check_item):
    """A manifest's bytes -> its keys (data: {}), columns, the first error among its items, and the first key
    that is there twice, of which json.load would keep the last; lists, empty where there is none."""
    text = raw.decode("latin-1")  # a character a byte: positions are those of the file
    raw.isascii() or raw.decode()  # UTF-8 or an error
    head, columns, wrong, twice = {}, {}, [], []

    def items(at):
        place, seconds, clips = array("q"), array("f"), array("i")
        columns.update(place=place, seconds=seconds, clips=clips)

        def item(i, key, at):
            value, end = scan(text, at)
            if (type(value) is dict and text.count(":", at, end) > len(value)  # every key has one
                    and len(COLON.findall(text, at, end)) > len(value)):
                names = [name for name, _ in pairs(raw[at:end].decode(), 0)[0]]
                twice.extend(f"data['{i}'] {name}" for name in names if names.count(name) > 1)
            numbers = math.nan, 1
            if not wrong:
                try:
                    numbers = check_item(i, key, value)
                except ValueError as error:
                    wrong.append(error)
            place.append(at)
            place.append(end)
            seconds.append(numbers[0])
            clips.append(numbers[1])
            return end

        return walk(text, at, item)

    def member(_, key, at):
        twice.extend([key] * (key in head))
        if key == "data" and text[at:at + 1] == "{":
            head[key] = {}
            return items(at)
        value, end = scan(text, at)
        head[key] = json.loads(raw[at:end])  # with its characters, not its bytes
        return end

    begin = SPACE.match(text).end()
    if text[begin:begin + 1] != "{":
        raise UserError("no object")
    end = walk(text, begin, member)
    if SPACE.match(text, end).end() != len(text):
        raise UserError("more after its end")
    return head, columns, wrong, twice


def build(file, check_item, check_head):
    """-> the parts of an index: bytes and arrays. ValueError names file, key and what was expected."""
    with open(file, "rb") as f:
        raw = f.read()
    try:
        head, columns, wrong, twice = parse(raw, check_item)
    except (ValueError, StopIteration, RecursionError) as error:  # told by the library, in its own words
        content = read_json(file)
        check_head(content, len(content.get("data", ())) if isinstance(content, dict) else 0)
        raise UserError(f"{file}: not read ({error})") from error
    if twice:
        raise UserError(f"{file}: {twice[0]} is there twice, expected once")
    n = len(columns.get("clips", ()))
    check_head(head, n)
    if wrong:
        raise wrong[0]
    told = {"digest": digest_of(io.BytesIO(raw)), "items": n, "bytes": len(raw), "head": head}
    told = json.dumps(told).encode()
    start = -(-(64 + len(told)) // 64) * 64
    numbers = [told.ljust(start - 64), *map(np.asarray, columns.values())]
    first = f"{MAGIC}{start} {digest_of(io.BytesIO(b''.join(numbers)))[:16]}\n".encode().ljust(64)
    return [first, *numbers, raw]


def digest_of(f):
    """Of an open file's bytes: every megabyte is multiplied into 64 bits, and these are hashed. Ten million
    items are 2.7 GB, which SHA-256 alone would take several seconds for at every start."""
    block, sums, size = np.empty(ODD.nbytes, np.uint8), [], 0
    while n := f.readinto(block):
        block[n:], words = 0, -(-n // 8)
        sums.append(np.einsum("i,i", block.view(np.uint64)[:words], ODD[:words]))
        size += n
    return hashlib.sha256(np.array([size, *sums], np.uint64).tobytes()).hexdigest()


def open_index(path, digest):
    """The index at a path, if every byte of it is what was written of these bytes; else None."""
    try:
        items = Items(os.open(path, os.O_RDONLY), path)
        numbers = digest_of(io.BytesIO(items._read(64, items.text - 64)))[:16]
        with open(items.image, "rb", closefd=False) as f:
            f.seek(items.text)
            return items if (numbers.encode(), digest_of(f)) == (items.sum, digest) else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError):  # damaged before its sum can be taken
        return None


@contextlib.contextmanager
def turn(file):
    """One process at a time; the others find the work done. -> the end of a name for what is half-written."""
    with open(file, "rb") as f:
        end = ".tmp"
        try:
            import fcntl
            fcntl.flock(f, fcntl.LOCK_EX)  # ends with the process, too, however that ends
        except (ImportError, OSError):  # a file system without locks: each does it, in a file of its own
            end = f".{socket.gethostname()}-{os.getpid()}.tmp"
        yield end


def write(path, parts, end):
    """Whole or not at all."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path + end, "wb") as f:
            f.writelines(parts)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + end, path)
    except OSError:
        with contextlib.suppress(FileNotFoundError, PermissionError, NotADirectoryError):
            os.remove(path + end)
        raise


def open_items(file, check_item, check_head, cache_dir=None):
    """-> the manifest's keys (data: {}), Items. check_item(i, key, item) -> (seconds, clips), and
    check_head(keys, number of items), raise ValueError for what is wrong."""
    if os.path.getsize(file) < 40 * SMALL:  # fewer than that, surely: no item is as short
        parts = build(file, check_item, check_head)
        items = Items(b"".join(map(bytes, parts)))
        return items.told["head"], items
    with open(file, "rb") as f:
        digest = digest_of(f)
    places = [file + ".index"]
    if cache_dir:
        key = hashlib.sha256(f"{os.path.abspath(file)} {digest}".encode()).hexdigest()[:16]
        places.append(os.path.join(cache_dir, f"{os.path.basename(file)}.{key}.index"))
    find = lambda: next((items for path in places if (items := open_index(path, digest))), None)
    items = find()
    if not items:
        with turn(file) as end:
            items = find() or make(file, places, end, check_item, check_head)
    return items.told["head"], items


def make(file, places, end, check_item, check_head):
    parts, why = build(file, check_item, check_head), None
    told = json.loads(parts[1])
    for path in places if told["items"] >= SMALL else ():
        try:
            write(path, parts, end)
        except OSError as error:
            why = why or error
            continue
        if items := open_index(path, told["digest"]):
            return items
    if why and os.environ.get("RANK", "0") == "0":
        print(f"note: {file}: its index is kept in memory ({why})", file=sys.stderr)
    return Items(b"".join(map(bytes, parts)))
