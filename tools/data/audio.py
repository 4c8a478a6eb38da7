"""A file -> its sound, whatever the file is: what decoders say, miss and get wrong."""
import collections
import contextlib
import io
import math
import mmap
import os
import re
import sys
import threading

import numpy as np
import soundfile
import soxr

from tools.common import UserError

BLOCK = 2 ** 17  # samples decoded at a time: a header's word for its size or channels costs no memory
LOUDEST = 1e30  # samples beyond it are none: float32 arithmetic would end
ENDLESS = 2 ** 50  # frames: no file has them
SILENT = 1e-4  # peak of a channel that is called silent, -80 dB: lossy codecs leave some noise there

quiet_now, lock = [], threading.Lock()
said = mmap.mmap(-1, 1)  # shared with processes forked later: what is said once is said once for all of them


@contextlib.contextmanager
def quiet():
    """File descriptor 2 leads nowhere: decoders written in C print a line per damaged frame there."""
    with lock:
        if not quiet_now:
            sys.stderr and sys.stderr.flush()
            quiet_now.append(os.dup(2))
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 2)
            os.close(nowhere)
        quiet_now.append(None)  # one more thread
    try:
        yield
    finally:
        with lock:
            quiet_now.pop()
            if len(quiet_now) == 1:
                os.dup2(quiet_now[0], 2)
                os.close(quiet_now.pop())


class Endless(io.FileIO):
    """A file that claims to go on for ever: libsndfile reads an MP3 until its estimate of the length, made of
    the size and the first frame, and without a VBR header that can be a sixth of it. `blank`: from where to
    where a VBR header's name is hidden, because it does not tell of all that follows."""
    at_end, blank = False, (0, 0)

    def seek(self, offset, whence=0):
        self.at_end = whence == 2
        return super().seek(offset, whence)

    def tell(self):
        return 2 ** 40 if self.at_end else super().tell()

    def readinto(self, buffer):
        at = super().tell()
        n = super().readinto(buffer)
        begin, end = max(self.blank[0] - at, 0), min(self.blank[1] - at, n)
        if begin < end:
            buffer[begin:end] = bytes(end - begin)
        return n


class Sound(soundfile.SoundFile):
    """soundfile seeks to where every read ended: some formats can't, and no FLAC whose header, written by a
    streaming encoder, tells no length."""
    def seekable(self):
        return False

    def go_to(self, first):
        """To be called once where super().seekable() is False: what can't be seeked in is read."""
        if super().seekable():
            self.seek(first)
        elif first:
            collections.deque(blocks(self, 0, first), maxlen=0)


def vbr_header(path):
    """(where an MP3's VBR header is, whether it tells of the whole file); (None, False) without one."""
    with open(path, "rb") as f:
        first = f.read(10)
        begin = 0
        if first[:3] == b"ID3":  # its size: four times seven bits
            begin = 10 + sum((byte & 127) << shift for byte, shift in zip(first[6:], (21, 14, 7, 0)))
        f.seek(begin)
        frame = f.read(4096)
    for name in (b"Xing", b"Info", b"VBRI"):
        at = frame.find(name)
        if at >= 0:
            flags, counted = frame[at + 7:at + 8] or b"\0", 0
            if name == b"VBRI":
                counted = int.from_bytes(frame[at + 10:at + 14], "big")
            elif flags[0] & 2:
                skip = at + 8 + 4 * (flags[0] & 1)
                counted = int.from_bytes(frame[skip:skip + 4], "big")
            missed = os.path.getsize(path) - begin - counted
            return begin + at, not counted or missed < 0.02 * counted + 4096  # tags at the end
    return None, False


def open_sound(path):
    """-> Sound, its length in frames, and whether that is more than an estimate."""
    f = Sound(path)
    frames, known = f.frames, f.frames < ENDLESS  # a FLAC from a pipe tells no length
    if f.format.startswith("MP"):
        at, whole = vbr_header(path)
        if not whole:
            f.close()
            endless = Endless(path)
            endless.blank = (at, at + 4) if at is not None else (0, 0)
            f, known = Sound(endless), False
    return f, frames, known


def length(path):
    """-> frames, counted where the header tells none, and their rate."""
    with quiet():
        f, frames, known = open_sound(path)
        with f:
            return frames if known else sum(map(len, blocks(f, 0, ENDLESS))), f.samplerate


def decodable(path):
    """Seconds from the beginning to where a decoder fails, to a tenth; 0.0 if it can't begin."""
    n, rate = 0, 1
    with quiet(), contextlib.suppress(soundfile.LibsndfileError), open_sound(path)[0] as f:
        rate = f.samplerate
        for block in blocks(f, 0, ENDLESS, most=rate // 20 * f.channels):
            n += len(block)
    return n / rate


def blocks(f, first, n, kind=np.float32, most=BLOCK):
    """Up to n frames from `first` on, as (k, channels), each good until the next."""
    f.go_to(first)
    buffer = np.empty((min(n, max(1, most // f.channels)), f.channels), kind)
    while n > 0:
        block = f.read(out=buffer[:n])
        yield block
        n = n - len(block) if len(block) == len(buffer) else 0


def read_channel(f, first, n, channel):
    """-> (k,) float32, k <= n."""
    kind = np.int16 if f.subtype == "PCM_16" else np.float32  # libsndfile takes ten times as long to scale
    x, done = np.empty(min(n, f.frames - first), kind), 0  # no memory before it is written to
    if f.channels == 1:
        f.go_to(first)
        x = f.read(out=x)
    else:
        for block in blocks(f, first, len(x), kind):
            x[done:done + len(block)] = block[:, channel]
            done += len(block)
        x = x[:done]
    return x if kind is np.float32 else x.astype(np.float32) * np.float32(2 ** -15)  # exact


def decode(path, start, seconds, count=False):
    """-> x (n,) float32 of at most `seconds` from `start` on, the rate, and the file's frames: as its header
    tells, or counted where that tells none (to the end of the file if `count`, else as far as was read).
    The first channel; where that is silent and another is not, the loudest."""
    instead = None
    with quiet():
        f, frames, known = open_sound(path)
        with f:
            rate = f.samplerate
            if not 1000 <= rate <= 1_000_000:
                raise UserError(f"a sample rate of {rate} Hz")
            first, n = int(start * rate), max(1, math.ceil(round(seconds * rate, 6)))
            if first >= f.frames:
                return np.empty(0, np.float32), rate, frames
            try:
                x = read_channel(f, first, n, 0)
            except soundfile.LibsndfileError:  # also where a file that tells no length ends before `first`
                if known or first < (frames := length(path)[0]):
                    raise
                return np.empty(0, np.float32), rate, frames
            if f.channels > 1 and len(x) and not max(x.max(), -x.min()) > SILENT:
                peaks = np.max([np.abs(block).max(0) for block in blocks(f, first, n) if len(block)], 0)
                if peaks.max() > SILENT:
                    instead = int(peaks.argmax())
                    x = read_channel(f, first, n, instead)
            if not known:
                more = len(x) == n
                rest = sum(map(len, blocks(f, first + n, ENDLESS))) if count and more else 0
                estimate = 0 if count or not more or frames >= ENDLESS else frames
                frames = max(estimate, first + len(x) + rest)
    if instead and not said[0]:
        said[0] = 1
        print(f"note: {path}: its first channel is silent, channel {instead + 1} is heard (said once)",
              file=sys.stderr)
    return x, rate, frames


def told(path):
    """-> sample rate, and seconds that the header tells of and the file lacks: libsndfile takes a file's end
    for the sound's. Encoders that stream write 2 GB or more: no length."""
    with quiet():
        info = soundfile.info(path)
    chunks = r"(?im)^ *(?:riff|form|data|ssnd)(?: size)? *: (\d+) \(should be (\d+)\)"
    sizes = [tuple(map(int, pair)) for pair in re.findall(chunks, info.extra_info)]
    lacking = max((said - held for said, held in sizes if said < 2 ** 31 - 2 ** 16), default=0)
    return info.samplerate, max(0, lacking) * info.duration / os.path.getsize(path)


def read(path, start, seconds, sample_rate, count=False):
    """-> x (n,) float32 at sample_rate, n > 0: at most `seconds` from `start` on; its least and greatest; and
    the seconds that the file has from there on (see decode). FileNotFoundError, ValueError: whatever a
    decoder raises is about the file."""
    if not os.path.isfile(path):
        what = "a folder, no" if os.path.isdir(path) else "no such"
        raise FileNotFoundError(f"{path}: {what} audio file")
    try:
        x, rate, frames = decode(path, start, seconds, count)
        if rate != sample_rate and len(x):
            x = soxr.resample(x, rate, sample_rate)  # HQ
            x = x if len(x) else np.zeros(1, np.float32)  # less than one sample
    except Exception as error:
        cause, what = str(error) or type(error).__name__, "not readable as audio"
        if isinstance(error, soundfile.LibsndfileError) and (seconds := decodable(path)):
            what = f"truncated or damaged: nothing is decoded from {seconds:.1f} s on"
        raise UserError(f"{path}: {what} ({cause})") from error
    if not len(x):
        raise UserError(f"{path}: no audio from {start} s on (the file has {frames / rate:.2f} s)")
    low, high = x.min(), x.max()
    if not -LOUDEST < low <= high < LOUDEST:  # also where one is not a number
        raise UserError(f"{path}: holds samples that are not finite numbers, or beyond {LOUDEST:g}")
    return x, low, high, max(frames / rate - start, 0)
