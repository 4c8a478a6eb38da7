"""What a researcher changes first, each changed from outside in a few lines to copy: the encoder, the
attention, another modality, the loss, a setting, a scoring rule."""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import config
import eval as evaluation
import model as model_file
from model import AudioFlamingo, ClapEncoder, LanguageModel, key_mask
from tests.helpers import set_gates, settings
from tools.checkpoint.language_models import load_lm_config_and_tokenizer
from tools.common import UserError
from tools.eval.rules import per_item
from tools.train.log import flops_per_step, parameter_table


class ConvEncoder(nn.Module):
    """Another encoder: two convolutions over 8 kHz sound, 5 tokens of 24 channels a window."""
    width, tokens_per_window, sample_rate = 24, 5, 8000

    def __init__(self):
        super().__init__()
        first, second = nn.Conv1d(1, 16, 64, 32), nn.Conv1d(16, 24, 8, 4)
        self.conv = nn.Sequential(first, nn.GELU(), second)

    def forward(self, windows):
        x = self.conv(windows[:, None])  # (n, 24, frames)
        return F.adaptive_avg_pool1d(x, self.tokens_per_window).transpose(1, 2)  # (n, 5, 24)

    def trainable(self):
        return list(self.parameters())

    def flops(self, n):
        return 2 * n * sum(p.numel() for p in self.parameters()) * 2500


class ClapAndSensor(ClapEncoder):
    """A second modality: 6 sensor readings after the samples of each window become one more token."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.tokens_per_window += 1
        self.project = nn.Linear(6, self.width)

    def forward(self, windows):
        samples, readings = windows[:, :-6], windows[:, -6:]
        return torch.cat([super().forward(samples), self.project(readings)[:, None]], 1)  # (n, S + 1, C)


def sigmoid_attention(q, k, v, n_keys, gate):
    """Another attention: sigmoid instead of softmax."""
    scores = torch.einsum("bthd,bnhd->bhtn", q, k) / q.shape[-1] ** 0.5
    weights = scores.sigmoid() * key_mask(n_keys, k.shape[1]) / n_keys.clamp(min=1).view(-1, 1, 1, 1)
    return gate.tanh() * torch.einsum("bhtn,bnhd->bthd", weights, v)


class SmoothedFlamingo(AudioFlamingo):
    """Another loss: label smoothing."""

    def summed_loss(self, x, targets):
        return F.cross_entropy(self.lm.logits(x).float(), targets, reduction="sum", label_smoothing=0.1)


@per_item
def counting(item):
    """Another scoring rule: right is a number at most 1 off."""
    return {"accuracy": abs(int(item["answer"]) - int(item["output"])) <= 1}


def new_model(tiny_settings, make=AudioFlamingo, encoder=None, own_lm=False):
    c = settings(tiny_settings, {"clap_finetune": True})
    _, lm, tokenizer = load_lm_config_and_tokenizer(c)
    if own_lm:  # a module in place of its sizes
        lm = LanguageModel(lm, added=len(tokenizer) - lm.vocab)
    model = make(c, lm, tokenizer, encoder=encoder)
    model.set_trainable(c)
    set_gates(model, 0.5, 0.0)
    return model


def step_and_answer(model, window):
    """One training step moves every part; then the model answers. -> the loss"""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.randint(1, 250, (2, 9))
    windows, n_windows = torch.rand(3, window), torch.tensor([2, 1])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    _, loss = model.train()(ids, windows, n_windows, labels=ids)
    loss.backward()
    optimizer.step()
    moved = set()
    for name, p in model.named_parameters():
        if not torch.equal(p, before[name]):
            moved.add(name.split(".")[0])
    assert moved == {"clap", "audio_transformer", "xattn", "lm"}
    questions = ["What is it?", "And this?"]
    answers = model.eval().generate(questions, windows, n_windows, max_new_tokens=3)
    assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers)
    return loss


def test_another_encoder(tiny_settings):
    model = new_model(tiny_settings, encoder=ConvEncoder())
    assert model.audio_config["sample_rate"] == 8000  # for data.load_audio
    step_and_answer(model, window=20000)
    assert flops_per_step(model, 9, 3, 4) > 0 and "audio encoder" in parameter_table(model)


def test_a_second_modality(tiny_settings):
    sizes = [tiny_settings[f"clap_{name}"] for name in ("embed_dim", "depths", "num_heads", "spec_size")]
    model = new_model(tiny_settings, encoder=ClapAndSensor(*sizes))
    step_and_answer(model, window=40000 + 6)
    assert model.clap.project.weight.grad.any()


@pytest.mark.parametrize("own_lm", [False, True])
def test_another_attention(tiny_settings, monkeypatch, own_lm):
    monkeypatch.setitem(model_file.BACKENDS, "sigmoid", sigmoid_attention)
    step_and_answer(new_model(tiny_settings | {"attention_backend": "sigmoid"}, own_lm=own_lm), window=40000)


def test_another_loss(tiny_settings):
    losses = []
    for make in (AudioFlamingo, SmoothedFlamingo):
        torch.manual_seed(0)
        losses.append(step_and_answer(new_model(tiny_settings, make), window=40000))
    assert losses[0] != losses[1]


def test_another_setting(tmp_path):
    script, recipe = tmp_path / "script.py", tmp_path / "recipe.py"
    script.write_text('"""A script."""\nmixup: float = 0.1  # weight of the other clip\n')
    recipe.write_text("mixup = 0.3\nbatch_size = 2\n")
    assert config.load([], str(script)).mixup == 0.1
    assert config.load([str(recipe)], str(script)).mixup == 0.3
    assert config.load([str(recipe), "--mixup=0.5"], str(script)).mixup == 0.5
    with pytest.raises(UserError, match="mixup"):
        config.load(["--mixup=much"], str(script))


def test_another_scoring_rule(monkeypatch):
    monkeypatch.setattr(evaluation, "METRICS", [(r"Counting", counting), *evaluation.METRICS])
    items = [{"prompt": "How many?", "output": "3", "answer": answer} for answer in ("4", "7")]
    rule = evaluation.choose_rule("Birds-Counting", items)
    assert rule(items)["accuracy"] == [True, False]
