"""HTS-AT of the package laion-clap, out of its one file; and the sizes that weights of one tell."""
import importlib.util
import math
import os
import sys
import types
import warnings
from functools import lru_cache

import torch.nn as nn


@lru_cache
def load_htsat_class():
    """laion_clap.clap_module.htsat.HTSAT_Swin_Transformer, without laion_clap's or torchlibrosa's __init__.

    Those import torchvision, librosa, numba and wandb, and download tokenizers. HTS-AT's file runs between
    stand-ins: empty packages with the same folders, and modules with the names it takes from `.utils` (for
    training heads) and `torchlibrosa.stft` (a waveform front end), neither of which we use.
    """
    found = {n: importlib.util.find_spec(n) for n in ("laion_clap", "torchlibrosa")}  # folders; runs nothing
    if None in found.values():
        raise ModuleNotFoundError("missing packages: pip install --no-deps laion-clap torchlibrosa")
    name = "laion_clap_htsat"
    modules = {n: types.ModuleType(n) for n in (name, f"{name}.utils", "torchlibrosa", "torchlibrosa.stft")}
    modules[name].__path__ = [os.path.join(os.path.dirname(found["laion_clap"].origin), "clap_module")]
    modules["torchlibrosa"].__path__ = [os.path.dirname(found["torchlibrosa"].origin)]
    utils, front_end = modules[f"{name}.utils"], modules["torchlibrosa.stft"]
    utils.do_mixup = utils.interpolate = None
    front_end.Spectrogram = front_end.LogmelFilterBank = lambda **_: nn.Identity()
    sys.modules.update(modules)
    warnings.filterwarnings("ignore", message="torch.meshgrid", category=UserWarning)  # of an older torch
    htsat = importlib.import_module(f"{name}.htsat")
    # whoever imports torchlibrosa later gets the real one; ours go by the stand-in's name, for pickle
    sys.modules[f"{name}.augmentation"] = augmentation = sys.modules["torchlibrosa.augmentation"]
    augmentation.SpecAugmentation.__module__ = augmentation.DropStripes.__module__ = f"{name}.augmentation"
    for n in ("torchlibrosa", "torchlibrosa.stft", "torchlibrosa.augmentation"):
        del sys.modules[n]
    return htsat.HTSAT_Swin_Transformer


def sizes_told(state):
    """The settings that HTS-AT's weights, {name: tensor}, tell by their names and shapes."""
    if "patch_embed.proj.weight" not in state:
        return {}
    heads = [[], [], [], []]  # of every block of every stage
    for name, tensor in state.items():
        if name.endswith("relative_position_bias_table"):
            heads[int(name.split(".")[1])].append(tensor.shape[1])
    told = {"clap_embed_dim": len(state["patch_embed.proj.weight"]), "clap_depths": list(map(len, heads)),
            "clap_num_heads": [stage[0] if stage else 1 for stage in heads]}  # 1: of no block, no harm
    if "absolute_pos_embed" in state:  # of patches of 4 x 4
        told |= {"position": True, "clap_spec_size": 4 * math.isqrt(state["absolute_pos_embed"].shape[1])}
    elif "layers.0.blocks.1.attn_mask" in state:  # one for each window of 8 x 8 patches
        told["clap_spec_size"] = 32 * math.isqrt(len(state["layers.0.blocks.1.attn_mask"]))
    return told
