"""The weights of audio encoders: CLAP checkpoints of the AF-CLAP kind, and LAION's own."""
import os

import torch

import config as settings
from data import SAMPLE_RATE
from model import hann_and_mel
from tools.checkpoint.files import load_pickle, tensors_in
from tools.checkpoint.htsat import sample_rate_of_mel
from tools.checkpoint.releases import UNUSED
from tools.common import UserError


def clap_state(file):
    """{our name: tensor} of a CLAP training checkpoint, {"state_dict": {"module.audio_branch.*", ...}}."""
    path, branch = settings.resolve_path(file), "audio_branch."
    if not os.path.isfile(path):
        raise FileNotFoundError(f"clap_checkpoint = {file}: no such file")
    saved = tensors_in(load_pickle(path), "state_dict", file)
    saved = {name.removeprefix("module."): tensor for name, tensor in saved.items()}
    state = {"clap.htsat." + n.removeprefix(branch): t for n, t in saved.items() if n.startswith(branch)}
    if not state:
        raise UserError(f"{file}: no module.audio_branch.* in its state_dict")
    mel = clap_mel(saved, file)
    state = {n: t for n, t in state.items() if not UNUSED.search(n)}
    return state if mel is None else state | {"clap.mel": mel}


def clap_mel(saved, file):
    """The mel bands of a CLAP that is not AF-CLAP; None for that. LAION's hear 48 kHz; those with a fusion
    branch were trained on HTK bands, those without on the ones in the file (get_mel and the HTS-AT of
    laion-clap, arXiv 2211.06687)."""
    bands, fusion = saved.get("audio_branch.logmel_extractor.melW"), any(".fusion_model." in n for n in saved)
    laion = "text_branch.embeddings.word_embeddings.weight" in saved  # RoBERTa; AF-CLAP's is a T5
    if bands is None and not fusion:
        raise UserError(f"{file}: an encoder without a fusion branch hears by its own mel bands, but there "
                         f"is no module.audio_branch.logmel_extractor.melW in the file")
    try:
        rate = 48000 if laion and bands is None else sample_rate_of_mel(bands)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
    if not fusion:
        return bands.float()
    return None if rate == SAMPLE_RATE else hann_and_mel(torch.device("cpu"), rate, 14000)[1]
