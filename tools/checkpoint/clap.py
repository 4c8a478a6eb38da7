"""Weights of audio encoders: CLAP checkpoints of the AF-CLAP kind, and LAION's own."""
import torch

import config as settings
from model import SAMPLE_RATE, mel_bands
from tools.checkpoint.files import load_pickle, state_dict_of
from tools.checkpoint.htsat import sample_rate_of_mel
from tools.checkpoint.releases import UNUSED
from tools.common import UserError

BANDS = "audio_branch.logmel_extractor.melW"  # (513, 64) mel bands


def clap_state(file):
    """{our name: tensor} of a CLAP training checkpoint, {"state_dict": {"module.audio_branch.*", ...}}."""
    saved = state_dict_of(load_pickle(settings.resolve_path(file)), "state_dict", file)
    saved = {name.removeprefix("module."): tensor for name, tensor in saved.items()}
    state = {}
    for name, tensor in saved.items():
        if name.startswith("audio_branch.") and not UNUSED.search(name):
            state["clap.htsat." + name.removeprefix("audio_branch.")] = tensor
    if not state:
        raise UserError(f"{file}: no module.audio_branch.* in its state_dict")
    mel = clap_mel(saved, file)
    return state if mel is None else state | {"clap.mel": mel}


def clap_mel(saved, file):
    """The mel bands (513, 64) of a CLAP that is not AF-CLAP; None for that, whose bands model.py computes.

    LAION's encoders take 48 kHz. Those with a fusion branch were trained on HTK bands, those without on the
    bands in the file (get_mel and HTS-AT of laion-clap, arXiv 2211.06687)."""
    has_fusion = any(".fusion_model." in name for name in saved)
    is_laion = "text_branch.embeddings.word_embeddings.weight" in saved  # RoBERTa; AF-CLAP has a T5
    if BANDS in saved:
        rate = sample_rate_of_mel(saved[BANDS])
    elif has_fusion:
        rate = 48000 if is_laion else SAMPLE_RATE
    else:
        raise UserError(f"{file}: an encoder without a fusion branch needs its own mel bands, but there is "
                        f"no module.{BANDS} in the file")
    if not has_fusion:
        return saved[BANDS].float()
    return None if rate == SAMPLE_RATE else mel_bands(torch.device("cpu"), rate, 14000)
