"""Between disk and tensors: runs, checkpoints and published releases.

    model = load("exp/sft", device="cuda", dtype=torch.bfloat16)   # a run, a checkpoint, a release, a hub id
    save_release(model, "my-release")                              # which the published code reads, too

    python checkpoint.py nvidia/audio-flamingo-2-0.5B              # a report: what is read, and what is not

open_checkpoint and init_from_parts return a model without weights and its state: tensors under our names, mapped from their files
and not in memory yet. place_weights then brings one after the other straight to its final dtype and device.
"""
import hashlib
import os
import re
import sys
from types import SimpleNamespace

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

import config as settings
from model import AudioFlamingo, ClapEncoder, LanguageModel, gated_blocks
from tools.checkpoint.devices import pick_device
from tools.checkpoint.clap import clap_state
from tools.checkpoint.files import inside, load_pickle, local_or_hub, tensors_in
from tools.checkpoint.htsat import infer_htsat_config
from tools.checkpoint.language_models import lm_from_width, check_sizes, lm_state, guess_base_lm, load_lm_config_and_tokenizer
from tools.checkpoint.model_card import about_run, checked_about, name_of
from tools.checkpoint.releases import TABLES, from_published, split_embeddings, release_pieces, save_release
from tools.checkpoint.run_dir import newest_checkpoint, own_parts
from tools.checkpoint.shapes import bounded, checked
from tools.common import UserError, join_names, read_json_object, shorten

# ------------------------------------------------------------------------------------------------------------
# A model without weights, and its state

RELEASE_FILES = ["safe_ckpt/*", "clap_ckpt/*", "*.json", "lm/*"]


class OnMeta(TorchFunctionMode):
    """torch.empty, which makes what is then drawn at random, gives meta tensors: nothing is drawn."""

    def __torch_function__(self, make, types, args=(), kwargs=None):
        return make(*args, **(kwargs or {}) | ({"device": "meta"} if make is torch.empty else {}))


def build_meta_model(c, state, text, source, given, fresh, saved=()):
    """The model of settings and of the sizes that its state tells, on the meta device: place_weights follows.
    given: what the user said, ValueError if it is another model's; saved: names that the file of the state
    tells itself: what they want and it lacks is missing. fresh: what listens is drawn at random."""
    encoder = {n.removeprefix("clap.htsat."): t for n, t in state.items() if n.startswith("clap.")}
    told, every, (_, sizes, tokenizer) = infer_htsat_config(encoder), "cross_attn_every_n_layers", text
    how = {name: told.pop(name) for name in ("position", "fusion") if name in told}
    how["mel"] = state.get("clap.mel")
    if blocks := sorted({int(n.split(".")[1]) for n in state if re.match(r"xattn\.\d+\.", n)}):
        inner = [len(tensor) for name, tensor in state.items() if name.endswith("pos_ffn.w_1.weight")]
        told |= {every: blocks, "audio_transformer_n_layers": len(inner)}
        told |= {"audio_transformer_d_inner": inner[0]} if inner else {}
    for name in told.keys() & set(given):
        said = sorted(gated_blocks(given[name], sizes.layers)) if name == every else given[name]
        if said != told[name]:
            part = "encoder" if name.startswith("clap_") else "model"
            raise UserError(f"{name} = {given[name]!r}, but the {part} of {source} has {told[name]!r}")
    told |= {every: blocks[0] + 1} if blocks else {}  # a stride, as published, unless somebody says more
    c = SimpleNamespace(**(vars(c) | {n: v for n, v in told.items() if n not in (*saved, *given)}))
    bounded(vars(c), source or "the settings")
    with torch.device("cpu") if fresh else OnMeta():
        encoder = ClapEncoder(c.clap_embed_dim, c.clap_depths, c.clap_num_heads, c.clap_spec_size, **how)
    longest = (encoder.max_frames - 1) / 100
    if not 0 <= c.window_overlap < c.window_length <= longest + 0.01:
        raise UserError(f"{source or 'the settings'}: window_length = {c.window_length}, window_overlap = "
                         f"{c.window_overlap}: expected at most {longest:.2f} s, and a shorter overlap")
    with torch.device("meta"):
        lm = LanguageModel(sizes, len(tokenizer) - sizes.vocab)
    try:
        with torch.device("cpu" if fresh else "meta"):
            model = AudioFlamingo(c, lm, tokenizer, encoder)
    except ValueError as error:
        raise UserError(f"{source}: {error}" if source else str(error)) from error
    model.about, model.skipped = {"language_model": name_of(c.lang_encoder_path)}, {}
    return model


def init_from_parts(c, given=(), fresh=True, saved=None, source=None):
    """-> a new model of the settings c, and the state of its pretrained parts, language model and CLAP.
    saved: the content of a training checkpoint, source, whose tensors, not in that state, tell sizes, too."""
    text = load_lm_config_and_tokenizer(c)
    state = {"lm." + name: tensor for name, tensor in lm_state(*text).items()}
    if c.clap_checkpoint:
        state |= clap_state(c.clap_checkpoint)
    source = source or c.clap_checkpoint
    trained, told = (trained_tensors(saved, text[1], source), saved.get("config", ())) if saved else ({}, ())
    return build_meta_model(c, state | trained, text, source, given, fresh, told), state


def load_language_model(c, device="cpu", dtype=torch.float32):
    """-> the frozen LanguageModel that settings name, and its tokenizer with the marks of a prompt."""
    folder, sizes, tokenizer = load_lm_config_and_tokenizer(c)
    state = lm_state(folder, sizes, tokenizer)
    with torch.device("meta"):
        lm = LanguageModel(sizes, len(tokenizer) - sizes.vocab).requires_grad_(False)
    place_weights(lm, state, device, dtype, folder)
    return lm.eval(), tokenizer


def open_checkpoint(path, given, setting="init_from"):
    """-> the model of a run directory (its newest checkpoint), a checkpoint, a release directory or a hub id,
    and its state. given: settings that override the saved ones."""
    found = next((p for p in (settings.resolve_path(path), path) if os.path.exists(p)), None)
    found = found or local_or_hub(path, RELEASE_FILES, given.get("cache_dir"), setting)
    try:
        file = newest_checkpoint(found) if os.path.isdir(found) else found
        if os.path.exists(listing := os.path.join(found, "safe_ckpt/metadata.json")):
            if not file or os.path.getmtime(file) <= os.path.getmtime(listing):
                return read_release(found, given)
            print(f"note: {found} holds a release and a newer {os.path.basename(file)}: that is read",
                  file=sys.stderr)
        if file is None:
            raise FileNotFoundError(f"{path}: holds no checkpoint_<epoch>.pt and no safe_ckpt/metadata.json")
        return read_checkpoint(file, given)
    except (KeyError, TypeError, IndexError, AttributeError, RuntimeError, ArithmeticError) as error:
        # contents that nobody writes, e.g. a name where a number is due: TRACEBACK=1 shows where it mattered
        raise UserError(f"{found}: not what a run or a release holds ({shorten(error)})") from error


def open_pretrained(c, given):
    """open_checkpoint of what pretrained_path and pretrained_ckpt of the settings c name; a release has one checkpoint."""
    folder, file = settings.resolve_path(c.pretrained_path), c.pretrained_ckpt or ""
    of_run = os.path.isdir(folder) and not os.path.exists(os.path.join(folder, "safe_ckpt"))
    of_run = of_run or os.path.isfile(os.path.join(folder, file))
    path = os.path.join(c.pretrained_path, file if of_run else "").rstrip("/")
    return open_checkpoint(path, {n: v for n, v in given.items() if n != "pretrained_path"}, "pretrained_path")


def read_checkpoint(file, given):
    """A checkpoint holds what trained and what was drawn at random; the rest is where its run took it."""
    saved = load_pickle(file)
    tensors_in(saved, "model_state_dict", file)
    own = checked(saved.get("config", {}), file, given)
    own |= {n: v for n, v in saved.get("config", {}).items() if n in settings.ORIGINS}
    c = SimpleNamespace(**(settings.defaults() | own | own_parts(own, os.path.dirname(file)) | given))
    try:
        if c.pretrained_path:  # that run knows where its parts are, but not what this one made of them
            before = os.path.join(settings.resolve_path(c.pretrained_path), c.pretrained_ckpt or "")
            if os.path.realpath(before) in map(os.path.realpath, (file, os.path.dirname(file))):
                raise UserError(f"{file}: pretrained_path = {c.pretrained_path!r} is this run: name what it "
                                 f"started from by --pretrained_path")
            below = {n: v for n, v in own.items() if n not in settings.ORIGINS + settings.PATHS} | given
            model, state = open_pretrained(c, below)
        else:
            if not own and "lang_encoder_path" not in given:  # of the published code: its gated blocks tell
                c.lang_encoder_path = guess_base_lm(saved["model_state_dict"], file)
            model, state = init_from_parts(c, given, False, saved, file)
            # our marks' rows were drawn at random just now: they come from the file, or are missing
            state = {name: tensor for name, tensor in state.items() if not name.endswith(".added")}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file}: a part of this run is not where it was. {error}") from error
    trained = trained_tensors(saved, model.lm.config, file, model.skipped)
    if not any(name.startswith("clap.") for name in (*state, *trained)):
        raise UserError(f"{file}: no audio encoder in it: name one by --clap_checkpoint")
    frozen = fingerprint({name: tensor for name, tensor in state.items() if name not in trained})
    if saved.get("frozen_hash", frozen) != frozen:
        raise UserError(f"{file}: the frozen weights it was trained with are not those found now under "
                         f"{saved.get('frozen_from')}")
    model.about = about_run(saved, os.path.dirname(file), model.about)
    return model, state | trained


def trained_tensors(saved, lm, source="checkpoint", skipped=None):
    """{our name: tensor} of a training checkpoint; our older ones and published ones have published names."""
    state = saved["model_state_dict"]
    published = r"(module\.)?(lang_encoder|audio_transformer_clap|clap\.(nv|af)clap)\."
    if not any(re.match(published, name) for name in state):
        return state
    pieces, left = from_published([(n, lambda t=t: t) for n, t in state.items()], source)
    if skipped is not None:
        skipped |= left
    return split_embeddings(pieces, lm, left, source)


def read_release(folder, given):
    pieces, skipped = from_published(release_pieces(folder), folder)
    if not any(name.startswith("clap.htsat.") for name in pieces) or TABLES[0] not in pieces:
        raise UserError(f"{folder}: not an Audio Flamingo 2 release: no clap.nvclap.* or no token table")
    saved, about = {"max_num_window": 12}, {"nvidia": True}  # as published: 2 min
    if os.path.lexists(os.path.join(folder, "config.json")):
        own = inside(folder, "config.json", "the layout of releases")
        content = read_json_object(own)
        if mine := checked(content, own, given):
            saved, about = mine, content.get("about", {})
        checked_about(about, own)
    base = saved.get("lang_encoder_path")
    if os.path.isdir(lm := os.path.join(folder, "lm")):  # save_release puts config and tokenizer there
        for path, _, files in os.walk(lm):  # chat templates may have a folder of their own
            for file in files:
                inside(folder, os.path.relpath(os.path.join(path, file), folder), "the layout of releases")
        saved |= {"lang_encoder_path": os.path.abspath(lm), "tokenizer_path": None}
    elif base is None and "lang_encoder_path" not in given:
        saved["lang_encoder_path"] = lm_from_width(pieces[TABLES[0]]().shape[-1], folder)
    clap = os.path.abspath(os.path.join(folder, "clap_ckpt/epoch_16.pt"))  # its text encoder
    saved |= {"clap_checkpoint": clap} if os.path.isfile(clap) else {}
    c = SimpleNamespace(**(settings.defaults() | saved | given))
    text = load_lm_config_and_tokenizer(c, weights=False)
    check_sizes(pieces, text[1], folder, "lm.")
    state = split_embeddings(pieces, text[1], skipped, folder)
    model = build_meta_model(c, state, text, folder, given, False, saved)
    model.about |= about | ({"language_model": base} if base and os.path.isdir(lm) else {})
    model.skipped = skipped
    return model, state


def fingerprint(tensors):
    """A short hash that tells one set of weights from another, from some 256 values of each, rounded to
    bf16."""
    digest = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        sample = t.detach().flatten()[:: max(1, t.numel() // 256)].float().cpu().to(torch.bfloat16)
        digest.update(f"{name} {tuple(t.shape)}".encode() + sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def misfits(model, state):
    """{what is wrong: names} of a state: every weight of the model that is still to come, no other one."""
    own, parts = model.state_dict(), {name.split(".")[0] for name in state}
    needed = [n for n, t in own.items() if t.is_meta or n.split(".")[0] in parts]
    both = [(n, t, own[n]) for n, t in state.items() if n in own]
    return {"missing": [n for n in needed if n not in state],
            "unexpected": [n for n in state if n not in own],
            "wrong shape": [f"{n} {tuple(t.shape)} instead of {tuple(o.shape)}" for n, t, o in both
                            if t.shape != o.shape],
            "wrong type": [f"{n} {t.dtype}" for n, t, o in both
                           if t.is_floating_point() != o.is_floating_point()]}


def place_weights(model, state, device, frozen, source):
    """Every weight to its final dtype and device, one by one, from `state`, which it empties, or as it was.
    Trained ones, BatchNorm's and mel bands become float32, frozen ones `frozen` (None: as in the file).
    ValueError lists the misfits."""
    if any((wrong := misfits(model, state)).values()):
        raise UserError(f"{source} does not fit the model: " +
                         "; ".join(f"{what}: {join_names(names)}" for what, names in wrong.items() if names))
    places = [(path, module, table, name) for path, module in model.named_modules()
              for table in (module._parameters, module._buffers) for name in table if table[name] is not None]
    for path, module, table, name in tqdm(places, "load", unit="tensor", disable=None, delay=2, leave=False):
        p = table[name]
        tensor = state.pop(f"{path}.{name}".lstrip("."), p.data)
        exact = isinstance(module, (nn.modules.batchnorm._BatchNorm, ClapEncoder))  # the latter's mel bands
        dtype = torch.float32 if exact or p.requires_grad else frozen or tensor.dtype
        tensor = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        table[name] = nn.Parameter(tensor, p.requires_grad) if table is module._parameters else tensor


def load(path, device="cpu", dtype=torch.float32, **given):
    """The model of a run directory, a checkpoint_<epoch>.pt, a release directory or a hub id, ready to
    answer. Settings in `given` override the saved ones. dtype None: every weight's own."""
    known, device = settings.settings_of("config/defaults.py"), pick_device(str(device))
    given = {name: settings.check(name, value, known, "from_pretrained") for name, value in given.items()}
    if dtype not in (None, torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise UserError(f"from_pretrained: dtype = {dtype!r}, expected torch.float32, bfloat16, float16, "
                         f"float64 or None")
    return materialize(*open_checkpoint(path, given), device, dtype, path)


def new(config, device="cpu", dtype=torch.float32):
    """A new model: the pretrained language model, CLAP from clap_checkpoint, the rest random."""
    return materialize(*init_from_parts(config), device, dtype, config.lang_encoder_path)


def materialize(model, state, device, dtype, source):
    place_weights(model.requires_grad_(False), state, device, dtype, source)
    return model.eval()


def report(paths, given):
    """Print what a run, a checkpoint or a release gives to its model, and what it does not -> exit code, 1 if
    the two do not fit."""
    if len(paths) != 1:
        raise UserError("usage: python checkpoint.py PATH [--name=value]")
    path, (model, state) = paths[0], open_checkpoint(paths[0], given)
    wrong = misfits(model.requires_grad_(False), state)
    loaded = [name for name in state if name not in wrong["unexpected"]]
    numbers = sum(state[name].numel() for name in loaded)
    print(f"{path}: {numbers:,} numbers, language model {model.about['language_model']}")
    wrong["not finite"] = [name for name in loaded if not state[name].float().isfinite().all()]
    rows = {"loaded": loaded, "duplicates": [], "unused": []} | model.skipped | wrong
    for what, names in rows.items():
        print(f"{what:12}{len(names):6}  {join_names(names)}")
    return int(any(wrong.values()))


def export_release(source, model, state, folder):
    """Write what read gave as a release, every weight in its own dtype."""
    save_release(materialize(model, state, "cpu", None, source), folder)
    print(f"wrote {folder}")


if __name__ == "__main__":
    settings.run(lambda c: report(c.files, settings.overrides(c)), "checkpoint.py", settings.LOADING, files=True)
