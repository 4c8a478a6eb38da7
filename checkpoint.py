"""Between disk and tensors: runs, published releases, language models, encoders, the hub, devices and
precisions.

    model = load("exp/sft", device="cuda", dtype=torch.bfloat16)   # a run, a checkpoint, a release, a hub id
    save_release(model, "my-release")                              # which the published code reads, too

read and start return a model without weights and its state: tensors under our names, mapped from their files
and not in memory yet. place_weights then brings one after the other straight to its final dtype and device.
"""
import glob
import hashlib
import json
import os
import re
import shutil
import zipfile
from types import SimpleNamespace

import torch
import torch.nn as nn

import config as settings
from data import MARKS, add_marks
from model import AudioFlamingo, ClapEncoder, LanguageModel

# ------------------------------------------------------------------------------------------------------------
# Files


def local_or_hub(path, patterns, cache_dir=None, setting="init_from"):
    """A folder, relative to the project's, as it is; org/name from the hub (or its cache, offline)."""
    if os.path.isdir(settings.place(path)):
        return settings.place(path)
    cache_dir = cache_dir and settings.place(cache_dir)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):
        raise FileNotFoundError(f"{setting} = {path!r}: no such folder, and not a hub id (org/name)")
    from huggingface_hub import snapshot_download
    try:
        return snapshot_download(path, cache_dir=cache_dir, allow_patterns=patterns)
    except Exception as error:  # the hub's client raises many kinds; to the user all of them mean "not there"
        raise FileNotFoundError(f"{setting} = {path!r} is not a folder here, and the hub did not give it: "
                                f"{type(error).__name__}: {str(error).splitlines()[0]}") from error


def load_pickle(path):
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # zip, pickle and storage errors alike: the file is not what it should be
        raise ValueError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0]})") from error


def save_atomically(content, path):
    """torch.save that leaves either the old file or the new one, also when the machine dies in between."""
    with open(path + ".tmp", "wb") as f:
        torch.save(content, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def load_tensors(file):
    """{name: tensor} of a safetensors file, each mapped by itself: in memory while it is used."""
    from safetensors import safe_open
    try:
        with safe_open(file, "pt") as opened:
            return {name: safe_open(file, "pt").get_tensor(name) for name in opened.keys()}
    except Exception as error:  # the package has an error class of its own, beside OSError
        raise ValueError(f"{file}: not a readable safetensors file ({error})") from error


# ------------------------------------------------------------------------------------------------------------
# Our names, and those of the published checkpoints

PUBLISHED = (("clap.htsat.", "clap.nvclap."), ("audio_transformer.", "audio_transformer_clap."),
             ("xattn.{i}.", "lang_encoder.model.layers.{i}.gated_cross_attn_layer_sound."),
             ("lm.layers.{i}.", "lang_encoder.model.layers.{i}.decoder_layer."),
             ("lm.lm_head.", "lang_encoder.lm_head."), ("lm.", "lang_encoder.model."))
UNUSED = re.compile(r"old_decoder_blocks\.|gated_cross_attn_layers_sound\.|position_enc\.inv_freq$"
                    r"|rotary_emb\.inv_freq$|\.(spectrogram_extractor|logmel_extractor|tscam_conv|head)\.")
TABLES = ("lm.embed_tokens.weight", "lm.lm_head.weight")


def rename(name, pairs):
    """The name with its beginning, the left one of the first fitting pair, replaced by the right one."""
    for left, right in pairs:
        if found := re.match(re.escape(left).replace(r"\{i\}", r"(\d+)"), name):
            return right.replace("{i}", "".join(found.groups())) + name[found.end():]
    return name


def our_name(name):
    name = name.removeprefix("module.").replace("clap.afclap.", "clap.nvclap.", 1)
    return rename(name, [(theirs, ours) for ours, theirs in PUBLISHED])


def from_published(state, lm):
    """A published state dict under our names: unused ones dropped and counted, the token table cut in two."""
    ours, dropped = {}, []
    for name, tensor in state.items():
        name = our_name(name)
        if UNUSED.search(name) or (lm.tied and name == TABLES[1]):
            dropped.append(name)
        elif name in TABLES:
            ours[name], ours[name.replace("weight", "added")] = tensor[:lm.vocab], tensor[lm.vocab:]
        else:
            ours[name] = tensor
    if dropped:
        print(f"skipped {len(dropped)} tensors that are duplicates or never used, e.g. {dropped[0]}")
    return ours


# ------------------------------------------------------------------------------------------------------------
# Language models and encoders

LM_FILES = ["*.json", "*.txt", "*.model", "model*.safetensors"]
RELEASE_FILES = ["safe_ckpt/*", "clap_ckpt/*", "*.json", "lm/*"]
FAMILIES = {"model_type": ("qwen2", "qwen3", "llama", "mistral"), "hidden_act": ("silu",),
            "sliding window": (None, False), "rotary scaling": ("default", "llama3")}


def text_side(c):
    """-> folder, sizes and tokenizer (with the marks of a prompt) of the language model that settings name.
    ValueError for what our blocks do not compute."""
    from transformers import AutoConfig, AutoTokenizer
    folder = local_or_hub(c.lang_encoder_path, LM_FILES, c.cache_dir, "lang_encoder_path")
    other = c.tokenizer_path and local_or_hub(c.tokenizer_path, LM_FILES[:3], c.cache_dir, "tokenizer_path")
    tokenizer = add_marks(AutoTokenizer.from_pretrained(other or folder))
    hf = AutoConfig.from_pretrained(folder)
    get = lambda name, default=None: getattr(hf, name, None) or default
    rope = get("rope_parameters") or get("rope_scaling", {})
    found = {"model_type": hf.model_type, "hidden_act": get("hidden_act"),
             "sliding window": get("sliding_window") if getattr(hf, "use_sliding_window", True) else None,
             "rotary scaling": rope.get("rope_type", rope.get("type", "default"))}
    for name, value in found.items():
        if value not in FAMILIES[name]:
            raise ValueError(f"{folder}: {name} {value!r} is not supported, expected one of {FAMILIES[name]}")
    stretch = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    sizes = SimpleNamespace(
        width=hf.hidden_size, layers=hf.num_hidden_layers, inner=hf.intermediate_size,
        heads=hf.num_attention_heads, kv_heads=hf.num_key_value_heads,
        d=get("head_dim", hf.hidden_size // hf.num_attention_heads),
        vocab=tokenizer.convert_tokens_to_ids(MARKS[0]),  # rows before <audio> are the language model's
        eps=hf.rms_norm_eps, rope_theta=rope.get("rope_theta") or get("rope_theta", 10000.0),
        rope_stretch={n: rope[n] for n in stretch} if found["rotary scaling"] == "llama3" else None,
        qkv_bias=get("attention_bias", hf.model_type == "qwen2"), out_bias=get("attention_bias", False),
        mlp_bias=get("mlp_bias", False), qk_norm=hf.model_type == "qwen3", tied=hf.tie_word_embeddings,
        positions=get("max_position_embeddings", 10 ** 9))
    return folder, sizes, tokenizer


def lm_state(folder, lm, tokenizer):
    """{name: tensor} of model.safetensors, else of what its index names, else of model*.safetensors; other
    weights (adapters, originals) are not the model's. The rows of our marks, which all stand between texts,
    start around that of the model's own such mark, eos: a frozen model knows where it belongs."""
    whole, index = (os.path.join(folder, f"model.safetensors{end}") for end in ("", ".index.json"))
    files, named = [whole], None
    if not os.path.exists(whole) and os.path.exists(index):
        named = settings.read_json(index)["weight_map"]
        files = [os.path.join(folder, file) for file in sorted(set(named.values()))]
    elif not os.path.exists(whole):
        files = sorted(glob.glob(os.path.join(glob.escape(folder), "model*.safetensors")))
    if gone := [file for file in files or [whole] if not os.path.isfile(file)]:
        raise FileNotFoundError(f"{gone[0]}: no such file" + (f", but {index} names it" if named else ""))
    state = {}
    for file in files:
        for name, tensor in load_tensors(file).items():
            if not UNUSED.search(name) and (named is None or named.get(name) == os.path.basename(file)):
                state[name.removeprefix("model.")] = tensor
    if lm.tied:
        state.pop("lm_head.weight", None)
    for table in {"embed_tokens.weight", "lm_head.weight"} & set(state):
        rows, added = state[table], len(tokenizer) - lm.vocab
        if len(rows) < lm.vocab:
            raise ValueError(f"{folder}: {table} has {len(rows)} rows, its tokenizer {lm.vocab} tokens")
        spread = rows[:lm.vocab:max(1, lm.vocab // 4096)].float().std(0)
        noise = 0.5 * spread * torch.randn(added, rows.shape[1])
        state[table.replace("weight", "added")] = rows[tokenizer.eos_token_id].float() + noise
        state[table] = rows[:lm.vocab]
    return state


def load_language_model(c, device="cpu", dtype=torch.float32):
    """-> the frozen LanguageModel that settings name, and its tokenizer with the marks of a prompt."""
    folder, sizes, tokenizer = text_side(c)
    with torch.device("meta"):
        lm = LanguageModel(sizes, len(tokenizer) - sizes.vocab).requires_grad_(False)
    place_weights(lm, lm_state(folder, sizes, tokenizer), device, dtype, folder)
    return lm.eval(), tokenizer


def clap_state(file):
    """{our name: tensor} of a CLAP training checkpoint, {"state_dict": {"module.audio_branch.*", ...}}."""
    if not os.path.isfile(settings.place(file)):
        raise FileNotFoundError(f"clap_checkpoint = {file}: no such file")
    saved, prefix = load_pickle(settings.place(file)).get("state_dict", {}), "module.audio_branch."
    state = {"clap.htsat." + n.removeprefix(prefix): t for n, t in saved.items() if n.startswith(prefix)}
    if not state:
        raise ValueError(f"{file}: no module.audio_branch.* in its state_dict")
    return {n: t for n, t in state.items() if not UNUSED.search(n)}


# ------------------------------------------------------------------------------------------------------------
# A model without weights, and its state


def skeleton(c, state, text, source, given, fresh):
    """The model of settings and of the sizes that its state tells, on the meta device: place_weights follows.
    fresh: what listens is drawn at random. ValueError if the user asked for another encoder."""
    encoder = {n.removeprefix("clap.htsat."): t for n, t in state.items() if n.startswith("clap.")}
    told = ClapEncoder.sizes(encoder)
    position = told.pop("position", False)
    for name, value in told.items():
        if name in given and given[name] != value:
            raise ValueError(f"{name} = {given[name]!r}, but the encoder of {source} has {value!r}")
    if blocks := sorted({int(name.split(".")[1]) for name in state if name.startswith("xattn.")}):
        inner = [len(tensor) for name, tensor in state.items() if name.endswith("pos_ffn.w_1.weight")]
        told |= {"cross_attn_every_n_layers": blocks, "audio_transformer_n_layers": len(inner)}
        told |= {"audio_transformer_d_inner": inner[0]} if inner else {}
    c = SimpleNamespace(**(vars(c) | told))
    encoder = ClapEncoder(c.clap_embed_dim, c.clap_depths, c.clap_num_heads, c.clap_spec_size, position)
    _, sizes, tokenizer = text
    with torch.device("meta"):
        lm = LanguageModel(sizes, len(tokenizer) - sizes.vocab)
    with torch.device("cpu" if fresh else "meta"):
        return AudioFlamingo(c, lm, tokenizer, encoder)


def start(c, given=(), fresh=True):
    """-> a new model of the settings c, and the state of its pretrained parts, language model and CLAP."""
    text = text_side(c)
    state = {"lm." + name: tensor for name, tensor in lm_state(*text).items()}
    if c.clap_checkpoint:
        state |= clap_state(c.clap_checkpoint)
    return skeleton(c, state, text, c.clap_checkpoint, given, fresh), state


def read(path, given, setting="init_from"):
    """-> the model of a run directory (its newest checkpoint), a checkpoint, a release directory or a hub id,
    and its state. given: settings that override the saved ones."""
    found = next((p for p in (settings.place(path), path) if os.path.exists(p)), None)
    found = found or local_or_hub(path, RELEASE_FILES, given.get("cache_dir"), setting)
    if os.path.exists(os.path.join(found, "safe_ckpt/metadata.json")):
        return read_release(found, given)
    file = newest_checkpoint(found) if os.path.isdir(found) else found
    if file is None:
        raise FileNotFoundError(f"{path}: neither checkpoint_<epoch>.pt nor safe_ckpt/metadata.json in it")
    return read_checkpoint(file, given)


def read_start(c, given):
    """read what pretrained_path and pretrained_ckpt of the settings c name."""
    path = os.path.join(c.pretrained_path, c.pretrained_ckpt or "").rstrip("/")
    return read(path, {n: v for n, v in given.items() if n != "pretrained_path"}, "pretrained_path")


def read_checkpoint(file, given):
    """A checkpoint holds what trained and what was drawn at random; the rest is where its run took it."""
    saved = load_pickle(file)
    if "model_state_dict" not in saved:
        raise ValueError(f"{file}: no model_state_dict in it; is it a training checkpoint?")
    names = settings.MODEL_SETTINGS + settings.ORIGINS
    own = {n: v for n, v in saved.get("config", {}).items() if n in names}
    c = SimpleNamespace(**(settings.defaults() | own | own_parts(own, os.path.dirname(file)) | given))
    try:
        if c.pretrained_path:  # that run knows where its parts are, but not what this one made of them
            below = {n: v for n, v in own.items() if n not in settings.ORIGINS + settings.PATHS} | given
            model, state = read_start(c, below)
        else:
            model, state = start(c, given, fresh=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file}: a part of this run is not where it was. {error}") from error
    trained = trained_tensors(saved, model.lm.config)
    frozen = fingerprint({name: tensor for name, tensor in state.items() if name not in trained})
    if saved.get("frozen_hash", frozen) != frozen:
        raise ValueError(f"{file}: the frozen weights it was trained with are not those found now under "
                         f"{saved['frozen_from']}")
    return model, state | trained


def own_parts(own, folder):
    """Settings whose path lay inside the run when it was saved and is in this folder now: runs move."""
    home, moved = settings.place(os.path.join(own.get("expdir", ""), own.get("run_name", ""))) + os.sep, {}
    for name, value in own.items():
        path = os.path.normpath(settings.place(value)) if name in settings.PATHS and value else ""
        inside = os.path.join(os.path.abspath(folder), path.removeprefix(home))
        if path.startswith(home) and os.path.exists(inside):
            moved[name] = inside
    return moved


def trained_tensors(saved, lm):
    """{our name: tensor} of a training checkpoint; our older ones and published ones have published names."""
    state = saved["model_state_dict"]
    published = r"(module\.)?(lang_encoder|audio_transformer_clap|clap\.(nv|af)clap)\."
    return from_published(state, lm) if any(re.match(published, name) for name in state) else state


def read_release(folder, given):
    state = {}
    for shard, names in settings.read_json(os.path.join(folder, "safe_ckpt/metadata.json")).items():
        file = os.path.join(folder, "safe_ckpt", shard.removesuffix(".safetensors") + ".safetensors")
        found = load_tensors(file)  # what metadata.json names, and nothing else that lies there
        if absent := [name for name in names if name not in found]:
            raise ValueError(f"{file}: tensors named in metadata.json are missing: {listed(absent)}")
        state |= found
    if not any(our_name(name).startswith("clap.htsat.") for name in state):
        raise ValueError(f"{folder}: not an Audio Flamingo 2 release: it holds no clap.nvclap.*")
    own = os.path.join(folder, "config.json")
    saved = settings.read_json(own) if os.path.exists(own) else {"max_num_window": 12}  # as published: 2 min
    saved = {name: value for name, value in saved.items() if name in settings.MODEL_SETTINGS}
    if os.path.isdir(os.path.join(folder, "lm")):  # save_release puts config and tokenizer there
        saved |= {"lang_encoder_path": os.path.abspath(os.path.join(folder, "lm")), "tokenizer_path": None}
    clap = os.path.abspath(os.path.join(folder, "clap_ckpt/epoch_16.pt"))  # its text encoder
    saved |= {"clap_checkpoint": clap} if os.path.isfile(clap) else {}
    c = SimpleNamespace(**(settings.defaults() | saved | given))
    text = text_side(c)
    state = from_published(state, text[1])
    return skeleton(c, state, text, folder, given, fresh=False), state


def newest_checkpoint(run):
    """A run's interim checkpoint if there is one (it is newer than any epoch's), else the last epoch's."""
    interim = os.path.join(run, "checkpoint_interim.pt")
    if os.path.exists(interim):
        return interim
    names = os.listdir(run) if os.path.isdir(run) else []
    epochs = [int(m[1]) for name in names if (m := re.fullmatch(r"checkpoint_(\d+)\.pt", name))]
    return os.path.join(run, f"checkpoint_{max(epochs)}.pt") if epochs else None


def fingerprint(tensors):
    """A short hash that tells one set of weights from another, from some 256 values of each, rounded to
    bf16."""
    digest = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        sample = t.detach().flatten()[:: max(1, t.numel() // 256)].float().cpu().to(torch.bfloat16)
        digest.update(f"{name} {tuple(t.shape)}".encode() + sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def place_weights(model, state, device, frozen, source):
    """Every weight to its final dtype and device, one by one, from `state`, which it empties, or as it was.
    Trained ones become float32, frozen ones `frozen`, BatchNorm's float32. ValueError lists the misfits."""
    own, parts = model.state_dict(), {name.split(".")[0] for name in state}
    needed = [n for n, t in own.items() if t.is_meta or n.split(".")[0] in parts]
    misfits = {"missing": [n for n in needed if n not in state],
               "unexpected": [n for n in state if n not in own],
               "wrong shape": [f"{n} {tuple(t.shape)} instead of {tuple(own[n].shape)}"
                               for n, t in state.items() if n in own and t.shape != own[n].shape]}
    if any(misfits.values()):
        raise ValueError(f"{source} does not fit the model: " +
                         "; ".join(f"{what}: {listed(names)}" for what, names in misfits.items() if names))
    del own  # it would keep what was drawn at random
    for path, module in model.named_modules():
        exact = isinstance(module, nn.modules.batchnorm._BatchNorm)
        for table in (module._parameters, module._buffers):
            for name, p in [(name, p) for name, p in table.items() if p is not None]:
                tensor = state.pop(f"{path}.{name}".lstrip("."), p.data)
                dtype = torch.float32 if exact or p.requires_grad else frozen
                tensor = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
                table[name] = nn.Parameter(tensor, p.requires_grad) if table is module._parameters else tensor


def listed(names):
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def load(path, device="cpu", dtype=torch.float32, **given):
    """The model of a run directory, a checkpoint_<epoch>.pt, a release directory or a hub id, ready to
    answer. Settings in `given` override the saved ones."""
    if unknown := set(given) - set(settings.defaults()):
        raise ValueError(f"from_pretrained: unknown setting {', '.join(sorted(unknown))}")
    return finished(*read(path, given), device, dtype, path)


def new(config, device="cpu", dtype=torch.float32):
    """A new model: the pretrained language model, CLAP from clap_checkpoint, the rest random."""
    return finished(*start(config), device, dtype, config.lang_encoder_path)


def finished(model, state, device, dtype, source):
    place_weights(model.requires_grad_(False), state, device, dtype, source)
    return model.eval()


def save_release(model, folder):
    """The release layout (safe_ckpt/, clap_ckpt/epoch_16.pt); our config.json and lm/ (config, tokenizer)."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    own, c = model.state_dict(), model.config
    if getattr(model, "int8", False):
        raise ValueError("a model with int8 weights is for answering: save the one it was made from")
    for table in set(TABLES) & set(own):  # one table, as published
        added = own.pop(table.replace("weight", "added"))
        own[table] = torch.cat([own[table], added.to(own[table].dtype)])
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
    save_atomically({"epoch": 16, "state_dict": clap}, os.path.join(folder, "clap_ckpt/epoch_16.pt"))
    lm = local_or_hub(c.lang_encoder_path, LM_FILES[:1], c.cache_dir, "lang_encoder_path")
    shutil.copyfile(os.path.join(lm, "config.json"), os.path.join(folder, "lm/config.json"))
    model.tokenizer.save_pretrained(os.path.join(folder, "lm"))
    sizes = {name: getattr(c, name) for name in settings.MODEL_SETTINGS}
    for name, content in (("config.json", sizes), ("safe_ckpt/metadata.json", metadata)):
        with open(os.path.join(folder, name), "w") as f:
            json.dump(content, f, indent=1)


# ------------------------------------------------------------------------------------------------------------
# Devices and precisions


def pick_device(name="auto"):
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device = {name!r}, expected auto, cpu, cuda or cuda:<n>") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device = {name!r}, but no CUDA device is available here")
    return device


def pick_precision(precision, device):
    """-> (dtype of products and frozen weights, reason). bf16 where the hardware multiplies it faster than
    float32."""
    if precision not in ("amp_bf16", "fp32"):
        raise ValueError(f"precision = {precision!r}, expected amp_bf16 or fp32")
    if precision == "fp32":
        return torch.float32, "asked for"
    units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if device.type == "cpu" and not units:
        return torch.float32, "this processor has no bf16 units, emulated bf16 is 5 times slower"
    return torch.bfloat16, "amp_bf16"
