"""Where a run stands in its blend, counted in items: what a step takes, and what is left of an epoch."""
from types import SimpleNamespace

import numpy as np

from data import plan_epoch


def epoch_items(manifests, valid, c):
    """Items of every epoch: (num_epochs,) int64; ValueError if there are none, or none in a manifest."""
    for m in (*manifests.values(), *valid.values()):
        if not len(m):
            raise ValueError(f"{m.file}: total_num = 0, expected items")
    weights = [(len(m), c.dataset_blending_global_weight * c.dataset_blending_config[name])
               for name, m in manifests.items()]
    if c.num_epochs > 10 ** 6:
        raise ValueError(f"num_epochs = {c.num_epochs}, expected at most a million")
    e = np.arange(c.num_epochs + 1)
    counts = sum(np.diff((e * N * w).astype(np.int64)) for N, w in weights)
    if not counts.sum():
        raise ValueError(f"dataset_blending_global_weight = {c.dataset_blending_global_weight}: "
                         f"{c.num_epochs} epochs select no item of {sum(N for N, _ in weights)}")
    return counts


def plan_of(c, world, hearing):
    """What decides which items a step takes. The same items, whatever they are divided into, are the same
    run."""
    per_step = c.batch_size * c.gradient_accumulation_steps * world
    divided = [c.batch_size, world] if c.max_windows_per_batch else []
    return {"items per step": per_step, "seed": c.seed, "bucket_batches": c.bucket_batches,
            "hearing": list(hearing.values()), "max_windows_per_batch": [c.max_windows_per_batch, *divided]}


def rest_of_epoch(manifests, tokenizer, saved):
    """Rows of its epoch that a saved run, whose steps took other items than ours, has not trained yet."""
    old, sizes = SimpleNamespace(**saved["config"]), saved["plan"]["hearing"]
    hearing = dict(zip(("window_length", "window_overlap", "max_num_window", "sample_rate"), sizes))
    _, rows, *_ = plan_epoch(manifests, old, tokenizer, hearing, saved["next_epoch"], 0, saved["world"],
                             only=saved["only"])
    return np.sort(np.concatenate(rows[saved["steps_in_epoch"] * old.gradient_accumulation_steps:]))


def changes(saved, c, world):
    """Settings and world size that are not what they were when this run was saved, for people."""
    silent = ("given", "expdir", "run_name", "max_steps", "device")
    old = {name: value for name, value in saved["config"].items() if name in vars(c) and name not in silent}
    now = vars(c) | {"world size": world}
    old["world size"] = saved["world"]
    return ", ".join(f"{name} {old[name]!r} -> {now[name]!r}" for name in old if old[name] != now[name])


def check_same_run(saved, file, frozen_hash, kept, trained, blend):
    """ValueError where a checkpoint of a run's folder is not one that these settings can go on from."""
    again = "give another run_name, or remove that folder"
    if saved["frozen_hash"] != frozen_hash or set(trained) != kept:
        raise ValueError(f"{file}: this run was started with other frozen weights or trained parts; {again}")
    if "plan" not in saved:
        raise ValueError(f"{file}: an older version saved it, and does not tell where it stood; give another "
                         f"run_name and pretrained_path = this one")
    if saved["blend"] != blend:
        names = [n for n in {*blend, *saved["blend"]} if saved["blend"].get(n) != blend.get(n)]
        raise ValueError(f"{file}: the blend is not what it was (items or weight of "
                         f"{', '.join(sorted(names))}), its epochs would be others; give another run_name "
                         f"and pretrained_path = this one")
