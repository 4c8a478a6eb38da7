"""train.py as a user runs it: one process, two (gloo), resumed, from a checkpoint, with bad files."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

import checkpoint
import config
from model import AudioFlamingo
from tests.helpers import ROOT, fails_with_one_line, run, write_manifest
from tools.checkpoint.files import load_pickle

EXACT = ("--precision=fp32",)  # on a CPU's bf16 units amp_bf16 rounds a batch and its halves differently
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def train(config, out, name, *options, launcher=(), ok=True):
    return run(*launcher, "train.py", config, f"--expdir={out}", f"--run_name={name}", *options, ok=ok)


def here(config_file, out, name, *options):
    """train.py in this process: what is wrong is a ValueError."""
    import train as script
    torch.backends.cuda.enable_flash_sdp(True)  # a run in bf16 turns it off, for its process
    arguments = [str(config_file), f"--expdir={out}", f"--run_name={name}", *options]
    return script.main(config.load(arguments, "train.py"))


def log(out, name, key="loss"):
    """Of the logged steps, or of the validations."""
    rows = [json.loads(line) for line in open(f"{out}/{name}/log.jsonl")]
    return [row[key] for row in rows if ("valid" if key == "valid" else "loss") in row]


def weights(out, name, epoch=1):
    return load_pickle(f"{out}/{name}/checkpoint_{epoch}.pt")["model_state_dict"]


def close(a, b, tolerance):
    assert set(a) == set(b)
    near = lambda x, y: (x - y).abs().max() <= tolerance * max(1e-2, y.abs().max())
    return all(near(a[k].double(), b[k].double()) for k in a)


@pytest.fixture(scope="module")
def straight(tiny_config, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    return out, train(tiny_config, out, "straight", "--batch_size=4", "--save_steps=1", *EXACT)


def test_run_leaves_what_is_promised(straight):
    out, result = straight
    run_folder = f"{out}/straight"
    assert sorted(os.listdir(run_folder)) == ["checkpoint_0.pt", "checkpoint_1.pt", "log.jsonl"]
    assert "cross-attention: sdpa" in result.stdout and "trainable" in result.stdout
    assert "| eta 0h00m" in result.stdout
    assert len(log(out, "straight")) == 2 and log(out, "straight", "valid")[-1].keys() == {"toy-AQA/val"}
    saved = load_pickle(f"{run_folder}/checkpoint_1.pt")
    assert {"epoch", "model_state_dict", "optimizer_state_dict", "lr_scheduler_state_dict"} <= set(saved)
    # frozen weights that have a file of their own are not in it; this CLAP, drawn at random, is nowhere else
    assert not any(name.startswith("lm.layers.") for name in saved["model_state_dict"])
    assert any(name.startswith("clap.") for name in saved["model_state_dict"])
    model = AudioFlamingo.from_pretrained(run_folder)
    for name, tensor in saved["model_state_dict"].items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_two_ranks_equal_one_with_twice_the_batch(straight, tiny_config):
    out, _ = straight
    train(tiny_config, out, "two", "--batch_size=2", *EXACT, launcher=TORCHRUN)
    assert log(out, "two") == pytest.approx(log(out, "straight"), abs=1e-5)
    assert close(weights(out, "two"), weights(out, "straight"), 1e-4)


def test_accumulation_equals_a_larger_batch(ten_steps, tiny_config):
    out, options = ten_steps
    here(tiny_config, out, "accumulated", *options, "--batch_size=1", "--gradient_accumulation_steps=2")
    assert log(out, "accumulated") == pytest.approx(log(out, "whole"), abs=1e-5)
    assert close(weights(out, "accumulated", 4), weights(out, "whole", 4), 1e-4)


@pytest.fixture(scope="module")
def ten_steps(tiny_config, tmp_path_factory):
    """A run of 10 steps, of 5 epochs, and its options."""
    out = tmp_path_factory.mktemp("ten")
    options = ["--num_epochs=5", "--lr_scheduler=cosine", "--valid_dataset_config={}", *EXACT]
    here(tiny_config, out, "whole", *options)
    return out, options


def same(a, b):
    assert set(a) == set(b)
    return all(torch.equal(a[name], b[name]) for name in a)


def start(*command):
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def wait_for_steps(out, name, n):
    for _ in range(1200):
        if os.path.exists(f"{out}/{name}/log.jsonl") and len(log(out, name)) >= n:
            return
        time.sleep(0.05)
    raise AssertionError(f"{name}: no {n} steps within a minute")


def test_signals_save_and_a_resumed_run_is_the_straight_one_bit_for_bit(ten_steps, tiny_config):
    out, options = ten_steps
    command = ("train.py", tiny_config, f"--expdir={out}", "--run_name=stopped", *options)
    for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        done = len(log(out, "stopped")) if os.path.exists(f"{out}/stopped/log.jsonl") else 0
        process = start(*command)
        wait_for_steps(out, "stopped", done + 1)
        process.send_signal(number)
        stdout, stderr = process.communicate()
        assert process.returncode == code and number.name in stdout and "Traceback" not in stderr, stderr
        assert os.path.exists(f"{out}/stopped/checkpoint_interim.pt") or "checkpoint_" in stdout
    run(*command)
    assert log(out, "stopped", "step") == list(range(1, 11)) == log(out, "whole", "step")
    assert log(out, "stopped") == log(out, "whole") and log(out, "stopped", "lr") == log(out, "whole", "lr")
    assert same(weights(out, "stopped", 4), weights(out, "whole", 4))
    states = [load_pickle(f"{out}/{name}/checkpoint_4.pt")["optimizer_state_dict"]["state"]
              for name in ("stopped", "whole")]
    assert all(same(a, b) for a, b in zip(*(state.values() for state in states)))


def test_a_signal_in_the_validation_ends_it_and_a_resume_does_it(tiny_config, tmp_path, monkeypatch, capsys):
    import train as script
    count, came = script.count_tokens, []

    def counted(batch):
        if not torch.is_grad_enabled():
            came.append(1)
            signal.raise_signal(signal.SIGTERM)
        return count(batch)

    with monkeypatch.context() as patch:
        patch.setattr(script, "count_tokens", counted)
        assert here(tiny_config, tmp_path, "run", "--num_epochs=1") == 0 and came == [1]
    assert "by SIGTERM: the last validation is not finished; the same command goes" in capsys.readouterr().out
    assert not log(tmp_path, "run", "valid") and os.path.exists(tmp_path / "run/checkpoint_0.pt")
    here(tiny_config, tmp_path, "run", "--num_epochs=1")
    assert len(log(tmp_path, "run", "valid")) == 1 and "not finished" not in capsys.readouterr().out


def test_a_signal_to_all_processes_leaves_workers_at_work(ten_steps, tiny_config):
    """Clusters send SIGTERM to every process of a job, terminals Ctrl-C; a second Ctrl-C has no traceback."""
    out, options = ten_steps
    command = ["train.py", tiny_config, f"--expdir={out}", "--run_name=all", "--num_workers=2", *options]
    for numbers, codes in (([signal.SIGTERM], [0]), ([signal.SIGINT] * 2, [130, -signal.SIGINT])):
        done = len(log(out, "all")) if os.path.exists(f"{out}/all/log.jsonl") else 0
        process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stderr=subprocess.PIPE,
                                   stdout=subprocess.DEVNULL, text=True, start_new_session=True)
        wait_for_steps(out, "all", done + 1)
        for number in numbers:
            os.killpg(process.pid, number)
            time.sleep(0.3)
        stderr = process.communicate()[1]
        assert process.returncode in codes and "Traceback" not in stderr and "error" not in stderr, stderr
    here(tiny_config, out, "all", *options)
    assert log(out, "all") == log(out, "whole") and same(weights(out, "all", 4), weights(out, "whole", 4))


def test_max_steps_stops_and_without_it_a_run_goes_on(ten_steps, tiny_config, capsys):
    out, options = ten_steps
    for most in (3, 4):
        here(tiny_config, out, "part", *options, "--lr_scheduler=constant", f"--max_steps={most}")
        assert "not finished" in capsys.readouterr().out
    here(tiny_config, out, "part", *options, "--lr_scheduler=constant")
    here(tiny_config, out, "constant", *options, "--lr_scheduler=constant")
    assert log(out, "part") == log(out, "constant")
    assert same(weights(out, "part", 4), weights(out, "constant", 4))
    assert "10 steps done" in capsys.readouterr().out


def test_resumed_with_another_division_of_the_same_step(ten_steps, tiny_config, capsys):
    """Batches of 2, then of 1, two a step: the same items a step, the same run within rounding."""
    out, options = ten_steps
    here(tiny_config, out, "divided", *options, "--max_steps=5", "--lr_scheduler=constant")
    here(tiny_config, out, "divided", *options, "--batch_size=1", "--gradient_accumulation_steps=2",
         "--lr_scheduler=constant")
    text = capsys.readouterr().out
    assert "batch_size 2 -> 1" in text and "divided anew" not in text
    here(tiny_config, out, "divided0", *options, "--lr_scheduler=constant")
    assert log(out, "divided") == pytest.approx(log(out, "divided0"), abs=1e-5)
    assert close(weights(out, "divided", 4), weights(out, "divided0", 4), 1e-4)


@pytest.mark.parametrize("first, then", [(1, 8), (3, 1)])
def test_resumed_with_another_batch_every_item_is_trained_once(tiny_config, tmp_path, first, then, capsys,
                                                               monkeypatch):
    options = ["--dataset_blending_global_weight=1.0", "--num_epochs=4", "--valid_dataset_config={}"]
    import train as script
    seen, on_device = [], script.on_device

    def count(batch, device):
        seen.extend(batch["paths"] * torch.is_grad_enabled())
        return on_device(batch, device)

    monkeypatch.setattr(script, "on_device", count)
    stop = -(-8 // first) + 1  # in the middle of the second epoch
    here(tiny_config, tmp_path, "run", *options, f"--batch_size={first}", f"--max_steps={stop}")
    here(tiny_config, tmp_path, "run", *options, "--batch_size=2", f"--max_steps={stop + 1}")  # and again
    here(tiny_config, tmp_path, "run", *options, f"--batch_size={then}")
    assert "divided anew" in capsys.readouterr().out
    assert sorted(map(seen.count, set(seen))) == [4] * 8
    assert sorted(set(seen[8:16])) == sorted(set(seen))  # an epoch has each once
    assert log(tmp_path, "run", "items_done")[-1] == 32 and os.path.exists(tmp_path / "run/checkpoint_3.pt")


def test_every_epoch_is_trained_whole(tiny_config, tmp_path):
    """2.4 items an epoch: 2 or 3. Steps are rounded up in each; the last checkpoint has the promised name."""
    here(tiny_config, tmp_path, "run", "--num_epochs=8", "--dataset_blending_global_weight=0.3",
         "--valid_dataset_config={}", "--save_epochs=3", "--keep_last=2")
    assert log(tmp_path, "run", "items_done")[-1] == int(8 * 0.3 * 8) == 19
    kept = sorted(name for name in os.listdir(tmp_path / "run") if name.endswith(".pt"))
    assert kept == ["checkpoint_5.pt", "checkpoint_7.pt"]
    assert set(log(tmp_path, "run", "epoch")) == set(range(8))


def test_rates_and_decay_of_a_resumed_run_are_the_new_ones(tiny_config, tmp_path, capsys):
    options = ["--valid_dataset_config={}", "--warmup_steps=0"]
    here(tiny_config, tmp_path, "run", *options, "--max_steps=2")
    here(tiny_config, tmp_path, "run", *options, "--learning_rate=5e-4", "--weight_decay=0.3",
         "--gate_learning_rate=0.02")
    text = capsys.readouterr().out
    for change in ("learning_rate 0.001 -> 0.0005", "weight_decay 0.1 -> 0.3",
                   "gate_learning_rate None -> 0.02"):
        assert change in text
    saved = load_pickle(tmp_path / "run/checkpoint_1.pt")
    groups = saved["optimizer_state_dict"]["param_groups"]
    assert {(g["lr"], g["weight_decay"]) for g in groups} == {(5e-4, 0.3), (5e-4, 0.0), (0.02, 0.0)}
    names = saved["optimizer_names"]
    assert {names[i] for g in groups if g["lr"] == 0.02 for i in g["params"]} == {
        n for n in names if n.endswith("_gate")}
    assert all(float(s["step"]) == 4 for s in saved["optimizer_state_dict"]["state"].values())


def test_what_trained_is_frozen_from_a_resume_on(tiny_config, tmp_path, capsys):
    options = ["--valid_dataset_config={}", "--precision=fp32"]
    here(tiny_config, tmp_path, "run", *options, "--clap_finetune", "--max_steps=2")
    here(tiny_config, tmp_path, "run", *options)
    assert "clap_finetune True -> False" in capsys.readouterr().out
    before, after = weights(tmp_path, "run", 0), weights(tmp_path, "run", 1)
    same = {n for n in after if torch.equal(after[n], before[n])}
    assert {n for n in after if n.startswith("clap.")} == {n for n in same if n.startswith("clap.")} != set()
    assert "xattn.0.attn_gate" not in same
    names = load_pickle(tmp_path / "run/checkpoint_1.pt")["optimizer_names"]
    assert names and not any(n.startswith("clap.") for n in names)


def test_a_validation_that_a_kill_prevented_is_done_on_resume(tiny_config, tmp_path):
    here(tiny_config, tmp_path, "run")
    file = tmp_path / "run/log.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert '"valid"' in lines[-1]
    file.write_text("".join(lines[:-1]))
    for _ in range(2):  # and no second time
        here(tiny_config, tmp_path, "run")
        assert file.read_text().splitlines(keepends=True) == lines


def test_another_blend_is_refused(straight, tiny_config):
    out, _ = straight
    with pytest.raises(ValueError, match="trained parts .*freeze_lm_embeddings False -> True"):
        here(tiny_config, out, "straight", "--freeze_lm_embeddings=true")
    with pytest.raises(ValueError, match="the blend is not what it was"):
        here(tiny_config, out, "straight", '--dataset_blending_config={"toy-AQA/train": 2.0}')


def test_a_damaged_checkpoint_is_not_used(ten_steps, tiny_config, capsys):
    out, options = ten_steps
    shutil.copytree(f"{out}/whole", f"{out}/damaged")
    with open(f"{out}/damaged/checkpoint_4.pt", "r+b") as f:  # cut
        f.truncate(os.path.getsize(f.name) // 2)
    with open(f"{out}/damaged/checkpoint_3.pt", "r+b") as f:  # one bit of a weight
        f.seek(os.path.getsize(f.name) // 2)
        byte = f.read(1)[0]
        f.seek(-1, 1)
        f.write(bytes([byte ^ 1]))
    here(tiny_config, out, "damaged", *options)
    text = capsys.readouterr().out
    assert text.count("is damaged") == 2 and "resumed" in text and "checkpoint_2.pt: epoch 3, step 6" in text
    assert same(weights(out, "damaged", 4), weights(out, "whole", 4))
    assert log(out, "damaged") == log(out, "whole")  # no step twice


def test_a_log_with_other_lines_loses_none_of_its_own(ten_steps, tiny_config):
    """Torn, without its last newline, with lines of somebody else's: only what comes again is taken out."""
    out, options = ten_steps
    whole = open(f"{out}/whole/log.jsonl", "rb").read().splitlines(keepends=True)
    odd = [b"# mine\n", b"\xff\xfe\x00\n", b"[1]\n", b"null\r\n", b"\n", b'{"step": "x"}\n']
    shutil.copytree(f"{out}/whole", f"{out}/log")
    file = f"{out}/log/log.jsonl"
    for end in (b"", b"\n", b'\n{"epoch": 4, "st'):
        os.remove(f"{out}/log/checkpoint_4.pt")
        with open(file, "wb") as f:
            f.write(b"".join(odd + whole).rstrip(b"\n") + end)
        here(tiny_config, out, "log", *options)
        assert log(out, "log", "step") == log(out, "whole", "step") and log(out, "log") == log(out, "whole")
    assert open(file, "rb").read().startswith(odd[-1] + b"".join(whole[:-3]))


def test_the_newest_checkpoint_is_never_removed(ten_steps, tiny_config):
    out, options = ten_steps
    shutil.copytree(f"{out}/whole", f"{out}/kept")
    for epoch in (2, 3, 4):
        os.truncate(f"{out}/kept/checkpoint_{epoch}.pt", 5000)
    here(tiny_config, out, "kept", *options, "--max_steps=6", "--keep_last=1")  # not 3, which is damaged
    assert load_pickle(f"{out}/kept/checkpoint_2.pt")["step"] == 6
    here(tiny_config, out, "kept", *options, "--keep_last=1")
    assert os.listdir(f"{out}/kept").count("checkpoint_4.pt") == 1 and len(os.listdir(f"{out}/kept")) == 2
    with pytest.raises(ValueError, match="num_epochs = 3, but .*checkpoint_4.pt has trained longer"):
        here(tiny_config, out, "kept", *options, "--num_epochs=3")


def test_resumed_between_an_epochs_last_step_and_its_end(tiny_config, tmp_path, monkeypatch):
    """The interim checkpoint of that step: nothing of the epoch is left to divide."""
    from tools.train import run as runs
    options = ["--save_epochs=9", "--save_steps=2", "--valid_dataset_config={}"]
    for name, then, steps in (("same", [], 4), ("windows", ["--max_windows_per_batch=4"], 4),
                              ("other", ["--batch_size=1"], 6)):
        with monkeypatch.context() as patch:
            patch.setattr(runs.Run, "_save", lambda run, file, content, save=runs.Run._save: (
                save(run, file, content) if file == "checkpoint_interim.pt" else None))
            here(tiny_config, tmp_path, name, *options, "--num_epochs=2", *then[:name == "windows"])
        assert "checkpoint_interim.pt" in os.listdir(tmp_path / name)
        here(tiny_config, tmp_path, name, *options, *then)
        assert log(tmp_path, name, "step") == list(range(1, steps + 1))


def test_manifests_named_in_another_order_or_edited_before_a_resume(tiny_config, tmp_path, capsys):
    for name, first in (("x", 0), ("y", 3)):
        items = [(f"{i}.wav", f"Tone or {name}?", ["noise", "tone"][i % 2]) for i in range(first, first + 5)]
        write_manifest(tmp_path / "m", f"{name}-AQA/train", items)
    options = ["--valid_dataset_config={}", f"--dataset_file_root={tmp_path}/m", *EXACT]
    blend = lambda names: "--dataset_blending_config=" + json.dumps({f"{n}-AQA/train": 1.0 for n in names})
    here(tiny_config, tmp_path, "whole", *options, blend("xy"))
    here(tiny_config, tmp_path, "part", *options, blend("xy"), "--max_steps=1")
    here(tiny_config, tmp_path, "part", *options, blend("yx"))
    assert log(tmp_path, "part") == log(tmp_path, "whole")
    assert "the items of" not in capsys.readouterr().out
    write_manifest(tmp_path / "m", "y-AQA/train", items[::-1])
    here(tiny_config, tmp_path, "part", *options, blend("xy"))
    assert "in effect from now on: the items of y-AQA/train\n" in capsys.readouterr().out


def test_what_is_no_checkpoint_of_a_run_is_named(tiny_config, tmp_path):
    for name in ("log.jsonl", "checkpoint_1.pt", "checkpoint_interim.pt", "checkpoint_0.pt.tmp"):
        os.makedirs(tmp_path / name / name)
        with pytest.raises(ValueError, match=f"{name}/{name}: a folder"):
            here(tiny_config, tmp_path, name)
        assert os.listdir(tmp_path / name) == [name]
    (tmp_path / "x").mkdir()
    torch.save({"epoch": 3, "model_state_dict": {}}, tmp_path / "x/checkpoint_3.pt")
    with pytest.raises(ValueError, match="checkpoint_3.pt: no 'step' in it"):
        here(tiny_config, tmp_path, "x")
    with pytest.raises(ValueError, match=f"{tmp_path}: a folder"):
        here(tiny_config, tmp_path, "y", f"--dataset_blending_output={tmp_path}")
    assert not (tmp_path / "y").exists()


def test_what_is_not_finite_is_skipped_named_and_bounded(tiny_config, tmp_path, monkeypatch, capsys):
    import train as script
    on_device, broken = script.on_device, {"3.wav"}

    def with_a_broken_clip(batch, device):
        ids, windows, *rest = on_device(batch, device)
        if any(os.path.basename(path) in broken for path in batch["paths"]):
            windows = torch.full(windows.shape, float("nan"))
        return ids, windows, *rest

    monkeypatch.setattr(script, "on_device", with_a_broken_clip)
    options = ["--valid_dataset_config={}", "--dataset_blending_global_weight=1.0", "--batch_size=1"]
    here(tiny_config, tmp_path, "one", *options, "--logging_steps=4")
    result = capsys.readouterr()
    assert result.err.count("not finite, no update; its items: ") == 2 and "3.wav" in result.err
    assert "16 steps done, 2 of them without an update" in result.out
    rows = [json.loads(line) for line in open(tmp_path / "one/log.jsonl")]
    named = [path for row in rows if "no_update" in row for path in row["items"]]
    assert [os.path.basename(path) for path in named] == ["3.wav", "3.wav"]
    assert all(t.isfinite().all() for t in weights(tmp_path, "one").values() if t.is_floating_point())
    broken |= {f"{i}.wav" for i in range(8)}
    before = open(tmp_path / "one/checkpoint_1.pt", "rb").read()
    with pytest.raises(ValueError, match="4 steps in a row made no update .*_steps = 3.*checkpoint_1.pt"):
        here(tiny_config, tmp_path, "one", *options, "--num_epochs=4", "--max_bad_steps=3")
    assert open(tmp_path / "one/checkpoint_1.pt", "rb").read() == before
    assert sorted(os.listdir(tmp_path / "one")) == ["checkpoint_0.pt", "checkpoint_1.pt", "log.jsonl"]


@pytest.mark.parametrize("options", [["--learning_rate=1e30"], ["--learning_rate=1e30", "--max_steps=1"],
                                     ["--weight_decay=1e30"]])
def test_weights_that_blew_up_are_not_saved(tiny_config, tmp_path, options):
    with pytest.raises(ValueError, match=options[0][2:].replace("=1e", " = 1e\\+")):
        here(tiny_config, tmp_path, "run", "--valid_dataset_config={}", *options)
    assert os.listdir(tmp_path / "run") == ["log.jsonl"]


def test_nothing_labelled_is_an_error(tiny_config, tiny_data, tmp_path, monkeypatch):
    for options in (["--max_steps=1"], ["--logging_steps=100"], ["--max_bad_steps=1", "--num_epochs=9"]):
        with pytest.raises(ValueError, match="no labelled token; .* cut off by max_tokens = 9"):
            here(tiny_config, tmp_path, "train", "--max_tokens=9", "--valid_dataset_config={}", *options)
        assert os.listdir(tmp_path / "train") == ["log.jsonl"]
    here(tiny_config, tmp_path, "on", "--max_steps=1", "--valid_dataset_config={}")
    with pytest.raises(ValueError, match="step 4: 3 steps in a row made no update .* no labelled token"):
        here(tiny_config, tmp_path, "on", "--max_tokens=9", "--valid_dataset_config={}")
    write_manifest(tmp_path / "m", "toy-AQA/train", [(f"{i}.wav", "Tone?", "tone") for i in range(8)])
    write_manifest(tmp_path / "m", "long-AQA/val", [("1.wav", "Is it a tone or not? " * 9, "tone")])
    options = [f"--dataset_file_root={tmp_path}/m", "--max_tokens=40"]
    with pytest.raises(ValueError, match="long-AQA/val: no labelled token in 1 items: 1 answers cut off"):
        here(tiny_config, tmp_path, "valid", *options, '--valid_dataset_config={"long-AQA/val": 1.0}')
    assert os.path.exists(tmp_path / "valid/checkpoint_0.pt")  # written before the validation
    write_manifest(tmp_path / "m", "gone-AQA/val", [("gone.wav", "Tone?", "tone")])
    with pytest.raises(ValueError, match="1 clips not read, e.g. .*gone.wav"):
        here(tiny_config, tmp_path, "gone", *options, '--valid_dataset_config={"gone-AQA/val": 1.0}')


def test_the_optimizers_own_clipping_is_torchs():
    """Gradients of norm 10, 0.5 and 3: moments and weights as after clip_grad_norm_."""
    from tools.train.optim import clip
    torch.manual_seed(0)
    gradients = [[torch.randn(20, 30), torch.randn(7)] for _ in range(3)]
    sizes = [torch.cat([g.flatten() for g in step]).norm() for step in gradients]
    results = []
    for how in ("ours", "torch's", "none"):
        p = [torch.nn.Parameter(torch.ones(size)) for size in ((20, 30), (7,), (3,))]
        optimizer = torch.optim.AdamW(p, 0.1, fused=True)
        for step, size, norm in zip(gradients, sizes, (10.0, 0.5, 3.0)):
            for x, g in zip(p, step):  # the third has none
                x.grad = g * norm / size
            if how == "ours":
                assert clip(optimizer, p, 1.0).item() == pytest.approx(norm, rel=1e-5)
            elif how == "torch's":
                torch.nn.utils.clip_grad_norm_(p, 1.0)
            optimizer.step()
        results.append([x for q in p[:2] for x in (q.data, *optimizer.state[q].values())])
    ours, theirs, none = results
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(ours, theirs))
    assert not torch.allclose(ours[2], none[2], rtol=0.1)  # the first moment


def test_grad_clip_0_is_off(tiny_config, tmp_path):
    for name, value in (("off", 0), ("large", 1e9)):
        here(tiny_config, tmp_path, name, f"--grad_clip={value}", "--valid_dataset_config={}")
    assert same(weights(tmp_path, "off"), weights(tmp_path, "large")) and log(tmp_path, "off", "gnorm")[0] > 0


def test_a_frozen_table_stays_frozen_where_the_language_model_trains(tiny_settings):
    base = config.defaults() | tiny_settings | {"unfreeze_full_lm": True}
    model = checkpoint.new(SimpleNamespace(**base))
    for table, trains in ((True, set()), (False, {"weight", "added"}), ("added", {"added"})):
        model.set_trainable(SimpleNamespace(**(base | {"freeze_lm_embeddings": table})))
        assert {n for n, p in model.lm.embed_tokens.named_parameters() if p.requires_grad} == trains
        assert all(p.requires_grad for p in model.lm.layers.parameters())


def test_one_folder_is_of_one_process(straight, tiny_config):
    from tools.train.run import Run
    out, _ = straight
    c = config.load([str(tiny_config), f"--expdir={out}", "--run_name=straight"], "train.py")
    before = sorted(os.listdir(f"{out}/straight"))
    held = Run(c, 0)
    fails_with_one_line("train.py", tiny_config, f"--expdir={out}", "--run_name=straight",
                        saying="another process trains in this folder")
    held.end()
    assert sorted(os.listdir(f"{out}/straight")) == before


FULL = ("import json, resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2); sys.path.insert(0, '.')\n")


def test_a_disk_that_fills_up(tiny_config, tmp_path, monkeypatch, capsys):
    """Files may not grow beyond 100 kB: the log fits, a checkpoint doesn't, as on a full disk."""
    here(tiny_config, tmp_path, "run", "--max_steps=2", "--valid_dataset_config={}")
    before = open(tmp_path / "run/checkpoint_0.pt", "rb").read()
    script = FULL + "sys.argv = sys.argv[2:]\nrunpy.run_path('train.py', run_name='__main__')"
    result = run("-c", script, 100000, "train.py", tiny_config, f"--expdir={tmp_path}", "--run_name=run",
                 "--valid_dataset_config={}", "--save_steps=1", "--num_epochs=3", ok=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "checkpoint_2.pt: could not be written, is the disk full?" in result.stderr.splitlines()[-1]
    assert result.stderr.count("training goes on") == 5, result.stderr
    assert log(tmp_path, "run", "step")[-1] == 6
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoint_0.pt", "log.jsonl"]
    assert open(tmp_path / "run/checkpoint_0.pt", "rb").read() == before


def test_the_copy_of_a_checkpoint_is_in_the_memory_of_the_one_before():
    from tools.train.run import on_host
    weights = {"a": torch.randn(3, 4), "b": torch.ones(2)}
    content = {"step": 1, "weights": weights, "groups": [{"lr": 1.0}, (2,)]}
    first = on_host(content)
    content["weights"]["a"] += 1
    assert not torch.equal(first["weights"]["a"], content["weights"]["a"])  # later steps do not change it
    content |= {"step": 2, "groups": [{"lr": 0.5}]}
    content["weights"] |= {"b": torch.ones(3), "c": torch.zeros(1)}  # another form, and a new one
    second = on_host(content, first)
    assert second["weights"]["a"] is first["weights"]["a"]
    assert all(torch.equal(second["weights"][n], t) and second["weights"][n] is not t
               for n, t in content["weights"].items())
    assert (second["step"], second["groups"]) == (2, [{"lr": 0.5}])


def test_log_lines_that_find_no_room_wait(tiny_config, tmp_path, monkeypatch, capsys):
    """A disk with room for half a line from the second on, until the fifth; then one that stays full."""
    options = ["--valid_dataset_config={}", "--dataset_blending_global_weight=1.0", "--num_epochs=2"]
    here(tiny_config, tmp_path, "roomy", *options)
    write, tries = os.write, []

    def short(file, data, until):
        of_log = data.startswith(b'{"')
        tries.append(None) if of_log else None
        return write(file, data[:len(data) // 2] if of_log and 2 <= len(tries) < until else data)

    monkeypatch.setattr(os, "write", lambda file, data: short(file, data, 5))
    here(tiny_config, tmp_path, "full", *options)
    assert log(tmp_path, "full") == log(tmp_path, "roomy") and len(log(tmp_path, "full")) == 8
    assert capsys.readouterr().err.count("full/log.jsonl: could not be written, is the disk full?") == 3
    tries.clear()
    monkeypatch.setattr(os, "write", lambda file, data: short(file, data, 999))
    with pytest.raises(ValueError, match="stays/log.jsonl: could not be written, is the disk full?"):
        here(tiny_config, tmp_path, "stays", *options)
    assert len(open(tmp_path / "stays/log.jsonl").read().splitlines()) == 1  # whole
    assert load_pickle(tmp_path / "stays/checkpoint_1.pt")["step"] == 8


def test_a_full_disk_is_one_line_that_names_the_file(straight, tiny_config, tiny_data, tmp_path):
    """As above, scripts that write at their end, one after the other in a process."""
    out, _ = straight
    script = FULL + ("for sys.argv in json.loads(sys.argv[2]):\n"
                     "    try: runpy.run_path(sys.argv[0], run_name='__main__'); print('done', *sys.argv)\n"
                     "    except SystemExit as end: print('code', end.code)")
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "p" * 99999, "output": "a", "answer": "a"}))
    loud = tmp_path / "noise.wav"
    soundfile.write(loud, np.random.default_rng(0).uniform(-1, 1, 80000), 16000)
    write_manifest(tmp_path / "m", "loud-AQA/train", [(str(loud), "Noise?", "yes")])
    scripts = {"rel": ["sample.py", f"--init_from={out}/straight", f"--export={tmp_path}/rel"],
               "p.png": ["tools/train/plot.py", f"{out}/straight", f"--output={tmp_path}/p.png"],
               "AQA.jsonl": ["eval.py", "score", f"{tmp_path}/a.jsonl", "--task=AQA",
                             f"--results={tmp_path}"],
               "audio": ["prepare/convert.py", f"{tmp_path}/m/loud-AQA/train.json",
                         f"--to={tmp_path}/packed"]}
    result = run("-c", script, 66000, json.dumps(list(scripts.values())), ok=False)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.stdout.count("code 2") == len(lines) == len(scripts), result.stdout + result.stderr[-3000:]
    for (name, _), line in zip(scripts.items(), lines):
        assert f"{tmp_path}" in line and name in line and ("disk full" in line or name == "rel"), line
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "m", "noise.wav", "packed"]


def test_an_unwritable_folder_is_found_first(tiny_config, tmp_path):
    (tmp_path / "file").write_text("")
    for setting in ("expdir", "dataset_blending_output"):
        with pytest.raises(ValueError, match=f"{tmp_path}/file.*cannot be written to"):
            here(tiny_config, tmp_path, "x", f"--{setting}={tmp_path}/file/x/y", "--lang_encoder_path=no")


@pytest.mark.parametrize("environment, saying", [
    ({"WORLD_SIZE": ""}, "WORLD_SIZE = ''"), ({"WORLD_SIZE": "2"}, "RANK = None"),
    ({"SLURM_NTASKS": "8"}, "SLURM_NTASKS = 8")])
def test_environments_that_are_not_torchruns(tiny_config, tmp_path, monkeypatch, environment, saying):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=saying):
        here(tiny_config, tmp_path, "x")


def test_ranks_are_started_alike_and_say_once_what_all_find(tiny_config, tmp_path, monkeypatch):
    from tools.train import run as runs
    options = ["--batch_size=1", "--max_tokens=9"]
    result = train(tiny_config, tmp_path, "two", *options, launcher=TORCHRUN, ok=False)
    assert result.returncode and result.stderr.count("error: toy-AQA/val: no labelled token") == 1
    monkeypatch.setattr(runs, "gathered", lambda some, control: [*some, {"seed": 42, "batch_size": 8}])
    runs.check_same_on_all_ranks({"seed": 42, "batch_size": 8}, None)
    with pytest.raises(ValueError, match="batch_size = 4 on one rank, 8 on another"):
        runs.check_same_on_all_ranks({"seed": 42, "batch_size": 4}, None)


def test_killed_ranks_restart_from_the_last_checkpoint(tiny_config, tmp_path):
    """Two ranks, one of them killed at random moments: torchrun starts both again, to the same weights."""
    options = ["--batch_size=1", "--num_epochs=8", "--save_steps=1", "--valid_dataset_config={}",
               "--shard_optimizer=true", *EXACT]
    train(tiny_config, tmp_path, "whole", *options, launcher=TORCHRUN)
    process = start(*TORCHRUN, "--max-restarts=3", "--monitor-interval=0.2", "train.py", tiny_config,
                    f"--expdir={tmp_path}", "--run_name=killed", *options)
    try:
        rng = random.Random(0)
        for steps in (1, rng.randint(3, 6), rng.randint(8, 11)):
            wait_for_steps(tmp_path, "killed", steps)
            children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
            os.kill(int(rng.choice(children.stdout.split())), signal.SIGKILL)
            time.sleep(1)
        _, stderr = process.communicate(timeout=120)
    finally:
        if process.poll() is None:  # it ends its ranks, too
            process.terminate()
            process.communicate()
    assert process.returncode == 0, stderr[-3000:]
    assert log(tmp_path, "killed") == log(tmp_path, "whole") and len(log(tmp_path, "whole")) == 16
    assert same(weights(tmp_path, "killed", 7), weights(tmp_path, "whole", 7))
    here(tiny_config, tmp_path, "one", *options, "--batch_size=2", "--num_epochs=8")  # one rank, not sharded
    assert close(weights(tmp_path, "one", 7), weights(tmp_path, "whole", 7), 1e-4)


@pytest.mark.parametrize("workers, most", [(0, 1), (2, 2)])
def test_cached_clips_are_decoded_once_by_each_worker(tiny_config, tmp_path, monkeypatch, workers, most):
    import data
    read_clip = data.read_clip

    def counted(path, **how):
        with open(tmp_path / "read", "a") as f:
            f.write(path + "\n")
        return read_clip(path, **how)

    monkeypatch.setattr(data, "read_clip", counted)
    here(tiny_config, tmp_path, "run", "--cache_audio", f"--num_workers={workers}", "--num_epochs=4",
         "--dataset_blending_global_weight=1.0")
    read = Counter(open(tmp_path / "read").read().split())
    assert len(read) == 8 and max(read.values()) <= 2 * most  # of training and of validation


def test_plot_and_profile(straight, tiny_config, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    from tools.train import plot
    out, _ = straight
    here(tiny_config, tmp_path, "run", "--profile", "--num_epochs=4", "--dataset_blending_global_weight=0.5")
    assert "Self CPU" in capsys.readouterr().out
    assert json.load(open(tmp_path / "run/trace.json"))["traceEvents"]
    here(tiny_config, tmp_path, "run", "--profile", "--num_epochs=5", "--dataset_blending_global_weight=0.5")
    assert "fourth step are traced, and there were fewer" in capsys.readouterr().out
    assert {len(row) for key in ("gates", "ff_gates") for row in log(tmp_path, "run", key)} == {3}  # layers
    c = config.load([f"--output={tmp_path}/new/both.png"], "tools/train/plot.py")
    plot.main(c, [f"{out}/straight", f"{tmp_path}/run"])
    assert open(tmp_path / "new/both.png", "rb").read(8) == b"\x89PNG\r\n\x1a\n"
    nulls = '{"step": 5, "gnorm": null, "gates": null, "valid": null}'
    for name, line in (("_odd", nulls), ("$\\frac$", "[1")):
        (tmp_path / name).mkdir()
        log_file = open(f"{tmp_path}/run/log.jsonl").read()
        (tmp_path / name / "log.jsonl").write_text("# mine\n" + log_file + line)  # torn, or a line of nulls
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a legend that would leave a name out
        plot.main(c, ["_odd", "$\\frac$"])
    with pytest.raises(FileNotFoundError, match="no log.jsonl"):
        plot.main(c, [f"{tmp_path}"])
    c.output = str(tmp_path)
    with pytest.raises(ValueError, match="a folder, expected the name of a file"):
        plot.main(c, [f"{tmp_path}/run"])


def test_a_run_whose_name_has_a_slash_is_the_newest(tiny_config, tmp_path):
    from tools.checkpoint.run_dir import newest_run
    here(tiny_config, tmp_path, "old", "--max_steps=1", "--valid_dataset_config={}")
    here(tiny_config, tmp_path, "group/new", "--max_steps=1", "--valid_dataset_config={}")
    assert newest_run([str(tmp_path)]) == f"{tmp_path}/group/new"


def test_compiled_blocks_train_alike_and_are_not_compiled_again(ten_steps, tiny_config, monkeypatch):
    """With dynamo's own backend, which is fast to compile: what is traced, and how often, is the same."""
    from torch._dynamo.utils import counters
    out, options = ten_steps
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compiled(block, backend="eager"))
    counters.clear()
    here(tiny_config, out, "compiled", *options, "--compile", "--max_steps=4")
    graphs = counters["stats"]["unique_graphs"]
    here(tiny_config, out, "eager", *options, "--max_steps=4")
    assert graphs > 0 and log(out, "compiled") == pytest.approx(log(out, "eager"), abs=1e-4)
    counters.clear()
    here(tiny_config, out, "longer", *options, "--compile", "--num_epochs=10", "--learning_rate=1e-4")
    assert counters["stats"]["unique_graphs"] <= graphs and len(log(out, "longer")) == 20


def test_accumulated_micro_steps_cast_once(tiny_config, tmp_path):
    """In bf16 (emulated where there are no units): two micro-steps of a step share their cast weights."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Casts(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            if f.overloadpacket.__name__ == "_to_copy" and (kwargs or {}).get("dtype") == torch.bfloat16:
                self.n += isinstance(args[0], torch.nn.Parameter)
            return f(*args, **(kwargs or {}))

    counted = []
    import train as script
    for accumulation in (1, 4):
        with pytest.MonkeyPatch.context() as patch, Casts() as casts:
            patch.setattr(script, "pick_precision", lambda *_: (torch.bfloat16, "to be counted"))
            here(tiny_config, tmp_path, f"a{accumulation}", "--batch_size=1", "--max_steps=1",
                 f"--gradient_accumulation_steps={accumulation}", "--valid_dataset_config={}")
        counted.append(casts.n)
    assert counted[0] == counted[1] > 0


def test_a_step_waits_for_nothing(tiny_config, tmp_path):
    """What makes a host wait for a device, counted: as many in a run of 8 steps as in one of 2."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Waits(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.counted = Counter()

        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            name = f.overloadpacket.__name__
            indices = [i for i in args[1] if i is not None] if name in ("index", "index_put_") else []
            if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal") or any(
                    i.dtype == torch.bool for i in indices):
                self.counted[name] += 1
            return f(*args, **(kwargs or {}))

    counted = []
    for steps in (2, 8):
        with Waits() as waits:
            here(tiny_config, tmp_path, f"run{steps}", "--batch_size=1", "--num_epochs=1",
                 "--logging_steps=100", "--valid_dataset_config={}", f"--max_steps={steps}",
                 "--dataset_blending_global_weight=1.0")
        counted.append(waits.counted)
    assert counted[0] == counted[1] and sum(counted[0].values()) > 0, counted


def test_batches_are_copied_ahead_by_a_stream_of_their_own(monkeypatch):
    """CUDA's streams replaced by ones that tell what they were asked, and when."""
    from tools.train import run as runs
    told, current = [], ["compute"]

    class Stream(SimpleNamespace):
        def record_event(self):
            return SimpleNamespace(after=told[-1])

        def wait_event(self, event):
            told.append((self.name, "waits for", *event.after[1:]))

    class Pinned(SimpleNamespace):
        def to(self, device, non_blocking):
            told.append((current[0], "copies", self.name))
            return self

        def record_stream(self, stream):
            told.append((stream.name, "holds", self.name))

    @contextmanager
    def stream(side):
        current[0] = side.name
        yield
        current[0] = "compute"

    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(name="side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(name=current[0]))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    for n in (0, 1, 3):
        told.clear()
        batches = [{"input_ids": Pinned(name=f"ids {i}"), "windows": Pinned(name=f"sound {i}"), "n": i}
                   for i in range(n)]
        for i, batch in enumerate(runs.prefetch_to_gpu(iter(batches), cuda)):
            ids, windows = runs.wait_for_copy(batch, cuda)
            told.append(("compute", "uses", i))
            assert batch is batches[i] and (ids.name, windows.name) == (f"ids {i}", f"sound {i}")
            assert "coming" not in batch and runs.wait_for_copy(batch, cuda)  # asked again: copied again
        copied = lambda i: [("side", "copies", f"ids {i}"), ("side", "copies", f"sound {i}")]
        used = lambda i: [("compute", "waits for", "copies", f"sound {i}"), ("compute", "holds", f"ids {i}"),
                          ("compute", "holds", f"sound {i}"), ("compute", "uses", i),
                          ("compute", "copies", f"ids {i}"), ("compute", "copies", f"sound {i}")]
        expected = [x for i in range(n) for x in (copied(0) if i == 0 else []) + (
            copied(i + 1) if i + 1 < n else []) + used(i)]
        assert told == expected
    lazy = runs.prefetch_to_gpu(iter(batches), torch.device("cpu"))
    assert next(lazy) is batches[0] and list(lazy) == batches[1:] and told == expected


def test_fine_tuning_starts_from_a_run(straight, tiny_config):
    out, _ = straight
    result = train(tiny_config, out, "sft",
                   f"--pretrained_path={out}/straight", "--pretrained_ckpt=checkpoint_1.pt",
                   "--clap_finetune=true", "--clap_learning_rate=1e-4", "--num_epochs=1")
    assert "audio encoder (CLAP)" in result.stdout
    tuned = AudioFlamingo.from_pretrained(f"{out}/sft")
    before = AudioFlamingo.from_pretrained(f"{out}/straight")
    old = before.state_dict()
    changed = {n.split(".")[0] for n, t in tuned.state_dict().items() if not torch.equal(t, old[n])}
    assert changed == {"clap", "audio_transformer", "xattn", "lm"}
    assert torch.equal(tuned.lm.layers[0].mlp.up_proj.weight, before.lm.layers[0].mlp.up_proj.weight)


def test_other_frozen_weights_are_noticed(straight, tiny_config, tiny_settings, tmp_path):
    from safetensors.torch import load_file, save_file
    out, _ = straight
    shutil.copytree(tiny_settings["lang_encoder_path"], tmp_path / "lm")
    state = load_file(tmp_path / "lm/model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"] += 0.1
    save_file(state, tmp_path / "lm/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="frozen weights"):
        AudioFlamingo.from_pretrained(f"{out}/straight", lang_encoder_path=str(tmp_path / "lm"))


def test_unreadable_clips_are_skipped_counted_and_bounded(tiny_config, tiny_data, tmp_path):
    items = [(f"{i}.wav", "Tone or noise?", ["noise", "tone"][i % 2]) for i in range(7)]
    write_manifest(tmp_path / "m", "toy-AQA/train", [*items, ("gone.wav", "Tone?", "noise")])
    options = [f"--dataset_file_root={tmp_path}/m", "--valid_dataset_config={}",
               "--dataset_blending_global_weight=1.0"]
    result = train(tiny_config, tmp_path, "some", *options, "--num_epochs=1", "--max_bad_fraction=0.5",
                   "--batch_size=1", launcher=TORCHRUN)  # whichever rank has it
    assert "gone.wav" in result.stderr and "bad 1" in result.stdout
    assert "gone.wav" in open(f"{tmp_path}/some/log.jsonl").read()
    fails_with_one_line("train.py", tiny_config, *options, f"--expdir={tmp_path}", "--run_name=none",
                        "--max_bad_fraction=0", saying=["max_bad_fraction", "gone.wav"])


def test_blending_record(tiny_config, tmp_path, monkeypatch, capsys):
    options = [f"--dataset_blending_output={tmp_path}/blend.jsonl", "--valid_dataset_config={}"]
    here(tiny_config, tmp_path, "blend", *options, "--max_steps=1")
    here(tiny_config, tmp_path, "other", *options, "--max_steps=1")  # two runs may share the file
    here(tiny_config, tmp_path, "blend", *options)
    rows = [json.loads(line) for line in open(f"{tmp_path}/blend.jsonl")]
    assert [(row["run"], row["epoch"], row["first"], row["stop"]) for row in rows] == [
        ("blend", 0, 0, 4), ("other", 0, 0, 4), ("blend", 1, 4, 8)]
    here(tiny_config, tmp_path, "none", "--dataset_blending_output=/dev/null", "--max_steps=1")
    assert os.path.exists("/dev/null")

    def taken(f, _):
        if f.name.endswith("blend.jsonl"):
            raise BlockingIOError

    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", no_locks)  # as on some file systems of clusters
    here(tiny_config, tmp_path, "unlocked", "--max_steps=1", "--valid_dataset_config={}")
    assert "log.jsonl cannot be locked" in capsys.readouterr().err
    monkeypatch.setattr("fcntl.lockf", taken)
    with pytest.raises(ValueError, match="dataset_blending_output = .*blend.jsonl: another run writes it"):
        here(tiny_config, tmp_path, "at-once", *options)
    assert not os.path.exists(tmp_path / "at-once")


@pytest.mark.parametrize("options, saying", [
    (["--bach_size=3"], "bach_size.*batch_size"),
    (["--batch_size=x"], "batch_size.*int"),
    (["--batch_size=0"], "batch_size = 0, expected.* 1 or more"),
    (["--gradient_accumulation_steps=-2"], "gradient_accumulation_steps = -2"),
    (["--num_epochs=0"], "num_epochs = 0"), (["--num_epochs=1000001"], "num_epochs = 1000001, .* a million"),
    (["--logging_steps=0"], "logging_steps = 0"),
    (["--max_steps=-1"], "max_steps = -1"), (["--max_tokens=0"], "max_tokens = 0"),
    (["--bucket_batches=0"], "bucket_batches = 0"), (["--seed=-1"], "seed = -1"),
    (["--cross_attn_every_n_layers=0"], "cross_attn_every_n_layers = 0"),
    (["--learning_rate=-1"], "learning_rate = -1"), (["--learning_rate=1e999"], "learning_rate = inf"),
    (["--learning_rate=0"], "learning_rate = 0: nothing would train"),
    (["--window_length=0"], "window_length = 0"), (["--run_name="], "run_name = ''"),
    (["--dataset_blending_global_weight=0"], "dataset_blending_global_weight = 0"),
    (["--dataset_blending_global_weight=1e300"], "= 1e.300: 8e.300 items an epoch; expected at most"),
    (["--dataset_blending_global_weight=0.001"], "dataset_blending_global_weight = 0.001: .* select no item"),
    (['--dataset_blending_config={"toy-AQA/train": 0}'], "dataset_blending_config: toy-AQA/train = 0"),
    (['--dataset_blending_config={"toy-AQA/train": -1.0}'], "toy-AQA/train = -1.0"),
    (['--dataset_blending_config={"no-AQA/train": 1.0}'], "no-AQA/train.json: no such manifest"),
    (['--dataset_blending_config={"none-AQA/train": 1.0}'], "none-AQA/train.json: total_num = 0"),
    (["--lang_encoder_path=nowhere"], "nowhere"),
    (["--clap_checkpoint=none.pt"], "none.pt: no such file"),
    (["--lr_scheduler=step"], "lr_scheduler.*cosine"),
    (["--device=cuda:9"], "cuda"), (["--device=meta"], "device = 'meta', expected"),
    (["--precision=fp8"], "precision"),
    (["--audio_transformer_n_head=7"], "audio_transformer_n_head"),
    (["--cross_attn_every_n_layers=9"], "cross_attn")])
def test_bad_input_is_one_line(tiny_config, tiny_data, tmp_path, options, saying):
    write_manifest(tiny_data, "none-AQA/train", [])
    with pytest.raises((ValueError, FileNotFoundError), match=saying):
        here(tiny_config, tmp_path, "x", *options)
    assert not os.path.exists(tmp_path / "x")


def test_bad_input_ends_a_process_with_code_2(tiny_config, tmp_path):
    fails_with_one_line("train.py", tiny_config, f"--expdir={tmp_path}", "--max_steps=-1",
                        saying="max_steps = -1")


def test_which_parts_each_stage_of_the_recipe_moves(tiny_config, tiny_data, tmp_path):
    """The real config files, one after the other, at tiny sizes: only the second trains the audio encoder."""
    c = config.load([tiny_config], "train.py")
    of_a_stage = ("_config", "learning_rate")
    sizes = {n: v for n, v in vars(c).items() if n in c.user_set and not n.endswith(of_a_stage)}
    before = None
    for stage, moved in (("pretrain", {"audio_transformer", "xattn", "lm.embed_tokens"}),
                         ("sft", {"audio_transformer", "xattn", "lm.embed_tokens", "clap"}),
                         ("long", {"audio_transformer", "xattn", "lm.embed_tokens"})):
        small = sizes | {
            "clap_checkpoint": None, "gradient_accumulation_steps": 1, "num_epochs": 1, "batch_size": 4,
            "expdir": str(tmp_path), "dataset_blending_config": {"toy-AQA/train": 1.0},
            "valid_dataset_config": {}, "dataset_blending_global_weight": 1.0, "warmup_steps": 1}
        if before:
            small |= {"pretrained_path": f"{tmp_path}/{before}", "pretrained_ckpt": "checkpoint_0.pt"}
        file = tmp_path / f"{stage}.py"
        lines = "".join(f"{name} = {value!r}\n" for name, value in small.items())
        file.write_text(open(f"config/{stage}.py").read() + lines)
        run("train.py", file)
        model = AudioFlamingo.from_pretrained(f"{tmp_path}/{stage}")
        start = AudioFlamingo.from_pretrained(f"{tmp_path}/{before}") if before else None
        if start is None:  # what was drawn at random is not known; the language model is
            start = checkpoint.new(SimpleNamespace(**(config.defaults() | sizes)))
            compare = [n for n in model.state_dict() if n.startswith("lm.") and not n.endswith(".added")]
            moved = {"lm.embed_tokens"}
        else:
            compare = list(model.state_dict())
        changed = {n for n in compare if not torch.equal(model.state_dict()[n], start.state_dict()[n])}
        assert {next((part for part in moved if n.startswith(part)), n) for n in changed} == moved, stage
        trained = {n for n, _ in model.named_parameters() if n.startswith(tuple(moved))}
        unused = ("fusion_model", "mel_conv2d")
        still = {n for n in trained & set(compare) - changed if not any(part in n for part in unused)}
        assert not {n for n in still if not n.endswith(("bias", "_gate"))}, still
        before = stage


def test_what_is_not_heard_is_said_once(tiny_config, tmp_path):
    """toy-AQA: clips of 1.5 to 4.3 s. One window of 2.5 s hears the first three whole."""
    options = ["--max_num_window=1", "--num_epochs=2",
               "--dataset_blending_global_weight=1.0", "--valid_dataset_config={}"]
    result = train(tiny_config, tmp_path, "short", *options)
    seconds = sum(max(0, 1.5 + 0.4 * i - 2.5) for i in range(8))
    note = ("note: 5 of 8 clips are longer than the 2.5 s that are heard (max_num_window = 1): "
            f"{seconds:.1f} s are left out")
    assert result.stdout.count("left out") == 1 and note in result.stdout
    assert "left out" not in train(tiny_config, tmp_path, "whole", "--num_epochs=1").stdout


def test_questions_about_two_clips_train_and_are_scored(tiny_config, tiny_data, tmp_path):
    """Manifests whose names are lists, beside others: in training, validation, check and eval."""
    two = [([f"{i}.wav", f"{i + 1}.wav"], "Which is the tone?", ["second", "first"][i % 2]) for i in range(4)]
    one = [(f"{i}.wav", "Tone or noise?", ["noise", "tone"][i % 2]) for i in range(4)]
    for split in ("train", "test"):
        write_manifest(tmp_path / "m", f"two-AQA/{split}", two + one)
    options = [f"--dataset_file_root={tmp_path}/m", '--valid_dataset_config={"two-AQA/test": 1.0}',
               '--dataset_blending_config={"two-AQA/train": 1.0}', "--dataset_blending_global_weight=1.0",
               "--num_epochs=1"]
    train(tiny_config, tmp_path, "two", *options)
    assert log(tmp_path, "two", "valid")[-1]["two-AQA/test"] > 0
    run("prepare/check.py", f"{tmp_path}/m/two-AQA/test.json", f"--data_root={tiny_data}")
    result = run("eval.py", "--split=two-AQA/test", f"--init_from={tmp_path}/two", f"--data_root={tiny_data}",
                 f"--dataset_file_root={tmp_path}/m", "--max_new_tokens=2")
    assert "two-AQA/test: accuracy" in result.stdout and "n 8" in result.stdout
