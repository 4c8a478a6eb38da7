"""Stand-ins for the published releases: true names, shapes, dtypes and duplicates, random weights.

    python tests/full_size.py 0.5B DIR            # or 1.5B, 3B
    python sample.py --audio clip.wav --init_from nvidia/audio-flamingo-2-0.5B --cache_dir DIR

DIR becomes a cache of the hub that holds the release and its language model's config and tokenizer.
"""
import json
import os
import sys

import torch
from safetensors.torch import save_file

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from checkpoint import OnMeta
from model import ClapEncoder

# width, blocks, inner width, heads, key heads, hub id
SIZES = {"0.5B": (896, 24, 4864, 14, 2, "nvidia/audio-flamingo-2-0.5B"),
         "1.5B": (1536, 28, 8960, 12, 2, "nvidia/audio-flamingo-2-1.5B"),
         "3B": (2048, 36, 11008, 16, 2, "nvidia/audio-flamingo-2")}
VOCABULARY, SHARDS = 151669, 12  # tokens with the four special tokens of a prompt


def gated_shapes(D, C=2048):
    return {"attn.norm.weight": (D,), "attn.norm.bias": (D,), "attn.to_q.weight": (512, D),
            "attn.to_kv.weight": (1024, C), "attn.to_out.weight": (D, 512), "attn_gate": (1,),
            "ff.0.weight": (D,), "ff.0.bias": (D,), "ff.1.weight": (4 * D, D), "ff.3.weight": (D, 4 * D),
            "ff_gate": (1,)}


def transformer_shapes(C=2048, inner=2048):
    shapes = {"layer_norm.weight": (C,), "layer_norm.bias": (C,), "position_enc.inv_freq": (64,)}
    for i in range(3):
        attention, feed = f"layer_stack.{i}.slf_attn.", f"layer_stack.{i}.pos_ffn."
        shapes |= {f"{attention}{w}.weight": (C, C) for w in ("w_qs", "w_ks", "w_vs", "fc")}
        shapes |= {feed + "w_1.weight": (inner, C), feed + "w_1.bias": (inner,),
                   feed + "w_2.weight": (C, inner), feed + "w_2.bias": (C,)}
        for part in (attention, feed):
            shapes |= {part + "layer_norm.weight": (C,), part + "layer_norm.bias": (C,)}
    return shapes


def lm_config(size):
    from transformers import Qwen2Config
    D, blocks, inner, heads, kv_heads, _ = SIZES[size]
    return Qwen2Config(hidden_size=D, num_hidden_layers=blocks, intermediate_size=inner,
                       num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=151936,
                       rope_theta=1e6, max_position_embeddings=32768, tie_word_embeddings=True,
                       bos_token_id=151643, eos_token_id=151643, architectures=["Qwen2ForCausalLM"])


def release_shapes(size):
    """{published name: shape, or a tensor whose values matter}."""
    from transformers import Qwen2ForCausalLM
    D, blocks = SIZES[size][:2]
    with torch.device("meta"):
        lm = Qwen2ForCausalLM(lm_config(size)).state_dict()
    shapes, prefix = {}, "lang_encoder.model."
    for name, tensor in lm.items():
        shapes["lang_encoder." + name] = tuple(tensor.shape)
        if name.startswith("model.layers."):  # each block twice
            i, rest = name.removeprefix("model.layers.").split(".", 1)
            del shapes["lang_encoder." + name]
            shapes[f"{prefix}layers.{i}.decoder_layer.{rest}"] = tuple(tensor.shape)
            shapes[f"lang_encoder.old_decoder_blocks.{i}.{rest}"] = tuple(tensor.shape)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        shapes["lang_encoder." + name] = (VOCABULARY, D)
    for i in range(blocks):
        for rest, shape in gated_shapes(D).items():
            shapes[f"{prefix}layers.{i}.gated_cross_attn_layer_sound.{rest}"] = shape
            shapes[f"lang_encoder.gated_cross_attn_layers_sound.{i}.{rest}"] = shape
    shapes |= {"audio_transformer_clap." + rest: shape for rest, shape in transformer_shapes().items()}
    with OnMeta():
        encoder = ClapEncoder(256, [2, 2, 12, 2], [4, 8, 16, 32]).htsat.state_dict()
    for rest, tensor in encoder.items():
        shapes["clap.nvclap." + rest] = tuple(tensor.shape) if tensor.is_meta else tensor.contiguous()
    return shapes


def values_of(name, shape, block):
    """Ones for norms, else the beginning of a random block, repeated: the same for a tensor and its copy."""
    if isinstance(shape, torch.Tensor):
        return shape
    if "norm" in name and name.endswith("weight"):
        return torch.ones(shape)
    n = torch.Size(shape).numel()
    return block.repeat(n // len(block) + 1)[:n].view(shape)


def snapshot(cache, repo):
    """A folder in a cache of the hub where a repository's files go."""
    home = os.path.join(cache, "models--" + repo.replace("/", "--"))
    folder = os.path.join(home, "snapshots", "0" * 40)
    for name in (folder, os.path.join(home, "refs")):
        os.makedirs(name, exist_ok=True)
    with open(os.path.join(home, "refs/main"), "w") as f:
        f.write("0" * 40)
    return folder


def write_language_model(size, folder):
    """config.json, and a tokenizer of bytes with as many tokens as Qwen2.5's: no weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    lm_config(size).save_pretrained(folder)
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {f"<{i}>": i for i in range(len(vocab), VOCABULARY - 5)} | {"<|endoftext|>": VOCABULARY - 5}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)


def write_release(size, cache):
    """-> the hub id under which --cache_dir=cache finds the release."""
    repo = SIZES[size][-1]
    write_language_model(size, snapshot(cache, f"Qwen/Qwen2.5-{size}"))
    folder = os.path.join(snapshot(cache, repo), "safe_ckpt")
    os.makedirs(folder, exist_ok=True)
    block = 0.02 * torch.randn(2 ** 16)
    shapes, metadata = release_shapes(size), {}
    for i in range(SHARDS):
        names = metadata[f"weight_{i}"] = list(shapes)[i::SHARDS]
        tensors = {name: values_of(name, shapes[name], block) for name in names}
        save_file(tensors, os.path.join(folder, f"weight_{i}.safetensors"))
    with open(os.path.join(folder, "metadata.json"), "w") as f:
        json.dump(metadata, f)
    return repo


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in SIZES:
        sys.exit(__doc__)
    print(write_release(*sys.argv[1:]))
