"""HTS-AT of the package laion-clap, out of its one file."""
import importlib.util
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
