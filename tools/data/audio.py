"""An audio file -> samples: libsndfile by way of soundfile, and what it gets wrong about some files."""
import io
import math
import mmap
import os
import re
import sys

import numpy as np
import soundfile
import soxr

from tools.common import UserError

BLOCK = 2 ** 17  # samples decoded at a time: many channels cost no memory
UNKNOWN_LENGTH = 2 ** 36  # frames; libsndfile gives more than this where a header has no length
SILENT = 1e-4  # peak of a silent channel, -80 dB: lossy codecs leave some noise there

warned = mmap.mmap(-1, 1)  # shared with the workers forked later: one warning for all of them


class EndlessFile(io.FileIO):
    """A file that claims to be endless. libsndfile reads an MP3 up to an estimate of its length, made of its
    size and first frame; without a VBR header that can be a sixth of it."""
    at_end = False

    def seek(self, offset, whence=0):
        self.at_end = whence == 2
        return super().seek(offset, whence)

    def tell(self):
        return 2 ** 40 if self.at_end else super().tell()


class AudioFile(soundfile.SoundFile):
    """soundfile seeks after every read, which fails in a FLAC without a length: this one does not."""

    def seekable(self):
        return False


def has_vbr_header(path):
    """Whether the first frame of an MP3 tells its length."""
    with open(path, "rb") as f:
        first = f.read(10)
        if first[:3] == b"ID3":  # cover art and other tags; their size: four times seven bits
            f.seek(10 + sum((byte & 127) << shift for byte, shift in zip(first[6:], (21, 14, 7, 0))))
        else:
            f.seek(0)
        frame = f.read(4096)
    return any(name in frame for name in (b"Xing", b"Info", b"VBRI"))


def open_audio(path):
    """-> AudioFile; its frames by the header, or estimated for an MP3 without one."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such audio file")
    try:
        f = AudioFile(path)
        frames = f.frames
        if f.format.startswith("MP") and not has_vbr_header(path):
            f = AudioFile(EndlessFile(path))
        return f, frames
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: a name that ends with .raw
        raise UserError(f"{path}: not readable as audio ({error})") from error


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
    x = np.concatenate(blocks)
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


def count_frames(path):
    """-> frames, decoded and counted where the header has no length; sample rate."""
    f, _ = open_audio(path)
    with f:
        counted = f.frames >= UNKNOWN_LENGTH
        return sum(map(len, read_blocks(f, 0, f.frames))) if counted else f.frames, f.samplerate


def missing_seconds(path):
    """Seconds that the header of a WAV or AIFF promises beyond the end of the file: libsndfile takes that for
    the end of the sound. A streaming encoder writes 2 GB or more, which means no length."""
    info = soundfile.info(path)
    chunks = r"(?im)^ *(?:riff|form|data|ssnd)(?: size)? *: (\d+) \(should be (\d+)\)"
    sizes = [(int(promised), int(held)) for promised, held in re.findall(chunks, info.extra_info)]
    missing = [promised - held for promised, held in sizes if promised < 2 ** 31 - 2 ** 16]
    return max(missing, default=0) * info.duration / os.path.getsize(path)


def read_audio(path, start, seconds, sample_rate):
    """-> x (n,) float32 at sample_rate, n > 0: at most `seconds` from `start` on; the seconds that the file
    has from there on: of a FLAC without a length, those read. FileNotFoundError, UserError name the file."""
    f, frames = open_audio(path)
    with f:
        rate, first = f.samplerate, int(start * f.samplerate)
        n = min(f.frames - first, max(1, math.ceil(round(seconds * rate, 6))))
        x = read_first_channel(f, first, n) if n > 0 else np.empty(0)
    if not len(x):
        raise UserError(f"{path}: no audio from {start} s on")
    seconds_left = (frames - first if frames < UNKNOWN_LENGTH else len(x)) / rate
    if rate != sample_rate:
        x = soxr.resample(x, rate, sample_rate)  # HQ
        x = x if len(x) else np.zeros(1, np.float32)  # less than one sample
    if not np.isfinite(x).all():
        raise UserError(f"{path}: holds samples that are not finite numbers")
    return x, seconds_left
