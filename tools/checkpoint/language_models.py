"""Language models in Hugging Face folders: config, tokenizer and weights of the families that model.py
computes."""
import os
import sys
from collections import defaultdict
from types import SimpleNamespace

import torch

from data import extend_tokenizer
from model import SPECIAL_TOKENS
from tools.checkpoint.files import load_shards, load_tensors, local_or_hub
from tools.common import UserError, read_json_object, shorten

TOKENIZER_FILES = ["*.json", "*.txt", "*.model"]
WEIGHT_FILES = ["model*.safetensors"]
SUPPORTED = {"model_type": ("qwen2", "qwen3", "llama", "mistral"), "hidden_act": ("silu",),
             "sliding_window": (None,), "rope_type": ("default", "llama3"),
             "quantization_config": (None,)}
# of the published releases
LM_OF_WIDTH = {896: "Qwen/Qwen2.5-0.5B", 1536: "Qwen/Qwen2.5-1.5B", 2048: "Qwen/Qwen2.5-3B"}
LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def lm_from_width(width, source):
    """The hub id of the language model of a published release, by its width."""
    if width not in LM_OF_WIDTH:
        widths = ", ".join(map(str, LM_OF_WIDTH))
        raise UserError(f"{source}: its language model has width {width}, the published ones {widths}: name "
                        f"it by --lang_encoder_path")
    return LM_OF_WIDTH[width]


# ------------------------------------------------------------------------------------------------------------
# Config and tokenizer


def read_with_transformers(kind, folder):
    try:
        return kind.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise dozens of classes, all inside this call
        raise UserError(f"{folder}: no usable {kind.__name__[4:].lower()} ({shorten(error)})") from error


def load_lm_config_and_tokenizer(c, weights=True):
    """-> folder, sizes (lm_config_of) and tokenizer, with the special tokens of a prompt, of the language
    model that the settings name. weights: whether the hub is asked for them as well."""
    from transformers import AutoConfig, AutoTokenizer
    patterns = TOKENIZER_FILES + WEIGHT_FILES if weights else TOKENIZER_FILES
    folder = source = local_or_hub(c.lang_encoder_path, patterns, c.cache_dir, "lang_encoder_path")
    if c.tokenizer_path:
        source = local_or_hub(c.tokenizer_path, TOKENIZER_FILES, c.cache_dir, "tokenizer_path")
    lm_config = lm_config_of(read_with_transformers(AutoConfig, folder), folder)
    tokenizer = read_with_transformers(AutoTokenizer, source)
    lm_config.known = len(tokenizer)  # tokens that have a pretrained row: one of ours may be among them
    if tokenizer.eos_token_id is None:
        raise UserError(f"{source}: the tokenizer has no eos token, which ends an answer: see its config")
    extend_tokenizer(tokenizer)
    special = [*SPECIAL_TOKENS[:3], tokenizer.sep_token]
    ids = set(tokenizer.convert_tokens_to_ids(special))
    if len(ids | {tokenizer.eos_token_id}) < 5:
        raise UserError(f"{source}: the tokenizer means two things by one of {', '.join(special)}, eos")
    # Token tables are in two parts: pretrained vocabulary, then our special tokens. Neither is ever empty.
    lm_config.vocab = len(tokenizer) - 1
    while lm_config.vocab - 1 in ids:
        lm_config.vocab -= 1
    return folder, lm_config, tokenizer


def lm_config_of(hf, folder):
    """The sizes of a LanguageModel, but vocab, from transformers' config. UserError for what model.py does
    not compute."""
    get = lambda name, default=None: getattr(hf, name, None) or default
    rope = get("rope_parameters") or get("rope_scaling", {})
    found = {"model_type": hf.model_type, "hidden_act": get("hidden_act"),
             "sliding_window": get("sliding_window"),
             "rope_type": rope.get("rope_type", rope.get("type", "default")),
             "quantization_config": get("quantization_config")}
    for name, value in found.items():
        if value not in SUPPORTED[name]:
            raise UserError(f"{folder}: {name} = {value!r} is not supported, only {SUPPORTED[name]}")
    family = hf.model_type  # reads some of the settings below, whatever else its config.json holds
    bias = family in ("llama", "qwen3") and get("attention_bias", False)
    scaling = {name: rope[name] for name in LLAMA3_SCALING} if found["rope_type"] == "llama3" else None
    return SimpleNamespace(
        width=hf.hidden_size, layers=hf.num_hidden_layers, inner=hf.intermediate_size,
        heads=hf.num_attention_heads, kv_heads=hf.num_key_value_heads,
        d=get("head_dim", hf.hidden_size // hf.num_attention_heads),
        eps=hf.rms_norm_eps, rope_theta=rope.get("rope_theta", getattr(hf, "rope_theta", 10000.0)),
        rope_stretch=scaling, qkv_bias=bias or family == "qwen2",
        out_bias=bias, mlp_bias=family == "llama" and get("mlp_bias", False),
        qk_norm=family == "qwen3", tied=hf.tie_word_embeddings, positions=hf.max_position_embeddings)


# ------------------------------------------------------------------------------------------------------------
# Weights


def lm_tensors(folder):
    """{Hugging Face's name: tensor} of model.safetensors, else of what its index names. Other files
    (adapters, originals) are not the model's."""
    single = os.path.join(folder, "model.safetensors")
    index = single + ".index.json"
    if os.path.exists(single) or not os.path.exists(index):
        return load_tensors(single)
    names_of = defaultdict(list)
    for name, file in read_json_object(index)["weight_map"].items():
        names_of[file].append(name)
    return load_shards(folder, names_of, index)


def lm_state(folder, lm_config, tokenizer):
    """{our name without "lm.": tensor} of the language model in a folder.

    Rows of new special tokens start near the eos row plus noise: a frozen model knows that token as the one
    between texts."""
    state = {name.removeprefix("model."): tensor for name, tensor in lm_tensors(folder).items()
             if not name.endswith("rotary_emb.inv_freq")}
    drop_tied_head(state, lm_config, "embed_tokens.weight", "lm_head.weight", folder)
    vocab = lm_config.vocab
    for table in [name for name in ("embed_tokens.weight", "lm_head.weight") if name in state]:
        rows = state[table]
        if len(rows) < vocab:
            raise UserError(f"{folder}: {table} has {len(rows)} rows, its tokenizer {vocab} tokens")
        spread = rows[:vocab:max(1, vocab // 4096)].float().std(0)
        learnt = rows[vocab:lm_config.known].float()  # special tokens of ours that the model was trained with
        noise = torch.randn(len(tokenizer) - vocab - len(learnt), rows.shape[1])
        fresh = rows[tokenizer.eos_token_id].float() + 0.5 * spread * noise
        state[table.replace("weight", "added")] = torch.cat([learnt, fresh])
        state[table] = rows[:vocab]
    return state


def drop_tied_head(state, lm_config, table, head, source):
    """Remove a head that config.json ties to the embeddings. One that differs from them is used, as
    transformers does: lm_config.tied becomes False."""
    if not lm_config.tied or not {table, head} <= set(state):
        return
    if torch.equal(state[table], state[head]):
        del state[head]
    else:
        lm_config.tied = False
        print(f"note: {source}: config.json ties the head to the embeddings, but the weights hold another "
              f"head: it is used", file=sys.stderr)
