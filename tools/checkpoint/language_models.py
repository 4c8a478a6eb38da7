"""Language models in Hugging Face folders: sizes, tokenizer and weights of those that our blocks compute."""
import glob
import math
import os
import re
import sys
from types import SimpleNamespace

import torch

from data import SPECIAL_TOKENS, extend_tokenizer, encode_prompts, encode_text
from tools.checkpoint.files import inside, load_tensors, local_or_hub, merged, same
from tools.common import UserError, join_names, read_json_object, shorten

LM_FILES = ["*.json", "*.txt", "*.model", "model*.safetensors"]
FAMILIES = {"model_type": ("qwen2", "qwen3", "llama", "mistral"), "hidden_act": ("silu",),
            "sliding window": (None, False), "rotary scaling": ("default", "llama3")}
BY_WIDTH = {896: "Qwen/Qwen2.5-0.5B", 1536: "Qwen/Qwen2.5-1.5B", 2048: "Qwen/Qwen2.5-3B"}  # of the releases
NEVER_USED = re.compile(r"rotary_emb\.inv_freq$")


def lm_from_width(width, source):
    """The language model of a published release."""
    if width not in BY_WIDTH:
        raise UserError(f"{source}: its language model has width {width}, the published ones "
                         f"{', '.join(map(str, BY_WIDTH))}: name it by --lang_encoder_path")
    return BY_WIDTH[width]


def guess_base_lm(state, file):
    """The language model that a published training checkpoint belongs to: its token table, or its blocks."""
    widths = [t.shape[-1] for n, t in state.items() if n.endswith(("embed_tokens.weight", "ff.1.weight"))]
    return lm_from_width(widths[0] if widths else None, file)


def opened(kind, folder):
    """transformers' own reading of a folder's config.json or tokenizer; never of code that lies there."""
    try:
        return kind.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a file that is not there or not what it should be: dozens of kinds
        raise UserError(f"{folder}: no usable {kind.__name__[4:].lower()} ({shorten(error)})") from error


def load_lm_config_and_tokenizer(c, weights=True):
    """-> folder, sizes and tokenizer (with the marks of a prompt) of the language model that settings name;
    weights: the hub is asked for them, too. ValueError for what our blocks do not compute."""
    from transformers import AutoConfig, AutoTokenizer
    files = LM_FILES if weights else LM_FILES[:3]
    folder = local_or_hub(c.lang_encoder_path, files, c.cache_dir, "lang_encoder_path")
    other = c.tokenizer_path and local_or_hub(c.tokenizer_path, LM_FILES[:3], c.cache_dir, "tokenizer_path")
    sizes = sizes_of(opened(AutoConfig, folder), folder)
    tokenizer = opened(AutoTokenizer, other or folder)
    known = len(tokenizer)
    try:
        check_marks(extend_tokenizer(tokenizer))
    except ValueError as error:
        raise UserError(f"{other or folder}: {error}") from error
    # tables are in two parts: rows of the language model, and, from here on, those of our marks
    marks = set(tokenizer.convert_tokens_to_ids([*SPECIAL_TOKENS[:3], tokenizer.sep_token]))
    sizes.vocab = len(tokenizer) - 1  # neither part is ever empty
    while sizes.vocab - 1 in marks:
        sizes.vocab -= 1
    sizes.known = known  # tokens that the tokenizer came with: a mark may be among them
    return folder, sizes, tokenizer


def check_marks(tokenizer):
    """ValueError where training would not know what is what: labels begin after the first sep, end at
    <|endofchunk|> and eos, and leave out pad."""
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in (*SPECIAL_TOKENS[:3], tokenizer.sep_token)}
    *begin, _, _ = encode_prompts(tokenizer, [""])[0]  # bos, or nothing
    if len(set(ids.values())) < 4 or tokenizer.eos_token in SPECIAL_TOKENS[:3] or set(begin) & set(ids.values()):
        raise UserError(f"the tokenizer means two things by one of {', '.join(ids)}: see its eos, bos, sep")
    for mark, number in ids.items():
        if number in encode_text(tokenizer, [mark])[0]:
            raise UserError(f"the tokenizer's mark {mark!r} is part of its plain texts, too")
    if len(tokenizer) <= (last := max(tokenizer.get_vocab().values())):
        raise UserError(f"the tokenizer's ids go up to {last}, but it has {len(tokenizer)} tokens")


def sizes_of(hf, folder):
    """The sizes of a LanguageModel, but vocab, from transformers' config of it."""
    get = lambda name, default=None: getattr(hf, name, None) or default
    rope = get("rope_parameters") or get("rope_scaling", {})
    found = {"model_type": hf.model_type, "hidden_act": get("hidden_act"),
             "sliding window": get("sliding_window") if getattr(hf, "use_sliding_window", True) else None,
             "rotary scaling": rope.get("rope_type", rope.get("type", "default"))}
    for name, value in found.items():
        if value not in FAMILIES[name]:
            raise UserError(f"{folder}: {name} {value!r} is not supported, expected one of {FAMILIES[name]}")
    counts = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
              "num_key_value_heads")
    for name in counts:
        if type(getattr(hf, name)) is not int or getattr(hf, name) < 1:
            raise UserError(f"{folder}/config.json: {name} = {getattr(hf, name)!r}, expected 1 or more")
    stretch = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    sizes = SimpleNamespace(
        width=hf.hidden_size, layers=hf.num_hidden_layers, inner=hf.intermediate_size,
        heads=hf.num_attention_heads, kv_heads=hf.num_key_value_heads,
        d=get("head_dim", hf.hidden_size // hf.num_attention_heads),
        eps=hf.rms_norm_eps, rope_theta=rope.get("rope_theta", getattr(hf, "rope_theta", 10000.0)),
        rope_stretch={n: rope[n] for n in stretch} if found["rotary scaling"] == "llama3" else None,
        qkv_bias=get("attention_bias", hf.model_type == "qwen2"), out_bias=get("attention_bias", False),
        mlp_bias=get("mlp_bias", False), qk_norm=hf.model_type == "qwen3", tied=hf.tie_word_embeddings,
        positions=hf.max_position_embeddings)
    numbers = {"rms_norm_eps": sizes.eps, "rope_theta": sizes.rope_theta,
               "max_position_embeddings": sizes.positions}
    for name, value in (numbers | (sizes.rope_stretch or {})).items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise UserError(f"{folder}/config.json: {name} = {value!r}, expected a number above 0")
    if sizes.heads % sizes.kv_heads or sizes.d < 2 or sizes.d % 2:
        raise UserError(f"{folder}/config.json: {sizes.heads} heads of {sizes.d} channels, {sizes.kv_heads} "
                         f"of keys: expected whole groups of heads and an even number of channels")
    return sizes


def weight_files(folder):
    """{name: function that maps its tensor}: of model.safetensors, else of what its index names, else of
    model*.safetensors; other weights (adapters, originals) are not the model's."""
    whole, index = (os.path.join(folder, f"model.safetensors{end}") for end in ("", ".index.json"))
    if not os.path.exists(whole) and os.path.exists(index):
        named = read_json_object(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
            raise UserError(f"{index}: no weight_map {{tensor: file}} in it")
        held = {file: load_tensors(inside(folder, file, index)) for file in sorted(set(named.values()))}
        if absent := [name for name, file in named.items() if name not in held[file]]:
            file = os.path.join(folder, named[absent[0]])
            raise UserError(f"{file}: not in it, though {index} says so: {join_names(absent)}")
        return [(name, held[file][name]) for name, file in named.items()]
    files = sorted(glob.glob(os.path.join(glob.escape(folder), "model*.safetensors")))
    files = [whole] if os.path.lexists(whole) or not files else files
    if not os.path.lexists(files[0]):
        raise FileNotFoundError(f"{whole}: no such file")
    files = [inside(folder, os.path.basename(file), "its kind") for file in files]
    return [piece for file in files for piece in load_tensors(file).items()]


def lm_state(folder, lm, tokenizer):
    """{name: tensor} of the language model in a folder. lm.tied becomes False where the weights hold a head
    of their own. The rows of our marks, which all stand between texts, start around that of the model's own
    such mark, eos: a frozen model knows where it belongs."""
    pieces, _ = merged([(n, get) for n, get in weight_files(folder) if not NEVER_USED.search(n)],
                       lambda name: name.removeprefix("model."), folder)
    check_sizes(pieces, lm, folder)
    untie_if_different(pieces, lm, "embed_tokens.weight", "lm_head.weight", folder)
    state = {name: get() for name, get in pieces.items()}
    for table in [name for name in ("embed_tokens.weight", "lm_head.weight") if name in state]:
        rows = state[table]
        if rows.ndim != 2 or len(rows) < lm.vocab:
            raise UserError(f"{folder}: {table} has shape {tuple(rows.shape)}, its tokenizer {lm.vocab} "
                             f"tokens")
        spread = rows[:lm.vocab:max(1, lm.vocab // 4096)].float().std(0)
        kept = rows[lm.vocab:lm.known].float()  # marks that the language model has learnt itself
        noise = 0.5 * spread * torch.randn(len(tokenizer) - lm.vocab - len(kept), rows.shape[1])
        eos = rows[tokenizer.eos_token_id].float()
        state[table.replace("weight", "added")] = torch.cat([kept, eos + noise])
        state[table] = rows[:lm.vocab]
    return state


def check_sizes(pieces, lm, source, prefix=""):
    """ValueError if config.json and the weights, {name: function that maps a tensor}, are of two models: told
    before a model of these sizes is made."""
    blocks = {name.split(".")[1] for name in (n.removeprefix(prefix) for n in pieces if n.startswith(prefix))
              if name.startswith("layers.")}
    table = pieces.get(prefix + "embed_tokens.weight")
    shape = tuple(table().shape) if table else (0, lm.width)
    width = table and (shape[1] if len(shape) == 2 else shape)
    if (len(blocks), *shape[1:]) != (lm.layers, lm.width):
        raise UserError(f"{source} does not fit the model: its weights are {len(blocks)} blocks of width "
                         f"{width}, config.json says {lm.layers} of {lm.width}: another language model?")


def untie_if_different(pieces, lm, table, head, source):
    """One table for both, unless the weights hold another head than config.json says: then theirs counts."""
    if lm.tied and head in pieces and table in pieces:
        if same(pieces[table](), pieces[head]()):
            del pieces[head]
        else:
            lm.tied = False
            print(f"note: {source}: config.json ties the head to the embeddings, but the weights hold "
                  f"another head: it is used", file=sys.stderr)
    elif lm.tied:
        pieces.pop(head, None)
