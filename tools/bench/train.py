"""tools/bench.py train: what an optimizer step costs, beside one written the published way (tools/bench/reference.py).

SmolLM2-135M with all 30 blocks gated, HTSAT-tiny, random weights; 4 clips, 64 text tokens of which 44 are
answers; what pretraining trains, with AdamW. The steps of both are taken in turns; figures are medians. Peak
memory is that of a process of its own that takes two steps: weights, gradients and optimizer state included.
"""
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace

import torch

import config
from model import AudioFlamingo
from tools.bench import reference as plain
from tools.bench.decode import HTSAT_TINY, SMOLLM2, Letters, clips, seconds_of
from tools.train.log import peak_memory
from tools.train.optim import parameter_groups

B, T, ANSWERS = 4, 64, 44
LENGTHS = {"3 windows": (3, 3, 3, 3), "1, 2, 5, 12": (1, 2, 5, 12)}
ROUNDS = 5


def batch(lengths, device):
    """-> input_ids, windows, n_windows, labels as AudioFlamingo takes them."""
    ids = torch.randint(1000, 40000, (B, T), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(T) < T - ANSWERS, -100, ids)
    return ids.to(device), clips(sum(lengths))[0].to(device), torch.tensor(lengths), labels


def stepper(ours, dtype, device):
    """-> a function of a batch that takes one optimizer step."""
    torch.manual_seed(0)
    c = SimpleNamespace(**(config.defaults() | HTSAT_TINY | {"cross_attn_every_n_layers": 1}))
    model = AudioFlamingo(c, SMOLLM2, Letters())
    model.set_trainable(c)
    for p in model.parameters():  # ours keeps frozen weights in the dtype of the products
        p.data = p.data.to(device, torch.float32 if p.requires_grad or not ours else dtype)
    model.clap.htsat.bn0.float()
    model.to(device).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, c), fused=ours or None)
    trained = [p for p in model.parameters() if p.requires_grad]

    def step(ids, windows, n_windows, labels):
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            if ours:
                _, loss = model(ids, windows, n_windows, labels)
            else:
                loss = plain.loss(model, ids, *plain.padded(windows, n_windows), labels.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, c.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peak(ours, dtype, lengths):
    """GiB, in a process of its own."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = stepper(ours, dtype, device)
    for _ in range(2):
        step(*batch(lengths, device))
    return peak_memory(device)


def train():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = {"mode": "train", "device": str(device), "torch": torch.__version__, "seconds": {}}
    memory = {}  # first: a child's peak begins at its parent's size
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as child:
        for name in ("ours", "plain"):
            memory[name] = child.submit(peak, name == "ours", torch.bfloat16, LENGTHS["1, 2, 5, 12"])
    memory = {name: round(most.result(), 2) for name, most in memory.items()}
    print(f"peak memory, bfloat16, 1, 2, 5, 12 windows: ours {memory['ours']} GiB, plain {memory['plain']}")
    print(f"seconds a step of {B} clips, {T} text tokens, on {device}, torch {torch.__version__}")
    print(f"{'':32}{'ours':>8}{'plain':>8}{'ratio':>8}{'tokens/s':>10}{'windows/s':>10}")
    ratios = {}
    for dtype in (torch.float32, torch.bfloat16):
        steps = {name: stepper(name == "ours", dtype, device) for name in ("ours", "plain")}
        for lengths, n in LENGTHS.items():
            data, taken = batch(n, device), {name: [] for name in steps}
            for _ in range(ROUNDS + 1):
                for name, step in steps.items():
                    taken[name].append(seconds_of(lambda: step(*data), device))
            ours, theirs = (statistics.median(some[1:]) for some in taken.values())
            case = f"{str(dtype)[6:]}, {lengths}"
            ratios[case] = round(ours / theirs, 3)
            figures["seconds"][case] = {"ours": round(ours, 3), "plain": round(theirs, 3)}
            print(f"{case:32}{ours:8.2f}{theirs:8.2f}{ratios[case]:8.2f}{B * T / ours:10.0f}"
                  f"{sum(n) / ours:10.1f}")
        del steps
    return figures | {
        "float32_ratio": ratios["float32, 3 windows"], "bf16_ratio": ratios["bfloat16, 3 windows"],
        "mixed_float32_ratio": ratios["float32, 1, 2, 5, 12"],
        "mixed_bf16_ratio": ratios["bfloat16, 1, 2, 5, 12"], "peak_memory_gib": memory,
        "peak_memory_ratio": round(memory["ours"] / memory["plain"], 3)}
