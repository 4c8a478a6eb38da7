"""Between disk and tensors: runs, checkpoints and published releases.

    model = load("exp/sft", device="cuda", dtype=torch.bfloat16)   # a run, a checkpoint, a release, a hub id
    save_release(model, "my-release")                              # which the published code reads, too

    python checkpoint.py nvidia/audio-flamingo-2-0.5B              # what is loaded, skipped and missing

open_checkpoint and init_from_parts return a model on the meta device and its state: {our name: tensor},
mapped from files, not yet in memory. place_weights then copies one tensor after the other to its final dtype
and device: peak memory is that of the weights.
"""
import hashlib
import os
from types import SimpleNamespace

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

import config as settings
from model import AudioFlamingo, ClapEncoder, LanguageModel
from tools.checkpoint.clap import clap_state
from tools.checkpoint.devices import pick_device
from tools.checkpoint.files import load_pickle, local_or_hub, state_dict_of
from tools.checkpoint.htsat import infer_htsat_config
from tools.checkpoint.language_models import lm_from_width, lm_state, load_lm_config_and_tokenizer
from tools.checkpoint.model_card import public_name, run_facts
from tools.checkpoint.releases import (TOKEN_TABLES, release_tensors, rename_published, save_release,
                                       split_embeddings)
from tools.checkpoint.run_dir import checkpoints, moved_parts, newest_checkpoint
from tools.common import UserError, join_names, read_json_object

RELEASE_FILES = ["safe_ckpt/*", "clap_ckpt/*", "*.json", "lm/*"]

# ------------------------------------------------------------------------------------------------------------
# A model without weights


class OnMeta(TorchFunctionMode):
    """Allocate parameters on the meta device and skip their initialisation. HTS-AT computes with some of its
    buffers while it is built: they stay real."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.empty:  # what nn.Linear and its like initialise
            kwargs = kwargs | {"device": "meta"}
        return function(*args, **kwargs)


def infer_settings(state):
    """-> ({setting: value} that the names and shapes of a state determine, options of ClapEncoder)."""
    htsat = {name.removeprefix("clap.htsat."): tensor for name, tensor in state.items()}
    inferred, encoder_options = infer_htsat_config(htsat)
    encoder_options["mel"] = state.get("clap.mel")
    gated = [int(name.split(".")[1]) for name in state if name.startswith("xattn.")]
    inner = [len(tensor) for name, tensor in state.items() if name.endswith("pos_ffn.w_1.weight")]
    if gated:  # a stride, as published: further blocks that the state lacks are missing, not left out
        inferred["cross_attn_every_n_layers"] = min(gated) + 1
        inferred["audio_transformer_n_layers"] = len(inner)
    if inner:
        inferred["audio_transformer_d_inner"] = inner[0]
    return inferred, encoder_options


def check_shapes(c, source):
    """Relations between settings that building the model relies on."""
    if not len(c.clap_depths) == len(c.clap_num_heads) == 4:
        raise UserError(f"{source}: clap_depths = {c.clap_depths}, clap_num_heads = {c.clap_num_heads}: "
                        f"expected a number for each of 4 stages")
    for stage, heads in enumerate(c.clap_num_heads):
        if heads < 1 or c.clap_embed_dim * 2 ** stage % heads:
            raise UserError(f"{source}: clap_num_heads = {c.clap_num_heads} do not divide clap_embed_dim = "
                            f"{c.clap_embed_dim}, twice as wide in every further stage")
    frames = c.clap_spec_size * (c.clap_spec_size // 64)  # that HTS-AT takes, of 10 ms; a window has one more
    longest = (frames - 1) / 100  # seconds
    if not c.window_overlap < c.window_length <= longest:
        raise UserError(f"{source}: window_length = {c.window_length}, window_overlap = {c.window_overlap}: "
                        f"expected at most {longest} s (clap_spec_size = {c.clap_spec_size}), and a shorter "
                        f"overlap")


def build_meta_model(c, state, text, source, overrides=(), fresh=False):
    """An AudioFlamingo on the meta device, for place_weights. Sizes that the state determines win over those
    of the settings c, `overrides` over both. text: what load_lm_config_and_tokenizer returns; fresh:
    initialise all but the language model, on the CPU."""
    inferred, encoder_options = infer_settings(state)
    c = SimpleNamespace(**vars(c) | inferred | dict(overrides))
    check_shapes(c, source or "settings")
    _, lm_config, tokenizer = text
    with torch.device("meta"):
        lm = LanguageModel(lm_config, len(tokenizer) - lm_config.vocab)
    with torch.device("cpu") if fresh else OnMeta():
        encoder = ClapEncoder(c.clap_embed_dim, c.clap_depths, c.clap_num_heads, c.clap_spec_size,
                              **encoder_options)
    with torch.device("cpu" if fresh else "meta"):
        model = AudioFlamingo(c, lm, tokenizer, encoder)
    model.about = {"language_model": public_name(c.lang_encoder_path)}
    model.skipped = {}
    return model


def init_from_parts(c, overrides=(), saved=None, source=None):
    """-> a new model of the settings c, and the state of its pretrained parts: language model and CLAP.
    saved: the content of a training checkpoint, `source`, whose tensors determine sizes as well: what is
    neither there nor pretrained is missing, not drawn at random."""
    text = load_lm_config_and_tokenizer(c)
    state = {"lm." + name: tensor for name, tensor in lm_state(*text).items()}
    if c.clap_checkpoint:
        state |= clap_state(c.clap_checkpoint)
    if saved is None:
        return build_meta_model(c, state, text, source, overrides, fresh=True), state
    trained = trained_tensors(saved, text[1], source)
    # rows of added tokens were drawn at random just now
    state = {name: tensor for name, tensor in state.items() if not name.endswith(".added")}
    return build_meta_model(c, state | trained, text, source, overrides), state


# ------------------------------------------------------------------------------------------------------------
# Reading


def open_checkpoint(path, overrides, setting="init_from"):
    """-> the model of a run directory (its newest checkpoint), a checkpoint, a release directory or a hub id,
    and its state. overrides: {setting: value} that win over the saved ones."""
    found = next(filter(os.path.exists, (settings.resolve_path(path), path)), None)
    if found is None:
        found = local_or_hub(path, RELEASE_FILES, overrides.get("cache_dir"), setting)
    if os.path.exists(os.path.join(found, "safe_ckpt/metadata.json")):
        return read_release(found, overrides)
    file = newest_checkpoint(found) if os.path.isdir(found) else found
    if file is None:
        raise FileNotFoundError(f"{path}: holds no checkpoint_<epoch>.pt and no safe_ckpt/metadata.json")
    return read_checkpoint(file, overrides)


def open_pretrained(c, overrides):
    """open_checkpoint of pretrained_path; of a run, of the file pretrained_ckpt in it."""
    path = c.pretrained_path
    if c.pretrained_ckpt and checkpoints(settings.resolve_path(path)):
        path = os.path.join(path, c.pretrained_ckpt)
    overrides = {**overrides}
    overrides.pop("pretrained_path", None)
    return open_checkpoint(path, overrides, "pretrained_path")


def model_settings(saved, file):
    """The model's settings among those that a file holds, checked."""
    return settings.check(settings.pick(saved, settings.MODEL_SETTINGS), file)


def read_checkpoint(file, overrides):
    """A checkpoint stores trained and randomly initialised tensors only; frozen weights are reloaded from
    where the run got them."""
    saved = load_pickle(file)
    state_dict_of(saved, "model_state_dict", file)  # before a language model is downloaded
    config = saved.get("config", {})  # none in those of the published code
    folder = os.path.dirname(file)
    own = model_settings(config, file)
    parts = settings.pick(config, settings.ORIGINS) | moved_parts(config, folder)
    c = SimpleNamespace(**settings.defaults() | own | parts | overrides)
    sizes = {name: value for name, value in own.items() if name not in settings.PATHS}
    try:
        if c.pretrained_path:  # the parent loads its parts from its own paths; sizes are this checkpoint's
            model, state = open_pretrained(c, sizes | overrides)
        else:
            model, state = init_from_parts(c, sizes | overrides, saved, file)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file}: a part of this run is not where it was. {error}") from error
    trained = trained_tensors(saved, model.lm.config, file)
    frozen = fingerprint({name: tensor for name, tensor in state.items() if name not in trained})
    if saved.get("frozen_hash", frozen) != frozen:
        raise UserError(f"{file}: the frozen weights it was trained with are not those found now under "
                        f"{saved.get('frozen_from')}")
    model.config.dataset_file_root = c.dataset_file_root  # not those of the parent run
    model.config.data_root = c.data_root
    model.about = run_facts(saved, folder, model.about)
    return model, state | trained


def trained_tensors(saved, lm_config, source="checkpoint"):
    """{our name: tensor} of the content of a training checkpoint."""
    state, _ = rename_published(state_dict_of(saved, "model_state_dict", source))
    split_embeddings(state, lm_config, source)
    return state


def read_release(folder, overrides):
    state, skipped = rename_published(release_tensors(folder))
    saved = {"max_num_window": 12}  # as published: 2 min
    about = {"nvidia": True}
    config_file = os.path.join(folder, "config.json")
    lm = os.path.join(folder, "lm")
    if os.path.isfile(config_file):
        content = read_json_object(config_file)
        if own := model_settings(content, config_file):
            saved, about = own, content.get("about", {})
    lm_name = saved.get("lang_encoder_path")
    if os.path.isdir(lm):  # of an export: config and tokenizer
        saved |= {"lang_encoder_path": os.path.abspath(lm), "tokenizer_path": None}
    elif lm_name is None and "lang_encoder_path" not in overrides:
        saved["lang_encoder_path"] = lm_from_width(state[TOKEN_TABLES[0]].shape[-1], folder)
    clap = os.path.abspath(os.path.join(folder, "clap_ckpt/epoch_16.pt"))  # for its text tower
    saved["clap_checkpoint"] = clap if os.path.isfile(clap) else None
    decided = saved | overrides
    c = SimpleNamespace(**settings.defaults() | decided)
    text = load_lm_config_and_tokenizer(c, weights=False)
    split_embeddings(state, text[1], folder)
    model = build_meta_model(c, state, text, folder, decided)
    model.about |= about | ({"language_model": lm_name} if lm_name else {})
    model.skipped = skipped
    return model, state


def fingerprint(tensors):
    """A short hash of a set of weights, from some 256 values of each, rounded to bf16."""
    digest = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        stride = max(1, t.numel() // 256)
        sample = t.detach().flatten()[::stride].float().cpu()
        bits = sample.to(torch.bfloat16).view(torch.int16).numpy()
        digest.update(f"{name} {tuple(t.shape)}".encode())
        digest.update(bits.tobytes())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------
# Placing weights


def find_misfits(model, state):
    """{what is wrong: names}. A state must hold every weight that is still on the meta device, all of each
    part that it holds any of, and nothing else."""
    own = model.state_dict()
    parts = {name.split(".")[0] for name in state}
    unexpected = [name for name in state if name not in own]
    missing, shapes, types = [], [], []
    for name, ours in own.items():
        theirs = state.get(name)
        if theirs is None:
            if ours.is_meta or name.split(".")[0] in parts:
                missing.append(name)
            continue
        if theirs.shape != ours.shape:
            shapes.append(f"{name} {tuple(theirs.shape)} instead of {tuple(ours.shape)}")
        if theirs.is_floating_point() != ours.is_floating_point():
            types.append(f"{name} {theirs.dtype}")
    return {"missing": missing, "unexpected": unexpected, "wrong shape": shapes, "wrong type": types}


def place_weights(model, state, device, frozen, source):
    """Copy every weight to its final dtype and device, one by one, from `state`, which is emptied. Trained
    weights, BatchNorm's and mel bands become float32, frozen ones the dtype `frozen` (None: as in the file).
    UserError lists what does not fit."""
    misfits = find_misfits(model, state)
    wrong = [f"{what}: {join_names(names)}" for what, names in misfits.items() if names]
    if wrong:
        raise UserError(f"{source} does not fit the model: {'; '.join(wrong)}")
    names = [*dict(model.named_parameters()), *dict(model.named_buffers())]
    for name in tqdm(names, "load", unit="tensor", disable=None, delay=2, leave=False):
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        exact = isinstance(module, (nn.modules.batchnorm._BatchNorm, ClapEncoder))  # the latter's mel bands
        old = getattr(module, attribute)
        new = state.pop(name, old.data)
        dtype = new.dtype
        if new.is_floating_point():
            dtype = torch.float32 if exact or old.requires_grad else frozen or dtype
        new = new.to(device, dtype, copy=True)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, old.requires_grad)
        setattr(module, attribute, new)


def materialize(model, state, device, dtype, source):
    """place_weights for answering: nothing trains."""
    place_weights(model.requires_grad_(False), state, device, dtype, source)
    return model.eval()


# ------------------------------------------------------------------------------------------------------------
# What scripts and model.py call


def load(path, device="cpu", dtype=torch.float32, **overrides):
    """The model of a run directory, a checkpoint_<epoch>.pt, a release directory or a hub id, ready to
    answer. overrides: settings that win over the saved ones; dtype None: every weight's own."""
    overrides = settings.check(overrides, "from_pretrained")
    model, state = open_checkpoint(path, overrides)
    return materialize(model, state, pick_device(str(device)), dtype, path)


def new_model(config, device="cpu", dtype=torch.float32):
    """A new model: the pretrained language model, CLAP from clap_checkpoint, the rest random."""
    return materialize(*init_from_parts(config), device, dtype, config.lang_encoder_path)


def load_language_model(c, device="cpu", dtype=torch.float32):
    """-> the frozen LanguageModel that the settings name, and its tokenizer with our special tokens."""
    folder, lm_config, tokenizer = load_lm_config_and_tokenizer(c)
    state = lm_state(folder, lm_config, tokenizer)
    with torch.device("meta"):
        lm = LanguageModel(lm_config, len(tokenizer) - lm_config.vocab)
    return materialize(lm, state, device, dtype, folder), tokenizer


def export_release(source, model, state, folder):
    """Write what open_checkpoint returned as a release, every weight in its own dtype."""
    save_release(materialize(model, state, "cpu", None, source), folder)
    print(f"wrote {folder}")


def print_state_report(paths, overrides):
    """Print which tensors of a run, a checkpoint or a release are loaded, skipped, missing or wrong -> exit
    code, 1 if they do not fit the model."""
    if len(paths) != 1:
        raise UserError("usage: python checkpoint.py PATH [--name=value]")
    model, state = open_checkpoint(paths[0], overrides)
    wrong = find_misfits(model.requires_grad_(False), state)
    loaded = [name for name in state if name not in wrong["unexpected"]]
    wrong["not finite"] = [name for name in loaded if not state[name].float().isfinite().all()]
    count = sum(state[name].numel() for name in loaded)
    print(f"{paths[0]}: {count:,} numbers, language model {model.about['language_model']}")
    for what, names in ({"loaded": loaded} | model.skipped | wrong).items():
        print(f"{what:12}{len(names):6}  {join_names(names)}")
    return int(any(wrong.values()))


def main(c):
    return print_state_report(c.files, settings.overrides(c))


if __name__ == "__main__":
    settings.run(main, "checkpoint.py", settings.LOADING, files=True)
