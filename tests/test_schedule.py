"""The learning-rate schedule: the same rates straight, stopped and resumed; never rising after warm-up."""
from dataclasses import asdict
from types import SimpleNamespace

import pytest

import config
from data import open_manifests, plan_epoch
from tools.train.resume import TrainState, blending_record
from train import lr_factor

RUNS = {"epochs": {"num_epochs": 4}, "max_steps": {"num_epochs": 9, "max_steps": 11}}
BATCHES = {"batch": {"batch_size": 3}, "windows": {"batch_size": 4, "max_windows_per_batch": 4}}


@pytest.fixture(scope="module")
def rates(tiny_data, tokenizer):
    """A function: settings, state, number of steps -> the factor of each of the next steps of a run."""

    def walk(state, stop_after=None, world=1, **settings):
        settings |= {
            "warmup_steps": 2,
            "dataset_file_root": tiny_data,
            "data_root": tiny_data,
            "dataset_blending_config": {"toy-AQA/train": 1.0},
            "dataset_blending_global_weight": 1.0}
        c = SimpleNamespace(**config.defaults() | settings)
        manifests = open_manifests(c, c.dataset_blending_config)
        total = sum(entry["stop"] - entry["first"] for entry in blending_record(c, manifests))
        audio = {"window_length": 2.5, "window_overlap": 0.0, "max_num_window": 2, "sample_rate": 16000}
        factors = []
        while not state.finished(c) and len(factors) != stop_after:
            _, rows, _ = plan_epoch(manifests, c, tokenizer, audio, state.epoch, world=world)
            samples = len(rows[state.step_in_epoch])
            factors.append(lr_factor(c, state, samples, total))
            state.advance(c, samples, state.epoch + (state.step_in_epoch + 1 == len(rows)))
        return factors

    return walk


@pytest.mark.parametrize("scheduler", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("batch", BATCHES)
def test_a_resumed_run_has_the_rates_of_the_straight_one(rates, scheduler, run, batch):
    settings = RUNS[run] | BATCHES[batch] | {"lr_scheduler": scheduler}
    straight = rates(TrainState(), **settings)
    assert straight[:3] == [0.5, 1.0, straight[2]] and len(straight) > 10
    assert straight[-1] == pytest.approx(float(scheduler == "constant"), abs=1e-12)
    for n in range(1, 11):
        state = TrainState()
        first = rates(state, stop_after=n, **settings)
        assert first + rates(TrainState(**asdict(state)), **settings) == straight


@pytest.mark.parametrize("scheduler", ["cosine", "linear"])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("change", [{"batch_size": 8}, {"batch_size": 1}, {"world": 2}])
def test_another_batch_never_raises_the_rate(rates, scheduler, run, change):
    settings = RUNS[run] | {"lr_scheduler": scheduler, "batch_size": 2}
    for n in (4, 8):  # ends of epochs
        state = TrainState()
        rates(state, stop_after=n, **settings)
        warmed_up = rates(TrainState(), stop_after=n, **settings)[2:]
        after = warmed_up + rates(state, **settings | change)
        assert after == sorted(after, reverse=True)
        assert after[-1] == pytest.approx(0, abs=1e-12)
