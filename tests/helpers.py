"""What several tests share: tiny manifests, a tiny model, running a script as a user does."""
import json
import os
import subprocess
import sys

import numpy as np
import soundfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.environ.get("SHARED", os.path.join(os.path.dirname(ROOT), "shared"))
GOLDEN_SPEC, GOLDEN = f"{SHARED}/spec", f"{SHARED}/golden/af2_nano"


def write_manifest(folder, name, items):
    """[(file name, prompt, output[, duration])] -> path of folder/<name>.json; split_path: the data root."""
    task, split = name.split("/")
    data = {str(i): {"name": n, "prompt": p, "output": o} | ({"duration": rest[0]} if rest else {})
            for i, (n, p, o, *rest) in enumerate(items)}
    os.makedirs(os.path.join(folder, task), exist_ok=True)
    path = os.path.join(folder, task, split + ".json")
    manifest = {"split": split, "split_path": ".", "flamingo_task": task,
                "total_num": len(data), "data": data}
    with open(path, "w") as f:
        json.dump(manifest, f)
    return path


def lay_out(folder, files, clips=()):
    """files: {path: lines of text, bytes, or something for JSON}; clips: paths of sounds of 0.2 s."""
    for path in [*files, *clips]:
        os.makedirs(os.path.dirname(f"{folder}/{path}"), exist_ok=True)
    for path, content in files.items():
        if isinstance(content, list) and all(isinstance(line, str) for line in content):
            content = "".join(line + "\n" for line in content).encode()
        with open(f"{folder}/{path}", "wb") as f:
            f.write(content if isinstance(content, bytes) else json.dumps(content).encode())
    for path in clips:
        soundfile.write(f"{folder}/{path}", np.zeros(1600), 8000)
    return str(folder)


def run(*command, ok=True, **environment):
    """Run a script of the project (or a module: -m ...) in its folder; asserts that it ends well."""
    result = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=os.environ | environment,
                            capture_output=True, text=True, timeout=600)
    assert not ok or result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result


def fails_with_one_line(*command, saying):
    """The script ends with code 2 and one line on stderr that holds each of the words, no traceback."""
    result = run(*command, ok=False)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 2 and len(lines) == 1, result.stderr[-2000:]
    assert "Traceback" not in result.stderr, result.stderr[-2000:]
    for word in [saying] if isinstance(saying, str) else saying:
        assert word in lines[0], lines[0]
    return result
