"""Around every script: one line for what is wrong, files that are read and folders that are written to."""
import ast
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
from contextlib import contextmanager, suppress


def commit():
    """The project's git commit, for logs and headers."""
    try:
        command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except FileNotFoundError:  # no git here
        return "unknown"


def need_room(folder):
    """Write a block where a folder is or will be: what will not work is said before the long work starts."""
    there = os.path.abspath(folder)
    while not os.path.lexists(there):  # a link to nowhere is no folder
        there = os.path.dirname(there)
    try:
        with tempfile.TemporaryFile(dir=there) as f:
            f.write(bytes(2 ** 16))
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written to ({error.strerror or error})") from error


def need_place(file):
    """need_room for a file: what is written at the end must not find a folder there."""
    if os.path.isdir(file) or not os.path.basename(file):
        raise ValueError(f"{file}: a folder, expected the name of a file to write")
    need_room(os.path.dirname(file) or ".")


@contextmanager
def writing(place, *kinds):
    """Around what writes to a place: an error of its disk names no file by itself. kinds: errors by which a
    library tells of the disk in terms of its own."""
    try:
        yield
    except (OSError, *kinds) as error:
        if isinstance(error, OSError) and (error.filename or error.errno is None):
            raise
        why = getattr(error, "strerror", error)
        raise OSError(f"{place}: could not be written, is the disk full? ({why})") from error


@contextmanager
def written(path, mode="w"):
    """A file to write to, which then takes the place of the one at `path`: whole, or not at all."""
    try:
        with writing(path), open(path + ".tmp", mode) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except BaseException:
        with suppress(OSError):
            os.remove(path + ".tmp")
        raise


def read_json(path):
    try:
        with open(path) as f:
            return json.load(f)
    except (ValueError, RecursionError) as error:  # the second: nested a thousand deep
        raise ValueError(f"{path}: not JSON that can be read ({error})") from error


def parse(text, kind):
    """A command-line string as a Python value: strings need no quotes; true, false, none are of any case."""
    if kind is str:
        return text
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        return text


def values_of(path):
    """{name: value} that a config file assigns; its functions, classes and modules are its own."""
    scope = {"__file__": os.path.abspath(path), "__name__": "config file"}
    try:
        with open(path, "rb") as f:  # its first line may tell an encoding
            exec(compile(f.read(), path, "exec"), scope)
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        why = error.msg if isinstance(error, SyntaxError) else error
        where = f"{path} line {line}" if line else path
        raise ValueError(f"{where}: {type(error).__name__}: {why}") from error
    return {n: v for n, v in scope.items()
            if not n.startswith("_") and not isinstance(v, types.ModuleType) and not callable(v)}


def print_help(script, known, names):
    """The docstring of a script, and its settings; then the script ends."""
    print(ast.get_docstring(ast.parse(open(script).read())) + "\n\nsettings:")
    for name in names:
        _, default, reason = known[name]
        print(f"  --{name}={default!r}".ljust(44), reason)
    sys.exit(0)


def run(main, script, reads=None):
    """main(config), which may return an exit code; what is wrong with the input is printed in one line, with
    exit code 2."""
    from config import load
    told = sys.unraisablehook  # torch tells of a dead worker in finalizers, too
    sys.unraisablehook = lambda e: None if "DataLoader worker" in str(e.exc_value) else told(e)
    code, at_once = 2, os.environ.get("WORLD_SIZE", "1") != "1"
    try:
        result = main(load(sys.argv[1:], script, reads))
        code = result if type(result) is int else 0
    except KeyboardInterrupt:
        code = 130
        print("interrupted", file=sys.stderr, flush=True)
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
            raise
        if os.environ.get("TRACEBACK"):
            traceback.print_exc()
        if at_once and os.environ.get("RANK") != "0":  # what every rank finds is said once
            time.sleep(2)  # torchrun ends us as soon as rank 0 has ended
        if isinstance(error, RuntimeError):  # torch tells that it died, not of what, and again at the end
            at_once = True
            error = f"{error} A process that reads clips was ended by the system: out of memory, most likely"
        text = str(error).strip()
        if "Original Traceback" in text:  # of a process that reads clips
            text = text.splitlines()[-1]
        print("error: " + re.sub(r"\s*\n\s*", " ", text), file=sys.stderr, flush=True)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own end prints a traceback for a Ctrl-C
    if code and at_once:
        sys.stdout.flush()
        os._exit(code)  # under torchrun the other ranks must not wait for us
    if code:
        sys.exit(code)
