"""What several tests share: tiny manifests, a tiny model, running a script as a user does."""
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import soundfile

import config

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


def settings(*changes):
    """The defaults as the settings of a script, changed by dictionaries."""
    names = config.defaults()
    for change in changes:
        names |= change
    return SimpleNamespace(**names)


def train_command(config_file, folder, *options):
    """train.py and its arguments; expdir/run_name is the folder."""
    expdir, name = os.path.split(str(folder))
    return ["train.py", str(config_file), f"--expdir={expdir}", f"--run_name={name}", *options]


def train(*arguments):
    """train.py in this process, whose signal handlers stay."""
    import train as script
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        return script.main(config.load(train_command(*arguments)[1:], "train.py"))
    finally:
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)


def set_gates(model, attention, feed_forward):
    """Open the gates of the gated blocks, which start closed."""
    for block in model.xattn.values():
        block.attn_gate.data.fill_(attention)
        block.ff_gate.data.fill_(feed_forward)


def assert_same_weights(a, b):
    """Two modules agree to the bit."""
    import torch
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)


def max_error(ours, right):
    """The largest error, as a share of the largest number."""
    return ((ours - right).abs().max() / right.abs().max()).item()


def save_byte_tokenizer(folder, fillers=0):
    """Write a tokenizer of <|endoftext|>, the 256 bytes and so many other tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<|endoftext|>", *letters, *(f"<{i}>" for i in range(fillers))]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=names[0]).save_pretrained(folder)


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
