"""Where a run stands in its blend, counted in items: what a step takes, and what is left of an epoch."""
import os
import signal
from types import SimpleNamespace

import numpy as np

import config as settings
from data import plan_epoch
from tools.checkpoint.files import load_pickle
from tools.common import UserError

OWN = (*settings.PATHS, "expdir", "cache_dir", "given", "device", "num_workers", "cache_audio")  # of a rank
STANDS = ("step", "next_epoch", "steps_in_epoch", "only", "done_items", "skipped_steps")
SAVED = (*STANDS, "seen", "plan", "world", "blend", "config", "frozen_hash", "model_state_dict",
         "optimizer_state_dict", "optimizer_names")


def epoch_items(manifests, valid, c):
    """Items of every epoch: (num_epochs,) int64; ValueError if there are none, or none in a manifest."""
    for m in (*manifests.values(), *valid.values()):
        if not len(m):
            raise UserError(f"{m.file}: total_num = 0, expected items")
    weights = [(len(m), c.dataset_blending_global_weight * c.dataset_blending_config[name])
               for name, m in manifests.items()]
    if c.num_epochs > 10 ** 6 or sum(N * w for N, w in weights) > 10 ** 10:
        raise UserError(f"num_epochs = {c.num_epochs}, dataset_blending_global_weight = "
                         f"{c.dataset_blending_global_weight:g}: {sum(N * w for N, w in weights):g} items an "
                         f"epoch; expected at most a million epochs, of 1e10 items")
    e = np.arange(c.num_epochs + 1)
    counts = sum(np.diff((e * N * w).astype(np.int64)) for N, w in weights)
    if not counts.sum():
        raise UserError(f"dataset_blending_global_weight = {c.dataset_blending_global_weight}: "
                         f"{c.num_epochs} epochs select no item of {sum(N for N, _ in weights)}")
    return counts


def plan_of(c, world, audio_config):
    """What decides which items a step takes. The same items, whatever they are divided into, are the same
    run."""
    per_step = c.batch_size * c.gradient_accumulation_steps * world
    divided = [c.batch_size, world] if c.max_windows_per_batch else []
    return {"items per step": per_step, "seed": c.seed, "bucket_batches": c.bucket_batches,
            "hearing": list(audio_config.values()), "max_windows_per_batch": [c.max_windows_per_batch, *divided]}


def rest_of_epoch(manifests, tokenizer, saved):
    """Rows of its epoch that a saved run, whose steps took other items than ours, has not trained yet."""
    old, sizes = SimpleNamespace(**saved["config"]), saved["plan"]["hearing"]
    audio_config = dict(zip(("window_length", "window_overlap", "max_num_window", "sample_rate"), sizes))
    _, rows, *_ = plan_epoch(manifests, old, tokenizer, audio_config, saved["next_epoch"], 0, saved["world"],
                             only=saved["only"])
    left = rows[saved["steps_in_epoch"] * old.gradient_accumulation_steps:]  # none: it was the last step
    return np.sort(np.concatenate([np.empty(0, np.int64), *left]))


def changes(saved, c, world, digests):
    """Settings, world size and manifests that are not what they were when this run was saved, for people."""
    silent = ("given", "expdir", "run_name", "max_steps", "device")
    old = {name: value for name, value in saved["config"].items() if name in vars(c) and name not in silent}
    now = vars(c) | {"world size": world}
    old["world size"] = saved["world"]
    found = [f"{name} {old[name]!r} -> {now[name]!r}" for name in old if old[name] != now[name]]
    before = saved.get("digests", digests)
    found += [f"the items of {name}" for name in before if before[name] != digests[name]]
    return ", ".join(found)


def read_saved(file):
    """The content of a checkpoint that a run can go on from, or ValueError."""
    saved = load_pickle(file)
    if missing := [name for name in SAVED if name not in saved]:
        raise UserError(f"{file}: no {missing[0]!r} in it, it does not tell where its run stood: an older "
                         f"version saved it, or another program; give another run_name")
    return saved


def check_same_run(saved, file, frozen_hash, kept, trained, blend, c):
    """ValueError where a checkpoint of a run's folder is not one that these settings can go on from."""
    again = "give another run_name, or remove that folder"
    if saved["frozen_hash"] != frozen_hash or set(trained) != kept:
        other = changes(saved, c, saved["world"], saved.get("digests", {})) or "no setting is another one"
        raise UserError(f"{file}: this run was started with other frozen weights or trained parts "
                         f"({other}); {again}")
    last = os.path.join(os.path.dirname(file), f"checkpoint_{c.num_epochs - 1}.pt")
    if saved["next_epoch"] + (saved["steps_in_epoch"] > 0) > c.num_epochs and not os.path.exists(last):
        raise UserError(f"num_epochs = {c.num_epochs}, but {file} has trained longer, and what it was "
                         f"then is not kept ({last}); {again}")
    if saved["blend"] != blend:
        names = [n for n in {*blend, *saved["blend"]} if saved["blend"].get(n) != blend.get(n)]
        raise UserError(f"{file}: the blend is not what it was (items or weight of "
                         f"{', '.join(sorted(names))}), its epochs would be others; give another run_name "
                         f"and pretrained_path = this one")


def what_is_left(c, at, stop, came, newest):
    """One line for people where a run ended before its end, else nothing. stop: by a signal; came: those of
    them that this process got; newest: the checkpoint to go on from."""
    ended = at["next_epoch"] >= c.num_epochs
    if ended and not (stop and c.valid_dataset_config):
        return ""
    number = f"stopped by {signal.Signals(came[0]).name if came else 'a signal to another rank'}"
    why, how = (number, "") if stop else (f"max_steps = {c.max_steps}", " without max_steps")
    what = "the last validation" if ended else f"epoch {at['next_epoch']} of {c.num_epochs}"
    return f"{why}: {what} is not finished; the same command{how} goes on from {newest}"
