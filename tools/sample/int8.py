"""Int8 weights for decoding on a CPU: the time of a token is that of reading the weights."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from tools.common import UserError


class Int8Linear(nn.Module):
    """A frozen nn.Linear whose weight is int8, times a bf16 scale per output row."""

    def __init__(self, weight, bias=None):
        super().__init__()
        weight = weight.float()
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        weight = (weight / scale[:, None]).round()
        self.register_buffer("weight", weight.to(torch.int8))
        self.register_buffer("scale", scale.to(torch.bfloat16))
        self.bias = bias

    def forward(self, x):
        rows = x.flatten(0, -2)
        if len(rows) <= 16:  # torch's int8 product is for few rows, and fast with bf16 ones alone
            y = torch._weight_int8pack_mm(rows.to(torch.bfloat16), self.weight, self.scale)
            y = y.to(x.dtype)
        else:
            y = F.linear(rows, self.weight.to(x.dtype))
            y = y * self.scale.to(x.dtype)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], -1)


class Int8Head(nn.Module):
    """A TokenEmbedding whose logits are int8 products; embeddings are as they were."""

    def __init__(self, table):
        super().__init__()
        self.table = table
        self.rows = Int8Linear(torch.cat([table.weight, table.added]))

    def forward(self, ids):
        return self.table(ids)

    def logits(self, x):
        return self.rows(x)


def quantize(model):
    """Replace, in place, the weights that a decoding step reads by int8: the language model's blocks and
    head, to_q, to_out and the gated feed-forward. Such a model neither trains nor saves. On a CPU alone."""
    device = model.lm.norm.weight.device
    if device.type != "cpu":
        raise UserError(f"int8 weights are for a CPU, not {device.type}: leave --int8 off")
    parents = [*model.lm.layers.modules(), *model.xattn.modules()]
    for parent in parents:
        for name, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear) and name != "to_kv":  # used once per clip, not per token
                setattr(parent, name, Int8Linear(linear.weight, linear.bias))
    head = "embed_tokens" if model.lm.config.tied else "lm_head"
    setattr(model.lm, head, Int8Head(getattr(model.lm, head)))
    model.int8 = True
    return model
