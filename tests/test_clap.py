"""prepare/clap.py: an encoder is trained; what would spoil it is found before anything is written."""
import os
import subprocess

import numpy as np
import pytest
import torch

import config
from prepare import clap, demo
from tests.helpers import write_manifest
from tools.checkpoint.files import load_pickle
from tools.common import UserError

CLIPS = [(f"{i}.wav", "", ["a noise", "a tone"][i % 2]) for i in range(8)]
GONE = ("gone.wav", "", "a tone")


@pytest.fixture
def train_clap(tiny_settings, tiny_data, tmp_path):
    """Trains on items -> the weights in the checkpoint."""
    def train(items, *options):
        write_manifest(tmp_path, "toy-AudioCaptioning/train", items)
        names = tiny_settings | {
            "dataset_file_root": str(tmp_path), "data_root": tiny_data, "precision": "fp32", "clap_steps": 3,
            "clap_batch_size": 4, "clap_config": {"toy-AudioCaptioning/train": 1},
            "clap_out": f"{tmp_path}/clap/epoch_16.pt"}
        (tmp_path / "clap.py").write_text("".join(f"{name} = {value!r}\n" for name, value in names.items()))
        clap.main(config.load([f"{tmp_path}/clap.py", *options], "prepare/clap.py"))
        return load_pickle(names["clap_out"])["state_dict"]

    return train


@pytest.mark.parametrize("items, options, named", [
    ([("0.wav", "", "a tone"), ("1.wav", "", "  ")], (), "train.json.*'1'"),
    ([("0.wav", "", "a tone"), ("1.wav", "", "A tone ")], (), "clap_config"),
    ([], (), "clap_config"),
    (CLIPS, ("--clap_config={}",), "clap_config"),
    (CLIPS, ('--clap_config={"toi-AudioCaptioning/train": 1}',), "toi-AudioCaptioning/train.json"),
    (CLIPS, ("--clap_steps=0",), "clap_steps"),
    (CLIPS, ("--clap_temperature=1e-30",), "clap_temperature"),
    (CLIPS, ("--clap_depths=[1,1,1]",), "clap_depths"),
    (CLIPS, ("--clap_num_heads=[1,1,1,0]",), "clap_num_heads"),
    (CLIPS, ("--clap_batch_size=1", "--clap_text_bank=0"), "clap_text_bank"),
    (CLIPS, ("--clap_out=README.md/x/epoch_16.pt",), "README.md/x"),
    (CLIPS, ("--clap_out=tests",), "tests"),
    ([("gone1.wav", "", "tone"), ("gone2.wav", "", "noise")], ("--max_bad_fraction=1",), "gone"),
    ([*CLIPS, GONE, ("lost.wav", "", "a noise")], ("--clap_steps=9",), "max_bad_fraction"),
    (CLIPS, ("--clap_muon_lr=1e18", "--clap_peak_lr=1e18"), "clap_peak_lr")])
def test_refused_before_anything_is_written(train_clap, tmp_path, items, options, named):
    with pytest.raises((UserError, FileNotFoundError), match=named):
        train_clap(items, *options)
    assert not os.path.exists(tmp_path / "clap/epoch_16.pt")


def test_an_encoder_is_trained_and_a_bad_clip_costs_nothing_else(train_clap, capsys):
    state = train_clap([*CLIPS, GONE], "--clap_steps=6")
    assert capsys.readouterr().err.count("gone.wav") == 1
    assert all(t.isfinite().all() for t in state.values() if t.is_floating_point())
    assert "module.audio_branch.patch_embed.proj.weight" in state and "module.logit_scale_a" in state
    again = train_clap([*CLIPS, GONE], "--clap_steps=6", "--cache_audio")
    assert all(torch.equal(state[name], again[name]) for name in state)


@pytest.mark.parametrize("options", [
    ("--clap_steps=10", "--clap_text_bank=0"),
    ("--clap_steps=1", "--clap_batch_size=1", "--clap_text_layers=0"),
    ("--clap_steps=2", f"--seed={10 ** 18}", "--clap_temperature=0.001")])
def test_limits_that_are_accepted_compute(train_clap, options):
    assert all(t.isfinite().all() for t in train_clap(CLIPS, *options).values() if t.is_floating_point())


def test_the_demo_hands_its_settings_on(monkeypatch, tmp_path):
    commands = []

    def start(title, *command):
        commands.append(command)
        return subprocess.Popen(["true"])

    monkeypatch.setattr(demo, "start_step", start)
    c = config.load(["config/demo.py", "--seed=43", f"--clap_checkpoint={tmp_path}/clap.pt",
                     f"--dataset_file_root={tmp_path}"], "prepare/demo.py")
    with pytest.raises(FileNotFoundError, match="GM-Family-AQA"):  # nothing was rendered
        demo.main(c)
    trained = [command for command in commands if command[0] in ("prepare/clap.py", "train.py")]
    assert len(trained) == 2 and f"--clap_out={tmp_path}/clap.pt" in trained[0]
    for script, *options in trained:
        c = config.load(options, script)
        assert (c.seed, c.clap_checkpoint, c.run_name) == (43, f"{tmp_path}/clap.pt", "demo")


def test_contrast_by_hand():
    """Two clips, four captions; caption 3 is a negative of clip 0 alone."""
    similarity = torch.tensor([[2.0, 0.5, -1.0, 1.5], [0.0, 1.0, 3.0, 9.0]])
    positive = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    contrasted = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=torch.bool)
    loss = lambda right, negatives: -np.log(np.exp(right) / (np.exp(right) + sum(np.exp(negatives))))
    by_clip = [loss(2.0, [0.5, -1.0, 1.5]), loss(0.0, [3.0]), loss(1.0, [3.0])]
    by_text = [0.0, 0.0, loss(1.0, [0.5])]  # caption 0 is true of both clips: it has no negative
    expected = (np.mean(by_clip) + np.mean(by_text)) / 2
    assert clap.contrast(similarity, positive, contrasted).item() == pytest.approx(expected, abs=1e-6)
    alone = torch.randn(2, 1, requires_grad=True)
    everything = torch.ones(2, 1, dtype=torch.bool)
    loss = clap.contrast(alone, everything, everything)
    loss.backward()
    assert loss == 0 and (alone.grad == 0).all()


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_muon_steps_in_every_direction_alike(shape):
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.zeros(shape))
    w.grad = torch.randn(shape) @ torch.diag(torch.logspace(0, -1, shape[1]))  # directions of different size
    clap.Muon([w], lr=0.1).step()
    step = torch.linalg.svdvals(w.detach()) / (0.1 * 0.2 * max(shape) ** 0.5)
    assert 0.5 < step.min() and step.max() < 1.4
    assert (w.detach() * w.grad).sum() < 0  # downhill
