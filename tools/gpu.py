"""Every number that needs a GPU, with one command: the GPU tests, then every bench. Nothing is fetched.

    make gpu                         # PYTHON=python3: whatever has torch, triton and pytest; else .venv's
    make gpu DEVICE=cpu              # the CPU stands in, for what it can
    python tools/gpu.py --device=cuda --out=docs

A step that fails or passes its time limit is told, and the next one goes on: 9 minutes at most. After every
step it writes docs/gpu-<name>.json (device, versions, commit, each step's last JSON line, what failed and
why) and the same as a page, docs/gpu-<name>.md. Where git cannot tell the commit, COMMIT does.
Exit code 0: all went well, 1: a step did not, 2: no GPU.
"""
import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LIMIT = 540  # seconds, of all steps together: half an hour on a borrowed GPU allows three tries
KERNEL_TESTS = ["-m", "pytest", "-q", "-rfEs", "-p", "no:cacheprovider", "tests/test_kernel.py"]
STEPS = {  # device -> (step, its limit in seconds, what Python runs)
    "cuda": [("tests", 150, [*KERNEL_TESTS, "-k", "not test_bench_kernel"]),  # the next step is that
             ("kernel", 150, ["tools/bench.py", "kernel"]), ("decode", 120, ["tools/bench.py", "decode"]),
             ("train", 100, ["tools/bench.py", "train"])],
    "cpu": [("tests", 120, [*KERNEL_TESTS, "-k", "torch_backends or pick_backend or errors_name"]),
            ("kernel", 200, ["tools/bench.py", "kernel"]), ("decode", 180, ["tools/bench.py", "decode"])]}


def run(command, limit, environment):
    """-> (exit code or None when the limit passed, stdout, stderr). Ends all that the command started."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=out,
                                   stderr=err, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # whatever ends this program, too: its children would keep the GPU
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the driver, no kill ends it
                process.wait(5)
        for file in (out, err):
            file.seek(0)
        return code, out.read(), err.read()


def last_json(text):
    """The object on the last line, None where there is none."""
    try:
        found = json.loads(text.rstrip().splitlines()[-1])
    except (IndexError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def take(step, limit, command, environment):
    """Run one step, show its output -> its entry in the report."""
    print(f"\n== {step}, at most {limit:.0f} s\n$ python {shlex.join(command)}", flush=True)
    start = time.time()
    code, out, err = run(command, limit, environment)
    print(out, end="")
    print(err, end="", file=sys.stderr)
    result = {None: "timed out", 0: "ok"}.get(code, "failed")
    entry = {"step": step, "command": command, "limit_s": round(limit),
             "seconds": round(time.time() - start, 1), "result": result, "figures": last_json(out)}
    lines = [line for line in (out + "\n" + err).splitlines() if line.strip()]
    if "pytest" in command:
        counts = [line for line in out.splitlines() if re.search(r"\d+ (passed|failed|skipped|error)", line)]
        entry["tests"] = counts[-1] if counts else None
    if code != 0:
        last = lines[-1][:300] if lines else f"exit code {code}, without a word"
        entry["why"] = f"took longer than {limit:.0f} s" if code is None else last
        entry["tail"] = lines[-20:]
        print(f"!! {step} {result}: {entry['why']}", flush=True)
    return entry


def describe(device):
    """-> device, versions and commit."""
    import torch
    git = ["git", "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    except FileNotFoundError:  # no git here
        commit = ""
    triton = None
    if importlib.util.find_spec("triton"):
        triton = importlib.import_module("triton").__version__
    found = {"device": f"{platform.machine()}, {os.cpu_count()} cores", "gpus": 0}
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        found = {"device": gpu.name, "gpus": torch.cuda.device_count(), "memory_gb": gpu.total_memory / 2**30}
    return found | {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip,
                    "triton": triton, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"),
                    "commit": commit or os.environ.get("COMMIT", "unknown")}


def scalars(value, path=""):
    """Every number, string and None of nested dicts as (dotted path, value); lists are left out."""
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in scalars(inner, f"{path}.{key}".strip("."))]
    return [] if isinstance(value, list) else [(path, value)]


def timings(figures):
    """A bench's rows of times -> a table of milliseconds: a line per shape, a column per backend."""
    holders = [value for value in figures.values() if isinstance(value, dict) and "rows" in value]
    rows = [row for holder in holders for row in holder["rows"]]
    backends, shapes = list(dict.fromkeys(row["backend"] for row in rows)), {}
    for row in rows:
        shape = (row["B"], row["T"], row["N"], row["D"], "fwd + bwd" if row["backward"] else "forward")
        shapes.setdefault(shape, {})[row["backend"]] = f"{row['ms']:.3f}"
    lines = [[*shape, *(ms.get(backend, "") for backend in backends)] for shape, ms in shapes.items()]
    return table(["B", "T", "N", "D", "ms", *backends], lines) + "\n" if rows else ""


def table(header, rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines) + "\n"


def page(report):
    """The report as one page of Markdown."""
    versions = ", ".join(f"{key} {report[key]}" for key in ("torch", "triton", "python", "commit", "date"))
    steps = [[e["step"], e["result"], e["seconds"], e["limit_s"], e.get("why") or e.get("tests") or ""]
             for e in report["steps"]]
    text = f"# {report['device']}\n\n{versions}\n\n"
    text += table(["step", "result", "seconds", "limit", ""], steps)
    for entry in report["steps"]:
        if entry["figures"]:
            short = lambda value: f"{value:.4g}" if isinstance(value, float) else value
            figures = [[f"`{path}`", short(value)] for path, value in scalars(entry["figures"])]
            text += f"\n## {entry['step']}\n\n" + timings(entry["figures"])
            text += table(["figure", "value"], figures)
    return text


def save(report, out):
    slug = re.sub("[^a-z0-9]+", "-", report["device"].lower()).strip("-") if report["gpus"] else "cpu"
    path = os.path.join(out, f"gpu-{slug}")
    os.makedirs(out, exist_ok=True)
    for name, text in ((f"{path}.json", json.dumps(report, indent=1) + "\n"), (f"{path}.md", page(report))):
        with open(name + ".tmp", "w") as f:
            f.write(text)
        os.replace(name + ".tmp", name)
    return path


def main(device, out):
    """-> exit code."""
    try:
        import torch
    except ImportError:
        print(f"no torch in {sys.executable}: PYTHON=... chooses another interpreter", file=sys.stderr)
        return 2
    if device == "cuda" and not torch.cuda.is_available():
        print(f"no GPU that torch {torch.__version__} can use; DEVICE=cpu runs what a CPU can stand in for",
              file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that run() ends what it started
    # compiled kernels, whatever the tests conclude from the machine's device files
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"}
    start, report = time.time(), describe(device) | {"limit_s": LIMIT, "seconds": 0.0, "steps": []}
    print(", ".join(f"{key} {value}" for key, value in report.items() if isinstance(value, str)))
    for step, limit, command in STEPS[device]:
        left = LIMIT - (time.time() - start)
        report["steps"].append(take(step, max(1, min(limit, left)), command, environment))
        report["seconds"] = round(time.time() - start, 1)
        path = save(report, out)
    failed = [entry["step"] for entry in report["steps"] if entry["result"] != "ok"]
    print(f"\n{report['seconds']:.0f} s, failed: {', '.join(failed) or 'none'}; {path}.json and .md")
    return 1 if failed else 0


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", default="cuda", choices=list(STEPS), help="cpu: a CPU stands in")
    parser.add_argument("--out", default=os.path.join(ROOT, "docs"), help="folder of the report (docs)")
    args = parser.parse_args()
    sys.exit(main(args.device, os.path.abspath(args.out)))
