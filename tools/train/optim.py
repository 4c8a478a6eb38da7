"""What trains at which rate, and the optimizer's state from checkpoint to checkpoint."""
import torch

from tools.common import UserError


def parameter_groups(model, c):
    """Three learning rates (CLAP, gates, the rest); weight decay on the gated blocks' matrices alone."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            rate = (c.clap_learning_rate if name.startswith("clap.") else
                    c.gate_learning_rate if name.endswith("_gate") else None)
            decay = c.weight_decay if name.startswith("xattn.") and p.ndim == 2 else 0.0
            groups.setdefault((c.learning_rate if rate is None else rate, decay), []).append(p)
    return [{"params": p, "lr": rate, "peak": rate, "weight_decay": decay}
            for (rate, decay), p in groups.items()]


def make_optimizer(model, c, world):
    """-> AdamW, and the names of its parameters in its order. ValueError where every rate is 0."""
    groups, options = parameter_groups(model, c), {"betas": (0.9, 0.999), "fused": True}
    if not any(group["peak"] for group in groups):
        raise UserError(f"learning_rate = {c.learning_rate:g}: nothing would train")
    name_of = {p: name for name, p in model.named_parameters()}
    names = [name_of[p] for group in groups for p in group["params"]]
    if c.shard_optimizer and world > 1:  # each rank keeps and updates a share of the state
        from torch.distributed.optim import ZeroRedundancyOptimizer
        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **options), names
    return torch.optim.AdamW(groups, **options), names


def clip(optimizer, parameters, most):
    """-> the norm of all gradients together. If it is above `most` (0: any may be), the optimizer's next step
    takes them as that much shorter: it reads them anyway, a pass of their own is saved."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    optimizer = getattr(optimizer, "optim", optimizer)  # of a shard
    optimizer.grad_scale = (norm / most).clamp(min=1).float() if most else None  # it divides by that
    return norm


def load_optimizer(optimizer, names, saved):
    """State by the names of parameters: rates, decay, what trains and so the groups may be other ones now."""
    at, before = {name: i for i, name in enumerate(names)}, saved["optimizer_names"]
    state = {at[before[i]]: s for i, s in saved["optimizer_state_dict"]["state"].items() if before[i] in at}
    groups, first = [], 0
    for group in optimizer.param_groups:
        options = {key: value for key, value in group.items() if key != "params"}
        groups.append(options | {"params": list(range(first, first + len(group["params"])))})
        first += len(group["params"])
    optimizer.load_state_dict({"state": state, "param_groups": groups})
