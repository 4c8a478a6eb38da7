"""train.py as a user runs it: one process, two (gloo), resumed, from a checkpoint, with bad files."""
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import config
from checkpoint import load_pickle
from model import AudioFlamingo
from tests.helpers import fails_with_one_line, run, write_manifest

EXACT = ("--precision=fp32",)  # on a CPU's bf16 units amp_bf16 rounds a batch and its halves differently
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def train(config, out, name, *options, launcher=()):
    return run(*launcher, "train.py", config, f"--expdir={out}", f"--run_name={name}", *options)


def log(out, name, key="loss"):
    return [entry[key] for line in open(f"{out}/{name}/log.jsonl") if key in (entry := json.loads(line))]


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


def test_accumulation_equals_a_larger_batch(straight, tiny_config):
    out, _ = straight
    train(tiny_config, out, "accumulated", "--batch_size=2", "--gradient_accumulation_steps=2", *EXACT)
    assert log(out, "accumulated") == pytest.approx(log(out, "straight"), abs=1e-5)
    assert close(weights(out, "accumulated"), weights(out, "straight"), 1e-4)


@pytest.mark.parametrize("launcher", [(), TORCHRUN])
def test_resume_equals_a_straight_run(tiny_config, tmp_path, launcher):
    options = ["--batch_size=1", "--save_steps=1", "--clap_finetune=False"]
    train(tiny_config, tmp_path, "whole", *options, launcher=launcher)
    steps = len(log(tmp_path, "whole"))
    # stop in the middle of an epoch as a kill would: the interim checkpoint of step 1 is what is left
    script = ("import train, sys, os, config\n"
              "save = train.save_atomically\n"
              "def stop(content, path):\n"
              "    save(content, path)\n"
              "    if content['step'] == 1: os._exit(9)\n"
              "train.save_atomically = stop\n"
              "train.main(config.load(sys.argv[1:], 'train.py'))\n")
    stopper = tmp_path / "stop.py"
    stopper.write_text("import sys; sys.path.insert(0, '.')\n" + script)
    command = (*launcher, stopper, tiny_config, f"--expdir={tmp_path}", "--run_name=part", *options)
    assert run(*command, ok=False).returncode != 0
    assert os.listdir(tmp_path / "part").count("checkpoint_interim.pt") == 1
    result = train(tiny_config, tmp_path, "part", *options, launcher=launcher)
    assert "resumed" in result.stdout
    assert log(tmp_path, "part", "step")[-1] == log(tmp_path, "whole", "step")[-1] == steps
    assert close(weights(tmp_path, "part"), weights(tmp_path, "whole"), 1e-6)
    assert not os.path.exists(tmp_path / "part/checkpoint_interim.pt")


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
    result = train(tiny_config, tmp_path, "some", *options, "--num_epochs=1", "--max_bad_fraction=0.5")
    assert "gone.wav" in result.stderr and "bad 1" in result.stdout
    assert "gone.wav" in open(f"{tmp_path}/some/log.jsonl").read()
    fails_with_one_line("train.py", tiny_config, *options, f"--expdir={tmp_path}", "--run_name=none",
                        "--max_bad_fraction=0.0", saying=["max_bad_fraction", "gone.wav"])


def test_blending_record(tiny_config, tmp_path):
    train(tiny_config, tmp_path, "blend",
          f"--dataset_blending_output={tmp_path}/blend.jsonl", "--valid_dataset_config={}")
    rows = [json.loads(line) for line in open(f"{tmp_path}/blend.jsonl")]
    assert [(row["epoch"], row["first"], row["stop"]) for row in rows] == [(0, 0, 4), (1, 4, 8)]


@pytest.mark.parametrize("options, saying", [
    (["--bach_size=3"], ["bach_size", "batch_size"]),
    (["--batch_size=x"], ["batch_size", "int"]),
    (['--dataset_blending_config={"no-AQA/train": 1.0}'], "no-AQA/train.json: no such manifest"),
    (["--lang_encoder_path=nowhere"], "nowhere"),
    (["--clap_checkpoint=none.pt"], "none.pt: no such file"),
    (["--lr_scheduler=step"], ["lr_scheduler", "cosine"]),
    (["--device=cuda:9"], "cuda"),
    (["--precision=fp8"], "precision"),
    (["--audio_transformer_n_head=7"], "audio_transformer_n_head"),
    (["--cross_attn_every_n_layers=9"], "cross_attn")])
def test_bad_input_is_one_line(tiny_config, tmp_path, options, saying):
    fails_with_one_line("train.py", tiny_config, f"--expdir={tmp_path}", *options, saying=saying)


def test_which_parts_each_stage_of_the_recipe_moves(tiny_config, tiny_data, tmp_path):
    """The real config files, one after the other, at tiny sizes: only the second trains the audio encoder."""
    c = config.load([tiny_config], "train.py")
    of_a_stage = ("_config", "learning_rate")
    sizes = {n: v for n, v in vars(c).items() if n in c.given and not n.endswith(of_a_stage)}
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
    run("data.py", "check", f"{tmp_path}/m/two-AQA/test.json", f"--data_root={tiny_data}")
    result = run("eval.py", "--split=two-AQA/test", f"--init_from={tmp_path}/two", f"--data_root={tiny_data}",
                 f"--dataset_file_root={tmp_path}/m", "--max_new_tokens=2")
    assert "two-AQA/test: accuracy" in result.stdout and "n 8" in result.stdout
