"""Train an Audio Flamingo 2 model: one script for one CPU, one GPU and many nodes.

    python train.py config/demo.py                                            # a CPU, minutes (see make demo)
    python train.py config/sft.py --batch_size=8                              # one GPU
    torchrun --nproc_per_node=8 train.py config/pretrain.py                   # one node
    torchrun --nnodes=2 --node_rank=$RANK --master_addr=$HOST --nproc_per_node=8 train.py config/pretrain.py

A run lives in expdir/run_name/: checkpoint_<epoch>.pt, log.jsonl. Started again, it goes on from its newest
checkpoint.
"""
import contextlib
import json
import math
import os
import platform
import random
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import config as settings
from checkpoint import save_atomically
from data import expected_steps, open_manifests, train_loader, unheard_note, valid_loader
from model import matrix_sizes, pick_backend

# dense bf16 peak, TFLOP/s, of the vendors' data sheets
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250, "L40S": 362, "4090": 165, "MI300X": 1307}


def parameter_groups(model, c):
    """Three learning rates (CLAP, gates, the rest); weight decay on the gated blocks' matrices alone."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            rate = (c.clap_learning_rate if name.startswith("clap.") else
                    c.gate_learning_rate if name.endswith("_gate") else None)
            decay = c.weight_decay if name.startswith("xattn.") and p.ndim == 2 else 0.0
            groups.setdefault((c.learning_rate if rate is None else rate, decay), []).append(p)
    return [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]


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


def schedule(c, step, total):
    """Factor on the learning rates at a step (from 0): linear warm-up, then constant, cosine or linear."""
    if step < c.warmup_steps:
        return (step + 1) / c.warmup_steps
    done = min(1.0, (step - c.warmup_steps) / max(1, total - c.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return {"constant": 1.0, "cosine": cosine, "linear": 1 - done}[c.lr_scheduler]


def count_tokens(batch):
    return int((batch["labels"][:, 1:] != -100).sum())


def on_device(batch, device):
    """The arguments of AudioFlamingo.forward."""
    ids, windows, labels = (batch[name] for name in ("input_ids", "windows", "labels"))
    ids, windows, labels = (x.to(device, non_blocking=True) for x in (ids, windows, labels))
    return ids, windows, batch["n_windows"], labels


def flops_per_step(model, tokens, windows, answers):
    """Forward and backward operations of one step: 2 per weight and use forward, as much again for the
    gradient of the input where anything below trains, and again for that of the weight where it trains
    itself. Attention's own products are left out: a few percent."""
    per, first = model.clap.tokens_per_window * windows, min(map(int, model.xattn))
    lm = 2 * tokens * sum(matrix_sizes(b) * (2 if i >= first else 1) for i, b in enumerate(model.lm.layers))
    to_kv = sum(x.attn.to_kv.weight.numel() for x in model.xattn.values())
    gated = 2 * 3 * (tokens * (matrix_sizes(model.xattn) - to_kv) + per * to_kv)
    head = 2 * 2 * answers * model.lm.embed_tokens.weight.numel()
    audio = 2 * 3 * per * matrix_sizes(model.audio_transformer)
    return lm + gated + head + audio + model.clap.flops(windows) * (3 if model.clap_trains() else 1)


def describe_machine(device, world):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores"
    versions = f"torch {torch.__version__} | python {platform.python_version()}"
    return f"{world} x {device.type} ({name}) | {versions} | {settings.commit()}"


@torch.no_grad()
def validate(model, c, manifests, device, autocast, rank, world):
    """Mean loss per labelled token of every validation manifest, over all ranks: {name: loss}."""
    model.eval()
    losses = {}
    for name, manifest in manifests.items():
        total = torch.zeros(2, dtype=torch.float64, device=device)  # summed loss, tokens
        for batch in valid_loader(manifest, c, model.tokenizer, model.hearing, rank, world):
            n = count_tokens(batch)
            with autocast():
                _, loss = model(*on_device(batch, device))
            total += torch.tensor([loss.double().item() * n, n], device=device)
        if world > 1:
            dist.all_reduce(total)
        losses[name] = (total[0] / total[1].clamp(min=1)).item()
    model.train()
    return losses


def main(c):
    if c.lr_scheduler not in ("constant", "cosine", "linear"):
        raise ValueError(f"lr_scheduler = {c.lr_scheduler!r}, expected constant, cosine or linear")
    if not c.dataset_blending_config:
        raise ValueError("dataset_blending_config is empty: give a config file, e.g. config/pretrain.py")

    # --- where we run
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = checkpoint.pick_device(c.device)
    if device.type == "cuda" and world > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    main_rank = rank == 0
    say = tqdm.write if main_rank else (lambda *_: None)
    dtype, reason = checkpoint.pick_precision(c.precision, device)
    autocast = lambda: torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)
    torch.manual_seed(c.seed)  # the same weights on every rank
    torch.backends.cuda.matmul.allow_tf32 = True
    backend = (c.attention_backend, "asked for") if c.attention_backend != "auto" else pick_backend(device)
    say(describe_machine(device, world))
    say(f"products in {dtype} ({reason}) | cross-attention: {backend[0]} ({backend[1]})")

    # --- data, model, optimizer
    run = os.path.join(settings.place(c.expdir), c.run_name)
    blending = c.dataset_blending_output and settings.place(c.dataset_blending_output)
    for folder in filter(None, (run, blending and os.path.dirname(blending))) if main_rank else ():
        settings.need_room(folder)
    manifests = open_manifests(c, c.dataset_blending_config)
    valid = open_manifests(c, c.valid_dataset_config)
    saved_file = checkpoint.newest_checkpoint(run)
    given = settings.given(c)
    if c.pretrained_path:  # sizes that were not given are its own
        model, state = checkpoint.read_start(c, given)
    else:
        model, state = checkpoint.start(c, given)
    model.recompute = c.gradient_checkpointing
    model.set_trainable(c)
    # what a checkpoint holds: what trains, and what is drawn at random here
    kept = {n for n, p in model.named_parameters() if p.requires_grad}
    kept |= {n for n in model.state_dict() if n not in state}
    if not c.pretrained_path:
        kept |= {n for n in state if n.endswith(".added")}
    if c.clap_finetune:
        kept |= {n for n in model.state_dict() if n.startswith("clap.")}  # its BatchNorm moves, too
    frozen_hash = checkpoint.fingerprint({n: t for n, t in state.items() if n not in kept})
    saved = {}
    if saved_file:
        saved = checkpoint.load_pickle(saved_file)
        trained = checkpoint.trained_tensors(saved, model.lm.config)
        if saved["frozen_hash"] != frozen_hash or set(trained) != kept:
            raise ValueError(f"{saved_file}: this run was started with other frozen weights or trained parts"
                             f"; give another run_name, or remove {run}")
        state |= trained
    source = c.pretrained_path or c.lang_encoder_path
    checkpoint.place_weights(model, state, device, dtype, saved_file or source)
    say(parameter_table(model))
    optimizer = torch.optim.AdamW(parameter_groups(model, c), betas=(0.9, 0.999), fused=True)
    peaks = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for p in model.parameters() if p.requires_grad]

    # --- resume
    first_epoch, first_micro, step = 0, 0, 0
    seen = {"bad": 0, "items": 0, "cut": 0, "long": 0, "unheard": 0}
    if saved:
        optimizer.load_state_dict(saved["optimizer_state_dict"])
        first_epoch, first_micro, step = saved["next_epoch"], saved["next_micro"], saved["step"]
        seen |= saved["seen"]
        say(f"resumed {saved_file}: epoch {first_epoch}, step {step}")
    torch.manual_seed(c.seed * 1000 + rank + 7919 * step)  # drop path and SpecAugment differ between ranks
    random.seed(c.seed + rank)
    ddp = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None,
                                  gradient_as_bucket_view=True) if world > 1 else model
    model.train()

    # --- how long
    accumulation = c.gradient_accumulation_steps
    passes = c.num_epochs * c.dataset_blending_global_weight
    if abs(passes - 1) > 1e-6:
        say(f"note: num_epochs x dataset_blending_global_weight = {passes:g}: so many passes over the "
            f"weighted blend, not one")
    blend = sum(len(m) * c.dataset_blending_config[n] for n, m in manifests.items())
    epoch_items = blend * c.dataset_blending_global_weight
    steps = expected_steps(manifests, c, model.tokenizer, model.hearing, epoch_items, world)
    total = math.ceil(steps / accumulation) * c.num_epochs
    total = min(total, c.max_steps) if c.max_steps else total
    if main_rank:
        os.makedirs(run, exist_ok=True)
        log = open(os.path.join(run, "log.jsonl"), "a")

    sizes = {name: getattr(model.config, name) for name in settings.MODEL_SETTINGS}

    def record(**entry):
        if main_rank:
            log.write(json.dumps(entry) + "\n")
            log.flush()

    def save(name, next_epoch, next_micro):
        if main_rank:
            weights = {n: t for n, t in model.state_dict().items() if n in kept}
            content = {"epoch": next_epoch - (next_micro == 0), "step": step, "next_epoch": next_epoch,
                       "next_micro": next_micro, "seen": seen, "config": vars(c) | sizes,
                       "frozen_hash": frozen_hash, "frozen_from": source, "model_state_dict": weights,
                       "optimizer_state_dict": optimizer.state_dict(),
                       "lr_scheduler_state_dict": {"step": step}}
            save_atomically(content, os.path.join(run, name))
            interim = os.path.join(run, "checkpoint_interim.pt")
            if name != "checkpoint_interim.pt" and os.path.exists(interim):
                os.remove(interim)

    # --- the loop: an epoch is a window of the blend; a step is `accumulation` micro-batches
    bar = tqdm(total=total, initial=step, desc="train", unit="step", disable=None if main_rank else True)
    on_gpu = device.type == "cuda"
    gpu_name = torch.cuda.get_device_name(device) if on_gpu else ""
    peak = next((tflops for gpu, tflops in PEAK_TFLOPS.items() if gpu in gpu_name), 0)
    window = dict.fromkeys(("steps", "loss", "tokens", "slots", "seconds", "flops"), 0)
    window["start"], loader = time.time(), None
    for epoch in range(first_epoch, c.num_epochs):
        if c.max_steps and step >= c.max_steps:
            break
        micro = first_micro if epoch == first_epoch else 0
        loader, chosen = train_loader(manifests, c, model.tokenizer, model.hearing, epoch, rank, world, micro,
                                      loader)
        record(epoch=epoch, **loader.stats)
        for entry in chosen:
            if entry["stop"] == entry["first"]:
                say(f"note: epoch {epoch} selects no item of {entry['dataset']}")
        if main_rank and blending:
            os.makedirs(os.path.dirname(blending), exist_ok=True)
            with open(blending, "a") as f:
                f.writelines(json.dumps(entry) + "\n" for entry in chosen)
        batches = iter(loader)
        while step < (c.max_steps or math.inf):  # the number of batches by duration is an estimate
            group = [batch for _, batch in zip(range(accumulation), batches)]
            if not group:
                break
            micro += len(group)
            # One all-reduce of counts makes the loss the mean over all labelled tokens of the step, on all
            # ranks.
            bad = sum(len(b["bad"]) for b in group)
            for cause in (cause for b in group for cause in b["bad"]):
                tqdm.write(f"skipped: {cause}", file=sys.stderr)
                record(epoch=epoch, step=step, skipped=cause)
            totals = {"bad": bad, "items": sum(len(b["n_windows"]) for b in group)}
            totals |= {name: sum(b[name] for b in group) for name in ("cut", "long", "unheard")}
            counts = [sum(map(count_tokens, group)), *totals.values()]
            counts = torch.tensor(counts, dtype=torch.float64, device=device)
            if world > 1:
                dist.all_reduce(counts)
            labelled, *totals_of_all = counts.tolist()
            seen = {name: seen[name] + more for name, more in zip(totals, totals_of_all)}
            if seen["bad"] > c.max_bad_fraction * max(seen["items"] + seen["bad"], 100):
                last = (group[-1]["bad"] or ["see the lines above"])[-1]
                files = seen["items"] + seen["bad"]
                raise ValueError(f"{seen['bad']:.0f} of the {files:.0f} audio files so far could not be used "
                                 f"(more than max_bad_fraction = {c.max_bad_fraction}); last: {last}")
            factor = schedule(c, step, total)
            for options, peak_rate in zip(optimizer.param_groups, peaks):
                options["lr"] = peak_rate * factor
            step_loss = torch.zeros((), device=device)
            for i, batch in enumerate(group):
                n = count_tokens(batch)
                reduce = i + 1 == len(group)  # one all-reduce per step
                with contextlib.nullcontext() if reduce or world == 1 else ddp.no_sync():
                    with autocast():
                        _, loss = ddp(*on_device(batch, device))
                    (loss * n * world / max(labelled, 1)).backward()
                step_loss += loss.detach() * n / max(labelled, 1)
            norm = torch.nn.utils.clip_grad_norm_(parameters, c.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            bar.update()

            # --- the log line
            for b in group:
                real = int((b["input_ids"] != model.pad_id).sum())
                window["tokens"] += real * world
                window["slots"] += b["input_ids"].numel() * world
                window["seconds"] += int(b["n_windows"].sum()) * model.hearing["window_length"] * world
                tokens, windows = b["input_ids"].numel(), len(b["windows"])
                window["flops"] += flops_per_step(model, tokens, windows, count_tokens(b))
            window["steps"] += 1
            window["loss"] = window["loss"] + step_loss  # no synchronisation here
            if step % c.logging_steps == 0 or step == total:
                mean_loss = window["loss"] / window["steps"]
                if world > 1:
                    dist.all_reduce(mean_loss)
                seconds = time.time() - window["start"]
                rates = {k: window[k] / seconds for k in ("tokens", "seconds")}
                mfu = f"{window['flops'] / seconds / peak / 1e12:.0%}" if peak else "n/a"
                memory = torch.cuda.max_memory_allocated(device) / 2 ** 30 if on_gpu else peak_memory()
                gate = np.mean([abs(math.tanh(float(x.attn_gate.detach()))) for x in model.xattn.values()])
                ms = 1000 * seconds / window["steps"]
                left, pad = int((total - step) * ms / 1000), 1 - window["tokens"] / window["slots"]
                rate = c.learning_rate * factor
                faults = "".join(f" | {name} {seen[name]:.0f}" for name in ("cut", "bad") if seen[name])
                say(f"step {step}/{total} | loss {mean_loss:.4f} | lr {rate:.1e} | gnorm {norm:.2f} | "
                    f"gate {gate:.3f} | {ms:.0f} ms | {rates['tokens'] / 1000:.1f}k tok/s | "
                    f"{rates['seconds']:.0f} s-audio/s | pad {pad:.0%} | mfu {mfu} | mem {memory:.1f}G | "
                    f"eta {left // 3600}h{left % 3600 // 60:02d}m{faults}")
                record(step=step, epoch=epoch, loss=mean_loss.item(), lr=rate, gnorm=float(norm),
                       gate=float(gate), ms=ms, tok_s=rates["tokens"], audio_s=rates["seconds"], pad=pad,
                       mfu=mfu, mem_gb=memory, **seen)
                window = dict.fromkeys(window, 0) | {"start": time.time()}
            if c.save_steps and step % c.save_steps == 0 and step < total:
                save("checkpoint_interim.pt", epoch, micro)
        if epoch == first_epoch and seen["long"]:
            say(unheard_note(int(seen["items"]), int(seen["long"]), seen["unheard"], model.hearing))
        if valid:
            losses = validate(model, c, valid, device, autocast, rank, world)
            for name, value in losses.items():
                say(f"epoch {epoch} | {name} | loss {value:.4f}")
            record(epoch=epoch, step=step, valid=losses)
            window["start"] = time.time()
        save(f"checkpoint_{epoch}.pt", epoch + 1, 0)
        if main_rank and c.delete_previous_checkpoint and os.path.exists(f"{run}/checkpoint_{epoch - 1}.pt"):
            os.remove(f"{run}/checkpoint_{epoch - 1}.pt")
    bar.close()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    say(f"{run}: {step} steps done")


def peak_memory():
    """Largest resident size of this process so far, GiB."""
    import resource
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2 ** 30


if __name__ == "__main__":
    settings.run(main, "train.py")
