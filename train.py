"""Train an Audio Flamingo 2 model: one script for one CPU, one GPU and many nodes.

    python train.py config/demo.py                                            # a CPU, minutes (see make demo)
    python train.py config/sft.py --batch_size=8                              # one GPU
    torchrun --nproc_per_node=8 train.py config/pretrain.py                   # one node
    torchrun --nnodes=2 --node_rank=$RANK --master_addr=$HOST --nproc_per_node=8 train.py config/pretrain.py

A run lives in expdir/run_name/: checkpoint_<epoch>.pt and log.jsonl. The same command resumes it from its
newest checkpoint, on a CPU bit for bit. SIGTERM, SIGUSR1 and Ctrl-C save and stop it within a step; on one
node torchrun --max-restarts=3 resumes it when a process dies.
"""
import math
import random
import signal
import time
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import config as settings
from data import open_manifests, train_loader, valid_loader
from tools.checkpoint.files import load_pickle
from tools.checkpoint.run_dir import INTERIM, is_whole, newest_checkpoint
from tools.common import UserError
from tools.train.log import StepStats, count_labelled, describe_machine, parameter_table
from tools.train.optim import load_optimizer, make_optimizer, set_up_training
from tools.train.resume import (PER_RANK_SETTINGS, TrainState, check_same_run, count_samples, restore_state,
                                what_is_left)
from tools.train.run import Run, catch_signals


def lr_factor(c, state, samples, total_samples):
    """Factor on the learning rates of the next step, which takes `samples` items: linear warm-up over
    warmup_steps, then constant, or cosine or linear down to 0 at the last step. Progress is the share of the
    run's items taken at the end of the step, or of max_steps where that is further: another batch size moves
    neither."""
    if state.step < c.warmup_steps:
        return (state.step + 1) / c.warmup_steps
    progress = (state.samples + samples - state.warmup_samples) / (total_samples - state.warmup_samples)
    if c.max_steps:
        progress = max(progress, (state.step + 1 - c.warmup_steps) / (c.max_steps - c.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return {"constant": 1.0, "cosine": cosine, "linear": 1 - progress}[c.lr_scheduler]


def seed_step(c, rank, step):
    """Seed drop path and SpecAugment by rank and step alone, so that a resumed run draws the same numbers."""
    seed = ((c.seed * 1000003 + step) * 4099 + rank + 1) % 2 ** 63
    torch.manual_seed(seed)
    random.seed(seed)


def model_inputs(batch, device):
    """The arguments of AudioFlamingo.forward. Labels and numbers of windows stay on the host, where indices
    are made of them; the copies from pinned memory do not block."""
    input_ids = batch["input_ids"].to(device, non_blocking=True)
    windows = batch["windows"].to(device, non_blocking=True)
    return input_ids, windows, batch["n_windows"], batch["labels"]


def autocast(run):
    return torch.autocast(run.device.type, run.dtype, enabled=run.dtype is not torch.float32)


class StepResult(NamedTuple):
    """Of one optimizer step, over all ranks; scalar tensors on the device."""
    loss: torch.Tensor  # mean over labelled tokens
    grad_norm: torch.Tensor  # before clipping
    labelled: torch.Tensor  # number of labelled tokens
    updated: torch.Tensor  # 0 where loss or gradient was not finite, or nothing was labelled; else 1


def train_step(model, optimizer, micro_batches, run, grad_clip):
    """One optimizer step -> StepResult. The loss is the mean over the labelled tokens of all micro-batches
    and ranks. Where it or its gradient is not finite, weights and optimizer state stay as they are. Nothing
    here waits for the device."""
    labelled = torch.full((), float(sum(map(count_labelled, micro_batches))), device=run.device)
    run.sum_over_ranks(labelled)
    total_loss = torch.zeros((), device=run.device)
    with autocast(run):  # one context for all micro-steps: weights are cast to bf16 once
        for i, batch in enumerate(micro_batches):
            is_last = i + 1 == len(micro_batches)  # gradients are reduced once a step
            with nullcontext() if is_last or run.world == 1 else model.no_sync():
                _, loss = model(*model_inputs(batch, run.device))
                loss = loss * count_labelled(batch) / labelled.clamp(min=1)
                with torch.autocast(run.device.type, enabled=False):
                    (loss * run.world).backward()  # DDP divides gradients by the number of ranks
            total_loss += loss.detach()
    run.sum_over_ranks(total_loss)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    updated = (grad_norm + total_loss).isfinite() & (labelled > 0)
    # GradScaler's switch: where found_inf is 1, fused AdamW changes nothing, without the host knowing
    getattr(optimizer, "optim", optimizer).found_inf = 1 - updated.float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(total_loss, grad_norm, labelled, updated.float())


def optimizer_steps(c, run, manifests, model, state):
    """Yield (this rank's micro-batches, number of samples on all ranks, epoch of the step after it) of every
    optimizer step from where `state` stands to the end of the run. The caller advances `state`."""
    loader, accumulation = None, c.gradient_accumulation_steps
    while not state.finished(c):
        epoch = state.epoch
        first = state.step_in_epoch * accumulation
        loader = train_loader(manifests, c, model.tokenizer, model.audio_config, epoch, run.rank,
                              run.world, first, loader, state.remaining)
        if state.between_epochs():
            run.log(epoch=epoch, step=state.step + 1, **loader.stats)
        batches = iter(loader)
        sizes = [len(rows) for rows in loader.rows]  # of every micro-batch, over all ranks
        for i in range(first, len(sizes), accumulation):
            micro_batches = [next(batches) for _ in range(accumulation)]
            is_last = i + accumulation >= len(sizes)
            yield micro_batches, sum(sizes[i:i + accumulation]), epoch + is_last


@torch.no_grad()
def validation_loss(run, model, loader, signals):
    """-> mean loss per labelled token over all ranks, NaN without one; why clips could not be read."""
    total = torch.zeros(2, dtype=torch.float64, device=run.device)  # loss, labelled tokens
    errors = []
    for batch in loader:
        if signals:
            break
        with autocast(run):
            _, loss = model(*model_inputs(batch, run.device))
        labelled = count_labelled(batch)
        total[0] += loss * labelled
        total[1] += labelled
        errors += batch["errors"]
    run.sum_over_ranks(total)
    loss, labelled = total.tolist()
    return loss / labelled if labelled else math.nan, run.gather_lists(errors)


def validate(c, run, model, loaders, state, signals):
    """Log the loss on every manifest -> whether that was done: not where a signal arrives. UserError where a
    loss is not finite, or nothing is labelled."""
    losses, errors = {}, []
    model.eval()
    for name, loader in loaders.items():
        loss, unreadable = validation_loss(run, model, loader, signals)
        if run.any_rank(bool(signals))[0]:
            return False
        if not math.isfinite(loss):
            raise UserError(f"{name}: the validation loss is {loss}: no answer fits into max_tokens = "
                            f"{c.max_tokens}, or clips were not read: {unreadable[:1]}")
        run.say(f"epoch {state.epoch - 1} | {name} | loss {loss:.4f}")
        losses[name] = loss
        errors += [f"{name}: {error}" for error in unreadable]
    model.train()
    run.log(epoch=state.epoch - 1, step=state.step, valid=losses, skipped=errors)
    return True


def build_model(c):
    """-> the model without weights; its weights; the names of the tensors that its checkpoints store, which
    are trainable or randomly initialised; a hash of the frozen ones."""
    overrides = settings.overrides(c)
    if c.pretrained_path:  # sizes that the user did not give are that model's
        model, weights = checkpoint.open_pretrained(c, overrides)
    else:
        model, weights = checkpoint.init_from_parts(c, overrides)
    set_up_training(model, c)
    stored = {name for name, p in model.named_parameters() if p.requires_grad}
    for name in model.state_dict():
        batch_norm = c.clap_finetune and name.startswith("clap.")  # its running statistics change, too
        added_rows = not c.pretrained_path and name.endswith(".added")
        if name not in weights or batch_norm or added_rows:
            stored.add(name)
    frozen_hash = checkpoint.fingerprint({name: t for name, t in weights.items() if name not in stored})
    return model, weights, stored, frozen_hash


def start_or_resume(c, run, manifests):
    """-> model, optimizer, state, manifests in the order that rows are counted in, and the facts that
    checkpoints hold beside. UserError where the folder's newest checkpoint is of another run."""
    torch.manual_seed(c.seed)  # the same new weights on every rank
    model, weights, stored, frozen_hash = build_model(c)
    source = c.pretrained_path or c.lang_encoder_path
    sizes = {name: getattr(model.config, name) for name in settings.MODEL_SETTINGS}
    facts = {
        "config": vars(c) | sizes | {"world_size": run.world},
        "blend": {name: [m.digest, c.dataset_blending_config[name] * c.dataset_blending_global_weight]
                  for name, m in manifests.items()},
        "stored": sorted(stored),
        "frozen_hash": frozen_hash,
        "frozen_from": source}
    shared = {name: value for name, value in facts["config"].items() if name not in PER_RANK_SETTINGS}
    run.check_same_on_all_ranks(shared | {"blend": facts["blend"], "frozen_hash": frozen_hash})
    newest = [newest_checkpoint(run.folder, run.say, is_whole)] if run.rank == 0 else []
    newest = run.gather_lists(newest)[0]
    saved = load_pickle(newest) if newest else None
    if saved:
        trained = checkpoint.trained_tensors(saved, model.lm.config)
        check_same_run(saved, newest, facts, trained)
        weights |= trained
        manifests = {name: manifests[name] for name in saved["blend"]}
    checkpoint.place_weights(model, weights, run.device, run.dtype, newest or source)
    optimizer, facts["optimizer_names"] = make_optimizer(model, c, run.world)
    state = TrainState()
    if saved:
        load_optimizer(optimizer, facts["optimizer_names"], saved)
        state = restore_state(saved, facts, manifests, model, run)
        run.say(f"resumed {newest}: epoch {state.epoch}, step {state.step}")
    if run.rank == 0:
        run.log_file.truncate(min(state.log_size, run.log_size()))
    return model, optimizer, state, manifests, facts


def save_checkpoint(c, run, model, optimizer, state, facts):
    """Save an epoch's checkpoint at its end, inside one the interim checkpoint. Called on all ranks."""
    if state.skipped_steps == state.step:
        return  # nothing has been learned
    if c.shard_optimizer and run.world > 1:
        optimizer.consolidate_state_dict(0)
    if run.rank > 0:
        return
    weights = {name: tensor for name, tensor in model.state_dict().items() if name in facts["stored"]}
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise UserError(f"step {state.step}: weights are not finite and not saved; learning_rate = "
                        f"{c.learning_rate:g}, weight_decay = {c.weight_decay:g}")
    state.log_size = run.log_size()
    epoch = state.epoch - state.between_epochs()  # the last one trained
    content = facts | {
        "epoch": epoch,
        "step": state.step,
        "train_state": vars(state),
        "model_state_dict": weights,
        "optimizer_state_dict": optimizer.state_dict()}
    run.save(f"checkpoint_{epoch}.pt" if state.between_epochs() else INTERIM, content)


def train(c, run):
    # --- data, model, optimizer, state
    run.say(describe_machine(run.device, run.world))
    manifests = open_manifests(c, c.dataset_blending_config)
    valid = open_manifests(c, c.valid_dataset_config)
    total_samples = count_samples(c, run, manifests)
    model, optimizer, state, manifests, facts = start_or_resume(c, run, manifests)
    run.say(parameter_table(model))
    valid = {name: valid_loader(manifest, c, model.tokenizer, model.audio_config, run.rank, run.world)
             for name, manifest in valid.items()}
    if c.compile:
        for block in [*model.lm.layers, *model.xattn.values()]:
            block.compile()
    ddp = model
    if run.world > 1:  # without device_ids, which would move labels to the device
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=c.clap_finetune)
    model.train()

    # --- the loop
    stats = StepStats(c, run, state, model)
    bar = tqdm(initial=state.step, desc="train", unit="step", disable=None if run.rank == 0 else True)
    saved_at, stop = time.time(), False
    signals = catch_signals()
    validated = False
    if valid and state.validation_due(c):  # a stop or a kill prevented it
        validated = validate(c, run, model, valid, state, signals)
    for micro_batches, samples, next_epoch in optimizer_steps(c, run, manifests, model, state):
        epoch = state.epoch
        factor = lr_factor(c, state, samples, total_samples)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        seed_step(c, run.rank, state.step)
        result = train_step(ddp, optimizer, micro_batches, run, c.grad_clip)
        state.advance(c, samples, next_epoch)
        stats.add(result, micro_batches)
        bar.update()

        overdue = 0 < 60 * c.save_minutes < time.time() - saved_at
        stop, overdue = run.any_rank(bool(signals), overdue)
        finished = state.finished(c)
        save_due = finished or stop or overdue or state.epoch_save_due(c)
        if save_due or state.step % c.logging_steps == 0:
            bar.total = state.estimate_steps(c, total_samples)
            stats.log_line(epoch, c.learning_rate * factor, bar.total)  # raises where training diverged
        if save_due:
            save_checkpoint(c, run, model, optimizer, state, facts)
            saved_at = time.time()
        if valid and state.validation_due(c):
            validated = validate(c, run, model, valid, state, signals)
            stats.start = time.time()
        if finished or stop:
            break
    bar.close()
    run.wait_for_checkpoint()
    if state.skipped_steps == state.step:
        raise UserError(f"none of the {state.step} steps made an update: {stats.explain()}")
    run.say(f"{run.folder}: {state.step} steps done, {state.skipped_steps} of them without an update")
    run.say(what_is_left(c, state, validated, signals, stop))
    return 130 if signal.SIGINT in signals else 0


def main(c):
    if not c.dataset_blending_config:
        raise UserError("dataset_blending_config is empty: give a config file, e.g. config/pretrain.py")
    if c.lr_scheduler not in ("constant", "cosine", "linear"):
        raise UserError(f"lr_scheduler = {c.lr_scheduler!r}, expected constant, cosine or linear")
    run = Run(c)
    try:
        code = train(c, run)
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise UserError(f"{error} It was killed, most likely for want of memory") from error
    finally:
        run.wait_for_checkpoint()
    if run.world > 1:
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    settings.run(main, "train.py")
