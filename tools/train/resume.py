"""Resume a run: the training state in a checkpoint, and whether today's settings can go on from it."""
import json
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

import config as settings
from data import plan_epoch
from model import AUDIO_SETTINGS
from tools.common import UserError, atomic_write, join_names

PER_RANK_SETTINGS = (*settings.PATHS, "expdir", "cache_dir", "user_set", "files", "device", "num_workers",
                     "cache_audio")
UNREPORTED_SETTINGS = ("expdir", "run_name", "user_set", "files", "device", "max_steps")
# what decides which items each step takes: with equal values a resumed run is bit-identical on a CPU
SAMPLE_ORDER_SETTINGS = ("world_size", "batch_size", "gradient_accumulation_steps", "seed", "bucket_batches",
                         "max_windows_per_batch", *AUDIO_SETTINGS)
OTHER_RUN = "give another --run_name (its weights can be that run's --pretrained_path)"


@dataclass
class TrainState:
    """What a resumed run needs beside weights and optimizer state."""
    step: int = 0  # optimizer steps taken
    epoch: int = 0  # the epoch of the next step
    step_in_epoch: int = 0  # steps taken of that epoch
    samples: int = 0  # items of the blend taken
    warmup_samples: int = 0  # of them during warm-up
    skipped_steps: int = 0  # steps without an update
    remaining: list | None = None  # rows of the epoch to take, where its rest was divided anew; None: all
    log_size: int = 0  # bytes of log.jsonl: what follows is logged again
    counts: dict = field(default_factory=dict)  # of StepStats

    def advance(self, c, samples, next_epoch):
        """Count a step of so many items; next_epoch: the epoch of the step after it."""
        if self.step < c.warmup_steps:
            self.warmup_samples += samples
        self.step += 1
        self.samples += samples
        self.step_in_epoch += 1
        if next_epoch > self.epoch:
            self.epoch, self.step_in_epoch, self.remaining = next_epoch, 0, None

    def between_epochs(self):
        return self.step_in_epoch == 0 and self.remaining is None

    def finished(self, c):
        return self.epoch >= c.num_epochs or 0 < c.max_steps <= self.step

    def estimate_steps(self, c, total_samples):
        """Steps of the whole run, if they go on to take as many samples."""
        steps = math.ceil(total_samples * self.step / self.samples)
        return min(steps, c.max_steps or steps)

    def epoch_save_due(self, c):
        return self.between_epochs() and self.epoch % c.save_epochs == 0

    def validation_due(self, c):
        due = self.finished(c) or self.epoch % c.valid_epochs == 0
        return due and self.step > 0 and self.between_epochs()


def blending_record(c, manifests):
    """The positions that every epoch takes of every manifest's stream, as Manifest.epoch does."""
    record = []
    for epoch in range(c.num_epochs):
        for name, manifest in manifests.items():
            passes = c.dataset_blending_global_weight * c.dataset_blending_config[name]
            record.append({
                "epoch": epoch,
                "dataset": name,
                "total_num": len(manifest),
                "weight": passes,
                "first": int(epoch * len(manifest) * passes),
                "stop": int((epoch + 1) * len(manifest) * passes)})
    return record


def count_samples(c, run, manifests):
    """-> number of items in all epochs of the run; UserError where an epoch takes none. Writes
    dataset_blending_output."""
    record = blending_record(c, manifests)
    items = Counter()  # of every epoch
    for entry in record:
        items[entry["epoch"]] += entry["stop"] - entry["first"]
    if not all(items.values()):
        raise UserError(f"an epoch takes no item of {join_names(list(manifests))}: "
                        f"dataset_blending_global_weight = {c.dataset_blending_global_weight:g} is too small")
    if c.dataset_blending_output and run.rank == 0:
        path = settings.resolve_path(c.dataset_blending_output)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with atomic_write(path) as f:
            f.writelines(json.dumps(entry) + "\n" for entry in record)
    passes = c.num_epochs * c.dataset_blending_global_weight
    if abs(passes - 1) > 1e-6:
        run.say(f"note: num_epochs x dataset_blending_global_weight = {passes:g} passes over the blend")
    return items.total()


def check_same_run(saved, file, facts, trained):
    """UserError where these settings cannot go on from a checkpoint of the run's folder."""
    if "train_state" not in saved:
        raise UserError(f"{file}: saved by an older version or another program, training cannot resume from "
                        f"it; {OTHER_RUN}")
    changes = changed_settings(saved, facts) or "no setting changed, but files did"
    reason = None
    if saved["frozen_hash"] != facts["frozen_hash"] or set(trained) != set(facts["stored"]):
        reason = "other frozen weights or trained parts"
    elif saved["blend"] != facts["blend"]:
        changed = [name for name in facts["blend"] if saved["blend"].get(name) != facts["blend"][name]]
        reason = f"another blend, of {join_names(changed)}"
    if reason:
        raise UserError(f"{file}: the run was started with {reason} ({changes}); {OTHER_RUN}")


def changed_settings(saved, facts):
    """The settings that are not what a checkpoint was saved with, in one line."""
    old, new = saved["config"], facts["config"]
    names = [name for name in new if name in old and name not in UNREPORTED_SETTINGS]
    return ", ".join(f"{name} {old[name]!r} -> {new[name]!r}" for name in names if old[name] != new[name])


def restore_state(saved, facts, manifests, model, run):
    """-> the TrainState of a checkpoint. Where steps would take other items than before, the rest of its
    epoch is divided anew, so that every item is still taken once."""
    state = TrainState(**saved["train_state"])
    old, new = saved["config"], facts["config"]
    changes = changed_settings(saved, facts)
    if changes:
        run.say(f"note: changed settings, in effect from now on: {changes}")
    if state.step_in_epoch and any(old[name] != new[name] for name in SAMPLE_ORDER_SETTINGS):
        # the items that the saved run has not taken, from its plan, which is made again
        audio_config = model.audio_config | {name: old[name] for name in AUDIO_SETTINGS}
        _, rows, *_ = plan_epoch(manifests, SimpleNamespace(**old), model.tokenizer, audio_config,
                                 state.epoch, world=old["world_size"], only=state.remaining)
        left = rows[state.step_in_epoch * old["gradient_accumulation_steps"]:]
        state.remaining, state.step_in_epoch = np.sort(np.concatenate(left)).tolist(), 0
        run.say(f"note: the {len(state.remaining)} items left of epoch {state.epoch} are divided anew: not "
                f"bit-identical to a run with the old settings")
    return state


def what_is_left(c, state, validated, signals, stopped):
    """A line for people: whether the run is finished, or what is left and why."""
    missing = "the last validation"
    if state.epoch < c.num_epochs:
        missing = f"epoch {state.epoch} of {c.num_epochs}"
        if c.valid_dataset_config and not state.between_epochs():
            missing += ", and its validation,"
    elif validated or not c.valid_dataset_config:
        return "all epochs are finished"
    signal = signals[0].name if signals else "a signal to another rank"
    reason = f"stopped by {signal}" if stopped or signals else f"max_steps = {c.max_steps}"
    return f"{reason}: {missing} is not finished; the same command resumes the run"
