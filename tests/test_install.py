"""What an installation needs: little, and none of what laion-clap and torchlibrosa declare."""
import importlib.metadata
import os
import re
import subprocess

import pytest
from packaging.requirements import Requirement

from tests.helpers import ROOT, run

HEAVY = ["wandb", "librosa", "numba", "pandas", "h5py", "opentelemetry"]

IMPORT_ALL = """
import glob, importlib, os, sys
for folder in ("tools", "prepare", "."):
    sys.path.insert(0, os.path.abspath(folder))
    for file in sorted(glob.glob(f"{folder}/*.py")):
        importlib.import_module(os.path.basename(file).removesuffix(".py"))
from data import load_audio
from model import ClapEncoder
load_audio(sys.argv[1], window_length=10.0, window_overlap=0.0, max_num_window=3)
ClapEncoder(16, [1, 1, 1, 1], [1, 2, 2, 4])
"""


def declared(requirements):
    """Names of all distributions that requirements bring, as the installed ones declare them."""
    names, queue = set(), [Requirement(line) for line in requirements]
    while queue:
        asked = queue.pop()
        name = re.sub("[-_.]+", "-", asked.name).lower()
        if name in names:
            continue
        names.add(name)
        for child in map(Requirement, importlib.metadata.requires(name) or ()):
            extras = asked.extras or {""}
            if not child.marker or any(child.marker.evaluate({"extra": extra}) for extra in extras):
                queue.append(child)
    return names


def test_the_readmes_lines_bring_few_packages():
    lines = open(f"{ROOT}/requirements.txt").read().splitlines()
    names = declared(line for line in lines if line and not line.startswith("#"))
    own = {name for name in names if not re.match("nvidia-|cuda-|triton", name)}  # 19 of a GPU build of torch
    print(len(names), "packages:", *sorted(names))
    assert len(own) + 2 <= 60  # laion-clap and torchlibrosa
    assert not [name for name in names for heavy in HEAVY if name.startswith(heavy)]


def test_makefile_and_readme_install_the_same():
    readme, makefile = open(f"{ROOT}/README.md").read(), open(f"{ROOT}/Makefile").read()
    assert "pip install -r requirements.txt\npip install --no-deps laion-clap torchlibrosa\n" in readme
    assert "-r requirements.txt" in makefile and "--no-deps laion-clap torchlibrosa" in makefile


def test_make_takes_the_first_python_that_runs(tmp_path):
    """A version manager leaves a python3.11 on the path that only prints an error."""
    programs = {"python3.11": "echo not installed >&2; exit 127", "python3.12": "echo python3.12"}
    for name, answer in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / name).chmod(0o755)
    chosen = ("PYTHON", "TORCH", "MAKEFLAGS", "MAKELEVEL")  # by whoever started these tests with make
    environment = {name: value for name, value in os.environ.items() if name not in chosen}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    command = ["make", "-n", "-B", "setup"]
    steps = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "python3.12 -m venv" in steps.stdout, steps


@pytest.mark.parametrize("there", [True, False])
def test_no_script_imports_what_laion_clap_declares(there, tiny_data):
    """Whether those packages are there or not: all scripts import, a clip is read, the encoder is built."""
    block = "" if there else f"import sys; sys.modules.update(dict.fromkeys({HEAVY}))\n"  # None: ImportError
    seen = f"{block}{IMPORT_ALL}\nprint(*[n for n in {HEAVY} if sys.modules.get(n)])"
    assert run("-c", seen, f"{tiny_data}/0.wav", TRITON_INTERPRET="0").stdout.strip() == ""


def test_the_stand_ins_are_gone_afterwards():
    """Whoever imports torchlibrosa after our encoder was built gets the real one."""
    run("-c", "import sys; from model import load_htsat_class; load_htsat_class(); "
              "assert not [n for n in sys.modules if n.startswith('torchlibrosa')]")
