"""The layout of the published releases: names of tensors, reading, writing.

    safe_ckpt/metadata.json {shard: tensor names}, safe_ckpt/<shard>.safetensors, clap_ckpt/epoch_16.pt
    and in ours: config.json (settings), lm/ (the language model's config and tokenizer), README.md
"""
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import config as settings
from tools.checkpoint.files import (load_pickle, load_shards, local_or_hub, replace_folder, save_atomically,
                                    state_dict_of)
from tools.checkpoint.language_models import drop_tied_head
from tools.checkpoint.model_card import model_card
from tools.common import UserError, name_disk_errors, read_json_object

# ------------------------------------------------------------------------------------------------------------
# Names: ours, and those of the published checkpoints

PUBLISHED = (("clap.htsat.", "clap.nvclap."), ("audio_transformer.", "audio_transformer_clap."),
             ("xattn.{i}.", "lang_encoder.model.layers.{i}.gated_cross_attn_layer_sound."),
             ("lm.layers.{i}.", "lang_encoder.model.layers.{i}.decoder_layer."),
             ("lm.lm_head.", "lang_encoder.lm_head."), ("lm.", "lang_encoder.model."))
COPIES = (("lm.layers.{i}.", "lang_encoder.old_decoder_blocks.{i}."),  # the same modules, saved twice
          ("xattn.{i}.", "lang_encoder.gated_cross_attn_layers_sound.{i}."))
UNUSED = re.compile(r"position_enc\.inv_freq$|rotary_emb\.inv_freq$"
                    r"|\.(spectrogram_extractor|logmel_extractor|tscam_conv|head)\.")
TOKEN_TABLES = ("lm.embed_tokens.weight", "lm.lm_head.weight")


def rename(name, pairs):
    """The name with its prefix, the left one of the first pair that matches, replaced by the right one."""
    for left, right in pairs:
        if match := re.match(re.escape(left).replace(r"\{i\}", r"(\d+)"), name):
            return right.replace("{i}", "".join(match.groups())) + name[match.end():]
    return name


def our_name(name):
    name = name.removeprefix("module.").replace("clap.afclap.", "clap.nvclap.", 1)
    return rename(name, [(theirs, ours) for ours, theirs in PUBLISHED + COPIES])


def rename_published(tensors):
    """{published name or ours: tensor} -> {our name: tensor}, {reason: names that are skipped}."""
    state, skipped = {}, {"duplicates": [], "unused": []}
    for name, tensor in tensors.items():
        ours = our_name(name)
        if UNUSED.search(name):
            skipped["unused"].append(name)
        elif ours in state:  # a copy of the same module: the first one is read
            skipped["duplicates"].append(name)
        else:
            state[ours] = tensor
    return state, skipped


def split_embeddings(state, lm_config, source):
    """In place: cut published token tables where our special tokens begin, leave out a tied head."""
    drop_tied_head(state, lm_config, *TOKEN_TABLES, source)
    for table in TOKEN_TABLES:
        added = table.replace("weight", "added")
        if table in state and added not in state:
            rows = state[table]
            state[table], state[added] = rows[:lm_config.vocab], rows[lm_config.vocab:]


def release_tensors(folder):
    """{published name: tensor} of what safe_ckpt/metadata.json names."""
    folder = os.path.join(folder, "safe_ckpt")
    listing = os.path.join(folder, "metadata.json")
    names_of = {}
    for shard, names in read_json_object(listing).items():
        names_of[shard.removesuffix(".safetensors") + ".safetensors"] = names
    return load_shards(folder, names_of, listing)


# ------------------------------------------------------------------------------------------------------------
# Writing


def save_release(model, folder):
    """Write the release layout, with config.json, lm/ and a model card. An older export at `folder` is
    replaced whole or not at all; a folder with other files is refused."""
    if getattr(model, "int8", False):
        raise UserError("a model with int8 weights is for answering: save the one it was made from")
    folder = os.path.realpath(os.path.expanduser(folder))
    with replace_folder(folder) as new, name_disk_errors(folder, SafetensorError):
        write_release(model, new)


def write_release(model, folder):
    from huggingface_hub import split_torch_state_dict_into_shards
    c, state, folder = model.config, published_state(model), Path(folder)
    for part in ("safe_ckpt", "clap_ckpt", "lm"):
        (folder / part).mkdir()
    shards = split_torch_state_dict_into_shards(state, max_shard_size="4GB").filename_to_tensors
    metadata = {f"weight_{i}": names for i, names in enumerate(shards.values())}
    for shard, names in metadata.items():
        file = folder / f"safe_ckpt/{shard}.safetensors"
        save_file({name: state[name] for name in names}, file)
        file.chmod(0o644)  # safetensors leaves 0600
    save_atomically(clap_checkpoint_of(state, c), str(folder / "clap_ckpt/epoch_16.pt"))
    lm = local_or_hub(c.lang_encoder_path, ["*.json"], c.cache_dir, "lang_encoder_path")
    shutil.copyfile(os.path.join(lm, "config.json"), folder / "lm/config.json")
    model.tokenizer.save_pretrained(folder / "lm")
    about = dict(model.about)
    content = {name: getattr(c, name) for name in settings.MODEL_SETTINGS}
    content |= {"lang_encoder_path": about.pop("language_model"), "tokenizer_path": None, "about": about,
                "cross_attn_every_n_layers": [int(i) for i in model.xattn]}
    (folder / "config.json").write_text(json.dumps(content, indent=1))
    (folder / "safe_ckpt/metadata.json").write_text(json.dumps(metadata, indent=1))
    (folder / "README.md").write_text(model_card(content, model))


def published_state(model):
    """{published name: tensor}: whole token tables, a copy of a tied head, the rotary frequencies."""
    own = model.state_dict()
    for table in TOKEN_TABLES:
        if table in own:
            own[table] = torch.cat([own[table], own.pop(table.replace("weight", "added"))])
    state = {rename(name, PUBLISHED): tensor.cpu().contiguous() for name, tensor in own.items()}
    if model.lm.config.tied:
        state["lang_encoder.lm_head.weight"] = state["lang_encoder.model.embed_tokens.weight"].clone()
    r = model.audio_transformer.rotary_dim
    state["audio_transformer_clap.position_enc.inv_freq"] = 4096.0 ** (-torch.arange(0, r, 2).float() / r)
    return state


def clap_checkpoint_of(state, c):
    """The content of clap_ckpt/epoch_16.pt: the encoder's weights, and the text tower of the file they came
    from."""
    branch, clap = "module.audio_branch.", {}
    for name, tensor in state.items():
        if name.startswith("clap.nvclap."):
            clap[branch + name.removeprefix("clap.nvclap.")] = tensor
    if "clap.mel" in state:  # determines the sample rate
        clap[branch + "logmel_extractor.melW"] = state["clap.mel"]
    source = c.clap_checkpoint and settings.resolve_path(c.clap_checkpoint)
    if source and os.path.isfile(source):
        saved = state_dict_of(load_pickle(source), "state_dict", source)
        clap |= {name: tensor for name, tensor in saved.items() if not name.startswith(branch)}
    return {"epoch": 16, "state_dict": clap}
