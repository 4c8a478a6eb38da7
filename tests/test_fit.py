"""tools/bench.py fit: its figures are those of the plan, its bytes those that a process really takes."""
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import config
from tests.helpers import fails_with_one_line, run

SMALL = ["--lang_encoder_path=HuggingFaceTB/SmolLM2-135M", "--clap_embed_dim=96", "--clap_depths=[2,2,6,2]"]
CASES = {  # clips, windows, tokens, answers | settings
    "nothing recomputed": (2, 1, 64, 30, "--clap_finetune", "--freeze_lm_embeddings=added",
                           "--cross_attn_every_n_layers=2"),
    "float32, blocks recomputed": (3, 1, 96, 60, "--precision=fp32", "--gradient_checkpointing",
                                   "--clap_finetune", "--clap_gradient_checkpointing",
                                   "--freeze_lm_embeddings=true", "--cross_attn_every_n_layers=5")}


def settings(*given):
    return config.load([*SMALL, *given], "tools/bench/fit.py")


def last_line(result):
    return json.loads(result.stdout.splitlines()[-1])


def test_the_plans_figures_come_out():
    """Pretraining of the published 3B on paper: GFLOP a clip of 3 windows, 64 tokens, 20 answers."""
    f = last_line(run("tools/bench.py", "fit", "config/pretrain.py"))
    planned = {"audio encoder": 364, "audio transformer": 30, "gated cross-attention": 29 + 10 + 1 + 155,
               "language model": 356, "head and loss": 12}
    for part, gflop in planned.items():
        assert f["forward_gflop"][part] == pytest.approx(gflop, rel=0.04), part
    assert (f["gpus"], f["gpu_gb"], f["batch_size"], f["windows"]) == (8, 80, 16, 3)
    assert f["trained"] == pytest.approx(1.74e9, rel=0.01)
    memory = f["memory_gb"]
    assert memory["trained weights"] == pytest.approx(7.0, rel=0.01)
    assert memory["gradients"] == pytest.approx(7.0, rel=0.01)
    assert memory["Adam's moments"] == pytest.approx(13.9, rel=0.01)
    assert memory["frozen weights"] == pytest.approx(6.2 + 0.6 - 2 * 0.31, rel=0.02)  # the table trains
    assert f["flops_per_sample"] == pytest.approx(1.8e12, rel=0.03)
    assert f["samples_per_s"] / 8 == pytest.approx(175, rel=0.03)
    assert f["windows_per_s"] == pytest.approx(4200, rel=0.03)
    assert f["host_to_device_mb_s"] == pytest.approx(4200 * 0.32, rel=0.03)  # windows of 320 kB
    assert f["all_reduce_gb"] == pytest.approx(7.0, rel=0.01)
    assert f["peak_gb"] == pytest.approx(sum(memory.values())) and f["peak_gb"] < 80
    # counted product by product, forward: trained parts three times, the frozen language model twice
    counted = f["forward_gflop"]
    step = counted["audio encoder"] + 2 * (counted["language model"] + counted["head and loss"])
    step += 3 * (counted["audio transformer"] + counted["gated cross-attention"])
    assert f["flops_per_sample"] == pytest.approx(1e9 * step, rel=0.03)


def test_largest_batch_fits_and_more_do_not(capsys):
    from tools.bench import fit as bench_fit
    argv = [*SMALL, "--max_num_window=1", "--gpus=1", "--gpu=6", "--cross_attn_every_n_layers=[28]"]
    c = config.load([*argv, "--batch_size=40", "--items=1000", "--max_tokens=64", "--pretrained_path=gone"],
                    "tools/bench/fit.py")
    bench_fit.fit(c)
    text = capsys.readouterr().out
    f = json.loads(text.splitlines()[-1])
    assert f["largest_batch"] > 40 and f["peak_gb"] < f["room_gb"] and f["epoch_items"] == 5
    assert "pretrained_path = gone is not here: the sizes are the settings'" in text
    assert "an epoch: 5 clips" in text and f["all_reduce_gb"] == 0
    for peak in (lambda b: 10 + b, lambda b: max(30, 10 + b), lambda b: 10 + min(b, 5) + b / 2):
        for room in (9, 29.5, 40, 100):
            found = bench_fit.largest(peak, peak(0), 4, room)
            best = max((b for b in range(1000) if b and peak(b) <= room), default=0)
            assert 0.9 * best <= found <= best, (room, found, best)


def test_hardware_and_language_model_of_a_config(tmp_path, monkeypatch):
    from tools.bench import fit as bench_fit
    file = tmp_path / "mine.py"
    file.write_text('"""Mine.\n\nHardware: 2 x 48 GB, or more.\n"""\nbatch_size = 1\n')
    c = config.load([str(file)], "tools/bench/fit.py")
    assert bench_fit.hardware(c, file) == (2, 48.0)
    c = config.load([str(file), "--gpu=24", "--gpus=1"], "tools/bench/fit.py")
    assert bench_fit.hardware(c, file) == (1, 24.0)
    for release, width in (("-0.5B", 896), ("-1.5B", 1536), ("", 2048), ("-SoundCoT", 2048)):
        c = config.load([f"--pretrained_path=nvidia/audio-flamingo-2{release}"], "tools/bench/fit.py")
        assert bench_fit.load_lm_config_and_tokenizer(c)[1].width == width
    fails_with_one_line("tools/bench.py", "fit", "--lang_encoder_path=some/where",
                        saying=["lang_encoder_path", "some/where", "Qwen2.5-0.5B"])


@pytest.mark.parametrize("given", [
    "gpu=0", "gpu=-1", "gpu=1e30", "gpus=0", "windows=-1", "tokens=0", "answers=65", "items=-5", "mfu=0",
    "mfu=1.5", "tflops=-1", "precision=fp8"])
def test_what_no_card_and_no_clip_is(given):
    from tools.bench import fit as bench_fit
    with pytest.raises(ValueError, match=given.split("=")[0] + " = .*expected"):
        bench_fit.fit(settings("--" + given))


def test_sizes_of_a_local_release_are_its_own(tiny_settings, tmp_path, capsys):
    """Not those of the settings' defaults, a 3B model."""
    from types import SimpleNamespace

    import checkpoint
    from tools.bench import fit as bench_fit
    model = checkpoint.new_model(SimpleNamespace(**(config.defaults() | tiny_settings)))
    model.save_pretrained(str(tmp_path / "r"))
    given = [f"--pretrained_path={tmp_path}/r", "--gpu=1.2", "--max_tokens=64"]
    bench_fit.fit(config.load(given, "tools/bench/fit.py"))
    text = capsys.readouterr().out
    f = json.loads(text.splitlines()[-1])
    assert f["trained"] + f["frozen"] == sum(p.numel() for p in model.parameters())
    assert f["windows"] == 2 and "is not here" not in text


def test_peak_of_a_real_step():
    """Resident memory of a process that takes two steps, above what it had before there was a model."""
    heap = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    heap |= {"OMP_NUM_THREADS": "1"}  # of each, side by side
    take = lambda case: last_line(run("-m", "tests.test_fit", case, **heap))
    for case, (measured, estimated) in zip(CASES, ThreadPoolExecutor().map(take, CASES)):
        print(f"{case}: measured {measured / 1e9:.3f} GB, estimated {estimated / 1e9:.3f} GB")
        assert measured == pytest.approx(estimated, rel=0.1), case


def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(B, W, T, A, *given):
    """-> bytes that two real training steps took at the most, and bytes that fit counts for them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    import checkpoint
    from tools.bench import fit as bench_fit
    from tools.train.log import peak_memory
    from tools.train.optim import parameter_groups
    c = settings(*given)
    dtype = torch.float32 if c.precision == "fp32" else torch.bfloat16
    model = bench_fit.build(c)
    with FakeTensorMode(allow_non_fake_inputs=True):
        bench_fit.without_numbers(model, dtype)
        estimated = bench_fit.micro_step(model, B, W, T, A, dtype, on_gpu=False).peak
    estimated += 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)  # Adam's moments
    before = resident()
    model = bench_fit.build(c)
    state = {name: torch.full(t.shape, 0.01 if t.is_floating_point() else 0, dtype=t.dtype)
             for name, t in model.state_dict().items()}
    checkpoint.place_weights(model, state, torch.device("cpu"), dtype, "the test")
    optimizer = torch.optim.AdamW(parameter_groups(model, c), fused=True)
    ids, labels = torch.ones(B, T, dtype=torch.long), torch.full((B, T), -100)
    labels[:, -A:] = 1
    sound = torch.randint(-3000, 3000, (B * W, 160000), dtype=torch.int16)
    for _ in range(2):
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            _, loss = model(ids, sound, torch.full((B,), W), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return peak_memory() * 2 ** 30 - before, estimated


if __name__ == "__main__":
    print(json.dumps(measure(*CASES[sys.argv[1]])))
