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
from model import AudioTransformer, ClapEncoder, GatedCrossAttention
from tests.helpers import save_byte_tokenizer

# width, blocks, inner width, heads, key heads, hub id
SIZES = {"0.5B": (896, 24, 4864, 14, 2, "nvidia/audio-flamingo-2-0.5B"),
         "1.5B": (1536, 28, 8960, 12, 2, "nvidia/audio-flamingo-2-1.5B"),
         "3B": (2048, 36, 11008, 16, 2, "nvidia/audio-flamingo-2")}
VOCABULARY, SHARDS = 151669, 12  # tokens with the four special tokens of a prompt


def lm_config(size):
    from transformers import Qwen2Config
    D, blocks, inner, heads, kv_heads, _ = SIZES[size]
    return Qwen2Config(hidden_size=D, num_hidden_layers=blocks, intermediate_size=inner,
                       num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=151936,
                       rope_theta=1e6, max_position_embeddings=32768, tie_word_embeddings=True,
                       bos_token_id=151643, eos_token_id=151643, architectures=["Qwen2ForCausalLM"])


def release_shapes(size):
    """{published name: tensor}, on the meta device where only the shape matters."""
    from transformers import Qwen2ForCausalLM
    D, blocks = SIZES[size][:2]
    with torch.device("meta"):
        lm = Qwen2ForCausalLM(lm_config(size)).state_dict()
        gated = GatedCrossAttention(D, 2048).state_dict()
        transformer = AudioTransformer(2048, 8, 3, 2048).state_dict()
        transformer["position_enc.inv_freq"] = torch.empty(64)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            lm[name] = torch.empty(VOCABULARY, D)
    with OnMeta():
        encoder = ClapEncoder(256, [2, 2, 12, 2], [4, 8, 16, 32]).htsat.state_dict()
    found, prefix = {}, "lang_encoder.model."
    for name, tensor in lm.items():
        if name.startswith("model.layers."):  # each block twice
            i, rest = name.removeprefix("model.layers.").split(".", 1)
            found[f"{prefix}layers.{i}.decoder_layer.{rest}"] = tensor
            found[f"lang_encoder.old_decoder_blocks.{i}.{rest}"] = tensor
        else:
            found["lang_encoder." + name] = tensor
    for i in range(blocks):
        for rest, tensor in gated.items():
            found[f"{prefix}layers.{i}.gated_cross_attn_layer_sound.{rest}"] = tensor
            found[f"lang_encoder.gated_cross_attn_layers_sound.{i}.{rest}"] = tensor
    for rest, tensor in transformer.items():
        found["audio_transformer_clap." + rest] = tensor
    for rest, tensor in encoder.items():
        found["clap.nvclap." + rest] = tensor
    return found


def values_of(name, tensor, block):
    """Ones for norms, else the beginning of a random block, repeated: the same for a tensor and its copy."""
    if not tensor.is_meta:
        return tensor.contiguous()
    if "norm" in name and name.endswith("weight"):
        return torch.ones(tensor.shape)
    n = tensor.numel()
    return block.repeat(n // len(block) + 1)[:n].view(tensor.shape)


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
    lm_config(size).save_pretrained(folder)
    save_byte_tokenizer(folder, fillers=VOCABULARY - 4 - 257)


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
