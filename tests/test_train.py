"""train.py as users run it: one process, two ranks, stopped, killed and resumed, bad data, a full disk."""
import fcntl
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import config
import train as script
from model import AudioFlamingo
from tests.helpers import ROOT, fails_with_one_line, run, train, train_command, write_manifest
from tools.checkpoint.files import load_pickle
from tools.common import UserError
from tools.train import plot

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
NO_VALIDATION = "--valid_dataset_config={}"
WHOLE_BLEND = "--dataset_blending_global_weight=1.0"  # an epoch takes all 8 clips
FP32 = "--precision=fp32"  # in bf16 a batch and its halves round differently


def start(*arguments, **options):
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True, **options)


def children(process):
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def entries(folder):
    with open(f"{folder}/log.jsonl") as f:
        return [json.loads(line) for line in f if line.endswith("\n")]


def steps(folder, key="loss"):
    """One value of every logged step."""
    return [entry[key] for entry in entries(folder) if "loss" in entry]


def wait_for_steps(folder, n):
    for _ in range(1800):
        if os.path.exists(f"{folder}/log.jsonl") and len(steps(folder)) >= n:
            return
        time.sleep(0.05)
    raise AssertionError(f"{folder}: no {n} steps within 90 s")


def saved(folder, epoch):
    return load_pickle(f"{folder}/checkpoint_{epoch}.pt")


def assert_equal(a, b):
    """Two checkpoints agree to the bit, in weights and optimizer state."""
    pairs = [(saved["model_state_dict"], saved["optimizer_state_dict"]["state"]) for saved in (a, b)]
    torch.testing.assert_close(*pairs, rtol=0, atol=0)


def assert_close(a, b):
    """Their weights agree within rounding."""
    torch.testing.assert_close(a["model_state_dict"], b["model_state_dict"], rtol=1e-4, atol=1e-6)


def clips(n):
    """Items of a manifest on the tiny clips."""
    return [(f"{i}.wav", "Tone or noise?", ["noise", "tone"][i % 2]) for i in range(n)]


@pytest.fixture(scope="module")
def straight(tiny_config, tmp_path_factory):
    """A run of 10 steps in 5 epochs -> its folder and its options."""
    folder = str(tmp_path_factory.mktemp("runs") / "straight")
    options = ["--num_epochs=5", "--lr_scheduler=cosine", NO_VALIDATION, FP32]
    train(tiny_config, folder, *options)
    return folder, options


@pytest.fixture
def other_lm(tiny_lm, tmp_path):
    """A copy of the language model with other weights."""
    folder = shutil.copytree(tiny_lm, tmp_path / "lm")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] += 0.1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def resumable(straight, tmp_path):
    """A copy of that run, as it was after 3 of its epochs; moved and renamed."""
    shutil.copytree(straight[0], tmp_path / "moved")
    for epoch in (3, 4):
        os.remove(tmp_path / f"moved/checkpoint_{epoch}.pt")
    return str(tmp_path / "moved")


# ------------------------------------------------------------------------------------------------------------
# What a run leaves


def test_a_run_leaves_checkpoints_and_a_log(tiny_config, tmp_path, capsys):
    folder = str(tmp_path / "run")
    train(tiny_config, folder)
    assert sorted(os.listdir(folder)) == ["checkpoint_0.pt", "checkpoint_1.pt", "log.jsonl"]
    assert steps(folder, "step") == [1, 2, 3, 4]
    losses = [entry["valid"] for entry in entries(folder) if "valid" in entry]
    assert [list(loss) for loss in losses] == [["toy-AQA/val"]] * 2
    assert "step 4/4 | loss" in capsys.readouterr().out


def test_epochs_take_every_item_and_old_checkpoints_go(tiny_config, tmp_path):
    """2.4 items an epoch are 2 or 3; the last checkpoint has the promised name."""
    folder = str(tmp_path / "run")
    train(tiny_config, folder, "--num_epochs=8", "--dataset_blending_global_weight=0.3", NO_VALIDATION,
          "--save_epochs=3", "--keep_last=2")
    assert steps(folder, "samples")[-1] == int(8 * 0.3 * 8) == 19
    assert sorted(os.listdir(folder)) == ["checkpoint_5.pt", "checkpoint_7.pt", "log.jsonl"]
    assert set(steps(folder, "epoch")) == set(range(8))


@pytest.mark.slow
def test_each_stage_of_the_recipe_trains_its_parts(tiny_config, tmp_path):
    """The real config files at tiny sizes: what trains moves and is saved, everything else is as it was."""
    connectors = {"audio_transformer", "xattn"}
    stages = {
        "pretrain": connectors | {"lm.embed_tokens"},
        "sft": connectors | {"lm.embed_tokens", "clap"},
        "long": connectors | {"lm.embed_tokens"},
        "sft_24gb": connectors | {"lm.embed_tokens.added", "clap"},
        "reason": connectors | {"lm.embed_tokens", "lm.layers", "lm.norm"}}
    train(tiny_config, tmp_path / "first", WHOLE_BLEND, "--num_epochs=1", NO_VALIDATION)
    before = AudioFlamingo.from_pretrained(str(tmp_path / "first")).state_dict()
    options = [
        tiny_config, WHOLE_BLEND, NO_VALIDATION, "--num_epochs=1", "--batch_size=4",
        "--gradient_accumulation_steps=1", "--warmup_steps=1", "--learning_rate=1e-2",
        "--gate_learning_rate=1e-2", "--clap_checkpoint=None", "--pretrained_ckpt=None",
        f"--pretrained_path={tmp_path}/first"]
    for stage, parts in stages.items():
        train(f"{ROOT}/config/{stage}.py", tmp_path / stage, *options)
        after = AudioFlamingo.from_pretrained(str(tmp_path / stage)).state_dict()
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        assert all(name.startswith(tuple(parts)) for name in moved), stage
        assert all(any(name.startswith(part) for name in moved) for part in parts), stage
        stored = set(saved(tmp_path / stage, 0)["model_state_dict"])
        assert moved <= stored and all(name.startswith(tuple(parts)) for name in stored), stage


def test_manifests_of_several_clips_train_and_validate(tiny_config, tmp_path):
    two = [([f"{i}.wav", f"{i + 1}.wav"], "Which is the tone?", "the second") for i in range(4)]
    write_manifest(tmp_path / "m", "two-AQA/train", two + clips(4))
    train(tiny_config, str(tmp_path / "two"), f"--dataset_file_root={tmp_path}/m", WHOLE_BLEND,
          "--num_epochs=1", '--valid_dataset_config={"two-AQA/train": 1.0}',
          '--dataset_blending_config={"two-AQA/train": 1.0}')
    assert entries(tmp_path / "two")[-1]["valid"]["two-AQA/train"] > 0


def test_the_blending_record_has_every_epoch_once(tiny_config, tmp_path):
    folder, record = str(tmp_path / "run"), tmp_path / "new/blend.jsonl"
    for options in (["--max_steps=1"], []):
        train(tiny_config, folder, f"--dataset_blending_output={record}", NO_VALIDATION, *options)
    with open(record) as f:
        rows = [json.loads(line) for line in f]
    taken = [(row["epoch"], row["first"], row["stop"]) for row in rows]
    assert taken == [(0, 0, 4), (1, 4, 8)]


@pytest.mark.slow
def test_plot(straight, tmp_path):
    pytest.importorskip("matplotlib")
    c = config.load([straight[0], f"--output={tmp_path}/plot.png"], "tools/train/plot.py", files=True)
    plot.main(c)
    assert open(tmp_path / "plot.png", "rb").read(8) == b"\x89PNG\r\n\x1a\n"
    torn = tmp_path / "torn"
    torn.mkdir()
    odd = entries(straight[0])[-1] | {"loss": None, "gnorm": None}  # of a step that was not finite
    (torn / "log.jsonl").write_text(json.dumps(odd) + '\n{"st')
    plot.main(config.load([str(torn)], "tools/train/plot.py", files=True))


# ------------------------------------------------------------------------------------------------------------
# Stopped and resumed


def test_max_steps_stops_and_a_resumed_run_is_the_straight_one(straight, tiny_config, tmp_path, capsys):
    folder, options = str(tmp_path / "run"), [*straight[1], "--lr_scheduler=constant"]
    train(tiny_config, str(tmp_path / "constant"), *options)
    for most in (3, 3, 4):
        train(tiny_config, folder, *options, f"--max_steps={most}")
        assert f"max_steps = {most}" in capsys.readouterr().out
    assert steps(folder, "step") == [1, 2, 3, 4]
    train(tiny_config, folder, *options)
    assert steps(folder) == steps(tmp_path / "constant")
    assert_equal(saved(folder, 4), saved(tmp_path / "constant", 4))


@pytest.mark.slow
def test_signals_save_and_stop_and_a_resumed_run_is_bit_equal(straight, tiny_config, tmp_path):
    """Clusters send SIGTERM to all processes of a job, terminals Ctrl-C; systems kill workers."""
    whole, options = straight
    folder = str(tmp_path / "run")
    for number, code in ((signal.SIGKILL, 2), (signal.SIGTERM, 0), (signal.SIGINT, 130)):
        done = len(steps(folder)) if os.path.exists(f"{folder}/log.jsonl") else 0
        process = start(*train_command(tiny_config, folder, *options, "--num_workers=1"))
        wait_for_steps(folder, done + 1)
        if number == signal.SIGKILL:
            os.kill(children(process)[0], number)
        else:
            os.killpg(process.pid, number)
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == code and "Traceback" not in stderr, stderr
        assert code == 2 or number.name in stdout or len(steps(folder)) == 10
    train(tiny_config, folder, *options)
    assert steps(folder, "step") == list(range(1, 11))
    assert steps(folder) == steps(whole) and steps(folder, "lr") == steps(whole, "lr")
    assert_equal(saved(folder, 4), saved(whole, 4))


@pytest.mark.slow
def test_two_ranks_killed_restart_and_equal_one_rank(tiny_config, tmp_path):
    """torchrun restarts both ranks when one is killed, to the same weights; a rank's missing clip is logged;
    one rank with twice the batch, or with half of it twice, is the same run."""
    write_manifest(tmp_path / "m", "toy-AQA/train", [*clips(7), ("gone.wav", "Tone?", "noise")])
    options = ["--batch_size=1", "--num_epochs=5", NO_VALIDATION, FP32, f"--dataset_file_root={tmp_path}/m"]
    two = [*options, "--shard_optimizer", "--save_minutes=1e-6", "--max_bad_fraction=0.5"]
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    run(*TORCHRUN, *train_command(tiny_config, whole, *two))
    assert any("gone.wav" in entry.get("skipped", "") for entry in entries(whole))
    restarting = (*TORCHRUN, "--max-restarts=1", "--monitor-interval=0.2")
    process = start(*restarting, *train_command(tiny_config, killed, *two))
    try:
        wait_for_steps(killed, 3)
        os.kill(children(process)[-1], signal.SIGKILL)
        _, stderr = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            process.terminate()
    assert process.returncode == 0, stderr[-3000:]
    assert steps(killed) == steps(whole) and steps(whole, "step") == list(range(1, 11))
    assert_equal(saved(killed, 4), saved(whole, 4))
    for name, how in (("batch", ["--batch_size=2"]), ("accumulated", ["--gradient_accumulation_steps=2"])):
        train(tiny_config, str(tmp_path / name), *options, "--max_bad_fraction=0.5", *how)
        assert steps(tmp_path / name) == pytest.approx(steps(whole), abs=1e-5)
        assert_close(saved(tmp_path / name, 4), saved(whole, 4))


@pytest.mark.slow
@pytest.mark.parametrize("setting, name", [
    ("seed", "seed"), ("dataset_file_root", "blend"), ("lang_encoder_path", "frozen_hash")])
def test_ranks_started_with_other_settings_data_or_weights_are_refused(
        tiny_config, other_lm, tmp_path, setting, name):
    """As on two nodes, each started by hand."""
    write_manifest(tmp_path, "toy-AQA/train", clips(8)[::-1])
    others = {"seed": 1, "dataset_file_root": tmp_path, "lang_encoder_path": other_lm}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    ranks = []
    for rank, options in enumerate([[], [f"--{setting}={others[setting]}"]]):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        arguments = train_command(tiny_config, tmp_path / "run", NO_VALIDATION, *options)
        ranks.append(start(*arguments, env=environment))
    for process in ranks:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 2 and f"error: {name} = " in stderr, stderr
        assert "Traceback" not in stderr, stderr


def test_resumed_with_the_same_items_a_step(straight, tiny_config, resumable):
    """Batches of 2, then of 1, two a step: the same run within rounding."""
    train(tiny_config, resumable, *straight[1], "--batch_size=1", "--gradient_accumulation_steps=2")
    assert steps(resumable) == pytest.approx(steps(straight[0]), abs=1e-5)
    assert_close(saved(resumable, 4), saved(straight[0], 4))


@pytest.mark.parametrize("first, then", [(1, 8), pytest.param(3, 1, marks=pytest.mark.slow)])
def test_resumed_with_another_batch_items_are_trained_once(tiny_config, tmp_path, first, then, monkeypatch):
    folder, options = str(tmp_path / "run"), [WHOLE_BLEND, "--num_epochs=4", NO_VALIDATION]
    paths, train_step = [], script.train_step

    def recorded(model, optimizer, micro_batches, *more):
        for batch in micro_batches:
            paths.extend(batch["paths"])
        return train_step(model, optimizer, micro_batches, *more)

    monkeypatch.setattr(script, "train_step", recorded)
    stop = -(-8 // first) + 1  # within the second epoch
    train(tiny_config, folder, *options, f"--batch_size={first}", f"--max_steps={stop}")
    train(tiny_config, folder, *options, "--batch_size=2", f"--max_steps={stop + 1}")
    train(tiny_config, folder, *options, f"--batch_size={then}")
    assert set(Counter(paths).values()) == {4}
    assert len(set(paths[8:16])) == len(set(paths)) == 8
    assert steps(folder, "samples")[-1] == 32 and os.path.exists(f"{folder}/checkpoint_3.pt")


def test_changed_rates_take_effect_and_are_reported(straight, tiny_config, resumable, capsys):
    train(tiny_config, resumable, *straight[1], "--lr_scheduler=constant", "--weight_decay=0.3",
          "--gate_learning_rate=0.02")
    output = capsys.readouterr().out
    assert all(name in output for name in ("lr_scheduler", "weight_decay", "gate_learning_rate"))
    groups = saved(resumable, 4)["optimizer_state_dict"]["param_groups"]
    used = {(group["lr"], group["weight_decay"]) for group in groups}
    assert used == {(1e-3, 0.3), (1e-3, 0.0), (0.02, 0.0)}


def test_what_is_not_the_same_run_is_refused(straight, tiny_config, resumable, other_lm):
    for option, name in (("--freeze_lm_embeddings=true", "freeze_lm_embeddings"),
                         ('--dataset_blending_config={"toy-AQA/train": 2.0}', "blend"),
                         (f"--lang_encoder_path={other_lm}", "lang_encoder_path")):
        with pytest.raises(UserError, match=name) as error:
            train(tiny_config, resumable, *straight[1], option)
        assert "checkpoint_2.pt" in str(error.value)
    torch.save({"epoch": 3, "model_state_dict": {}}, f"{resumable}/checkpoint_3.pt")  # of an older version
    with pytest.raises(UserError, match="checkpoint_3.pt"):
        train(tiny_config, resumable, *straight[1])


def test_a_damaged_checkpoint_is_not_used(straight, tiny_config, tmp_path):
    whole, options = straight
    folder = shutil.copytree(whole, tmp_path / "damaged")
    last, before = folder / "checkpoint_4.pt", folder / "checkpoint_3.pt"
    os.truncate(last, last.stat().st_size // 2)
    content = bytearray(before.read_bytes())
    content[len(content) // 2] ^= 1  # one bit of a weight
    before.write_bytes(content)
    with open(f"{folder}/log.jsonl", "a") as f:
        f.write('{"step": 11, "lo')  # torn
    train(tiny_config, folder, *options)
    assert steps(folder) == steps(whole)
    assert_equal(saved(folder, 4), saved(whole, 4))


def test_a_validation_that_a_kill_prevented_is_done_on_resume(tiny_config, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "run/log.jsonl"
    train(tiny_config, folder)
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:-1]))
    for _ in range(2):  # and no second time
        train(tiny_config, folder)
        assert log.read_text() == "".join(lines)


# ------------------------------------------------------------------------------------------------------------
# What goes wrong


def test_steps_that_are_not_finite_change_nothing(tiny_config, tmp_path, monkeypatch):
    folder, train_step, unchanged = tmp_path / "run", script.train_step, []

    def with_a_broken_clip(model, optimizer, micro_batches, *more):
        before = [p.detach().clone() for p in model.parameters()]
        (batch,) = micro_batches
        is_broken = batch["paths"][0].endswith("3.wav")
        if is_broken:
            batch["windows"] = batch["windows"] * math.nan
        result = train_step(model, optimizer, micro_batches, *more)
        if is_broken:
            unchanged.append(all(map(torch.equal, before, model.parameters())))
        return result

    monkeypatch.setattr(script, "train_step", with_a_broken_clip)
    train(tiny_config, folder, NO_VALIDATION, WHOLE_BLEND, "--batch_size=1", "--logging_steps=4")
    assert unchanged == [True, True]
    named = [path for entry in entries(folder) if "no_update" in entry for path in entry["items"]]
    assert [os.path.basename(path) for path in named] == ["3.wav"] * 2
    assert steps(folder, "skipped_steps")[-1] == 2 and None not in steps(folder)
    weights = saved(folder, 1)["model_state_dict"]
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize("options, name", [
    (["--learning_rate=1e18", "--max_bad_steps=3", "--num_epochs=5"], "learning_rate"),
    (["--max_tokens=9", "--max_steps=1"], "max_tokens"),
    (["--max_tokens=9", "--max_bad_steps=1"], "max_tokens")])
def test_a_run_that_learns_nothing_ends_without_a_checkpoint(tiny_config, tmp_path, options, name):
    with pytest.raises(UserError, match=name):
        train(tiny_config, str(tmp_path / "run"), NO_VALIDATION, "--save_epochs=9", *options)
    assert os.listdir(tmp_path / "run") == ["log.jsonl"]


def test_validation_without_labels_is_named(tiny_config, tmp_path):
    write_manifest(tmp_path / "m", "toy-AQA/train", [(f"{i}.wav", "Tone?", "tone") for i in range(8)])
    write_manifest(tmp_path / "m", "long-AQA/val", [("1.wav", "Is it a tone or not? " * 9, "tone")])
    write_manifest(tmp_path / "m", "gone-AQA/val", [("gone.wav", "Tone?", "tone")])
    for split, cause in (("long-AQA/val", "max_tokens"), ("gone-AQA/val", "gone.wav")):
        folder = tmp_path / split[:4]
        with pytest.raises(UserError, match=f"{split}.*{cause}"):
            train(tiny_config, str(folder), f"--dataset_file_root={tmp_path}/m", "--max_tokens=40",
                  f'--valid_dataset_config={{"{split}": 1.0}}')
        assert (folder / "checkpoint_0.pt").exists()


def test_unreadable_and_truncated_clips_are_reported(tiny_config, tiny_data, tmp_path, capsys):
    """Clips of 1.5 to 3.9 s in windows of 2.5 s, and one that is missing."""
    write_manifest(tmp_path / "m", "toy-AQA/train", [*clips(7), ("gone.wav", "Tone?", "noise")])
    options = [f"--dataset_file_root={tmp_path}/m", NO_VALIDATION, WHOLE_BLEND, "--max_num_window=1"]
    train(tiny_config, str(tmp_path / "some"), *options, "--num_epochs=2", "--logging_steps=4",
          "--max_bad_fraction=0.5")
    errors = capsys.readouterr().err
    assert errors.count("max_num_window") == 1 and errors.count("gone.wav") == 2
    last = entries(tmp_path / "some")[-1]
    seconds = 2 * sum(max(0, 1.5 + 0.4 * i - 2.5) for i in range(7))
    assert (last["unreadable_clips"], last["clips"], last["truncated_clips"]) == (2, 14, 8)
    assert last["truncated_seconds"] == pytest.approx(seconds, abs=0.01)
    with pytest.raises(UserError, match="max_bad_fraction.*gone.wav"):
        train(tiny_config, str(tmp_path / "none"), *options, "--max_bad_fraction=0")


@pytest.mark.slow
def test_two_runs_in_one_folder_are_refused(tiny_config, resumable):
    with open(f"{resumable}/log.jsonl", "ab+") as f:  # as a run does
        fcntl.lockf(f, fcntl.LOCK_EX)
        fails_with_one_line(*train_command(tiny_config, resumable), saying=f"{resumable}")


@pytest.mark.slow
def test_a_full_disk_is_named_and_checkpoints_stay_whole(straight, tiny_config, resumable):
    """Files may not grow beyond 100 kB: the log fits, a checkpoint doesn't, as on a full disk."""
    before = open(f"{resumable}/checkpoint_2.pt", "rb").read()
    code = ("import resource, signal, sys, config, train\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))\n"
            "sys.argv = sys.argv[1:]\n"
            "config.run(train.main, 'train.py')")
    arguments = train_command(tiny_config, resumable, *straight[1])
    fails_with_one_line("-c", code, *arguments, saying="checkpoint_3.pt")
    assert sorted(os.listdir(resumable)) == [f"checkpoint_{epoch}.pt" for epoch in range(3)] + ["log.jsonl"]
    assert open(f"{resumable}/checkpoint_2.pt", "rb").read() == before


def test_an_unwritable_place_is_found_first(tiny_config, tmp_path):
    (tmp_path / "file").write_text("")
    for setting in ("expdir", "dataset_blending_output"):
        with pytest.raises(OSError, match=f"{tmp_path}/file"):
            train(tiny_config, str(tmp_path / "x"), f"--{setting}={tmp_path}/file/x/y",
                  "--lang_encoder_path=no")


@pytest.mark.parametrize("options, name", [
    (["--lr_scheduler=step"], "lr_scheduler"),
    (["--dataset_blending_config={}"], "dataset_blending_config"),
    (["--dataset_blending_global_weight=0.001"], "dataset_blending_global_weight"),
    (['--dataset_blending_config={"no-AQA/train": 1.0}'], "no-AQA/train.json"),
    (['--dataset_blending_config={"none-AQA/train": 1.0}'], "none-AQA/train"),
    (["--lang_encoder_path=nowhere"], "nowhere"),
    (["--clap_checkpoint=none.pt"], "none.pt"),
    (["--device=cuda:9"], "cuda:9"),
    (["--precision=fp8"], "fp8")])
def test_a_bad_setting_is_named(tiny_config, tiny_data, tmp_path, options, name):
    write_manifest(tiny_data, "none-AQA/train", [])
    with pytest.raises((UserError, FileNotFoundError), match=name):
        train(tiny_config, str(tmp_path / "x"), *options)


# ------------------------------------------------------------------------------------------------------------
# What a step costs


class CountSynchronisations(TorchDispatchMode):
    """Operations that make the host wait for a GPU, counted on any device."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            self.counts[name] += 1
        if name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def test_steps_between_log_lines_do_not_synchronise(tiny_config, tmp_path):
    counts = []
    for n in (2, 8):
        with CountSynchronisations() as synchronisations:
            train(tiny_config, str(tmp_path / f"run{n}"), "--batch_size=1", "--num_epochs=1", WHOLE_BLEND,
                  "--logging_steps=100", NO_VALIDATION, f"--max_steps={n}", "--save_epochs=9")
        counts.append(synchronisations.counts)
    assert counts[0] == counts[1] and sum(counts[0].values()) > 0


@pytest.mark.slow
def test_compiled_blocks_train_alike(straight, tiny_config, tmp_path, monkeypatch):
    """With dynamo's own backend, which is fast to compile."""
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compiled(block, backend="eager"))
    train(tiny_config, str(tmp_path / "compiled"), *straight[1], "--compile")
    assert steps(tmp_path / "compiled") == pytest.approx(steps(straight[0]), abs=1e-4)
