"""tools/bench.py fit: its figures are those of the plan, its bytes those that a process really takes."""
import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import config
from tests.helpers import run
from model import matrix_sizes
from tools.bench import fit
from tools.checkpoint.devices import pick_precision
from tools.common import UserError
from tools.train.log import flops_per_step, peak_memory
from tools.train.optim import parameter_groups

SMALL = ["--lang_encoder_path=HuggingFaceTB/SmolLM2-135M", "--clap_embed_dim=96", "--clap_depths=[2,2,6,2]",
         "--precision=fp32"]
CASES = {  # clips, windows, tokens, answers, micro-batches | settings
    "table trains": (2, 2, 64, 30, 2, "--cross_attn_every_n_layers=3"),
    "encoder trains, recomputed": (3, 1, 96, 60, 1, "--gradient_checkpointing",
                                   "--clap_gradient_checkpointing",
                                   "--clap_finetune", "--freeze_lm_embeddings=true",
                                   "--cross_attn_every_n_layers=5")}


def settings(*argv):
    return config.load([*SMALL, *argv], "tools/bench/fit.py")


def peak_bytes(model, B, W, T, A, micro_batches):
    memory = fit.step_memory(model, B, W, T, A, 4, accumulates=micro_batches > 1)
    return sum(memory.values())


@pytest.mark.slow
def test_the_command_prints_the_planned_figures():
    """Pretraining of the published 3B on paper: GFLOP a clip of 3 windows, 64 tokens, 20 answers."""
    result = run("tools/bench.py", "fit", "config/pretrain.py")
    f = json.loads(result.stdout.splitlines()[-1])
    assert f["forward_gflop"] == pytest.approx({
        "audio encoder": 364, "audio transformer": 30, "gated cross-attention": 195, "language model": 356,
        "head and loss": 12}, rel=0.04)
    planned = {
        "gpus": 8, "gpu_gb": 80, "batch_size": 16, "windows": 3, "trained": 1.74e9,
        "flops_per_sample": 1.8e12,
        "samples_per_s": 8 * 175, "windows_per_s": 4200,
        "host_to_device_mb_s": 4200 * 0.32, "all_reduce_gb": 7.0}
    planned |= {"trained weights": 7.0, "gradients": 7.0, "Adam's moments": 13.9, "frozen weights": 6.2}
    figures = f | f["memory_gb"]
    assert {name: figures[name] for name in planned} == pytest.approx(planned, rel=0.03)
    assert f["peak_gb"] == pytest.approx(sum(f["memory_gb"].values()))
    assert f["peak_gb"] < 45


def test_a_config_names_its_hardware_and_a_release_its_language_model(tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text('"""Mine.\n\nHardware: 2 x 48 GB, or more.\n"""\nbatch_size = 1\n')
    monkeypatch.setattr(sys, "argv", ["fit", str(file)])
    c = settings("--max_num_window=1", "--items=1000", "--cross_attn_every_n_layers=[28]")
    f = fit.fit(c)
    assert (f["gpus"], f["gpu_gb"], f["epoch_items"]) == (2, 48.0, 5)
    model, B, room = fit.build_sized_model(c), f["largest_batch"], 1e9 * f["room_gb"]
    assert peak_bytes(model, B, 1, 64, 20, 2) <= room
    assert peak_bytes(model, B + 1, 1, 64, 20, 2) > room
    for release, width in (("-0.5B", 896), ("-1.5B", 1536), ("", 2048), ("-SoundCoT", 2048)):
        c = config.load([f"--pretrained_path=nvidia/audio-flamingo-2{release}"], "tools/bench/fit.py")
        assert fit.sizes_and_tokenizer(c)[1].width == width


@pytest.mark.parametrize("wrong", [
    "gpu=0", "gpus=0", "windows=-1", "tokens=0", "answers=65", "items=-5", "mfu=1.5", "tflops=-1",
    "precision=fp8",
    "lang_encoder_path=some/where"])
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises((UserError, FileNotFoundError), match=wrong.split("=")[0]):
        fit.fit(settings("--" + wrong))


def test_sizes_of_a_local_release_are_its_own(tiny_settings, tmp_path, monkeypatch):
    """Not those of the settings' defaults, a 3B model."""
    model = checkpoint.new_model(SimpleNamespace(**(config.defaults() | tiny_settings)))
    model.save_pretrained(str(tmp_path / "r"))
    monkeypatch.setattr(sys, "argv", ["fit"])
    f = fit.fit(config.load([f"--pretrained_path={tmp_path}/r"], "tools/bench/fit.py"))
    assert f["trained"] + f["frozen"] == sum(p.numel() for p in model.parameters())
    assert f["windows"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_peak_of_real_steps(case):
    """Resident memory of a process that takes two steps, above what it had before there was a model."""
    heap = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    result = run("-m", "tests.test_fit", case, **heap)
    measured, counted = json.loads(result.stdout.splitlines()[-1])
    print(f"{case}: measured {measured / 1e9:.3f} GB, counted {counted / 1e9:.3f} GB")
    assert counted == pytest.approx(measured, rel=0.1)


def measure_steps(B, W, T, A, micro_batches, *argv):
    """-> bytes that two real training steps take at the most, and bytes that fit counts for them."""
    c = settings(*argv)
    model = fit.build_sized_model(c).train()
    counted = peak_bytes(model, B, W, T, A, micro_batches)
    with open("/proc/self/statm") as f:
        before = int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    state = {name: torch.full(t.shape, 0.01).to(t.dtype) for name, t in model.state_dict().items()}
    checkpoint.place_weights(model, state, torch.device("cpu"), torch.float32, "the test")
    optimizer = torch.optim.AdamW(parameter_groups(model, c), fused=True)
    ids = torch.ones(B, T, dtype=torch.long)
    labels = ids.clone()
    labels[:, :-A] = -100
    sound = torch.randint(-3000, 3000, (B * W, 160000), dtype=torch.int16)
    n_windows = torch.full((B,), W)
    for _ in range(2):
        for _ in range(micro_batches):
            _, loss = model(ids, sound, n_windows, labels)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return peak_memory() * 2 ** 30 - before, counted


if __name__ == "__main__":
    print(json.dumps(measure_steps(*CASES[sys.argv[1]])))


def test_a_gradient_that_reaches_the_table_passes_the_blocks_below_the_first_gated_one():
    flops = {}
    for frozen in (True, False):
        options = settings("--cross_attn_every_n_layers=[20]", f"--freeze_lm_embeddings={frozen}")
        model = fit.build_sized_model(options)
        flops[frozen] = flops_per_step(model, 64, 3, 20)
    assert flops[False] - flops[True] == 2 * 64 * matrix_sizes(model.lm.layers[:20])


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_fp32_is_float32_everywhere(precision):
    pick_precision(precision, torch.device("cpu"))
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
        assert backend.allow_tf32 == (precision != "fp32")
