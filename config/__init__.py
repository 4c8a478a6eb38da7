"""Settings: flat names, one default each in config/defaults.py, overridden by a config file, then by --name=value.

    config = load(sys.argv[1:], "train.py")        # config/defaults.py + the annotated settings of train.py itself
    config.batch_size, vars(config)

A config file is flat Python that assigns names (`batch_size = 8`); it may compute, it may not invent names.
Every error is a ValueError of one line; run() prints it and exits with code 2.
"""
import ast
import difflib
import os
import re
import sys
import traceback
import types
import typing
from types import SimpleNamespace

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def settings_of(path):
    """{name: (type, default, reason)} of the lines `name: type = default  # reason` in a Python file."""
    source = open(path).read()
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign):
            reason = lines[node.end_lineno - 1][node.end_col_offset:].strip().lstrip("# ")
            kind = eval(ast.unparse(node.annotation), {})
            found[node.target.id] = (kind, ast.literal_eval(node.value), reason)
    return found


def defaults():
    """{name: default} of config/defaults.py."""
    return {name: default for name, (_, default, _) in settings_of(os.path.join(ROOT, "config/defaults.py")).items()}


def check(name, value, known, where):
    """The value as the setting's type, or a ValueError that names the setting, the value and the expected type."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        raise ValueError(f"{where}: unknown setting {name!r}" + (f"; nearest: {', '.join(near)}" if near else ""))
    kind = known[name][0]
    allowed = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if float in allowed and type(value) is int:
        value = float(value) if int not in allowed else value
    if type(value) in allowed or (value is None and types.NoneType in allowed):
        return value
    expected = " or ".join("None" if t is types.NoneType else t.__name__ for t in allowed)
    raise ValueError(f"{where}: {name} = {value!r} is a {type(value).__name__}, expected {expected}")


def parse(text, kind):
    """A command-line string as a Python value. Strings need no quotes; true/false/none are understood in any case."""
    if kind is str:
        return text
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        return text


def load(argv, script):
    """Defaults of config/defaults.py and of the script, then config files, then --name=value or --name value."""
    known = settings_of(os.path.join(ROOT, "config/defaults.py")) | settings_of(os.path.join(ROOT, script))
    values = {name: default for name, (_, default, _) in known.items()}
    if "--help" in argv or "-h" in argv:
        print(ast.get_docstring(ast.parse(open(os.path.join(ROOT, script)).read())) + "\n\nsettings:")
        for name, (kind, default, reason) in known.items():
            print(f"  --{name}={default!r}".ljust(44), reason)
        sys.exit(0)
    overrides, given, i = {}, set(), 0
    while i < len(argv):
        arg, where = argv[i], "command line"
        if not arg.startswith("--"):
            path = arg if os.path.exists(arg) else os.path.join(ROOT, arg)
            if not arg.endswith(".py") or not os.path.isfile(path):
                raise ValueError(f"{where}: {arg!r} is neither --name=value nor a config file that exists (something.py)")
            scope = {}
            exec(compile(open(path).read(), path, "exec"), scope)
            for name, value in scope.items():
                if not name.startswith("_") and not isinstance(value, types.ModuleType):
                    values[name] = check(name, value, known, arg)
                    given.add(name)
        else:
            name, equals, text = arg[2:].partition("=")
            if not equals:
                i += 1
                if i == len(argv):
                    raise ValueError(f"{where}: --{name} has no value; write --{name}=value")
                text = argv[i]
            kind = known[name][0] if name in known else None
            overrides[name] = check(name, parse(text, kind), known, where)
        i += 1
    return SimpleNamespace(**(values | overrides), given=sorted(given | set(overrides)))


def model_settings(config, only_given=True):
    """{name: value} of the settings that shape the model or what it hears, those that the user gave or all."""
    pattern = re.compile("clap_|audio_transformer_|cross_attn_|lang_enc|tokenizer_|cache_dir|window_|max_num_w|attention_b")
    return {n: getattr(config, n) for n in defaults() if pattern.match(n) and (not only_given or n in config.given)}


def run(main, script):
    """main(config); what is wrong with the input is printed in one line, with exit code 2."""
    try:
        main(load(sys.argv[1:], script))
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        if os.environ.get("TRACEBACK"):
            traceback.print_exc()
        print("error: " + re.sub(r"\s*\n\s*", " ", str(error)), file=sys.stderr, flush=True)
        os._exit(2) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else sys.exit(2)  # other ranks must not wait for us
