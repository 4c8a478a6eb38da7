"""Settings: flat names, one default each in config/defaults.py, overridden by a config file, then by
--name=value.

    config = load(sys.argv[1:], "train.py")        # config/defaults.py + the annotated settings of train.py
    config.batch_size, vars(config)

A config file is flat Python that assigns names (`batch_size = 8`); it may compute, it may not invent names.
Every error is a ValueError of one line; run() prints it and exits with code 2.
"""
import ast
import difflib
import math
import os
import types
import typing
from types import SimpleNamespace

from config.defaults import LEAST, LOADING, MODEL_SETTINGS, ORIGINS, PATHS, POSITIVE  # noqa: F401
from tools.scripts import commit, need_room, parse, print_help, read_json, run, values_of  # noqa: F401

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def place(path):
    """A path in a setting: a relative one starts at the project's folder, wherever the script was started."""
    return os.path.join(ROOT, os.path.expanduser(path))


def given(config, names=LOADING):
    """{name: value} of those of the settings that the user gave, in a config file or on the command line."""
    return {name: getattr(config, name) for name in names if name in config.given}


def settings_of(path):
    """{name: (type, default, reason)} of the lines `name: type = default  # reason` in a Python file."""
    source = open(place(path)).read()
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign):
            reason = lines[node.end_lineno - 1][node.end_col_offset:].strip().lstrip("# ")
            kind = eval(ast.unparse(node.annotation), {})
            found[node.target.id] = (kind, ast.literal_eval(node.value), reason)
    return found


def defaults():
    """{name: default} of config/defaults.py."""
    return {name: default for name, (_, default, _) in settings_of("config/defaults.py").items()}


def check(name, value, known, where):
    """The value as the setting's type, or a ValueError that names setting, value and what is expected."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        near = f"; nearest: {', '.join(near)}" if near else ""
        raise ValueError(f"{where}: unknown setting {name!r}{near}")
    kind, wrong = known[name][0], f"{where}: {name} = {value!r:.200}"
    allowed = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if float in allowed and int not in allowed and type(value) is int:
        value = float(value) if abs(value) < 2 ** 63 else math.inf
    if type(value) not in allowed and (value is not None or types.NoneType not in allowed):
        expected = " or ".join("None" if t is types.NoneType else t.__name__ for t in allowed)
        raise ValueError(f"{wrong} is a {type(value).__name__}, expected {expected}")
    if type(value) in (int, float):
        wild = abs(value) >= 2 ** 63 if type(value) is int else not math.isfinite(value)
        if wild or value < LEAST.get(name, value) or (name in POSITIVE and value <= 0):
            at_least = f", {LEAST[name]} or more" if name in LEAST else ", more than 0" * (name in POSITIVE)
            raise ValueError(f"{wrong}, expected a finite number{at_least}")
    for key, weight in value.items() if type(value) is dict else ():
        if type(key) is not str or type(weight) not in (int, float) or not 0 < weight < 2 ** 63:
            raise ValueError(f"{where}: {name}: {key} = {weight!r:.80}, expected a name and a weight above 0")
    outside = name == "run_name" and (os.path.isabs(value) or ".." in value.split("/"))  # of expdir
    if outside or (name in ("run_name", "expdir") and not value.strip()):
        raise ValueError(f"{wrong}, expected the name of a folder")
    return value


def load(argv, script, reads=None):
    """Defaults of config/defaults.py and of the script, then config files, then --name=value or --name value.
    reads: the names of defaults.py that the script reads, for its --help; None: all."""
    shared, own = settings_of("config/defaults.py"), settings_of(script)
    known = shared | own  # a script may mean something of its own by a name
    values, overrides, given, i = {n: default for n, (_, default, _) in known.items()}, {}, set(), 0
    if "--help" in argv or "-h" in argv:
        print_help(place(script), known, [*own, *(n for n in shared if reads is None or n in reads)])
    while i < len(argv):
        arg, where = argv[i], "command line"
        if not arg.startswith("--"):
            path = arg if os.path.exists(arg) else place(arg)
            if not arg.endswith(".py") or not os.path.isfile(path):
                raise ValueError(f"{where}: {arg!r} is neither --name=value nor a config file that exists")
            new = {name: check(name, value, known, arg) for name, value in values_of(path).items()}
            values, given = values | new, given | set(new)
        else:
            name, equals, text = arg[2:].partition("=")
            text = os.path.expanduser(text)  # of --name=~/x: the shell leaves that to us
            kind, default, _ = known.get(name, (None, None, None))
            following = "".join(argv[i + 1:i + 2])
            if not equals and kind is bool and following.lower() not in ("true", "false"):
                text = "true"  # a flag by itself
            elif not equals and (not following or following.startswith("--")):
                raise ValueError(f"{where}: --{name} has no value; write --{name}=value")
            elif not equals:
                i, text = i + 1, following
            value = parse(text, kind)
            if default == [] and type(value) is not list:  # a list that grows with every use of its flag
                value = [*overrides.get(name, []), text]
            overrides[name] = check(name, value, known, where)
        i += 1
    return SimpleNamespace(**(values | overrides), given=sorted(given | set(overrides)))
