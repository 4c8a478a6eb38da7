"""Settings: flat names, one default each in config/defaults.py, overridden by a config file, then by
--name=value.

    config = load(sys.argv[1:], "train.py")        # config/defaults.py + the annotated settings of train.py
    config.batch_size, vars(config)

A config file is flat Python that assigns names (`batch_size = 8`); it may compute, it may not invent names.
Every error is a ValueError of one line; run() prints it and exits with code 2.
"""
import ast
import difflib
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
import types
import typing
from types import SimpleNamespace

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# What a model is and what it hears: saved with its weights, and taken from there by whoever starts from them.
MODEL_SETTINGS = ("lang_encoder_path", "tokenizer_path", "clap_spec_size", "clap_embed_dim", "clap_depths",
                  "clap_num_heads", "audio_transformer_n_head", "audio_transformer_n_layers",
                  "audio_transformer_d_inner", "cross_attn_every_n_layers", "window_length", "window_overlap",
                  "max_num_window")
# What a script that loads a model hands on: those, where the parts of a run lie, and what belongs to the
# machine.
LOADING = (*MODEL_SETTINGS, "pretrained_path", "clap_checkpoint", "cache_dir", "attention_backend")
PATHS = ("lang_encoder_path", "tokenizer_path", "pretrained_path", "clap_checkpoint", "dataset_file_root",
         "data_root")
ORIGINS = ("expdir", "run_name", "pretrained_ckpt", *PATHS[2:])  # where a run was, and what it was made of


def place(path):
    """A path in a setting: a relative one starts at the project's folder, wherever the script was started."""
    return os.path.join(ROOT, path)


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
    """The value as the setting's type, or a ValueError that names setting, value and the expected type."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        near = f"; nearest: {', '.join(near)}" if near else ""
        raise ValueError(f"{where}: unknown setting {name!r}{near}")
    kind = known[name][0]
    allowed = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if float in allowed and type(value) is int:
        value = float(value) if int not in allowed else value
    if type(value) in allowed or (value is None and types.NoneType in allowed):
        return value
    expected = " or ".join("None" if t is types.NoneType else t.__name__ for t in allowed)
    raise ValueError(f"{where}: {name} = {value!r} is a {type(value).__name__}, expected {expected}")


def parse(text, kind):
    """A command-line string as a Python value: strings need no quotes; true, false, none are of any case."""
    if kind is str:
        return text
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        return text


def load(argv, script, reads=None):
    """Defaults of config/defaults.py and of the script, then config files, then --name=value or --name value.
    reads: the names of defaults.py that the script reads, for its --help; None: all."""
    shared, own = settings_of("config/defaults.py"), settings_of(script)
    known = own | shared
    values = {name: default for name, (_, default, _) in known.items()}
    if "--help" in argv or "-h" in argv:
        print(ast.get_docstring(ast.parse(open(place(script)).read())) + "\n\nsettings:")
        for name in (*own, *(name for name in shared if reads is None or name in reads)):
            kind, default, reason = known[name]
            print(f"  --{name}={default!r}".ljust(44), reason)
        sys.exit(0)
    overrides, given, i = {}, set(), 0
    while i < len(argv):
        arg, where = argv[i], "command line"
        if not arg.startswith("--"):
            path = arg if os.path.exists(arg) else os.path.join(ROOT, arg)
            if not arg.endswith(".py") or not os.path.isfile(path):
                raise ValueError(f"{where}: {arg!r} is neither --name=value nor a config file that exists")
            scope = {}
            exec(compile(open(path).read(), path, "exec"), scope)
            for name, value in scope.items():
                if not name.startswith("_") and not isinstance(value, types.ModuleType):
                    values[name] = check(name, value, known, arg)
                    given.add(name)
        else:
            name, equals, text = arg[2:].partition("=")
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


def commit():
    """The project's git commit, for logs and headers."""
    try:
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip() or "unknown"
    except FileNotFoundError:  # no git here
        return "unknown"


def need_room(folder):
    """Write a block where a folder is or will be: what will not work is said before the long work starts."""
    there = os.path.abspath(folder)
    while not os.path.exists(there):
        there = os.path.dirname(there)
    try:
        with tempfile.TemporaryFile(dir=there) as f:
            f.write(bytes(2 ** 16))
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written to ({error.strerror or error})") from error


def read_json(path):
    try:
        with open(path) as f:
            return json.load(f)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error


def run(main, script, reads=None):
    """main(config); what is wrong with the input is printed in one line, with exit code 2."""
    try:
        main(load(sys.argv[1:], script, reads))
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        if os.environ.get("TRACEBACK"):
            traceback.print_exc()
        if isinstance(error, RuntimeError):  # torch tells that it died, not of what
            error = f"{error} A process that reads clips was ended by the system: out of memory, most likely"
        print("error: " + re.sub(r"\s*\n\s*", " ", str(error)), file=sys.stderr, flush=True)
        # under torchrun the other ranks must not wait for us
        os._exit(2) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else sys.exit(2)
