"""tools/bench.py train: what an optimizer step costs, beside one written the published way (reference.py).

SmolLM2-135M with all 30 blocks gated, HTSAT-tiny, random weights; 4 clips, 64 text tokens of which 44 are
answers; what pretraining trains, with AdamW. The two take turns; figures are medians. Peak memory is that of
a process of its own that takes two steps: weights, gradients and optimizer state included.
"""
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch

from tools.bench import reference
from tools.bench.common import time_in_turns, noise, small_model, small_settings
from tools.checkpoint.devices import pick_device
from tools.train.log import peak_memory
from tools.train.optim import parameter_groups

B, T, ANSWERS = 4, 64, 44
EQUAL = (3, 3, 3, 3)  # windows of the clips
MIXED = (1, 2, 5, 12)
CASES = {
    "float32": (torch.float32, EQUAL),
    "bf16": (torch.bfloat16, EQUAL),
    "mixed_float32": (torch.float32, MIXED),
    "mixed_bf16": (torch.bfloat16, MIXED)}


def make_batch(n_windows, device):
    """-> input_ids, windows, n_windows, labels as AudioFlamingo takes them."""
    ids = torch.arange(B * T, device=device).view(B, T)
    labels = ids.clone()
    labels[:, :-ANSWERS] = -100
    windows = noise(sum(n_windows))
    return ids, windows.to(device), torch.tensor(n_windows), labels.cpu()


def make_step(ours, dtype, n_windows, device):
    """-> a function that takes one optimizer step."""
    c = small_settings()
    ids, windows, n_windows, labels = make_batch(n_windows, device)
    model = small_model(device, torch.float32, gate=0)
    model.set_trainable(c)
    for p in model.parameters():
        if ours and not p.requires_grad:  # ours keeps frozen weights in the dtype of the products
            p.data = p.data.to(dtype)
    model.clap.htsat.bn0.float()
    model.train()
    optimizer = torch.optim.AdamW(parameter_groups(model, c), fused=ours or None)

    def loss():
        if ours:
            return model(ids, windows, n_windows, labels)[1]
        return reference.loss(model, ids, windows, n_windows, labels.to(device))

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            y = loss()
        y.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peak_of_two_steps(device, ours):
    """GiB, in bfloat16."""
    step = make_step(ours, torch.bfloat16, MIXED, device)
    step()
    step()
    return peak_memory(device)


def train(c):
    device = pick_device(c.device)
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as process:
        ours, plain = process.map(partial(peak_of_two_steps, device), (True, False))
    figures = {
        "device": str(device),
        "peak_gib": {"ours": ours, "plain": plain},
        "peak_memory_ratio": ours / plain}
    for name, case in CASES.items():
        steps = {"ours": make_step(True, *case, device), "plain": make_step(False, *case, device)}
        seconds = time_in_turns(steps, device, rounds=5, warmup=1)
        figures[f"{name}_s"] = seconds
        figures[f"{name}_ratio"] = seconds["ours"] / seconds["plain"]
    return figures
