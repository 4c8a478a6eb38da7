"""What an installation needs: little, and none of what laion-clap and torchlibrosa declare."""
import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT, run

HEAVY = ["wandb", "librosa", "numba", "pandas", "h5py", "opentelemetry"]

IMPORT_ALL = """
import glob, importlib, socket, sys
unknown, absent = eval(sys.argv[1]), eval(sys.argv[2])
sys.modules.update(dict.fromkeys(absent))  # None: ImportError
def connect(*_):
    raise OSError("network")
socket.socket.connect = connect
for file in [*glob.glob("*.py"), *glob.glob("prepare/*.py"), *glob.glob("tools/**/*.py", recursive=True)]:
    importlib.import_module(file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
from data import load_audio
from model import ClapEncoder
load_audio(sys.argv[3], window_length=10.0, window_overlap=0.0, max_num_window=3)
ClapEncoder(16, [1, 1, 1, 1], [1, 2, 2, 4])
print(*[name for name in unknown if sys.modules.get(name)])
"""


def make(*arguments, **environment):
    """make -n: the commands that it would run."""
    outer = ("PYTHON", "TORCH", "MAKEFLAGS", "MAKELEVEL")  # of the make that started these tests
    environment = {name: value for name, value in os.environ.items() if name not in outer} | environment
    command = ["make", "-n", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_makefile_and_readme_install_the_same():
    readme, commands = open(f"{ROOT}/README.md").read(), make("-B", "setup")
    assert "pip install -r requirements.txt\npip install --no-deps laion-clap torchlibrosa\n" in readme
    assert "-r requirements.txt" in commands and "--no-deps laion-clap torchlibrosa" in commands


def test_make_takes_the_first_python_that_runs(tmp_path):
    """A version manager leaves a python3.11 on the path that only prints an error."""
    programs = {"python3.11": "echo not installed >&2; exit 127", "python3.12": "echo python3.12"}
    for name, answer in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / name).chmod(0o755)
    assert "python3.12 -m venv" in make("-B", "setup", PATH=f"{tmp_path}:{os.environ['PATH']}")


def test_make_gpu_runs_tests_and_benches_on_its_device():
    commands = make("gpu", f"PYTHON={sys.executable}", "DEVICE=cpu")
    assert "tests/test_kernel.py" in commands
    for bench in ("kernel", "decode", "train"):
        assert f"{sys.executable} tools/bench.py {bench} --device=cpu" in commands


@pytest.mark.slow
@pytest.mark.parametrize("absent", [[], HEAVY])
def test_all_modules_import_without_network_and_what_laion_clap_declares(absent, tiny_data):
    """A clip is read, the encoder is built; whoever imports torchlibrosa afterwards gets the real one."""
    unknown = [*HEAVY, "torchvision", "laion_clap", "torchlibrosa"]
    clip = f"{tiny_data}/0.wav"
    done = run("-c", IMPORT_ALL, unknown, absent, clip, TRITON_INTERPRET="0", HF_HUB_OFFLINE="1")
    assert done.stdout.strip() == ""
