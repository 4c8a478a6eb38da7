"""Checkpoints that are not what they should be, as users meet them: one error that names the file and what is
wrong in it; nothing in a file is run."""
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from tests.helpers import settings
from tools.common import UserError

SHARD, LISTING = "safe_ckpt/weight_0.safetensors", "safe_ckpt/metadata.json"
NORM = "lang_encoder.model.norm.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22\nsize 132\n"


@pytest.fixture(scope="module")
def release(tiny_settings, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("release") / "tiny")
    c = settings(tiny_settings)
    checkpoint.new_model(c).save_pretrained(folder)
    return folder


def cut(name):
    return lambda folder: os.truncate(folder / name, os.path.getsize(folder / name) * 2 // 3)


def rewrite(name, text):
    return lambda folder: (folder / name).write_text(text)


def edit_config(**changes):
    def change(folder):
        content = json.load(open(folder / "config.json"))
        json.dump(content | changes, open(folder / "config.json", "w"))
    return change


def edit_shard(edit, list_again=True):
    """Change the tensors of the one shard, and metadata.json with them."""
    def change(folder):
        state = load_file(folder / SHARD)
        edit(state)
        save_file(state, folder / SHARD)
        if list_again:
            json.dump({"weight_0": list(state)}, open(folder / LISTING, "w"))
    return change


FILES = {  # what happened to a release: (how, words of the error)
    "cut": (cut(SHARD), "weight_0.safetensors"),
    "Git LFS pointer": (rewrite(SHARD, POINTER), "weight_0.safetensors"),
    "absent": (lambda folder: os.remove(folder / SHARD), "weight_0.safetensors"),
    "listing cut": (cut(LISTING), "metadata.json"),
    "CLAP cut": (cut("clap_ckpt/epoch_16.pt"), "epoch_16.pt"),
    "tokenizer cut": (cut("lm/tokenizer.json"), "r/lm"),
    "config no JSON": (rewrite("config.json", "max_num_window = 3"), "config.json"),
    "wrong type": (edit_config(max_num_window="3"), "config.json.*max_num_window"),
    "below the minimum": (edit_config(audio_transformer_n_head=0), "config.json.*audio_transformer_n_head"),
    "stages": (edit_config(clap_num_heads=[3, 2, 2, 4]), "clap_num_heads"),
    "longer than CLAP": (edit_config(window_length=11.0), "window_length"),
    "other blocks": (edit_config(cross_attn_every_n_layers=2), "unexpected.*xattn"),
    "not in the shard": (edit_shard(lambda s: s.pop(NORM), False), "weight_0.safetensors.*" + NORM),
    "missing": (edit_shard(lambda s: s.pop(NORM)), "missing: lm.norm.weight"),
    "extra": (edit_shard(lambda s: s.update(extra=torch.zeros(2))), "unexpected: extra"),
    "shape": (edit_shard(lambda s: s.update({NORM: s[NORM][:-1].clone()})), "wrong shape: lm.norm.weight"),
    "dtype": (edit_shard(lambda s: s.update({NORM: s[NORM].long()})), "wrong type: lm.norm.weight")}


@pytest.mark.parametrize("kind", FILES)
def test_a_broken_release_is_refused(release, tmp_path, kind):
    change, words = FILES[kind]
    folder = shutil.copytree(release, tmp_path / "r")
    change(folder)
    with pytest.raises((UserError, OSError), match=words):
        model = checkpoint.load(str(folder))
        model.save_pretrained(str(tmp_path / "again"))  # reads clap_ckpt


@pytest.mark.parametrize("name, value", [("max_num_window", "3"), ("window_length", float("nan")),
                                         ("bach_size", 1), ("device", "nope"), ("device", "cuda:99")])
def test_settings_that_a_model_cannot_be_loaded_with(release, name, value):
    with pytest.raises(UserError, match=name):
        checkpoint.load(release, **{name: value})


class Evil:
    """Unpickled by anything that trusts it, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", [2, 4])  # of torch.save, and of LAION's checkpoints
def test_pickles_run_nothing(tiny_settings, tmp_path, protocol):
    made, file = str(tmp_path / "made"), tmp_path / "checkpoint_0.pt"
    evil = {"x": Evil(made)}
    torch.save({"model_state_dict": evil, "state_dict": evil}, file, pickle_protocol=protocol)
    with pytest.raises(UserError, match="checkpoint_0.pt.*mkdir"):
        checkpoint.load(str(file))
    c = settings(tiny_settings, {"clap_checkpoint": str(file)})
    with pytest.raises(UserError, match="checkpoint_0.pt.*mkdir"):
        checkpoint.new_model(c)
    assert not os.path.exists(made)
    torch.load(file, weights_only=False)
    assert os.path.exists(made)  # it would have


def test_text_in_place_of_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoint_9.pt").write_text(POINTER)
    with pytest.raises(UserError, match="checkpoint_9.pt"):
        checkpoint.load(str(tmp_path / "checkpoint_9.pt"))


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    torch.save({"state_dict": {"x": torch.ones(9)}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="other.pt.*model_state_dict"):
        checkpoint.load(str(tmp_path / "other.pt"))
