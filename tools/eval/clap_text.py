"""CLAP's text tower, for "retrieval" in closed sets: the label nearest to what the model said.

The published one of Audio Flamingo 2: a T5 encoder of flan-t5-large's shape, texts padded to 77 tokens, the
plain mean of all 77 last hidden states, two linear layers. Sizes are read from the weights.
"""
import os
import sys
from functools import lru_cache

import torch

import config as settings
from tools.checkpoint.devices import pick_device
from tools.checkpoint.files import load_pickle
from tools.common import UserError

LENGTH = 77  # tokens


def text_tower(file, c):
    """embed of the CLAP checkpoint `file` under matching, text_tokenizer and device; None: exact."""
    if c.matching not in ("auto", "exact", "retrieval"):
        raise UserError(f"matching = {c.matching!r}, expected auto, exact or retrieval")
    embed, why = None, "asked for"
    if c.matching != "exact":
        where = file and settings.resolve_path(file)
        embed, why = _read(where, c.text_tokenizer, c.device) if file else (None, "no clap_checkpoint given")
    if embed is None and c.matching == "retrieval":
        raise UserError(f"matching = 'retrieval': {why}")
    print(f"closed set: {'exact' if embed is None else 'retrieval'} ({why})", file=sys.stderr)
    return embed


@lru_cache(1)
def _read(file, tokenizer, device):
    if not os.path.isfile(file):
        return None, f"{file} is not there"
    saved = load_pickle(file)
    try:
        embed = load_text_tower(saved.get("state_dict", {}), tokenizer, pick_device(device))
    except OSError as error:  # no tokenizer on disk, no hub
        return None, f"its tokenizer {tokenizer} cannot be had ({str(error).splitlines()[0]})"
    return embed, file if embed else f"{file} holds no T5 text encoder"


def load_text_tower(state, tokenizer_path="google/flan-t5-large", device="cpu"):
    """embed(texts) -> (n, d) float32, rows of length 1; or None if the state dict holds no T5 encoder.

    state: the "state_dict" of a CLAP checkpoint, with module.text_branch.* and module.text_projection.*."""
    branch = {name.removeprefix("module.text_branch."): tensor for name, tensor in state.items()
              if name.startswith("module.text_branch.")}
    if "encoder.block.0.layer.0.SelfAttention.q.weight" not in branch:
        return None
    from transformers import AutoTokenizer, T5Config, T5EncoderModel
    table = branch["shared.weight"] if "shared.weight" in branch else branch["encoder.embed_tokens.weight"]
    first = "encoder.block.0.layer."
    buckets, heads = branch[first + "0.SelfAttention.relative_attention_bias.weight"].shape
    gated = first + "1.DenseReluDense.wi_0.weight" in branch
    inner = branch[first + ("1.DenseReluDense.wi_0.weight" if gated else "1.DenseReluDense.wi.weight")]
    layers = len({name.split(".")[2] for name in branch if name.startswith("encoder.block.")})
    shape = T5Config(vocab_size=len(table), d_model=table.shape[1], d_ff=len(inner), num_layers=layers,
                     num_heads=heads, d_kv=len(branch[first + "0.SelfAttention.q.weight"]) // heads,
                     relative_attention_num_buckets=buckets, dropout_rate=0.0,
                     feed_forward_proj="gated-gelu" if gated else "relu")
    encoder = T5EncoderModel(shape)
    branch |= {"shared.weight": table, "encoder.embed_tokens.weight": table}
    encoder.load_state_dict({name: branch[name].float() for name in encoder.state_dict()})
    linear = {name.removeprefix("module.text_projection."): tensor.float() for name, tensor in state.items()
              if name.startswith("module.text_projection.")}
    width, hidden = linear["0.weight"].shape
    project = torch.nn.Sequential(torch.nn.Linear(hidden, width), torch.nn.ReLU(),
                                  torch.nn.Linear(width, len(linear["2.weight"])))
    project.load_state_dict(linear)
    encoder, project = encoder.to(device).eval(), project.to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)

    @torch.inference_mode()
    def embed(texts):
        parts = []
        for start in range(0, len(texts), 64):
            ids = tokenizer(list(texts[start:start + 64]), padding="max_length", truncation=True,
                            max_length=LENGTH, return_tensors="pt").to(device)
            states = encoder(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"])[0]
            vectors = project(states.mean(1))  # (n, 77, d) -> (n, d'): the mean counts padding, too
            parts.append(torch.nn.functional.normalize(vectors, dim=-1).cpu())
        return torch.cat(parts).numpy()

    return embed

