"""tools/bench.py decode: what a token of an answer costs, beside the published way and the machine's limits.

SmolLM2-135M with all 30 blocks gated, HTSAT-tiny, random weights and noise: no time depends on them. All
variants decode side by side, a token each in turns; figures are medians.
"""
import torch
import torch.nn.functional as F

from data import encode_prompts
from tools.bench import reference
from tools.bench.common import medians_in_turns, noise, print_table, small_model
from tools.checkpoint.devices import pick_device
from tools.sample import decoding
from tools.sample.decoding import Sampling, decode_stream
from tools.sample.int8 import quantize

PROMPT = "What happens in this recording?"
WINDOWS = (3, 12, 30)


def stream(model, W, B=1):
    """A generator of steps: B answers to a prompt about W windows."""
    return decoding.stream(model, [PROMPT] * B, noise(B * W), torch.full((B,), W))


def plain_stream(model, W):
    device = model.lm.norm.weight.device
    ids = encode_prompts(model.tokenizer, [PROMPT])
    ids = torch.tensor(ids, device=device)
    windows, mask = reference.padded(noise(W), torch.tensor([W]))
    windows, mask = windows.to(device), mask.to(device)
    return reference.greedy_tokens(model, ids, windows, mask)


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


def end_answers(model, share=1 / 32):
    """An answer ends with this probability at every token, which the model's state decides: the same answers
    whichever way they are asked."""
    logits, model.stop_ids = model.lm.logits, [0]

    def ending(x):
        y = logits(x)
        ends = (1e3 * x[:, 0].float()) % 1 < share
        y[ends, 0] = float("inf")
        return y

    model.lm.logits = ending


def continuous_speedup(model, device, questions=64, slots=8):
    """Time of batch after batch over that of continuous batching."""
    end_answers(model)
    items = [("question", window[None], [1]) for window in noise(questions)]

    def answer(some):
        for _ in decode_stream(model, some, slots, Sampling(max_new_tokens=64)):
            pass

    def batches():
        for i in range(0, questions, slots):
            answer(items[i:i + slots])

    runs = {"batches": batches, "continuous": lambda: answer(items)}
    seconds = medians_in_turns(runs, device, rounds=1, warmup=0)
    return seconds["batches"] / seconds["continuous"]


@torch.no_grad()
def decode(c):
    device = pick_device(c.device)
    float32 = small_model(device, torch.float32)
    bf16 = small_model(device, torch.bfloat16)
    models = {"ms_per_token": float32, "bf16_ms": bf16}
    if device.type == "cpu":
        models["int8_ms"] = quantize(small_model(device, torch.bfloat16))
    first = medians_in_turns({
        "float32": lambda: next(stream(float32, 12)),
        "bf16": lambda: next(stream(bf16, 12))}, device, rounds=3, warmup=1)

    runs = {"read": read_once(float32, 12), "products": products_alone(bf16)}
    runs["batch"] = stream(bf16, 12, B=8).__next__
    for W in WINDOWS:
        runs["plain_ms_per_token", W] = plain_stream(float32, W).__next__
        for name, model in models.items():
            runs[name, W] = stream(model, W).__next__
    seconds = medians_in_turns(runs, device, rounds=16)  # warm-up: the audio and the prompt, and a token
    ms = {name: 1e3 * median for name, median in seconds.items()}

    figures = {"device": str(device), "int8_ms": None, "first_token_s": first}
    for name in ("plain_ms_per_token", *models):
        figures[name] = {str(W): ms[name, W] for W in WINDOWS}
        print_table([name, "ms"], figures[name].items())
    return figures | {
        "read_ms": ms["read"],
        "products_ms": ms["products"],
        "float32_over_read": ms["ms_per_token", 12] / ms["read"],
        "bf16_over_products": ms["bf16_ms", 12] / ms["products"],
        "batch8_ms_per_token": ms["batch"] / 8,
        "continuous_speedup": continuous_speedup(bf16, device)}
