"""What every stage uses: errors of the user, files written atomically, JSON, optional packages, a process
pool."""
import importlib
import itertools
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from datetime import timedelta

# How long a rank waits for another one: for its disk, its share of a validation, its scoring. A dead one is
# noticed at once.
RANK_TIMEOUT = timedelta(days=7)


class UserError(ValueError):
    """A mistake in the input: a setting, a file, a folder. Scripts print it as one line and exit with code 2;
    any other exception keeps its traceback."""


def commit():
    """The project's git commit, for logs and headers."""
    folder = shlex.quote(os.path.dirname(os.path.abspath(__file__)))
    status, output = subprocess.getstatusoutput(f"git -C {folder} describe --always --dirty")
    return "unknown" if status else output  # no git, or no repository


def optional_import(module, purpose, extra):
    """A module of an optional package; UserError names the command that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        command = f"pip install -r requirements-{extra}.txt"
        raise UserError(f"{purpose} needs {package}, which is not installed: {command}") from error


def shorten(error):
    """The class and the beginning of the message of a library's exception, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def join_names(names, most=5):
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(str(name)[:120] for name in names[:most]) + more


# ------------------------------------------------------------------------------------------------------------
# Writing


def existing_folder(path):
    """The path, or the innermost of its folders that is there."""
    path = os.path.abspath(path)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def check_folder_writable(folder):
    """Fail fast: UserError where nothing can be written in a folder that is there or will be made."""
    try:
        with tempfile.TemporaryFile(dir=existing_folder(folder), buffering=0) as f:
            f.write(bytes(2 ** 16))  # fails on a full disk
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror or error})") from error


def check_writable(file):
    """Fail fast: UserError where a file cannot be written."""
    if os.path.isdir(file) or not os.path.basename(file):
        raise UserError(f"{file}: a folder, expected the name of a file to write")
    check_folder_writable(os.path.dirname(file) or ".")


def check_not_read(output, inputs):
    """Fail fast: UserError where a file to write is one of those that are read, by any path; so is its
    temporary (atomic_write)."""
    for path in filter(os.path.exists, (output, output + ".tmp")):
        for file in filter(os.path.exists, inputs):
            if os.path.samefile(path, file):
                raise UserError(f"{output}: would replace {file}, which is read here: name another one")


@contextmanager
def name_disk_errors(path, *kinds):
    """Add the path to an OSError that names no file (a full disk), and to exceptions of `kinds`, by which a
    library reports one."""
    try:
        yield
    except (OSError, *kinds) as error:
        if isinstance(error, OSError) and (error.filename or error.errno is None):
            raise
        reason = getattr(error, "strerror", error)
        raise OSError(f"{path}: could not be written, is the disk full? ({reason})") from error


@contextmanager
def atomic_write(path, mode="w"):
    """A file opened for writing that replaces the one at `path` when the block ends: whole, or not at all."""
    temporary = path + ".tmp"
    try:
        with name_disk_errors(path), open(temporary, mode) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.remove(temporary)
        raise


@contextmanager
def new_folder(path):
    """A folder to fill, which becomes the one at `path` when the block ends: whole, or not at all. OSError
    where something is there already; what a killed run left half-made is removed."""
    check_folder_writable(path)
    if os.path.lexists(path):
        os.rmdir(path)  # an empty folder
    temporary = path + ".tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    try:
        with name_disk_errors(path):
            yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------
# Text of other systems


def guess_text(path, content):
    """A text in the encoding that chardet takes it for, with a note of what that makes of a word."""
    purpose = f"{path}: text that is not UTF-8, without table.py's --encoding,"
    optional_import("chardet.pipeline", purpose, "prepare")  # only chardet 7 has it
    import chardet
    sample = re.sub(rb"[\0-\x7f]{100,}", b"\n", content)  # long ASCII says nothing
    guesses = chardet.detect_all(sample, encoding_era=chardet.EncodingEra.MODERN_WEB, ignore_threshold=True)
    # in a few words of Western Europe it sees others as often, which are written less
    prior = {"Windows-1252": 1.4}
    likeliest = max(guesses, key=lambda guess: guess["confidence"] * prior.get(guess["encoding"], 1))
    guess = likeliest["encoding"] or "UTF-8"
    text = decode_text(path, guess)
    if re.search("[\x80-\x9f]", text):  # control characters, which nobody writes
        raise UserError(f"{path}: not UTF-8, and no encoding is likely (table.py takes it as --encoding)")
    word = re.search(r"[^\s,;|]{0,20}[^\0-\x7f][^\s,;|]{0,20}", text)[0]
    print(f"note: {path} is not UTF-8, read as {guess}: {word.encode(guess)} is {word!r} (table.py takes "
          f"another one as --encoding)")
    return text


def decode_text(path, encoding=""):
    """The text of a file in an encoding; "": UTF-8, UTF-16 where a byte order mark says so, else a guess.
    UserError names the line that is none: a wrong byte among UTF-8, a binary file, UTF-16 without a mark."""
    with open(path, "rb") as f:
        content = f.read()
    marked = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    known = encoding or ("utf-16" if marked else "utf-8")
    try:
        text = content.decode(known).removeprefix("\ufeff")
    except (LookupError, ValueError) as error:
        text = content.decode(errors="replace")
        wrong = text.count("\ufffd")
        if known == "utf-8" and b"\0" not in content and wrong >= len(re.findall(r"[^\0-\x7f]", text)) / 2:
            return guess_text(path, content)
        line = content.count(b"\n", 0, getattr(error, "start", 0)) + 1
        raise UserError(f"{path} line {line}: not a text in the encoding {known!r} ({error})") from error
    control = re.search("[\0\x1b]", text)
    if control:
        line = text.count("\n", 0, control.start()) + 1
        raise UserError(f"{path} line {line}: {control[0]!r} in it, expected a text (UTF-16 and ISO-2022-JP "
                        f"need table.py's --encoding)")
    return text


# ------------------------------------------------------------------------------------------------------------
# JSON


def read_json(path):
    try:
        with open(path, encoding="utf-8-sig") as f:
            return json.load(f)
    except ValueError as error:
        raise UserError(f"{path}: not readable JSON in UTF-8 ({error})") from error


def read_json_object(path):
    """{name: value} of a JSON file."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: a {type(content).__name__}, expected an object {{name: value}}")
    return content


def read_json_rows(path):
    """Yield the rows of a JSON list, {"data": a list} or {name: row} as they are read: of millions, few are
    in memory. Also of JSON lines, which pandas and datasets write under this ending."""
    with open(path, "rb") as f:
        lines = f.readline(2 ** 20), f.readline(2 ** 20)
    if None not in map(parse_json_line, lines):
        yield from (row for _, row in read_json_lines(path))
        return
    try:
        with open(path, encoding="utf-8-sig") as f:
            text = f.read(2 ** 12).lstrip()
            data = re.match(r'\{[^[{]*"data"\s*:\s*(?=\[)', text)
            elements = read_json_elements(f, text[data.end():] if data else text, nested=bool(data))
            if text.startswith("{") and not data:
                elements = itertools.islice(elements, 1, None, 2)  # without the names
            yield from elements
    except ValueError as error:
        raise UserError(f"{path}: not readable JSON ({error})") from error


def read_json_elements(f, text, nested=False, size=2 ** 20, longest=2 ** 26):
    """Yield the elements of a list, or the names and values of an object by turns. `text` begins with it, an
    open file holds the rest, read `size` characters at a time. ValueError where there is none, where an
    element is no JSON or longer than `longest`, or where something follows, unless it is nested."""
    if not text.startswith(("[", "{")):
        raise ValueError("neither a list nor an object")
    close = "]" if text.startswith("[") else "}"
    decode, begin = json.JSONDecoder().raw_decode, 1
    while True:
        begin = re.compile(r"[\s,:]*").match(text, begin).end()
        try:
            if text.startswith(close, begin):
                break
            element, begin = decode(text, begin)
        except ValueError:  # the rest of the element is not read yet
            more = f.read(size)
            if not more or len(text) - begin > longest:
                raise
            text, begin = text[begin:] + more, 0
        else:
            yield element
    if not nested and (text[begin + 1:] + f.read()).strip():
        raise ValueError("more after its end")


def parse_json_line(line):
    """The object in a line of bytes; None for a torn line, or one that holds something else."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def read_json_lines(path):
    """Yield (line number, object) of a JSON-lines file, without its empty lines; UserError names file and
    line."""
    with open(path, "rb") as f:  # json.loads decodes UTF-8, with a byte order mark or without
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            entry = parse_json_line(line)
            if entry is None:
                raise UserError(f"{path} line {number}: {line[:80]!r}, expected a JSON object in UTF-8")
            yield number, entry


# ------------------------------------------------------------------------------------------------------------
# Work for all cores


def map_parallel(work, tasks, workers, describe=str):
    """Yield (task, work(task)) in order of completion, computed by `workers` processes.

    Tasks are drawn from their iterable as they are needed, two per worker ahead. An exception of `work` is
    raised here. Where a worker dies (a decoder that crashes, no memory), the tasks under way are run again
    one by one, and a UserError names (`describe`) the one that does it again. However the loop ends, tasks
    that have begun are finished first: none leaves a file half-written.
    """
    fork = multiprocessing.get_context("fork")  # workers inherit `work` and what it refers to, unpickled
    pool = ProcessPoolExecutor(workers, fork, _start_worker, [work])
    tasks, pending = iter(tasks), {}  # future: its task, oldest first
    try:
        while True:
            for task in itertools.islice(tasks, 2 * workers - len(pending)):
                pending[pool.submit(_run_task, task)] = task
            if not pending:
                return
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                result = future.result()
                yield pending.pop(future), result
    except BrokenProcessPool as error:
        suspects = list(pending.values())
        if len(suspects) > 1:
            for task in suspects:
                list(map_parallel(work, [task], 1, describe))
        names = join_names([describe(task) for task in suspects])
        raise UserError(f"{names}: the worker process died (its memory, or a crash of a library)") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(work):
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent lets the workers finish
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _exit_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _run_task(task):
    return _work(task)
