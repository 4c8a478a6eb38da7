"""Settings: flat names with one default each in config/defaults.py, overridden by config files, then by
--name=value.

    c = load(sys.argv[1:], "train.py")     # config/defaults.py and the annotated settings of train.py
    c.batch_size, c.user_set               # a value, and the names that the user gave

A config file is flat Python that assigns settings (`batch_size = 8`); it may compute, but not invent names. A
script ends with `run(main, __file__)`, which prints a UserError as one line and exits with code 2.
"""
import ast
import difflib
import keyword
import math
import os
import re
import runpy
import signal
import sys
import time
import traceback
import types
import typing
from types import SimpleNamespace

from config.defaults import LOADING, MINIMUM, MODEL_SETTINGS, ORIGINS, PATHS, POSITIVE  # noqa: F401
from tools.common import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LARGEST = 2 ** 63  # integers and weights stay below


def resolve_path(path):
    """A path in a setting: relative ones start at the project's folder, wherever the script was started."""
    return os.path.join(ROOT, os.path.expanduser(path))


def pick(values, names):
    """Those of the names that a dict holds."""
    return {name: values[name] for name in names if name in values}


def overrides(config):
    """{name: value} of those settings of a model that the user set, in a config file or on the command line.
    """
    return pick(vars(config), [name for name in LOADING if name in config.user_set])


# ------------------------------------------------------------------------------------------------------------
# What settings there are, and which values they take


def settings_of(script):
    """{name: (types, default, reason)} of the lines `name: type = default  # reason` of a Python file."""
    with open(resolve_path(script)) as f:
        source = f.read()
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign):
            reason = lines[node.end_lineno - 1][node.end_col_offset:].strip().lstrip("# ")
            kind = eval(ast.unparse(node.annotation))
            allowed = typing.get_args(kind) or (kind,)  # of int | None
            found[node.target.id] = (allowed, ast.literal_eval(node.value), reason)
    return found


def defaults():
    """{name: default} of config/defaults.py."""
    return {name: default for name, (_, default, _) in settings_of("config/defaults.py").items()}


def check(values, where, known=None):
    """{setting: value} in the settings' types; UserError names `where` they come from, the setting, its value
    and what was expected. known: what settings_of returns; None: the settings of config/defaults.py."""
    known = known or settings_of("config/defaults.py")
    checked = {}
    for name, value in values.items():
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            raise UserError(f"{where}: unknown setting {name!r}; nearest: {', '.join(nearest) or 'none'}")
        allowed = known[name][0]
        if type(value) is int and float in allowed and int not in allowed and abs(value) < LARGEST:
            value = float(value)
        if expected := wrong_value(name, value, allowed):
            raise UserError(f"{where}: {name} = {value!r:.200}, expected {expected}")
        checked[name] = value
    return checked


def wrong_value(name, value, allowed):
    """What was expected instead of the value of a setting, if it is wrong."""
    if type(value) not in allowed:
        return " or ".join("None" if t is types.NoneType else t.__name__ for t in allowed)
    if type(value) in (int, float):
        if not abs(value) < LARGEST:
            return "a finite number below 2^63"
        if value < MINIMUM.get(name, value):
            return f"{MINIMUM[name]} or more"
        if name in POSITIVE and value <= 0:
            return "more than 0"
    if type(value) is dict:
        for key, weight in value.items():
            if type(key) is not str or type(weight) not in (int, float) or not 0 < weight < math.inf:
                return f"names with weights above 0, not {key!r}: {weight!r:.80}"
    if name == "run_name" and (not value.strip() or os.path.isabs(value) or ".." in value.split("/")):
        return "the name of a folder inside expdir"


# ------------------------------------------------------------------------------------------------------------
# Reading config files and the command line


def read_config_file(path):
    """{name: value} that a config file assigns; functions, classes and modules are its own."""
    try:
        scope = runpy.run_path(path)
    except Exception as error:  # whatever its code raises, as one line
        lines = [getattr(error, "lineno", None)]  # of a SyntaxError
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == path:
                lines.append(frame.lineno)
        raise UserError(f"{path} line {lines[-1]}: {type(error).__name__}: {error}") from error
    return {name: value for name, value in scope.items()
            if not name.startswith("_") and not isinstance(value, types.ModuleType) and not callable(value)}


def parse_value(text, allowed):
    """A command-line string as a Python value of one of the allowed types, if it is one; strings need no
    quotes, true, false and none may be written in any case."""
    if allowed == (str,):
        return text
    word = text.title() if text.lower() in ("true", "false", "none") else text
    try:
        value = ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return text
    return text if str in allowed and type(value) not in allowed else value


def take_value(argv, known):
    """Remove a --name=value, --name value or, for a bool, --name from the front of argv -> name, text."""
    name, equals, text = argv.pop(0)[2:].partition("=")
    if keyword.iskeyword(name):  # --from is the setting from_
        name += "_"
    following = argv[0] if argv else ""
    if equals:
        return name, os.path.expanduser(text)  # of --name=~/x, which the shell leaves as it is
    if name in known and known[name][0] == (bool,) and following.lower() not in ("true", "false"):
        return name, "true"
    if not following or following.startswith("--"):
        raise UserError(f"command line: --{name} has no value; write --{name}=value")
    return name, argv.pop(0)


def load(argv, script, reads=None, files=False):
    """Defaults of config/defaults.py and of the script, then config files, then --name=value or --name value.

    reads: names of defaults.py that the script reads, for its --help (None: all). files: whether the script
    takes other arguments, which become c.files.
    """
    shared, own = settings_of("config/defaults.py"), settings_of(script)
    known = shared | own
    if "--help" in argv or "-h" in argv:
        print_help(script, known, [*own, *(name for name in shared if reads is None or name in reads)])
    argv, values, options, others = list(argv), {}, {}, []
    while argv:
        if argv[0].startswith("--"):
            name, text = take_value(argv, known)
            allowed, default, _ = known.get(name, ((str,), None, None))
            value = parse_value(text, allowed)
            if default == [] and type(value) is not list:  # a list that grows with each use of its flag
                value = [*options.get(name, []), text]
            options |= check({name: value}, "command line", known)
        elif argv[0].endswith(".py"):
            path = argv.pop(0)
            found = path if os.path.exists(path) else resolve_path(path)
            if not os.path.isfile(found):
                raise UserError(f"command line: {path}: no such config file")
            values |= check(read_config_file(found), path, known)
        elif files:
            others.append(argv.pop(0))
        else:
            raise UserError(f"command line: {argv[0]!r} is neither --name=value nor a config file (.py)")
    values |= options
    unset = {name: default for name, (_, default, _) in known.items()}
    return SimpleNamespace(**unset | values, user_set=sorted(values), files=others)


def print_help(script, known, names):
    """Print a script's docstring and its settings, and exit."""
    with open(resolve_path(script)) as f:
        print(ast.get_docstring(ast.parse(f.read())) + "\n\nsettings:")
    for name in names:
        _, default, reason = known[name]
        print(f"  --{name.rstrip('_')}={default!r}".ljust(44), reason)
    sys.exit(0)


# ------------------------------------------------------------------------------------------------------------
# Running a script


def run(main, script, reads=None, files=False):
    """Call main(settings), which may return an exit code. A user's mistake, or a file that cannot be read or
    written, is printed as one line, with exit code 2; a programmer's mistake keeps its traceback."""
    code, ranks = 2, int(os.environ.get("WORLD_SIZE", "1"))
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8, names that are not
    try:
        code = main(load(sys.argv[1:], script, reads, files)) or 0
    except KeyboardInterrupt:
        code = 130
        print("interrupted", file=sys.stderr, flush=True)
    except (UserError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            traceback.print_exc()
        if ranks > 1 and os.environ.get("RANK") != "0":
            time.sleep(2)  # rank 0 reports what all ranks find; torchrun then ends the others
        print("error: " + one_line(error), file=sys.stderr, flush=True)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # at exit, Python prints a traceback for a Ctrl-C
    if code and ranks > 1:
        sys.stdout.flush()
        os._exit(code)  # the other ranks must not wait for this one
    if code:
        sys.exit(code)


def one_line(error):
    """The message of an exception; of one raised in a DataLoader worker, the last line of its traceback."""
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1].removeprefix("tools.common.UserError: ")
    return re.sub(r"\s*\n\s*", " ", text)
