"""AdamW: which parameters train at which rate, and its state from checkpoint to checkpoint."""
import itertools

import torch

from tools.common import UserError


def set_up_training(model, c):
    """Choose what trains, and what is recomputed in the backward pass."""
    model.set_trainable(c)
    model.gradient_checkpointing = c.gradient_checkpointing
    model.clap.gradient_checkpointing = c.clap_gradient_checkpointing


def parameter_groups(model, c):
    """Three learning rates (CLAP, gates, the rest); weight decay on the gated blocks' matrices alone."""
    groups = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        rate = None
        if name.startswith("clap."):
            rate = c.clap_learning_rate
        elif name.endswith("_gate"):
            rate = c.gate_learning_rate
        rate = c.learning_rate if rate is None else rate
        decay = c.weight_decay if name.startswith("xattn.") and p.ndim == 2 else 0.0
        group = {"params": [], "lr": rate, "peak_lr": rate, "weight_decay": decay}
        groups.setdefault((rate, decay), group)["params"].append(p)
    return list(groups.values())


def make_optimizer(model, c, world):
    """-> AdamW, and the names of its parameters in its order. UserError where every rate is 0."""
    groups = parameter_groups(model, c)
    if not any(group["peak_lr"] for group in groups):
        raise UserError(f"learning_rate = {c.learning_rate:g}: nothing would train")
    name_of = {p: name for name, p in model.named_parameters()}
    names = [name_of[p] for group in groups for p in group["params"]]
    options = {"betas": (0.9, 0.999), "fused": True}
    if c.shard_optimizer and world > 1:  # each rank keeps and updates a share of the state
        from torch.distributed.optim import ZeroRedundancyOptimizer
        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **options), names
    return torch.optim.AdamW(groups, **options), names


def load_optimizer(optimizer, names, saved):
    """Load state by parameter name: rates, decay, trained parts and so the groups may have changed."""
    moments = saved["optimizer_state_dict"]["state"]
    old = {name: moments[i] for i, name in enumerate(saved["optimizer_names"]) if i in moments}
    state = {i: old[name] for i, name in enumerate(names) if name in old}
    positions = itertools.count()
    groups = []
    for group in optimizer.param_groups:
        indices = [next(positions) for _ in group["params"]]
        groups.append(group | {"params": indices})
    optimizer.load_state_dict({"state": state, "param_groups": groups})
