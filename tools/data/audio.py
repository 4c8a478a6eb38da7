"""An audio file -> samples: libsndfile by way of soundfile, and what it gets wrong about some files."""
import io
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

PLACEHOLDERS = {  # how a file begins that a download left instead of another: what it is
    rb"$": "an empty file",
    rb"\s*version https://git-lfs": "a Git LFS pointer: run git lfs pull",
    rb"(\xef\xbb\xbf)?\s*<": "an HTML page"}
OGG_STREAM = b"OggS\0\2"  # the first page of a stream
FLAC_STREAM = b'fLaC\0\0\0"'
NO_DATA = b"data\0\0\0\0"
XING = re.compile(rb"(?:Xing|Info)\0\0\0[\x03\x07\x0b\x0f].{4}(.{4})", re.S)  # the length of an MP3, in bytes
# An ID3v1 tag or a byte of padding may end a sound before another one begins.
NEXT_SOUND = re.compile(rb"(?:TAG.{125}|\0)?(?=RIFF|OggS\0\x02|fLaC|ID3[\x02-\x04]|\xff[\xe2-\xfb])", re.S)

warned = mmap.mmap(-1, 1)  # shared with the workers forked later: one warning for all of them


class EndlessFile(io.FileIO):
    """A file that claims to be endless. libsndfile reads an MP3 up to an estimate of its length, made of its
    size and first frame; without a VBR header that can be a sixth of it."""
    at_end = False

    def seek(self, offset, whence=0):
        self.at_end = whence == 2
        return super().seek(offset, whence)

    def tell(self):
        return ENDLESS if self.at_end else super().tell()


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


def find_placeholder(path):
    """What there is instead of a file that was not downloaded, or None."""
    try:
        with open(path, "rb") as f:
            head = f.read(99)
    except PermissionError:  # which whoever reads it reports
        return None
    return next((name for beginning, name in PLACEHOLDERS.items() if re.match(beginning, head)), None)


def read_at(file, offset, n):
    return os.pread(file.fileno(), n, offset)


def read_head(file, begin):
    """-> where a sound begins after its ID3 tag (cover art), the bytes there."""
    tag = read_at(file, begin, 10)
    if tag[:3] == b"ID3":  # its size: four times seven bits
        begin += 10 + sum((byte & 127) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0)))
    return begin, read_at(file, begin, 4096)


def find_bytes(file, wanted, begin, most):
    """Where some bytes are in the next `most` bytes of a file, else ENDLESS."""
    size = os.fstat(file.fileno()).st_size
    for offset in range(begin, min(begin + most, size), 2 ** 20):
        index = read_at(file, offset, 2 ** 20 + len(wanted)).find(wanted)
        if index >= 0:
            return offset + index
    return ENDLESS


def sound_end(file, begin):
    """Where the sound at `begin` ends by its headers; ENDLESS where they do not tell."""
    begin, head = read_head(file, begin)
    if head[:4] == b"RIFF":
        return begin + 8 + int.from_bytes(head[4:8], "little")
    if head[:4] == b"fLaC":  # its length in bytes is nowhere; hours are not searched
        return find_bytes(file, FLAC_STREAM, begin + 4, 2 ** 25)
    page = head
    while page[:6] == OGG_STREAM:  # streams that run side by side begin one after another
        lengths = page[27:27 + sum(page[26:27])]
        begin += 27 + len(lengths) + sum(lengths)
        page = read_at(file, begin, 282)
    if head[:6] == OGG_STREAM:
        return find_bytes(file, OGG_STREAM, begin, ENDLESS)
    length = XING.search(head)
    return begin + max(1, int.from_bytes(length[1], "big")) if length else ENDLESS


@lru_cache(maxsize=4096)
def split_sounds(path, size, modified):
    """-> (begin, end) of each sound in a file. Searching an hour of Ogg takes 50 ms: once for all its
    items."""
    begins = [0]
    with open(path, "rb") as file:
        while True:
            end = sound_end(file, begins[-1])
            following = NEXT_SOUND.match(read_at(file, end, 140))
            begin = end + following.end() if following else size
            if not NEXT_SOUND.match(read_head(file, begin)[1]):  # the end, or a tag there
                return list(zip(begins, [*begins[1:], size]))
            begins.append(begin)


def open_part(file, begin, end, head):
    """-> AudioFile of a part of an open file, which begins with `head`; its frames by the header, or
    estimated for an MP3 without one."""
    path = file.name
    riff_end = begin + 8 + int.from_bytes(head[4:8], "little")
    unfinished = head[:4] == b"RIFF" and NO_DATA in head and abs(riff_end - end) > 1
    source = path
    named_raw = path.lower().endswith(".raw")  # which soundfile refuses
    if unfinished or named_raw or end - begin < os.fstat(file.fileno()).st_size:
        # unfinished: its recorder did not come back to fill in the sizes; -1 means up to the end
        content = read_at(file, begin, end - begin).replace(NO_DATA, b"data" + b"\xff" * 4, unfinished)
        source = io.BytesIO(content)
    f = AudioFile(source)
    frames = f.frames
    if source == path and f.format.startswith("MP") and not re.search(b"Xing|Info|VBRI", head):
        f = AudioFile(EndlessFile(path))
    if f.format == "RAW":  # by its ending alone: .au, .snd, .vox, .gsm
        raise soundfile.SoundFileRuntimeError("no header")
    if not 1000 <= f.samplerate <= 1e6:
        raise soundfile.SoundFileRuntimeError(f"sample rate {f.samplerate} Hz")
    return f, frames


def check_mp3_end(file, end):
    """An MP3 is decoded up to a frame of another rate or number of channels, which may begin another one."""
    rest = read_at(file, end - 4, 12)
    if len(rest) == 12 and (NEXT_SOUND.match(rest) or NEXT_SOUND.match(rest, 4)):
        raise soundfile.SoundFileRuntimeError("an MP3 whose rate or channels change")


def open_sounds(path):
    """Yield (AudioFile, frames) of each sound in a file, as open_part does. FileNotFoundError or UserError
    name the file and what is wrong with it."""
    found = find_file(path)
    if not os.path.isfile(found):
        raise FileNotFoundError(f"{path}: no such audio file")
    head = b"\0"
    try:
        with open(found, "rb") as file:  # once: network file systems open few files a second
            stat = os.fstat(file.fileno())
            for begin, end in split_sounds(found, stat.st_size, stat.st_mtime_ns):
                start, head = read_head(file, begin)
                if head[:4] in (b"fLaC", b"OggS"):  # not read behind a tag by libsndfile
                    begin = start
                f, frames = open_part(file, begin, end, head)
                f.path = found
                with f:
                    yield f, frames
                    if isinstance(f.name, EndlessFile) and not len(f.read(1)):
                        check_mp3_end(file, io.FileIO.tell(f.name))
    except (soundfile.SoundFileError, OSError) as error:
        text = re.match(rb"[^\0-\x08\x0e-\x1f]+$", head) and "text, no sound"
        cause = find_placeholder(found) or text or getattr(error, "error_string", error)  # without the path
        raise UserError(f"{path}: not readable as audio ({cause})") from error


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
        raise UserError(f"{f.path}: truncated or damaged ({error})") from error


def read_channel(f, first, n, channel):
    """-> (k,) float32, k <= n."""
    x = np.concatenate([block[:, channel].copy() for block in read_blocks(f, first, n)])
    return x * np.float32(2 ** -15) if x.dtype == np.int16 else x  # exact


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
        print(f"Warning: {f.path}: the first channel is silent, channel {loudest + 1} is used "
              f"(reported once)", file=sys.stderr)
    return read_channel(f, first, n, loudest)


def count_frames(path):
    """-> frames, decoded and counted where the header has no length; sample rate. Of several sounds: all
    their frames at the rate of the first."""
    seconds, rate = 0, None
    for f, frames in open_sounds(path):
        rate = rate or f.samplerate
        if f.frames >= UNKNOWN_LENGTH:
            frames = sum(map(len, read_blocks(f, 0, f.frames)))
        seconds += frames / f.samplerate
    return round(seconds * rate), rate


def missing_seconds(path):
    """Seconds that the header of a WAV or AIFF promises beyond the end of the file: libsndfile takes that for
    the end of the sound. A streaming encoder writes 2 GB or more, which means no length."""
    chunks = r"(?im)^ *(?:riff|form|data|ssnd)(?: size)? *: (\d+) \(should be (\d+)\)"
    seconds = 0
    for f, frames in open_sounds(path):
        missing = [0]
        for promised, held in re.findall(chunks, f.extra_info):
            if int(promised) < 2 ** 31 - 2 ** 16:
                missing.append(int(promised) - int(held))
        seconds += max(missing) * frames / f.samplerate / os.path.getsize(f.path)
    return seconds


def read_audio(path, start, seconds, sample_rate):
    """-> x (n,) float32 at sample_rate, n > 0: at most `seconds` from `start` on; the seconds that the file
    has from there on: of a FLAC without a length, those read. FileNotFoundError, UserError name the file."""
    pieces, seconds_left, offset = [], 0, start
    for f, frames in open_sounds(path):
        rate = f.samplerate
        first = int(offset * rate)
        n = min(f.frames - first, max(int(not pieces), math.ceil(round(seconds * rate, 6))))
        if n > 0:
            x = read_first_channel(f, first, n)
            seconds -= len(x) / rate
            end = first + len(x)
            if len(x) < n or not end <= frames < UNKNOWN_LENGTH:  # else estimated, perhaps
                frames = end
            pieces.append(soxr.resample(x, rate, sample_rate) if rate != sample_rate else x)  # HQ
        seconds_left += max(0, frames - first) / rate
        offset = max(0, offset - frames / rate)
    if not sum(map(len, pieces)):
        raise UserError(f"{path}: no audio from {start} s on")
    x = np.concatenate(pieces)
    if not np.isfinite(x).all():
        raise UserError(f"{path}: holds samples that are not finite numbers")
    return x, seconds_left
