"""What training tells about itself: parts that train, operations, memory, the line of a logged step."""
import os
import platform
import sys

import torch

from model import matrix_sizes
from tools.common import commit

# dense bf16 peak, TFLOP/s, of the vendors' data sheets
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250, "L40S": 362, "4090": 165, "MI300X": 1307}


def parameter_table(model):
    """A line per part of the model: parameters, and how many of them train."""
    text = {"embeddings and head": "lm.embed_tokens lm.lm_head", "language-model blocks": "lm.layers lm.norm"}
    parts = {"audio encoder (CLAP)": "clap", "audio transformer": "audio_transformer",
             "gated cross-attention": "xattn"} | text
    lines = [f"{'part':24} {'parameters':>15} {'trainable':>15}"]
    for part, prefixes in parts.items():
        mine = [p for name, p in model.named_parameters() if name.startswith(tuple(prefixes.split()))]
        trained = sum(p.numel() for p in mine if p.requires_grad)
        lines.append(f"{part:24} {sum(p.numel() for p in mine):15,} {trained:15,}")
    return "\n".join(lines)


def flops_per_step(model, tokens, windows, answers):
    """Forward and backward operations of one step: 2 per weight and use forward, as much again for the
    gradient of the input where anything below trains, and again for that of the weight where it trains
    itself. Attention's own products are left out: a few percent."""
    per, first = model.clap.tokens_per_window * windows, min(map(int, model.xattn))
    uses = lambda i, block: 1 + (i >= first) + next(block.parameters()).requires_grad
    lm = 2 * tokens * sum(matrix_sizes(b) * uses(i, b) for i, b in enumerate(model.lm.layers))
    to_kv = sum(x.attn.to_kv.weight.numel() for x in model.xattn.values())
    gated = 2 * 3 * (tokens * (matrix_sizes(model.xattn) - to_kv) + per * to_kv)
    head = 2 * 2 * answers * model.lm.embed_tokens.weight.numel()
    audio = 2 * 3 * per * matrix_sizes(model.audio_transformer)
    return lm + gated + head + audio + model.clap.flops(windows) * (3 if model.clap_trains() else 1)


def describe_machine(device, world):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores"
    versions = f"torch {torch.__version__} | python {platform.python_version()}"
    return f"{world} x {device.type} ({name}) | {versions} | {commit()}"


def peak_flops(device):
    """Of the device in bf16, 0 if unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return 1e12 * next((tflops for gpu, tflops in PEAK_TFLOPS.items() if gpu in name), 0)


def peak_memory(device=torch.device("cpu")):
    """GiB: the most allocated on a GPU, the largest resident size of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    import resource
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2 ** 30


def gates(model):
    """tanh of the gates of every gated block: {"gates": of attention, "ff_gates": of the feed-forward}."""
    blocks = list(model.xattn.values())
    values = torch.cat([b.attn_gate for b in blocks] + [b.ff_gate for b in blocks]).detach().float().tanh()
    values = [round(value, 6) for value in values.tolist()]
    return {"gates": values[:len(blocks)], "ff_gates": values[len(blocks):]}


def line(entry, total, left):
    """A logged step for people; left: seconds to go."""
    mfu = f"{entry['mfu']:.0%}" if entry["mfu"] else "n/a"
    faults = [f" | {name} {entry[name]:.0f}" for name in ("cut", "bad", "skipped_steps") if entry[name]]
    return (f"step {entry['step']}/{total} | loss {entry['loss']:.4f} | lr {entry['lr']:.1e} | "
            f"gnorm {entry['gnorm']:.2f} | gate {entry['gate']:.3f} | {entry['ms']:.0f} ms | "
            f"{entry['tok_s'] / 1000:.1f}k tok/s | {entry['audio_s']:.0f} s-audio/s | "
            f"pad {entry['pad']:.0%} | mfu {mfu} | mem {entry['mem_gb']:.1f}G | "
            f"eta {left // 3600:.0f}h{left % 3600 // 60:02.0f}m{''.join(faults)}")
