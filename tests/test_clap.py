"""prepare/clap.py: what would spoil an encoder is found before it trains, and none that trained is lost."""
import json
import os

import pytest
import torch

import config
from prepare import clap
from tests.helpers import write_manifest
from tools.checkpoint.files import load_pickle

CLIPS = [(f"{i}.wav", "", ["a noise", "a tone"][i % 2]) for i in range(8)]


@pytest.fixture
def train_clap(tiny_settings, tiny_data, tmp_path):
    def train(items, *options, valid=CLIPS):
        file = write_manifest(tmp_path, "toy-AudioCaptioning/train", [i for i in items if type(i) is tuple])
        if items and type(items[-1]) is dict:  # what the last item says, too
            manifest = json.load(open(file))
            list(manifest["data"].values())[-1].update(items[-1])
            json.dump(manifest, open(file, "w"))
        write_manifest(tmp_path, "toy-AudioCaptioning/val", valid)
        names = tiny_settings | {"dataset_file_root": str(tmp_path), "data_root": tiny_data,
                                 "precision": "fp32",
                                 "clap_config": {"toy-AudioCaptioning/train": 1}, "clap_steps": 3,
                                 "clap_valid_config": {"toy-AudioCaptioning/val": 1}, "clap_batch_size": 4,
                                 "clap_out": f"{tmp_path}/clap/epoch_16.pt"}
        file = tmp_path / "clap.py"
        file.write_text("".join(f"{name} = {value!r}\n" for name, value in names.items()))
        clap.main(config.load([str(file), *options], "prepare/clap.py"))
        return load_pickle(names["clap_out"])["state_dict"]

    yield train
    for file in (tmp_path / "clap").glob("*") if (tmp_path / "clap").exists() else ():
        state = load_pickle(str(file))["state_dict"]
        assert all(t.isfinite().all() for t in state.values() if t.is_floating_point())


@pytest.mark.parametrize("items, options, saying", [
    ([("0.wav", "", "a tone"), ("1.wav", "", "  ")], (), "data.'1'. output = '  ', expected a caption"),
    ([("0.wav", "", "a tone"), ("1.wav", "", "A tone ")], (), "all captions .* are alike"),
    ([], (), "total_num = 0, expected captioned clips"),
    (CLIPS, ('--clap_valid_config={"toi-AudioCaptioning/val": 1}',), "toi-AudioCaptioning/val.json: no such"),
    (CLIPS, ("--clap_steps=0",), "clap_steps = 0"),
    (CLIPS, ("--clap_batch_size=-1",), "clap_batch_size = -1"),
    (CLIPS, ("--clap_out=README.md/x/epoch_16.pt",), "README.md/x: cannot be written to"),
    (CLIPS, ("--clap_out=README.md/",), "README.md/: a folder, expected the name of a file"),
    (CLIPS, ("--clap_out=tests",), "tests: a folder, expected the name of a file"),
    ([(f"gone{i}.wav", "", f"tone {i}") for i in "12"], ("--max_bad_fraction=1",), "2 of 2 clips could not"),
    ([*CLIPS, {"negatives": ["a song", "A tone "]}], (), "'7'. negatives = 'a tone', which is also"),
    ([*CLIPS, {"positives": "a song"}], (), "positives = 'a song', expected a list of captions"),
    (CLIPS, ("--clap_muon_lr=1e30", "--clap_peak_lr=1e30"), "nothing is written")])
def test_refused_before_anything_is_written(train_clap, tmp_path, items, options, saying):
    with pytest.raises((ValueError, FileNotFoundError), match=saying):
        train_clap(items, *options)
    assert not os.path.exists(tmp_path / "clap/epoch_16.pt")


def test_bad_clips_are_named_and_cost_nothing_else(train_clap, capsys):
    gone = ("gone.wav", "", "a tone")
    state = train_clap([*CLIPS, gone], "--clap_steps=6", valid=[gone, *CLIPS])
    result = capsys.readouterr()
    assert result.err.count("gone.wav: no such audio file") == 2 and "right of 2 captions" in result.out
    assert all(t.isfinite().all() for t in state.values() if t.is_floating_point())
    with pytest.raises(ValueError, match="none of its clips could be read; the encoder is written"):
        train_clap(CLIPS, valid=[gone])
    with pytest.raises(ValueError, match="max_bad_fraction"):
        train_clap([*CLIPS, gone, ("lost.wav", "", "a noise")], "--clap_steps=9")


def test_a_batch_of_one_caption_has_no_nan():
    similarity = torch.randn(2, 3, requires_grad=True)
    positive = torch.tensor([[True, False, False], [True, False, False]])
    clap.contrast(similarity, positive, torch.ones_like(positive)).backward()
    assert similarity.grad.isfinite().all()
    everything = torch.ones(2, 1, dtype=torch.bool)
    alone = torch.randn(2, 1, requires_grad=True)
    loss = clap.contrast(alone, everything, everything)
    loss.backward()
    assert loss == 0 and (alone.grad == 0).all()
