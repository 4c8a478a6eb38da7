"""Resume a run: the training state in a checkpoint, and whether today's settings can go on from it."""
import signal
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

import config as settings
from data import plan_epoch
from model import AUDIO_SETTINGS
from tools.checkpoint.files import load_pickle
from tools.common import UserError
from tools.train.log import COUNTS

# settings that may differ between ranks, and those whose change is not worth a note
PER_RANK_SETTINGS = (*settings.PATHS, "expdir", "cache_dir", "user_set", "files", "device", "num_workers",
                     "cache_audio")
SILENT_SETTINGS = ("expdir", "run_name", "user_set", "files", "device", "max_steps")
CHECKPOINT_KEYS = ("train_state", "sample_order", "world_size", "blend", "digests", "config", "frozen_hash",
                   "model_state_dict", "optimizer_state_dict", "optimizer_names")


@dataclass
class TrainState:
    """What a resumed run needs beside weights and optimizer state."""
    step: int = 0  # optimizer steps taken
    epoch: int = 0  # the epoch of the next step
    step_in_epoch: int = 0  # steps taken of that epoch
    samples: int = 0  # items of the blend taken
    skipped_steps: int = 0  # steps without an update
    remaining: list | None = None  # rows of the epoch that are left where it was divided anew; None: all
    counts: dict = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))

    def advance(self, samples, next_epoch):
        """Count a step of so many items; next_epoch: the epoch of the step after it."""
        self.step += 1
        self.samples += samples
        self.step_in_epoch += 1
        if next_epoch > self.epoch:
            self.epoch, self.step_in_epoch, self.remaining = next_epoch, 0, None

    def between_epochs(self):
        """Whether the next step is an epoch's first; not where the rest of an epoch was divided anew."""
        return self.step_in_epoch == 0 and self.remaining is None

    def finished(self, c):
        return self.epoch >= c.num_epochs or 0 < c.max_steps <= self.step

    def validation_due(self, c):
        epoch_ended = self.step > 0 and self.between_epochs()
        return epoch_ended and (self.finished(c) or self.epoch % c.valid_epochs == 0)


def items_per_epoch(manifests, c):
    """(num_epochs,) int64; UserError where an epoch selects no item."""
    for manifest in manifests.values():
        if not len(manifest):
            raise UserError(f"{manifest.file}: total_num = 0, expected items")
    epochs = np.arange(c.num_epochs + 1)
    counts = 0
    for name, manifest in manifests.items():
        per_epoch = len(manifest) * c.dataset_blending_global_weight * c.dataset_blending_config[name]
        counts = counts + np.diff((epochs * per_epoch).astype(np.int64))
    if not counts.all():
        raise UserError(f"dataset_blending_global_weight = {c.dataset_blending_global_weight:g}: epoch "
                        f"{counts.argmin()} selects no item of these manifests; expected a larger weight")
    return counts


def sample_order(c, world, audio_config):
    """The settings that decide which items each step takes; where they are equal, a resumed run is bit-identical
    on a CPU. Batches of another size are the same order if a step takes as many items."""
    order = {"items per step": c.batch_size * c.gradient_accumulation_steps * world, "seed": c.seed,
             "bucket_batches": c.bucket_batches, "max_windows_per_batch": c.max_windows_per_batch}
    if c.max_windows_per_batch:
        order |= {"batch_size": c.batch_size, "world": world}
    return order | audio_config


def describe_blend(manifests, c):
    """What a checkpoint says of its data: {manifest: items and passes per epoch}, {manifest: digest of its items}."""
    weight = c.dataset_blending_global_weight
    blend = {name: [len(m), c.dataset_blending_config[name] * weight] for name, m in manifests.items()}
    return {"blend": blend, "digests": {name: m.digest for name, m in manifests.items()}}


def read_checkpoint(file):
    """The content of a checkpoint that training can resume from; UserError for any other."""
    saved = load_pickle(file)
    missing = [key for key in CHECKPOINT_KEYS if key not in saved]
    if missing:
        raise UserError(f"{file}: no {missing[0]} in it: saved by an older version or another program, so training "
                        f"cannot resume; start from its weights by --pretrained_path and another --run_name")
    return saved


def check_same_run(saved, facts, file, trained):
    """UserError where these settings cannot go on from a checkpoint of the run's folder."""
    advice = "give another --run_name (its weights can be that run's --pretrained_path)"
    if saved["frozen_hash"] != facts["frozen_hash"] or set(trained) != set(facts["stored"]):
        changes = changed_settings(saved, facts) or "no setting changed, but files did"
        raise UserError(f"{file}: the run was started with other frozen weights or trained parts ({changes}); "
                        f"{advice}")
    if saved["blend"] != facts["blend"]:
        raise UserError(f"{file}: the run was started with another blend ({saved['blend']} items and passes an "
                        f"epoch, now {facts['blend']}); {advice}")
    if saved["train_state"]["epoch"] > facts["config"]["num_epochs"]:
        raise UserError(f"{file} has trained longer than num_epochs = {facts['config']['num_epochs']}; {advice}")


def changed_settings(saved, facts):
    """Settings, world size and manifests that differ from those a checkpoint was saved with, in one line."""
    old, new = ({**content["config"], "world_size": content["world_size"]} for content in (saved, facts))
    names = [name for name in old if name in new and name not in SILENT_SETTINGS]
    changes = [f"{name} {old[name]!r} -> {new[name]!r}" for name in names if old[name] != new[name]]
    changes += [f"the items of {name}" for name in facts["digests"] if
                saved["digests"].get(name) != facts["digests"][name]]
    return ", ".join(changes)


def restore_state(saved, facts, manifests, tokenizer, run):
    """-> the TrainState of a checkpoint. Where steps would take other items than before, what is left of its epoch
    is divided anew: every item is still trained on once."""
    state = TrainState(**saved["train_state"])
    changes = changed_settings(saved, facts)
    if changes:
        run.say(f"note: changed settings, in effect from now on: {changes}")
    if state.step_in_epoch and saved["sample_order"] != facts["sample_order"]:
        state.remaining = remaining_rows(saved, manifests, tokenizer)
        state.step_in_epoch = 0
        run.say(f"note: the {len(state.remaining)} items left of epoch {state.epoch} are divided anew: the run is not "
                f"bit-identical to one with the old settings")
    return state


def remaining_rows(saved, manifests, tokenizer):
    """Rows of the interrupted epoch that the saved run has not trained on: from its step on, of its plan made again."""
    old, state = SimpleNamespace(**saved["config"]), saved["train_state"]
    audio_config = {name: saved["sample_order"][name] for name in (*AUDIO_SETTINGS, "sample_rate")}
    _, rows, *_ = plan_epoch(manifests, old, tokenizer, audio_config, state["epoch"], 0, saved["world_size"],
                             only=state["remaining"])
    return np.sort(np.concatenate(rows[state["step_in_epoch"] * old.gradient_accumulation_steps:])).tolist()


def say_schedule(c, run, total_samples, samples_per_step):
    passes = c.num_epochs * c.dataset_blending_global_weight
    if abs(passes - 1) > 1e-6:
        run.say(f"note: num_epochs x dataset_blending_global_weight = {passes:g} passes over the weighted blend, not 1")
    steps = total_samples // samples_per_step
    if c.warmup_steps > steps:
        run.say(f"note: warmup_steps = {c.warmup_steps} of about {steps} steps: learning_rate = "
                f"{c.learning_rate:g} is never reached")


def what_is_left(c, run, state, valid, signals, stopped):
    """A line for people where a run ended before its end. stopped: by a signal, which another rank may have got."""
    what = f"epoch {state.epoch} of {c.num_epochs}"
    if state.epoch == c.num_epochs:
        what = "the last validation"
        if run.rank > 0 or not valid or run.has_validation(state.step):
            return "all epochs are finished"
    reason = f"max_steps = {c.max_steps}"
    if stopped or signals:
        reason = "stopped by " + (signal.Signals(signals[0]).name if signals else "a signal to another rank")
    return f"{reason}: {what} is not finished; the same command resumes the run"
