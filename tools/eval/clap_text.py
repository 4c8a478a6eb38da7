"""CLAP's text encoder, for "retrieval" in closed sets: the label whose text is nearest to the answer.

That of Audio Flamingo 2: a T5 encoder of flan-t5-large's shape, texts padded to 77 tokens, the plain mean of
all 77 last hidden states, two linear layers.
"""
import os
import sys
from functools import lru_cache

import torch
from torch import nn

import config as settings
from tools.checkpoint.devices import pick_device
from tools.checkpoint.files import load_pickle
from tools.common import UserError, shorten

LENGTH = 77  # tokens


def pick_text_encoder(clap_checkpoint, c):
    """embed(texts) of a CLAP checkpoint, or None for exact matching, by matching, text_encoder and device;
    prints which and why."""
    if c.matching not in ("auto", "exact", "retrieval"):
        raise UserError(f"matching = {c.matching!r}, expected auto, exact or retrieval")
    embed, reason = None, "matching = exact"
    if c.matching != "exact":
        path = settings.resolve_path(clap_checkpoint) if clap_checkpoint else None
        embed, reason = open_text_encoder(path, c.text_encoder, c.device)
    if embed is None and c.matching == "retrieval":
        raise UserError(f"matching = 'retrieval': {reason}")
    print(f"closed set: {'exact' if embed is None else 'retrieval'} ({reason})", file=sys.stderr)
    return embed


@lru_cache(1)
def open_text_encoder(path, t5, device):
    """-> embed or None, and the reason."""
    if not path or not os.path.isfile(path):
        return None, f"clap_checkpoint = {path}: no such file"
    state = load_pickle(path).get("state_dict", {})
    if "module.text_branch.encoder.block.0.layer.0.SelfAttention.q.weight" not in state:
        return None, f"{path} holds no T5 text encoder"
    try:
        return load_text_encoder(state, t5, pick_device(device)), path
    except OSError as error:  # transformers: neither on disk nor on the hub
        return None, f"text_encoder = {t5}: {shorten(error)}"


def load_text_encoder(state, t5="google/flan-t5-large", device="cpu"):
    """embed(texts) -> (n, d) float32, rows of length 1.

    state: the "state_dict" of a CLAP checkpoint, with module.text_branch.* and module.text_projection.*; t5:
    where config and tokenizer of its encoder come from."""
    from transformers import AutoConfig, AutoTokenizer, T5EncoderModel
    encoder = T5EncoderModel(AutoConfig.from_pretrained(t5))
    tokenizer = AutoTokenizer.from_pretrained(t5)

    def part(prefix):
        return {name.removeprefix(prefix): tensor.float() for name, tensor in state.items()
                if name.startswith(prefix)}

    branch, linear = part("module.text_branch."), part("module.text_projection.")
    embedding = branch.get("shared.weight", branch.get("encoder.embed_tokens.weight"))
    branch |= dict.fromkeys(("shared.weight", "encoder.embed_tokens.weight"), embedding)
    encoder.load_state_dict({name: branch[name] for name in encoder.state_dict()})
    d, hidden = linear["0.weight"].shape
    project = nn.Sequential(nn.Linear(hidden, d), nn.ReLU(), nn.Linear(d, d))
    project.load_state_dict(linear)
    encoder, project = encoder.to(device).eval(), project.to(device).eval()

    @torch.inference_mode()
    def embed(texts):
        parts = []
        for start in range(0, len(texts), 64):
            ids = tokenizer(texts[start:start + 64], padding="max_length", truncation=True, max_length=LENGTH,
                            return_tensors="pt").to(device)
            states = encoder(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"])[0]
            vectors = project(states.mean(1))  # (n, 77, d) -> (n, d'): the mean counts padding, too
            parts.append(nn.functional.normalize(vectors, dim=-1).cpu())
        return torch.cat(parts).numpy()

    return embed
