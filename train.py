"""Train an Audio Flamingo 2 model: one script for one CPU, one GPU and many nodes.

    python train.py config/demo.py                                            # a CPU, minutes (see make demo)
    python train.py config/sft.py --batch_size=8                              # one GPU
    torchrun --nproc_per_node=8 train.py config/pretrain.py                   # one node
    torchrun --nnodes=2 --node_rank=$RANK --master_addr=$HOST --nproc_per_node=8 train.py config/pretrain.py

A run lives in expdir/run_name/: checkpoint_<epoch>.pt, log.jsonl. Started again, it goes on from its newest
checkpoint, to the bit where the step takes the same items. SIGTERM, SIGUSR1 and Ctrl-C save and end it;
torchrun --max-restarts=3 starts it again by itself when a process dies.
"""
import contextlib
import math
import os
import random
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import config as settings
from data import open_manifests, train_loader, truncation_warning, valid_loader
from model import pick_backend
from tools.train import log as meters
from tools.train import run as runs
from tools.checkpoint.devices import pick_device, pick_precision
from tools.train.log import flops_per_step, parameter_table, peak_memory
from tools.train.optim import clip, load_optimizer, make_optimizer
from tools.train.resume import (OWN, STANDS, changes, check_same_run, epoch_items, plan_of, read_saved,
                            rest_of_epoch, what_is_left)
from tools.checkpoint.run_dir import newest_whole
from tools.common import UserError
from tools.train.watch import COUNTS, Watch, count, count_tokens


def schedule(c, step, items, per_step, total_items):
    """Factor on the learning rates at a step (from 0): linear warm-up, then by the share of the items done,
    which stays where it is when a run goes on with another batch: constant, cosine or linear."""
    if step < c.warmup_steps:
        return (step + 1) / c.warmup_steps
    warm = c.warmup_steps * per_step
    done = min(1.0, max(0.0, items - warm) / max(1, total_items - warm))
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return {"constant": 1.0, "cosine": cosine, "linear": 1 - done}[c.lr_scheduler]


def seed_step(c, rank, step):
    """Drop path and SpecAugment differ between ranks and steps, and not between a straight run and a resumed
    one: random numbers depend on nothing else."""
    torch.manual_seed(((c.seed * 1000003 + step) * 4099 + rank + 1) % 2 ** 63)
    random.seed(torch.initial_seed())


def on_device(batch, device):
    """The arguments of AudioFlamingo.forward. Labels and numbers of windows stay on the host: positions are
    made of them."""
    return *runs.wait_for_copy(batch, device), batch["n_windows"], batch["labels"]


@torch.no_grad()
def validate(model, c, loaders, device, autocast, world, control, came):
    """Mean loss per labelled token of every validation manifest, over all ranks: {name: loss}, None if a
    signal came; and what could not be read. ValueError where no token is labelled."""
    model.eval()
    losses, bad = {}, []
    for name, loader in loaders.items():
        total = torch.zeros(3, dtype=torch.float64, device=device)  # summed loss, tokens, outputs cut off
        unread = []
        for batch in runs.prefetch_to_gpu(loader, device):
            if came:
                break
            n = count_tokens(batch)
            unread += batch["bad"]
            with autocast():
                _, loss = model(*on_device(batch, device))
            total += torch.stack([loss.double() * n, *total.new_tensor([n, batch["cut"]])])
        if runs.any_rank([bool(came)], control)[0]:
            return None, []
        if world > 1:
            dist.all_reduce(total)
        unread = runs.all_gather_lists(unread, control)
        loss, labelled, cut = total.tolist()
        if not labelled:
            why = f"{cut:.0f} answers cut off by max_tokens = {c.max_tokens}, {len(unread)} clips not read"
            raise UserError(f"{name}: no labelled token in {len(loader.dataset)} items: {why}" +
                             (f", e.g. {unread[0]}" if unread else ""))
        if not math.isfinite(loss):
            raise UserError(f"{name}: the validation loss is {loss}")
        losses[name] = loss / labelled
        bad += [f"{name}: {cause}" for cause in unread]
    model.train()
    return losses, bad


def train(c, run, rank, world, local_rank):
    if not c.dataset_blending_config:
        raise UserError("dataset_blending_config is empty: give a config file, e.g. config/pretrain.py")
    if c.lr_scheduler not in ("constant", "cosine", "linear"):
        raise UserError(f"lr_scheduler = {c.lr_scheduler!r}, expected constant, cosine or linear")

    # --- where we run
    device = pick_device(c.device)
    if device.type == "cuda" and world > 1:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    main_rank, control = rank == 0, None
    dtype, reason = pick_precision(c.precision, device)
    if world > 1:  # control: between hosts, no device waits
        control = runs.join("nccl" if device.type == "cuda" else "gloo", rank, world)
    say = tqdm.write if main_rank else (lambda *_: None)
    note = lambda text: main_rank and tqdm.write(text, file=sys.stderr)
    autocast = lambda: torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)
    torch.manual_seed(c.seed)  # the same weights on every rank
    torch.backends.cuda.matmul.allow_tf32 = True
    backend = (c.attention_backend, "asked for") if c.attention_backend != "auto" else pick_backend(device)
    say(meters.describe_machine(device, world))
    say(f"products in {dtype} ({reason}) | cross-attention: {backend[0]} ({backend[1]})")

    # --- data, model, optimizer
    manifests = open_manifests(c, c.dataset_blending_config)
    valid = open_manifests(c, c.valid_dataset_config)
    counts = epoch_items(manifests, valid, c)
    blend = {n: [len(m), c.dataset_blending_config[n] * c.dataset_blending_global_weight]
             for n, m in manifests.items()}
    digests = {n: m.items.told["digest"] for n, m in manifests.items()}
    saved_file = newest_whole(run.folder, say)
    given = settings.overrides(c)
    if c.pretrained_path:  # sizes that were not given are its own
        model, state = checkpoint.open_pretrained(c, given)
    else:
        model, state = checkpoint.init_from_parts(c, given)
    model.recompute, model.clap.recompute = c.gradient_checkpointing, c.clap_gradient_checkpointing
    heard = model.tokenizer, model.audio_config, rank, world
    valid = {name: valid_loader(manifest, c, *heard) for name, manifest in valid.items()}
    model.set_trainable(c)
    # what a checkpoint holds: what trains, and what is drawn at random here
    kept = {n for n, p in model.named_parameters() if p.requires_grad}
    kept |= {n for n in model.state_dict() if n not in state}
    if not c.pretrained_path:
        kept |= {n for n in state if n.endswith(".added")}
    if c.clap_finetune:
        kept |= {n for n in model.state_dict() if n.startswith("clap.")}  # its BatchNorm moves, too
    frozen_hash = checkpoint.fingerprint({n: t for n, t in state.items() if n not in kept})
    here = digests | {"checkpoint": os.path.basename(saved_file or ""), "frozen weights": frozen_hash}
    runs.check_same_on_all_ranks(here | {n: v for n, v in vars(c).items() if n not in OWN}, control)
    saved = {}
    if saved_file:
        saved = read_saved(saved_file)
        trained = checkpoint.trained_tensors(saved, model.lm.config)
        check_same_run(saved, saved_file, frozen_hash, kept, trained, blend, c)
        manifests = {name: manifests[name] for name in saved["blend"]}  # in this order its rows are counted
        state |= trained
    source = c.pretrained_path or c.lang_encoder_path
    checkpoint.place_weights(model, state, device, dtype, saved_file or source)
    say(parameter_table(model))
    for block in [*model.lm.layers, *model.xattn.values()] if c.compile else ():
        block.compile()
    optimizer, names = make_optimizer(model, c, world)
    parameters = [p for p in model.parameters() if p.requires_grad]
    sizes = {name: getattr(model.config, name) for name in settings.MODEL_SETTINGS}

    # --- where it stands: whole epochs, optimizer steps of this one, items of the blend
    plan, accumulation = plan_of(c, world, model.audio_config), c.gradient_accumulation_steps
    at = dict.fromkeys(STANDS, 0) | {"only": None}
    seen = dict.fromkeys(COUNTS, 0)
    if saved:
        load_optimizer(optimizer, names, saved)
        at = {name: saved[name] for name in at}
        seen |= saved["seen"]
        say(f"resumed {saved_file}: epoch {at['next_epoch']}, step {at['step']}")
        if changed := changes(saved, c, world, digests):
            say(f"note: other settings than before, in effect from now on: {changed}")
        if at["steps_in_epoch"] and saved["plan"] != plan:
            at["only"] = rest_of_epoch(manifests, model.tokenizer, saved).tolist()
            at["steps_in_epoch"] = 0
            say(f"note: a step takes other items than before; the {len(at['only'])} items of epoch "
                f"{at['next_epoch']} that are left are divided anew: not bit for bit the run it was")
    run.begin(at["next_epoch"] + (at["steps_in_epoch"] > 0 or at["only"] is not None), at["step"])
    ddp = model
    if world > 1:  # every rank has read the frozen weights: only what trains is compared, sent and reduced
        frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
        frozen += [n for n, _ in model.named_buffers() if not c.clap_finetune]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
        ddp = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None,
                                      gradient_as_bucket_view=True)
    model.train()

    # --- how long
    passes = c.num_epochs * c.dataset_blending_global_weight
    if abs(passes - 1) > 1e-6:
        say(f"note: num_epochs x dataset_blending_global_weight = {passes:g}: so many passes over the "
            f"weighted blend, not one")
    limit, per_step, total_items = c.max_steps or math.inf, plan["items per step"], int(counts.sum())
    if c.max_steps:
        total_items = min(total_items, at["done_items"] + max(0, limit - at["step"]) * per_step)
    if c.warmup_steps * per_step > total_items:
        say(f"note: warmup_steps = {c.warmup_steps}, and there are about {total_items // per_step} steps: "
            f"learning_rate = {c.learning_rate:g} is never reached")

    watch = Watch(c, run, at, seen, device, control, saved_file)
    forward = lambda batch: model(*on_device(batch, device))[1]

    def save(name):
        watch.look(last_step)
        if at["skipped_steps"] == at["step"]:
            return  # nothing has been learnt
        with autocast():
            watch.check_weights(model, forward)
        if c.shard_optimizer and world > 1:
            optimizer.consolidate_state_dict(0)
        if main_rank:
            content = at | {
                "epoch": at["next_epoch"] - (at["steps_in_epoch"] == 0), "seen": seen, "plan": plan,
                "world": world, "blend": blend, "digests": digests, "config": vars(c) | sizes,
                "frozen_hash": frozen_hash, "frozen_from": source,
                "model_state_dict": {n: t for n, t in model.state_dict().items() if n in kept},
                "optimizer_state_dict": optimizer.state_dict(), "optimizer_names": names,
                "lr_scheduler_state_dict": {"step": at["step"]}}
            run.save(name, content)
        watch.newest = os.path.join(run.folder, name)

    def look_at_valid(epoch):
        losses, unread = validate(model, c, valid, device, autocast, world, control, came)
        for name, value in (losses or {}).items():
            say(f"epoch {epoch} | {name} | loss {value:.4f}")
        for cause in unread:
            note(f"skipped: {cause}")
        if losses:
            run.write(epoch=epoch, step=at["step"], valid=losses, skipped=unread)
        return losses is None

    ended = at["next_epoch"] if valid and saved and not at["steps_in_epoch"] and at["only"] is None else 0
    due = ended and (ended == c.num_epochs or ended % c.valid_epochs == 0)
    came, stop, loader = runs.catch_signals(), False, None
    if runs.any_rank([main_rank and due and not run.validated(at["step"])], control)[0]:
        stop = look_at_valid(ended - 1)  # the process died between checkpoint and validation

    # --- the loop: an epoch is a window of the blend; a step is `accumulation` micro-batches
    steps_in = lambda items: int(np.ceil(items / per_step).sum())  # rounded up in every epoch
    bar = tqdm(initial=at["step"], desc="train", unit="step", disable=None if main_rank else True)
    peak, first_epoch, saved_at = meters.peak_flops(device), at["next_epoch"], time.time()
    window = dict.fromkeys(("steps", "good", "loss", "tokens", "slots", "seconds", "flops"), 0)
    window["start"] = time.time()
    run.profiler = runs.profiler(run.folder, device) if c.profile and main_rank else None
    for epoch in range(first_epoch, c.num_epochs):
        if stop or at["step"] >= limit:
            break
        taken = []
        if counts[epoch]:
            first = at["steps_in_epoch"] * accumulation
            loader, chosen = train_loader(manifests, c, model.tokenizer, model.audio_config, epoch, rank, world,
                                          first, loader, at["only"])
            if not first and at["only"] is None:
                run.write(epoch=epoch, step=at["step"], **loader.stats)
                run.write_blend(chosen)
            for entry in chosen:
                if entry["stop"] == entry["first"]:
                    say(f"note: epoch {epoch} selects no item of {entry['dataset']}")
            parts = list(map(len, loader.rows))
            taken = [sum(parts[i:i + accumulation]) for i in range(first, len(parts), accumulation)]
            per_step = sum(taken) / len(taken) if c.max_windows_per_batch and taken else per_step
            batches = runs.prefetch_to_gpu(loader, device)
        last_step = min(limit, at["step"] + len(taken) + steps_in(counts[epoch + 1:]))
        bar.total = last_step
        for items in taken:
            if at["step"] >= limit:
                break
            group = [next(batches) for _ in range(accumulation)]
            factor = schedule(c, at["step"], at["done_items"], per_step, total_items)
            for options in optimizer.param_groups:
                options["lr"] = options["peak"] * factor
            seed_step(c, rank, at["step"])
            # One all-reduce of counts makes the loss the mean over all labelled tokens of the step, on all
            # ranks. It stays on the device.
            of_step = sum(count(batch) for batch in group).to(device, non_blocking=True)
            if world > 1:
                dist.all_reduce(of_step)
            labelled, step_loss = of_step[0].clamp(min=1).float(), torch.zeros((), device=device)
            with autocast():  # around all of them: trained matrices are cast once a step
                for i, batch in enumerate(group):
                    reduce = i + 1 == len(group)  # one all-reduce per step
                    with contextlib.nullcontext() if reduce or world == 1 else ddp.no_sync():
                        _, loss = ddp(*on_device(batch, device))
                        loss = loss * count_tokens(batch) / labelled
                        with torch.autocast(device.type, enabled=False):
                            (loss * world).backward()
                    step_loss += loss.detach()
            if world > 1:
                dist.all_reduce(step_loss)
            norm = clip(optimizer, parameters, c.grad_clip)
            # 1: not finite, 2: nothing to learn from: AdamW leaves everything as it is, on all ranks alike
            flag = torch.where(of_step[0] == 0, 2.0, (~(norm + step_loss).isfinite()).float())
            getattr(optimizer, "optim", optimizer).found_inf = (flag > 0).float()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            at |= {"step": at["step"] + 1, "steps_in_epoch": at["steps_in_epoch"] + 1,
                   "done_items": at["done_items"] + items}
            watch.add(at["step"], flag, of_step, group)
            bar.update()
            if run.profiler:
                run.profiler.step()

            # --- the log line
            for b in group:
                slots = b["input_ids"].numel()
                window["tokens"] += int(np.count_nonzero(b["input_ids"].numpy() != model.pad_id)) * world
                window["slots"] += slots * world
                window["seconds"] += len(b["windows"]) * model.audio_config["window_length"] * world
                window["flops"] += flops_per_step(model, slots, len(b["windows"]), count_tokens(b))
            window["steps"] += 1
            window["good"] = window["good"] + (flag == 0)  # no synchronisation here
            window["loss"] = window["loss"] + torch.where(flag == 0, step_loss, 0.0)
            if at["step"] % c.logging_steps == 0 or at["step"] == last_step:
                watch.look(last_step)
                seconds = time.time() - window["start"]
                loss = float(window["loss"] / window["good"]) if float(window["good"]) else math.nan
                gates = meters.gates(model)
                ms = 1000 * seconds / window["steps"]
                entry = dict(
                    step=at["step"], epoch=epoch, loss=loss, lr=c.learning_rate * factor, gnorm=float(norm),
                    gate=float(np.mean(np.abs(gates["gates"]))), ms=ms, tok_s=window["tokens"] / seconds,
                    audio_s=window["seconds"] / seconds, pad=1 - window["tokens"] / window["slots"],
                    mfu=window["flops"] / seconds / peak if peak else None, mem_gb=peak_memory(device),
                    skipped_steps=at["skipped_steps"], items_done=at["done_items"], **seen, **gates)
                say(meters.line(entry, last_step, (last_step - at["step"]) * ms / 1000))
                run.write(**entry)
                window = dict.fromkeys(window, 0) | {"start": time.time()}
            late = main_rank and c.save_minutes and time.time() - saved_at > 60 * c.save_minutes
            stop, late = runs.any_rank([bool(came), bool(late)], control)
            if stop:
                break
            if late or (c.save_steps and at["step"] % c.save_steps == 0):
                if at["step"] < last_step:
                    save("checkpoint_interim.pt")
                    saved_at = time.time()
        if counts[epoch] and at["steps_in_epoch"] * accumulation < len(parts):  # stopped in its middle
            save("checkpoint_interim.pt" if stop else f"checkpoint_{epoch}.pt")
            break
        at |= {"next_epoch": epoch + 1, "steps_in_epoch": 0, "only": None}
        if epoch == first_epoch and seen["long"]:
            say(truncation_warning(int(seen["items"]), int(seen["long"]), seen["unheard"], model.audio_config))
        last = stop or epoch + 1 == c.num_epochs or at["step"] >= limit
        if last or (epoch + 1) % c.save_epochs == 0:
            save(f"checkpoint_{epoch}.pt")
            saved_at = time.time()
        if valid and not stop and (last or (epoch + 1) % c.valid_epochs == 0):
            stop = look_at_valid(epoch)
            window["start"] = time.time()
    bar.close()
    if world > 1:
        dist.barrier(control)
        dist.destroy_process_group()
    run.close()
    skipped = at["skipped_steps"] and f", {at['skipped_steps']} of them without an update (see log.jsonl)"
    say(f"{run.folder}: {at['step']} steps done{skipped or ''}")
    if left := what_is_left(c, at, stop, came, watch.newest):
        say(left)
    return 130 if came and came[0] == signal.SIGINT else 0


def main(c):
    rank, world, local_rank = runs.processes()
    run = runs.Run(c, rank)  # its folder, found unwritable or taken before anything is loaded
    try:
        return train(c, run, rank, world, local_rank)
    except RuntimeError as error:
        if "DataLoader worker (pid" in str(error):
            raise UserError(f"{error} A data loading process was killed: out of memory, most likely") from error
        if world == 1 or not any(word in str(error).lower() for word in ("gloo", "nccl", "peer")):
            raise
        raise UserError(f"rank {rank}: another rank ended ({str(error).splitlines()[0][:200]})") from error
    finally:
        runs.release_signals()
        run.end()


if __name__ == "__main__":
    settings.run(main, "train.py")
