"""An audio file -> samples: libsndfile by way of soundfile, and what it gets wrong about some files."""
import io
import itertools
import math
import mmap
import os
import re
import sys
import unicodedata
from functools import lru_cache

import numpy as np
import soundfile
import soxr

from tools.common import UserError

BLOCK = 2 ** 17  # samples decoded at a time: many channels cost no memory
UNKNOWN_LENGTH = 2 ** 36  # frames; libsndfile gives more than this where a header has no length
ENDLESS = 2 ** 40  # bytes; no file has so many
SILENT = 1e-4  # peak of a silent channel, -80 dB: lossy codecs leave some noise there
LOWEST_RATE, HIGHEST_RATE = 1000, 1_000_000  # Hz; other headers are damaged

NO_SOUND = {  # how a file begins that holds no sound: what it is
    rb"$": "an empty file",
    rb"version https://git-lfs": "a Git LFS pointer",
    rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype )?html": "an HTML page",
    rb"[^\0-\x08\x0e-\x1f]+$": "text, no sound"}
OGG_STREAM = b"OggS\0\2"  # the first page of a stream
XING = re.compile(rb"(?:Xing|Info)\0\0\0[\x03\x07\x0b\x0f].{4}(.{4})", re.S)  # the length of an MP3, in bytes
# An ID3v1 tag or a byte of padding may end a sound before another one begins.
NEXT_SOUND = re.compile(rb"(?:TAG.{125}|\0)?(?=RIFF|OggS\0\x02|fLaC|ID3[\x02-\x04]|\xff[\xe2-\xfb])", re.S)

warned = mmap.mmap(-1, 1)  # shared with the workers forked later: one warning for all of them


class Part(io.FileIO):
    """Bytes `begin` to `end` of a file, as a file of their own; endless: one that claims to have no end."""

    def __init__(self, path, begin, end, endless=False):
        super().__init__(os.open(path, os.O_RDONLY))  # soundfile takes nothing by a name that ends in .raw
        self.path = path
        self.begin, self.end, self.endless = begin, end, endless
        self.seek(0)

    def seek(self, offset, whence=0):
        origin = (self.begin, super().tell(), self.end)[whence]
        if self.endless and whence == 2 and offset == 0:
            origin = ENDLESS
        return super().seek(max(self.begin, origin + offset))  # -128: an ID3v1 tag

    def tell(self):
        return super().tell() - self.begin

    def readinto(self, buffer):
        left = max(0, self.end - super().tell())
        return super().readinto(memoryview(buffer)[:left])

    def __repr__(self):  # in messages
        return self.path


class AudioFile(soundfile.SoundFile):
    """soundfile seeks after every read, which fails in a FLAC without a length: this one does not."""

    def seekable(self):
        return False


# ------------------------------------------------------------------------------------------------------------
# The sounds of a file. It may hold several, one after another (`cat`, recorders of radio streams), of which
# libsndfile reads the first.


def find_file(path):
    """The path; where there is none, the one that differs in Unicode normalisation: macOS decomposes the
    letters of names, tables and manifests of other systems compose them."""
    folder, name = os.path.split(path)
    if os.path.exists(path) or not name:
        return path
    folder = find_file(folder)
    for form in ("NFC", "NFD"):
        other = os.path.join(folder, unicodedata.normalize(form, name))
        if os.path.exists(other):
            return other
    return path


def read_at(path, offset, n):
    with open(path, "rb") as f:
        f.seek(offset)
        return f.read(n)


def read_head(path, begin):
    """-> where a sound begins after its ID3 tag (cover art), the bytes there."""
    tag = read_at(path, begin, 10)
    if tag[:3] == b"ID3":  # its size: four times seven bits
        begin += 10 + sum((byte & 127) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0)))
    return begin, read_at(path, begin, 4096)


def find_bytes(path, wanted, begin, most=ENDLESS):
    """Where some bytes are in the `most` bytes of a file from `begin` on; ENDLESS: nowhere."""
    with open(path, "rb") as f:
        for offset in range(begin, begin + most, 2 ** 16):
            block = os.pread(f.fileno(), 2 ** 16 + len(wanted) - 1, offset)
            if wanted in block:
                return offset + block.index(wanted)
            if not block:
                break
    return ENDLESS


def sound_end(path, begin):
    """Where the sound at `begin` ends by its headers; ENDLESS where they do not tell."""
    begin, head = read_head(path, begin)
    if head[:4] == b"RIFF":
        return begin + 8 + int.from_bytes(head[4:8], "little")
    if head[:4] == b"fLaC":  # its length in bytes is nowhere; hours are not searched
        return find_bytes(path, b'fLaC\0\0\0"', begin + 4, 2 ** 25)
    page = head
    while page[:6] == OGG_STREAM:  # streams that run side by side begin one after another
        lengths = page[27:27 + page[26]]
        begin += 27 + len(lengths) + sum(lengths)
        page = read_at(path, begin, 282)
    if head[:6] == OGG_STREAM:
        return find_bytes(path, OGG_STREAM, begin)
    length = XING.search(head)
    return begin + int.from_bytes(length[1], "big") if length else ENDLESS


@lru_cache(maxsize=4096)
def split_sounds(path, size, modified):
    """-> (begin, end) of each sound in a file. Searching an hour of Ogg takes 50 ms: once
    for all its items."""
    begins = [0]
    while True:
        end = sound_end(path, begins[-1])
        following = NEXT_SOUND.match(read_at(path, end, 140))
        if not following:
            return list(zip(begins, [*begins[1:], size]))
        begins.append(end + following.end())


def open_part(path, begin, end, head):
    """-> AudioFile of these bytes of a file, `head` the first; frames by its header: estimated for an MP3
    without one."""
    whole = begin == 0 and end == os.path.getsize(path) and not path.endswith(".raw")
    f = AudioFile(path if whole else Part(path, begin, end))
    frames = f.frames
    if f.format.startswith("MP") and not re.search(b"Xing|Info|VBRI", head):
        # libsndfile would stop at its estimate, made of the size and the first frame: a sixth of it, perhaps
        f = AudioFile(Part(path, begin, end, endless=True))
    data = head.find(b"data\0\0\0\0") + 8
    if f.format.startswith("WAV") and frames == 0 and data >= 8:
        # written by a recorder that never came back to its header, unless the sizes say that nothing follows
        if abs(int.from_bytes(head[4:8], "little") + 8 - end + begin) > 1:
            part = Part(path, begin + data, end)
            f = AudioFile(part, "r", f.samplerate, f.channels, f.subtype, "LITTLE", "RAW")
            frames = f.frames
    elif f.format == "RAW":
        raise soundfile.SoundFileRuntimeError("no header")
    if not LOWEST_RATE <= f.samplerate <= HIGHEST_RATE:
        raise soundfile.SoundFileRuntimeError(f"sample rate {f.samplerate} Hz")
    return f, frames


def open_sounds(path):
    """Yield (AudioFile, frames) of each sound in a file, as open_part does. FileNotFoundError or UserError
    name the file and what is wrong with it."""
    file = find_file(path)
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{path}: no such audio file")
    head = b"\0"
    try:
        stat = os.stat(file)
        parts = list(split_sounds(file, stat.st_size, stat.st_mtime_ns))
        for begin, end in parts:
            begin, head = read_head(file, begin)
            f, frames = open_part(file, begin, end, head)
            with f:
                yield f, frames
                if isinstance(f.name, Part) and f.name.endless and not len(f.read(1)):
                    # an MP3 without a VBR header, to the last frame of the first one's rate and channels
                    begin += f.name.tell() - 4
                    following = NEXT_SOUND.search(read_at(file, begin, 12))
                    if following:
                        parts.append((begin + following.end(), end))
    except (soundfile.SoundFileError, OSError) as error:
        causes = [cause for beginning, cause in NO_SOUND.items() if re.match(beginning, head)]
        raise UserError(f"{path}: not readable as audio ({causes[0] if causes else error})") from error


def read_blocks(f, first, n):
    """Yield up to n frames from `first` on as (k, channels), each valid until the next."""
    dtype = "int16" if f.subtype == "PCM_16" else "float32"  # libsndfile takes ten times as long to convert
    buffer = np.empty((min(n, max(1, BLOCK // f.channels)), f.channels), dtype)
    try:
        f.seek(first)
        while n > 0:
            block = f.read(out=buffer[:n])
            yield block
            n = n - len(block) if len(block) == len(buffer) else 0
    except soundfile.LibsndfileError as error:
        raise UserError(f"{f.name}: truncated or damaged ({error})") from error


def read_channel(f, first, n, channel):
    """-> (k,) float32, k <= n."""
    blocks = [block[:, channel].copy() for block in read_blocks(f, first, n)]
    x = join(blocks)
    return x if x.dtype == np.float32 else x.astype(np.float32) * np.float32(2 ** -15)  # exact


def read_first_channel(f, first, n):
    """The first channel; where that is silent and another is not, the loudest, with a warning."""
    x = read_channel(f, first, n, 0)
    if f.channels == 1 or np.abs(x).max(initial=0) > SILENT:
        return x
    peaks = [np.abs(read_channel(f, first, n, channel)).max(initial=0) for channel in range(f.channels)]
    loudest = int(np.argmax(peaks))
    if peaks[loudest] <= SILENT:
        return x
    if not warned[0]:
        warned[0] = 1
        print(f"Warning: {f.name}: the first channel is silent, channel {loudest + 1} is used "
              f"(reported once)", file=sys.stderr)
    return read_channel(f, first, n, loudest)


def length(f):
    """Frames, decoded and counted where the header has no length."""
    if f.frames < UNKNOWN_LENGTH:
        return f.frames
    return sum(map(len, read_blocks(f, 0, f.frames)))


def count_frames(path):
    """-> frames of a file; its sample rate, of several sounds the first one's."""
    lengths = [(length(f), f.samplerate) for f, _ in open_sounds(path)]
    rate = lengths[0][1]
    return round(sum(n * rate / own_rate for n, own_rate in lengths)), rate


def missing_seconds(path):
    """Seconds that the header of a WAV or AIFF promises beyond the end of the file: libsndfile takes that for
    the end of the sound. A streaming encoder writes 2 GB or more, which means no length."""
    chunks = r"(?im)^ *(?:riff|form|data|ssnd)(?: size)? *: (\d+) \(should be (\d+)\)"
    total = 0
    for f, frames in open_sounds(path):
        sizes = [(int(promised), int(held)) for promised, held in re.findall(chunks, f.extra_info)]
        missing = [promised - held for promised, held in sizes if promised < 2 ** 31 - 2 ** 16]
        total += max([0, *missing]) * frames / f.samplerate / os.path.getsize(path)
    return total


def join(arrays):
    return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]  # a copy takes as long as decoding a WAV


def resample(pieces, sample_rate):
    """[(rate, samples)], one after another -> samples."""
    resampled = []
    for rate, group in itertools.groupby(pieces, lambda piece: piece[0]):
        x = join([x for _, x in group])
        resampled.append(soxr.resample(x, rate, sample_rate) if rate != sample_rate else x)  # HQ
    x = join(resampled)
    return x if len(x) else np.zeros(1, np.float32)  # less than one sample


def read_audio(path, start, seconds, sample_rate):
    """-> x (n,) float32 at sample_rate, n > 0: at most `seconds` from `start` on; the seconds that the file
    has from there on: of a FLAC without a length, those read. FileNotFoundError, UserError name the file."""
    pieces, seconds_left, offset = [], 0, start
    for f, frames in open_sounds(path):
        rate, first = f.samplerate, int(offset * f.samplerate)
        n = min(f.frames - first, max(not pieces, math.ceil(round(seconds * rate, 6))))
        if n > 0:
            x = read_first_channel(f, first, n)
            pieces.append((rate, x))
            seconds -= len(x) / rate
            end = first + len(x) if len(x) else length(f)
            frames = end if len(x) < n or frames >= UNKNOWN_LENGTH else max(frames, end)  # an estimate
        seconds_left += max(0, frames - first) / rate
        offset = max(0, offset - frames / rate)
    if not any(len(x) for _, x in pieces):
        raise UserError(f"{path}: no audio from {start} s on")
    x = resample(pieces, sample_rate)
    if not np.isfinite(x).all():
        raise UserError(f"{path}: holds samples that are not finite numbers")
    return x, seconds_left
