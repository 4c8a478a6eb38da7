"""What the benches share: timing of functions in turns, a table, the model of decode and train."""
import time
from types import SimpleNamespace

import numpy as np
import torch

import config
from data import SPECIAL_TOKENS
from model import AudioFlamingo

ROUNDS = 20
CACHE_BYTES = 2 ** 28  # more than any GPU's L2 cache
SMOLLM2 = SimpleNamespace(
    width=576, layers=30, inner=1536, heads=9, kv_heads=3, d=64, vocab=49152, eps=1e-5, rope_theta=1e5,
    rope_stretch=None, qkv_bias=False, out_bias=False, mlp_bias=False, qk_norm=False, tied=True,
    positions=8192)
HTSAT_TINY = {"clap_embed_dim": 96, "clap_depths": [2, 2, 6, 2], "clap_num_heads": [4, 8, 16, 32]}


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


def time_in_turns(runs, device, rounds=ROUNDS, warmup=2):
    """{name: function} -> {name: [20th percentile, median, 80th] of its seconds}. The functions take turns,
    so that a slow moment of the machine slows all of them."""
    seconds = {name: [] for name in runs}
    for _ in range(warmup + rounds):
        for name, run in runs.items():
            seconds[name].append(seconds_of(run, device))
    return {name: np.percentile(taken[warmup:], [20, 50, 80]).tolist() for name, taken in seconds.items()}


def medians_in_turns(runs, device, **options):
    return {name: median for name, (_, median, _) in time_in_turns(runs, device, **options).items()}


def print_table(header, rows):
    """Cells are strings or numbers; None is a dash."""
    lines = [header, *([format_cell(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *cells]))
    print()


def print_figures(figures):
    """The numbers and strings of a report; its tables are printed elsewhere."""
    print_table(["figure", ""], [row for row in figures.items() if not isinstance(row[1], (dict, list))])


def format_cell(cell):
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


# ------------------------------------------------------------------------------------------------------------
# SmolLM2-135M with all 30 blocks gated and HTSAT-tiny, with random weights: no time depends on them


class ByteTokenizer:
    """A tokenizer of any size, without files: the bytes of a text; special tokens after the vocabulary."""

    def __init__(self, vocab=SMOLLM2.vocab):
        self.vocab, self.eos_token_id = vocab, 0
        self.pad_token_id, self.sep_token_id = self.convert_tokens_to_ids(list(SPECIAL_TOKENS[2:]))

    def __len__(self):
        return self.vocab + len(SPECIAL_TOKENS)

    def __call__(self, texts, **_):
        if isinstance(texts, str):
            return {"input_ids": [self.convert_tokens_to_ids(texts)]}
        return {"input_ids": [list(text.encode()) for text in texts]}

    def convert_tokens_to_ids(self, names):
        if isinstance(names, str):
            return self.vocab + SPECIAL_TOKENS.index(names)
        return [self.convert_tokens_to_ids(name) for name in names]


def small_settings():
    return SimpleNamespace(**(config.defaults() | HTSAT_TINY | {"cross_attn_every_n_layers": 1}))


def small_model(device, dtype, gate=0.5):
    torch.manual_seed(0)
    model = AudioFlamingo(small_settings(), SMOLLM2, ByteTokenizer())
    for gated in model.xattn.values():
        gated.attn_gate.data.fill_(gate)
        gated.ff_gate.data.fill_(gate)
    model.requires_grad_(False).eval().to(device, dtype)
    model.clap.htsat.bn0.float()
    model.stop_ids = []  # answers do not end
    return model


def noise(windows):
    """(windows, L) int16."""
    generator = torch.Generator().manual_seed(windows)
    return torch.randint(-3000, 3000, (windows, 160000), generator=generator, dtype=torch.int16)
