"""The layout of the published releases: their names, what is read of them, and how one is written.

    safe_ckpt/metadata.json {shard: tensor names}, safe_ckpt/<shard>.safetensors, clap_ckpt/epoch_16.pt
    and in ours: config.json (settings), lm/ (the language model's config and tokenizer), README.md
"""
import json
import os
import re
import shutil
import sys

import torch

import config as settings
from tools.checkpoint.files import inside, load_pickle, load_tensors, local_or_hub, merged, replaced, save_atomically, tensors_in
from tools.checkpoint.language_models import untie_if_different
from tools.checkpoint.model_card import CARD_OF_OURS, model_card, name_of
from tools.common import UserError, join_names, read_json_object

# ------------------------------------------------------------------------------------------------------------
# Our names, and those of the published checkpoints

PUBLISHED = (("clap.htsat.", "clap.nvclap."), ("audio_transformer.", "audio_transformer_clap."),
             ("xattn.{i}.", "lang_encoder.model.layers.{i}.gated_cross_attn_layer_sound."),
             ("lm.layers.{i}.", "lang_encoder.model.layers.{i}.decoder_layer."),
             ("lm.lm_head.", "lang_encoder.lm_head."), ("lm.", "lang_encoder.model."))
COPIES = (("lm.layers.{i}.", "lang_encoder.old_decoder_blocks.{i}."),  # the same modules once more
          ("xattn.{i}.", "lang_encoder.gated_cross_attn_layers_sound.{i}."))
UNUSED = re.compile(r"position_enc\.inv_freq$|rotary_emb\.inv_freq$"
                    r"|\.(spectrogram_extractor|logmel_extractor|tscam_conv|head)\.")
TABLES = ("lm.embed_tokens.weight", "lm.lm_head.weight")


def rename(name, pairs):
    """The name with its beginning, the left one of the first fitting pair, replaced by the right one."""
    for left, right in pairs:
        if found := re.match(re.escape(left).replace(r"\{i\}", r"(\d+)"), name):
            return right.replace("{i}", "".join(found.groups())) + name[found.end():]
    return name


def our_name(name):
    name = name.removeprefix("module.").replace("clap.afclap.", "clap.nvclap.", 1)
    return rename(name, [(theirs, ours) for ours, theirs in PUBLISHED + COPIES])


def from_published(pieces, source):
    """[(published name, function that gives its tensor)] -> {our name: such a function}, and the names of
    those that are not taken. ValueError if copies differ."""
    unused = [name for name, _ in pieces if UNUSED.search(name)]
    found, copies = merged([piece for piece in pieces if not UNUSED.search(piece[0])], our_name, source)
    return found, {"duplicates": copies, "unused": unused}


def split_embeddings(pieces, lm, skipped, source):
    """-> {our name: tensor}: the token tables cut where our marks begin, a tied head left out."""
    tied = TABLES[1] in pieces
    untie_if_different(pieces, lm, *TABLES, source)
    if tied and TABLES[1] not in pieces:
        skipped["duplicates"].append(TABLES[1])
    state = {name: get() for name, get in pieces.items()}
    for table in set(TABLES) & set(state):
        rows = state[table]
        state[table], state[table.replace("weight", "added")] = rows[:lm.vocab], rows[lm.vocab:]
    if any(skipped.values()):
        print(f"skipped {sum(map(len, skipped.values()))} tensors that are duplicates or never used (python "
              f"checkpoint.py {source} lists them)", file=sys.stderr)
    return state


def release_pieces(folder):
    """[(name, function that maps its tensor)] of what safe_ckpt/metadata.json names, which is all its shards
    hold; nothing else that lies there is read."""
    listing = inside(folder, "safe_ckpt/metadata.json", "the layout of releases")
    pieces = []
    for shard, names in read_json_object(listing).items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{listing}: {shard!r} is not a list of tensor names")
        name = os.path.join("safe_ckpt", shard.removesuffix(".safetensors") + ".safetensors")
        file = inside(folder, name, listing)
        held = load_tensors(file)
        if absent := [name for name in names if name not in held]:
            raise UserError(f"{file}: tensors named in metadata.json are missing: {join_names(absent)}")
        if more := [name for name in held if name not in names]:
            raise UserError(f"{file}: unexpected tensors, which metadata.json does not name: {join_names(more)}")
        pieces += held.items()
    return pieces


# ------------------------------------------------------------------------------------------------------------
# Writing

OF_A_RELEASE = re.compile(r"safe_ckpt/(metadata\.json|.*\.safetensors)|clap_ckpt/epoch_16\.pt|config\.json"
                          r"|lm/(config|generation_config|tokenizer.*|special_tokens_map|added_tokens|vocab)\.json"
                          r"|lm/(merges\.txt|tokenizer\.model|(additional_chat_templates/.*|chat_template)\.jinja)")


def save_release(model, folder):
    """The release layout (safe_ckpt/, clap_ckpt/epoch_16.pt); our config.json, lm/ (config, tokenizer) and
    model card. A release that stood there goes, whole or not at all; other files in the folder stay."""
    if getattr(model, "int8", False):
        raise UserError("a model with int8 weights is for answering: save the one it was made from")
    known = lambda name: rename(name, PUBLISHED) != name or name == "clap.mel"
    weight = lambda x: isinstance(x, torch.Tensor) and not x.is_meta and not x.is_quantized
    if odd := [name for name, x in model.state_dict().items() if not (known(name) and weight(x))]:
        raise UserError(f"a release holds the weights of a model as it is loaded, not {join_names(odd)}")
    table = model.lm.embed_tokens
    if (rows := len(table.weight) + len(table.added)) != len(model.tokenizer):
        raise UserError(f"a release has a row for each token: here are {len(model.tokenizer)} tokens and "
                         f"{rows} rows")
    folder = os.path.realpath(os.path.expanduser(folder))
    if (os.getcwd() + os.sep).startswith(folder + os.sep):
        raise UserError(f"{folder}: an export replaces it, and you are in it")
    readme = os.path.join(folder, "README.md")
    theirs = os.path.isfile(readme) and not open(readme, errors="replace").read(9999).count(CARD_OF_OURS)
    old = [os.path.join(path, file) for path, _, files in os.walk(folder) for file in files]
    mine = [name for file in old if OF_A_RELEASE.fullmatch(name := os.path.relpath(file, folder))]
    if mine and "safe_ckpt/metadata.json" not in mine:
        raise UserError(f"{folder} is no release, but holds {join_names(mine)}, which a release would replace: "
                         f"name another folder")
    ours = lambda name: bool(OF_A_RELEASE.fullmatch(name)) or (name == "README.md" and not theirs)
    with replaced(folder, ours) as new:
        write_release(model, new)
        if theirs:
            os.remove(os.path.join(new, "README.md"))
            print(f"note: {readme} is not a model card of ours: it stays", file=sys.stderr)


def write_release(model, folder):
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    own, c = model.state_dict(), model.config
    for table in set(TABLES) & set(own):  # one table, as published
        own[table] = torch.cat([own[table], own.pop(table.replace("weight", "added"))])
    state = {rename(name, PUBLISHED): tensor.cpu().contiguous() for name, tensor in own.items()}
    if model.lm.config.tied:
        state["lang_encoder.lm_head.weight"] = state["lang_encoder.model.embed_tokens.weight"].clone()
    r = model.audio_transformer.rotary_dim
    state["audio_transformer_clap.position_enc.inv_freq"] = 4096.0 ** (-torch.arange(0, r, 2).float() / r)
    for sub in ("safe_ckpt", "clap_ckpt", "lm"):
        os.makedirs(os.path.join(folder, sub), exist_ok=True)
    shards, metadata = split_torch_state_dict_into_shards(state, max_shard_size="4GB").filename_to_tensors, {}
    for i, names in enumerate(shards.values()):
        metadata[f"weight_{i}"] = names
        save_file({n: state[n] for n in names}, os.path.join(folder, f"safe_ckpt/weight_{i}.safetensors"))
    clap = {"module.audio_branch." + n.removeprefix("clap.nvclap."): t for n, t in state.items()
            if n.startswith("clap.nvclap.")}
    if "clap.mel" in state:  # tells the sample rate
        clap["module.audio_branch.logmel_extractor.melW"] = state["clap.mel"]
    if c.clap_checkpoint and os.path.isfile(before := settings.resolve_path(c.clap_checkpoint)):
        was = tensors_in(load_pickle(before), "state_dict", before)  # its text tower goes along
        clap |= {n: t for n, t in was.items() if not n.startswith("module.audio_branch.")}
    save_atomically({"epoch": 16, "state_dict": clap}, os.path.join(folder, "clap_ckpt/epoch_16.pt"))
    lm = local_or_hub(c.lang_encoder_path, ["*.json"], c.cache_dir, "lang_encoder_path")
    shutil.copyfile(os.path.join(lm, "config.json"), os.path.join(folder, "lm/config.json"))
    model.tokenizer.save_pretrained(os.path.join(folder, "lm"))
    sizes = {name: getattr(c, name) for name in settings.MODEL_SETTINGS}
    about = dict(getattr(model, "about", {}))
    sizes |= {"lang_encoder_path": about.pop("language_model", None) or name_of(c.lang_encoder_path),
              "tokenizer_path": None, "about": about,  # no paths of this machine
              "cross_attn_every_n_layers": [int(i) for i in model.xattn]}
    for name, content in (("config.json", sizes), ("safe_ckpt/metadata.json", metadata)):
        with open(os.path.join(folder, name), "w") as f:
            json.dump(content, f, indent=1)
    with open(os.path.join(folder, "README.md"), "w") as f:
        f.write(model_card(sizes, model))
