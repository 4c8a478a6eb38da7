"""HTS-AT of the package laion-clap, imported from its one file, and the sizes inferred from its weights."""
import importlib.util
import math
import os
import sys
import types
import warnings
from functools import lru_cache

import torch.nn as nn

from tools.common import UserError

# HTS-AT's waveform front end, which we do not use: ours is model.log_mel
FRONT_END = types.SimpleNamespace(sample_rate=16000, window_size=1024, hop_size=160, mel_bins=64, fmin=50,
                                  fmax=8000)


@lru_cache
def load_htsat_class():
    """laion_clap.clap_module.htsat.HTSAT_Swin_Transformer, without laion_clap's or torchlibrosa's __init__.

    Those import torchvision, librosa, numba and wandb, and download tokenizers. HTS-AT's file runs between
    stand-ins: empty packages with the same folders, and modules with the names it takes from `.utils` (for
    training heads) and `torchlibrosa.stft` (a waveform front end), neither of which we use.
    """
    found = {n: importlib.util.find_spec(n) for n in ("laion_clap", "torchlibrosa")}  # folders; runs nothing
    if None in found.values():
        raise UserError("missing packages: pip install --no-deps laion-clap torchlibrosa")
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
    for n in ("torchlibrosa", "torchlibrosa.stft", "torchlibrosa.augmentation"):
        del sys.modules[n]  # who imports torchlibrosa later gets the real one
    return htsat.HTSAT_Swin_Transformer


def sample_rate_of_mel(mel):
    """The sample rate (Hz) of mel bands (513, 64), from the last bin with a weight: 511 for AF-CLAP (None),
    whose bands end at 8 of 8 kHz; 298 for LAION's checkpoints, whose bands end at 14 of 24 kHz."""
    if mel is None:
        return FRONT_END.sample_rate
    rates = {511: 16000, 298: 48000}
    bins = (mel > 1e-5 * mel.max()).any(1).nonzero().flatten().tolist()
    if mel.shape != (513, 64) or not bins or bins[-1] not in rates:
        raise UserError(f"mel bands {list(mel.shape)}, last bin {bins[-1:]}: expected (513, 64), and bin 511 "
                        f"(16 kHz, up to 8 kHz) or 298 (48 kHz, up to 14 kHz)")
    return rates[bins[-1]]


def infer_htsat_config(state):
    """-> (settings, arguments of ClapEncoder) from the names and shapes of HTS-AT's weights {name: tensor}.
    """
    if "patch_embed.proj.weight" not in state:
        return {}, {}
    heads = [[], [], [], []]  # of the blocks of each stage
    for name, tensor in state.items():
        if name.endswith("relative_position_bias_table"):
            stage = int(name.split(".")[1])
            heads[stage].append(tensor.shape[1])
    inferred = {
        "clap_embed_dim": len(state["patch_embed.proj.weight"]),
        "clap_depths": [len(stage) for stage in heads],
        "clap_num_heads": [stage[0] if stage else 1 for stage in heads]}  # 1: no blocks
    options = {
        "fusion": any("fusion_model" in name for name in state),
        "position": "absolute_pos_embed" in state}
    if options["position"]:  # of patches of 4 x 4
        inferred["clap_spec_size"] = 4 * math.isqrt(state["absolute_pos_embed"].shape[1])
    elif "layers.0.blocks.1.attn_mask" in state:  # one for each window of 8 x 8 patches
        inferred["clap_spec_size"] = 32 * math.isqrt(len(state["layers.0.blocks.1.attn_mask"]))
    return inferred, options
