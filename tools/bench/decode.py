"""tools/bench.py decode: what a token of an answer costs, beside the published way and the machine's limits.

SmolLM2-135M with all 30 blocks gated, HTSAT-tiny, random weights and noise: no time depends on them. All
variants decode side by side, a token each in turns; figures are medians.
"""
from collections import defaultdict

import torch
import torch.nn.functional as F

from data import encode_prompts
from tools.bench import reference
from tools.bench.common import time_in_turns, noise, small_model
from tools.checkpoint.devices import pick_device
from tools.sample.decoding import Sampling, decode_stream
from tools.sample.int8 import quantize

PROMPT = "What happens in this recording?"
WINDOWS = (3, 12, 30)


def stream(model, W, B=1):
    """A generator of steps: B answers to a prompt about W windows."""
    item = (PROMPT, noise(W), [W])
    return decode_stream(model, [item] * B, B, Sampling())


def plain_stream(model, W):
    device = model.lm.norm.weight.device
    ids = torch.tensor(encode_prompts(model.tokenizer, [PROMPT]), device=device)
    windows = noise(W).to(device)
    return reference.greedy_tokens(model, ids, windows, torch.tensor([W]))


# ------------------------------------------------------------------------------------------------------------
# The machine's limits


def step_weights(model):
    """The matrices that one token is multiplied with."""
    parts = ("lm.layers.", "xattn.", "lm.embed_tokens.")
    return [p for name, p in model.named_parameters()
            if name.startswith(parts) and p.ndim == 2 and "to_kv" not in name]


def read_once(model, W):
    """-> a function that reads those, and keys and values of W windows, once: at the rate of a large sum."""
    weights = step_weights(model)
    keys_and_values = 2 * 8 * 64 * len(model.xattn) * 64 * W
    size = keys_and_values + sum(p.numel() for p in weights)
    return weights[0].new_zeros(size).sum


def products_alone(model):
    """-> a function that multiplies one row with each of them."""
    weights = step_weights(model)
    rows = [p.new_ones(1, p.shape[1]) for p in weights]
    return lambda: list(map(F.linear, rows, weights))


# ------------------------------------------------------------------------------------------------------------
# Many questions whose answers have many lengths


def continuous_speedup(model, device, questions=64, slots=8):
    """Time of batch after batch over that of continuous batching. An answer ends with a probability of 1/32
    at every token, which the model's state decides: the same answers either way."""
    logits, model.stop_ids = model.lm.logits, [0]

    def ending_logits(x):
        y = logits(x)
        ends = 1e3 * x[:, 0].float() % 1 < 1 / 32
        y[ends, 0] = float("inf")
        return y

    model.lm.logits = ending_logits
    items = [("question", window[None], [1]) for window in noise(questions)]

    def answer(some):
        list(decode_stream(model, some, slots, Sampling(max_new_tokens=64)))

    def batches():
        for i in range(0, questions, slots):
            answer(items[i:i + slots])

    runs = {"batches": batches, "continuous": lambda: answer(items)}
    seconds = time_in_turns(runs, device, rounds=1, warmup=0)
    return seconds["batches"] / seconds["continuous"]


@torch.no_grad()
def decode(c):
    device = pick_device(c.device)
    float32 = small_model(device, torch.float32)
    bf16 = small_model(device, torch.bfloat16)
    int8 = quantize(small_model(device, torch.bfloat16)) if device.type == "cpu" else None
    first_token = {
        "float32": lambda: next(stream(float32, 12)),
        "bf16": lambda: next(stream(bf16, 12))}
    first_token = time_in_turns(first_token, device, rounds=3, warmup=1)
    figures = defaultdict(dict)
    for W in WINDOWS:
        runs = {
            "read_ms": read_once(float32, W),
            "products_ms": products_alone(bf16),
            "plain_ms_per_token": plain_stream(float32, W).__next__,
            "ms_per_token": stream(float32, W).__next__,
            "bf16_ms": stream(bf16, W).__next__}
        if W == 12:
            runs["batch8_ms"] = stream(bf16, W, B=8).__next__
        if int8:
            runs["int8_ms"] = stream(int8, W).__next__
        seconds = time_in_turns(runs, device, rounds=16)  # warm-up: the audio and the prompt, and a token
        for name, median in seconds.items():
            figures[name][str(W)] = 1e3 * median
    ms = {name: of_windows["12"] for name, of_windows in figures.items()}
    return {"device": str(device), "int8_ms": None} | figures | {
        "first_token_s": first_token,
        "batch8_ms_per_token": ms["batch8_ms"] / 8,
        "float32_over_read": ms["ms_per_token"] / ms["read_ms"],
        "bf16_over_products": ms["bf16_ms"] / ms["products_ms"],
        "continuous_speedup": continuous_speedup(bf16, device)}
