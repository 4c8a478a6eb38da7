"""make gpu, the CPU standing in: what fails and what hangs is told, limited and survived."""
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from tests.helpers import ROOT
from tools import bench
from tools import gpu

HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # a bench's worker
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(600)
"""


def runs(pid):
    try:
        return open(f"/proc/{pid}/stat").read().split()[2] != "Z"  # a dead one may wait for its parent
    except FileNotFoundError:
        return False


def test_a_failing_and_a_hanging_step_are_told_and_survived(tmp_path, monkeypatch, capsys):
    figures = {"ms": 1.5, "gpu": {"rows": [{"B": 1, "T": 2, "N": 3, "D": 0, "backward": False,
                                            "backend": "naive", "ms": 0.25}]}}
    fine = ["-c", f"import json; print('a table'); print(json.dumps({figures}))"]
    monkeypatch.setattr(gpu, "STEPS", {"cpu": [
        ("breaks", 20, ["-c", "import sys; print('halfway'); sys.exit('no such thing')"]),
        ("hangs", 2, ["-c", HANGS, f"{tmp_path}/pid"]),
        ("fine", 20, fine)]})
    start = time.time()
    assert gpu.main("cpu", str(tmp_path)) == 1
    assert time.time() - start < 20
    report = json.load(open(tmp_path / "gpu-cpu.json"))
    breaks, hangs, done = report["steps"]
    assert breaks["result"] == "failed" and breaks["why"] == "no such thing" and breaks["figures"] is None
    assert hangs["result"] == "timed out" and hangs["why"] == "took longer than 2 s" and hangs["seconds"] < 5
    assert not runs(int((tmp_path / "pid").read_text()))
    assert done["result"] == "ok" and done["figures"] == figures and "why" not in done
    assert report["torch"] == torch.__version__ and report["commit"] and report["seconds"] < 20
    page, said = (tmp_path / "gpu-cpu.md").read_text(), capsys.readouterr().out
    for told in ("no such thing", "| 1 | 2 | 3 | 0 | forward | 0.250 |", "| `ms` | 1.5 |"):
        assert told in page
    for told in ("halfway", "!! hangs timed out: took longer than 2 s", "failed: breaks, hangs"):
        assert told in said


def test_all_steps_together_end_within_the_limit(tmp_path, monkeypatch):
    """The steps' own limits fit into it, and one that would not is cut."""
    assert gpu.LIMIT <= 540
    for steps in gpu.STEPS.values():
        assert sum(limit for _, limit, _ in steps) <= gpu.LIMIT - 20  # and a start and an end
    sleeps = ["-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(gpu, "LIMIT", 2)
    monkeypatch.setattr(gpu, "STEPS", {"cpu": [("one", 30, sleeps), ("two", 30, sleeps)]})
    start = time.time()
    assert gpu.main("cpu", str(tmp_path)) == 1
    assert time.time() - start < 8


def test_every_bench_is_a_step():
    commands = [command for _, _, command in gpu.STEPS["cuda"]]
    needed = set(bench.MODES) - {"data", "fit"}  # those two need no GPU
    assert {command[1] for command in commands if command[0] == "tools/bench.py"} == needed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make gpu would use it")
def test_without_a_gpu_one_line():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "gpu", f"PYTHON={sys.executable}"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    told = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert result.returncode == 2 and len(told) == 1 and "DEVICE=cpu" in told[0], result
    assert not result.stdout
