"""What a researcher changes first, changed from outside in a few lines: the encoder, and the attention."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import config
import model as model_file
from model import AudioFlamingo, LanguageModel, key_mask
from tools.checkpoint.language_models import load_lm_config_and_tokenizer
from tools.train.log import flops_per_step, parameter_table


class ToyEncoder(nn.Module):
    """An encoder of one's own: two convolutions over 8 kHz sound, 5 tokens of 24 channels a window."""

    width, tokens_per_window, sample_rate = 24, 5, 8000

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(1, 16, 64, 32), nn.GELU(), nn.Conv1d(16, 24, 8, 4))

    def forward(self, windows):
        x = self.conv(windows[:, None])  # (n, 24, frames)
        return F.adaptive_avg_pool1d(x, self.tokens_per_window).transpose(1, 2)  # (n, 5, 24)

    def trainable(self):
        return list(self.parameters())

    def flops(self, n):
        return 2 * n * sum(p.numel() for p in self.parameters()) * 2500


def softer_attention(q, k, v, n_keys, gate):
    """An attention of one's own: sigmoid instead of softmax."""
    scores = torch.einsum("bthd,bnhd->bhtn", q, k) / q.shape[-1] ** 0.5
    weights = scores.sigmoid() * key_mask(n_keys, k.shape[1]) / n_keys.clamp(min=1).view(-1, 1, 1, 1)
    return gate.tanh() * torch.einsum("bhtn,bnhd->bthd", weights, v)


def one_step_and_an_answer(model, window):
    c = SimpleNamespace(**(config.defaults() | {"clap_finetune": True}))
    model.set_trainable(c)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for gated in model.xattn.values():
        nn.init.constant_(gated.attn_gate, 0.5)
    ids = torch.randint(1, 250, (2, 9))
    windows, n_windows = torch.randn(3, window).clamp(-1, 1), torch.tensor([2, 1])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(ids, windows, n_windows, labels=ids)[1].backward()
    optimizer.step()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"clap", "audio_transformer", "xattn", "lm"}
    answers = model.eval().generate(["What is it?", "And this?"], windows, n_windows, max_new_tokens=3)
    assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers)


def test_another_encoder(tiny_settings):
    c = SimpleNamespace(**(config.defaults() | tiny_settings))
    _, sizes, tokenizer = load_lm_config_and_tokenizer(c)
    model = AudioFlamingo(c, sizes, tokenizer, encoder=ToyEncoder())
    assert model.audio_config["sample_rate"] == 8000  # what data.load_audio is given
    one_step_and_an_answer(model, window=20000)
    assert flops_per_step(model, 9, 3, 4) > 0 and "audio encoder" in parameter_table(model)


@pytest.mark.parametrize("lm", ["sizes", "module"])
def test_another_attention(tiny_settings, monkeypatch, lm):
    monkeypatch.setitem(model_file.BACKENDS, "softer", softer_attention)
    c = SimpleNamespace(**(config.defaults() | tiny_settings | {"attention_backend": "softer"}))
    _, sizes, tokenizer = load_lm_config_and_tokenizer(c)
    lm = sizes if lm == "sizes" else LanguageModel(sizes, added=len(tokenizer) - sizes.vocab)
    one_step_and_an_answer(AudioFlamingo(c, lm, tokenizer), window=40000)
