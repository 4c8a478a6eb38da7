"""What training reports: statistics of its steps, the log line, parameters that train, operations, memory."""
import math
import os
import platform
import sys
import time
from collections import Counter
from statistics import mean

import torch

from data import truncation_warning
from model import matrix_sizes
from tools.common import UserError, commit, join_names

# dense bf16 peak, TFLOP/s, of the vendors' data sheets
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250, "L40S": 362, "4090": 165, "MI300X": 1307}

# ------------------------------------------------------------------------------------------------------------
# Statistics of steps


def count_labelled(batch):
    """Number of labels that are predicted: not that of a text's first token, which nothing comes before."""
    return int((batch["labels"].numpy()[:, 1:] != -100).sum())


class StepStats:
    """Statistics of training steps, over all ranks. Losses and gradient norms stay on the device until
    `log_line` reads them: the loop's only host-device synchronisation. state.counts and state.skipped_steps
    are as of the last log line."""

    def __init__(self, c, run, state, model):
        self.c, self.run, self.state, self.model = c, run, state, model
        self.bad_steps_in_a_row = 0
        self.start_line()

    def start_line(self):
        """Start what the next log line is about."""
        self.start = time.time()
        self.steps = []  # (step, StepResult, paths of this rank's clips)
        self.counts = Counter()  # of this rank
        self.errors = []  # why clips could not be read

    def add(self, result, micro_batches):
        """Count a step that was taken: host arithmetic alone."""
        paths = []
        for batch in micro_batches:
            labelled, windows = count_labelled(batch), len(batch["windows"])
            slots = batch["input_ids"].numel()
            paths += batch["paths"]
            self.errors += batch["errors"]
            self.counts.update(
                tokens=int((batch["input_ids"].numpy() != self.model.pad_id).sum()),
                token_slots=slots,
                labelled_tokens=labelled,
                audio_seconds=windows * self.model.audio_config["window_length"],
                flops=flops_per_step(self.model, slots, windows, labelled),
                clips=len(batch["paths"]),
                unreadable_clips=len(batch["errors"]),
                truncated_answers=batch["unfinished"],
                truncated_clips=batch["truncated_clips"],
                truncated_seconds=batch["truncated_seconds"])
        self.steps.append((self.state.step, result, paths))

    def log_line(self, epoch, lr, total_steps):
        """Read the steps since the last log line and write theirs; report those without an update. UserError
        where training cannot go on."""
        results = [torch.stack(result) for _, result, _ in self.steps]
        results = torch.stack(results).tolist()  # waits for the device
        new = self.sum_counts()
        losses = []
        for (step, _, paths), (loss, grad_norm, labelled, updated) in zip(self.steps, results):
            if updated:
                losses.append(loss)
                self.bad_steps_in_a_row = 0
            else:
                self.report_skipped(step, paths, labelled)
        seconds = time.time() - self.start
        peak = self.run.world * peak_flops(self.run.device)
        gates = gate_values(self.model, "attn_gate")
        entry = dict(
            step=self.state.step,
            epoch=epoch,
            lr=lr,
            loss=mean(losses or [math.nan]),
            gnorm=grad_norm,
            gate=mean(map(abs, gates)),
            ms=1000 * seconds / len(self.steps),
            tok_s=new["tokens"] / seconds,
            audio_s=new["audio_seconds"] / seconds,
            pad=1 - new["tokens"] / new["token_slots"],
            mfu=new["flops"] / seconds / peak if peak else None,
            mem_gb=peak_memory(self.run.device),
            samples=self.state.samples,
            skipped_steps=self.state.skipped_steps,
            **self.state.counts,
            gates=gates,
            ff_gates=gate_values(self.model, "ff_gate"))
        self.run.say(format_line(entry, total_steps))
        self.run.log(**entry)
        self.start_line()

    def sum_counts(self):
        """-> counts of all ranks since the last log line, which are added to the run's. Reports clips that
        were not read, or not whole."""
        totals, new, errors = Counter(self.state.counts), Counter(), []
        for rank_counts, rank_errors in self.run.gather_lists([(self.counts, self.errors)]):
            new.update(rank_counts)
            errors += rank_errors
        for error in errors:
            self.run.say(f"skipped: {error}", sys.stderr)
            self.run.log(step=self.state.step, skipped=error)
        if not totals["truncated_clips"] and new["truncated_clips"]:
            self.run.say(truncation_warning(new["clips"], new["truncated_clips"], new["truncated_seconds"],
                                            self.model.audio_config), sys.stderr)
        totals.update(new)
        self.state.counts = dict(totals)
        unreadable = totals["unreadable_clips"]
        files = totals["clips"] + unreadable
        if unreadable > self.c.max_bad_fraction * max(files, 100):
            raise UserError(f"{unreadable} of {files} audio files so far could not be read, more than "
                            f"max_bad_fraction = {self.c.max_bad_fraction}; the last: {errors[-1:]}")
        return new

    def report_skipped(self, step, paths, labelled):
        """Log a step without an update; UserError after too many of them."""
        self.state.skipped_steps += 1
        self.bad_steps_in_a_row += 1
        self.reason = "loss or gradient not finite" if labelled else "no labelled token"
        paths = self.run.gather_lists(paths)
        self.run.say(f"step {step}: {self.reason}, no update; clips: {join_names(paths)}", sys.stderr)
        self.run.log(step=step, no_update=self.reason, items=paths)
        if self.bad_steps_in_a_row > self.c.max_bad_steps:
            raise UserError(f"step {step}: {self.bad_steps_in_a_row} steps in a row without an update "
                            f"(max_bad_steps = {self.c.max_bad_steps}): {self.explain()}")

    def explain(self):
        """What the last step without an update may be due to."""
        c, counts = self.c, self.state.counts
        return (f"{self.reason}; learning_rate = {c.learning_rate:g}, precision = {c.precision}, "
                f"{counts['truncated_answers']} of {counts['clips']} answers cut off by max_tokens = "
                f"{c.max_tokens}, {counts['unreadable_clips']} clips not read")


def gate_values(model, name):
    """tanh of attn_gate or ff_gate of every gated block."""
    gates = [getattr(block, name) for block in model.xattn.values()]
    return torch.cat(gates).float().tanh().tolist()


def format_line(entry, total_steps):
    """A log entry for the terminal."""
    mfu = f"{entry['mfu']:.0%}" if entry["mfu"] else "n/a"
    eta = (total_steps - entry["step"]) * entry["ms"] / 1000
    truncated = f"truncated answers {entry['truncated_answers']} | " if entry["truncated_answers"] else ""
    return (f"step {entry['step']}/{total_steps} | loss {entry['loss']:.4f} | lr {entry['lr']:.1e} | "
            f"gnorm {entry['gnorm']:.2f} | gate {entry['gate']:.3f} | {entry['ms']:.0f} ms | "
            f"{entry['tok_s'] / 1000:.1f}k tok/s | {entry['audio_s']:.0f} s-audio/s | "
            f"pad {entry['pad']:.0%} | mfu {mfu} | mem {entry['mem_gb']:.1f}G | "
            f"{truncated}eta {eta // 3600:.0f}h{eta % 3600 // 60:02.0f}m")


# ------------------------------------------------------------------------------------------------------------
# Model and machine


def parameter_table(model):
    """A line per part of the model: parameters, and how many of them train."""
    parts = {"audio encoder (CLAP)": "clap", "audio transformer": "audio_transformer",
             "gated cross-attention": "xattn", "embeddings and head": ("lm.embed_tokens", "lm.lm_head"),
             "language-model blocks": ("lm.layers", "lm.norm")}
    lines = [f"{'part':24} {'parameters':>15} {'trainable':>15}"]
    for part, prefixes in parts.items():
        parameters = [p for name, p in model.named_parameters() if name.startswith(prefixes)]
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        lines.append(f"{part:24} {sum(p.numel() for p in parameters):15,} {trainable:15,}")
    return "\n".join(lines)


def forward_flops(model, tokens, windows, answers):
    """{part: operations of a forward pass}, 2 per weight and use. Attention's own products are left out: a
    few percent."""
    audio_tokens = model.clap.tokens_per_window * windows
    to_kv = sum(block.attn.to_kv.weight.numel() for block in model.xattn.values())
    gated = matrix_sizes(model.xattn) - to_kv
    return {
        "head and loss": 2 * answers * model.lm.embed_tokens.weight.numel(),
        "language model": 2 * tokens * matrix_sizes(model.lm.layers),
        "gated cross-attention": 2 * tokens * gated + 2 * audio_tokens * to_kv,
        "audio transformer": 2 * audio_tokens * matrix_sizes(model.audio_transformer),
        "audio encoder": model.clap.flops(windows)}


def flops_per_step(model, tokens, windows, answers):
    """Forward and backward operations of one step. The backward pass takes as many as the forward pass for
    the gradient of the input where anything below trains, and again for that of the weight where it trains
    itself."""
    forward = forward_flops(model, tokens, windows, answers)
    layers = model.lm.layers
    lm_trains = next(layers.parameters()).requires_grad
    table_trains = any(p.requires_grad for p in model.lm.embed_tokens.parameters())
    below = 0 if lm_trains or table_trains else min(map(int, model.xattn))  # blocks that no gradient reaches
    block = forward["language model"] // len(layers)
    backward = {
        "head and loss": forward["head and loss"],
        "language model": block * (len(layers) * (1 + lm_trains) - below),
        "gated cross-attention": 2 * forward["gated cross-attention"],
        "audio transformer": 2 * forward["audio transformer"],
        "audio encoder": 2 * forward["audio encoder"] * model.clap_trains()}
    return sum(forward.values()) + sum(backward.values())


def describe_machine(device, world):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores"
    versions = f"torch {torch.__version__} | python {platform.python_version()}"
    return f"{world} x {device.type} ({name}) | {versions} | {commit()}"


def peak_flops(device):
    """Of the device in bf16, 0 if unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return 1e12 * next((tflops for gpu, tflops in PEAK_TFLOPS.items() if gpu in name), 0)


def peak_memory(device=torch.device("cpu")):
    """GiB: the most allocated on a GPU, the largest resident size of this process on a CPU (VmHWM: unlike
    ru_maxrss it does not start at the size of the process that started this one)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 2 ** 20
