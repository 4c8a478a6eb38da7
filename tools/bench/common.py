"""What the benches share: timing of functions in turns, printed figures, the model of decode and train."""
import time
from types import SimpleNamespace

import numpy as np
import torch

import config
from data import extend_tokenizer
from model import AudioFlamingo

CACHE_BYTES = 2 ** 28  # more than any GPU's L2 cache
SMOLLM2 = SimpleNamespace(
    width=576, layers=30, inner=1536, vocab=49152, positions=8192, tied=True,
    heads=9, kv_heads=3, d=64, rope_theta=1e5, rope_stretch=None, qk_norm=False, eps=1e-5,
    qkv_bias=False, out_bias=False, mlp_bias=False)
HTSAT_TINY = {
    "clap_embed_dim": 96,
    "clap_depths": [2, 2, 6, 2],
    "clap_num_heads": [4, 8, 16, 32]}


# ------------------------------------------------------------------------------------------------------------
# Timing and printing


def seconds_of(run, device):
    """Seconds of one call; on a GPU those of its kernels, from a cold L2 cache."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device).zero_()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def time_in_turns(runs, device, rounds=20, warmup=2):
    """{name: function} -> {name: median of its seconds}; prints them with the 20th and 80th percentile. The
    functions take turns, so that a slow moment of the machine slows all of them."""
    seconds = {name: [] for name in runs}
    for _ in range(warmup + rounds):
        for name, run in runs.items():
            seconds[name].append(seconds_of(run, device))
    medians = {}
    for name, taken in seconds.items():
        low, median, high = np.percentile(taken[warmup:], [20, 50, 80]).tolist()
        print(f"{name}: {median:.4g} s, {low:.4g} to {high:.4g}")
        medians[name] = median
    return medians


def print_figures(figures, prefix=""):
    """A line for each number or string; lists are printed elsewhere."""
    for name, value in figures.items():
        if isinstance(value, dict):
            print_figures(value, f"{prefix}{name}: ")
        elif not isinstance(value, list):
            number = isinstance(value, (int, float))
            print(f"{prefix}{name}".ljust(48), f"{value:,.6g}" if number else value)


# ------------------------------------------------------------------------------------------------------------
# SmolLM2-135M with all 30 blocks gated and HTSAT-tiny, with random weights: no time depends on them


def byte_tokenizer(vocab=SMOLLM2.vocab):
    """A tokenizer of any size: the bytes of a text; our special tokens come after the vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    names = pre_tokenizers.ByteLevel.alphabet()
    names += map(str, range(len(names), vocab))
    ids = dict(zip(names, range(vocab)))
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    return extend_tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="256"))


def small_settings():
    return SimpleNamespace(**config.defaults() | HTSAT_TINY)


def small_model(device, dtype, gate=0.5):
    torch.manual_seed(0)
    model = AudioFlamingo(small_settings(), SMOLLM2, byte_tokenizer())
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            parameter.data.fill_(gate)
    model.requires_grad_(False).eval().to(device, dtype)
    model.clap.htsat.bn0.float()
    model.stop_ids = []  # answers do not end
    return model


def noise(windows):
    """(windows, L) int16."""
    torch.manual_seed(windows)
    return torch.randint(-3000, 3000, (windows, 160000), dtype=torch.int16)
