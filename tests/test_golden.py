"""The published numbers of a tiny random model (shared golden files): forward, backward, batched or not."""
import os
import types

import numpy as np
import pytest
import torch

from data import Collate, encode_prompts
from model import AudioFlamingo, log_mel, rotate, to_float
from tests.helpers import GOLDEN, max_error
from tools.checkpoint.releases import our_name
from tools.sample.decoding import Sampling, decode_stream, split_batch

# in Triton's interpreter a backward pass takes ten seconds
TRITON = [pytest.mark.slow, pytest.mark.skipif(
    not os.environ.get("TRITON_INTERPRET"), reason="the model is on the CPU, Triton compiles for a GPU")]


@pytest.fixture(scope="module")
def model(golden):
    n_head = golden[1]["audio_transformer"]["n_head"]
    return AudioFlamingo.from_pretrained(
        GOLDEN, lang_encoder_path=f"{GOLDEN}/lm", max_num_window=3, audio_transformer_n_head=n_head)


def test_tokens(model, golden):
    arrays, facts, *_ = golden
    special = facts["special"]
    ids, labels, cut = Collate(model.tokenizer, 512, 160000).encode(facts["prompts"])
    assert torch.equal(ids, arrays["input_ids"])
    assert torch.equal(labels, arrays["labels"]) and cut == 0
    assert model.audio_id == special["audio"]
    assert model.pad_id == special["pad"]
    assert model.sep_id == special["sep"]
    assert model.stop_ids == [special["endofchunk"], special["eos"]]


def test_audio_tokens(model, golden):
    arrays, _, windows, n = golden
    real = arrays["audio_mask"].bool()
    assert n.tolist() == real.sum(1).tolist() == [3, 1]
    windows_float = to_float(windows)
    assert max_error(log_mel(windows_float), arrays["log_mel"][real]) < 2e-4
    with torch.no_grad():
        clap_tokens = model.clap(windows_float)
        audio, n_keys = model.encode_audio(windows, n)
    assert max_error(clap_tokens, arrays["clap_tokens"][real]) < 2e-4
    for ours, theirs, keys in zip(audio, arrays["audio_tokens"], n_keys):
        assert max_error(ours[:keys], theirs[:keys]) < 2e-4


@pytest.mark.parametrize("backend", ["naive", "sdpa", pytest.param("triton", marks=TRITON)])
def test_logits_and_loss(model, golden, backend):
    arrays, _, windows, n = golden
    model.backend = backend
    ids = arrays["input_ids"]
    with torch.no_grad():
        logits, none = model(ids, windows, n)
        _, loss = model(ids, windows, n, labels=arrays["labels"])
        alone, _ = model(ids[1:], windows[3:], n[1:])
    mask = arrays["attention_mask"].bool()
    assert max_error(logits[mask], arrays["logits"][mask]) < 2e-4
    assert max_error(alone[0], arrays["logits"][1]) < 2e-4
    assert none is None and abs(loss - arrays["loss"]) < 1e-4


def published_dropout(shape=(2, 4, 192, 192), layers=3, position=13204928):
    """Which attention weights of the audio transformer the golden gradients kept: (layers, B, H, S, S) bool.

    The published transformer drops a tenth of its attention weights in training mode (its attention class has
    that as a default that nothing overrides), and the golden gradients, unlike the golden loss, were taken in
    training mode. Our model has no dropout, so the test puts it in. The draws are those of torch's CPU
    generator, seed 0, after the 13,204,928 numbers that building the published model takes: two 32-bit
    outputs of the Mersenne Twister an element.
    """
    n = int(np.prod(shape)) * layers
    twister = np.random.RandomState(0)
    outputs = twister.randint(0, 2 ** 32, position + 2 * n, dtype=np.uint32)
    draws = outputs[position:].astype(np.uint64)
    high, low = draws[0::2], draws[1::2]
    bits = (high << np.uint64(32)) | low
    uniform = (bits & np.uint64(2 ** 53 - 1)) / 2 ** 53
    return torch.from_numpy(uniform < 0.9).view(layers, *shape)


def attention_keeping(keep):
    """AudioAttention.forward, naive, with attention weights dropped."""
    def forward(self, x, rope, mask):
        def heads(projection):
            split = projection(x).unflatten(-1, (self.n_head, -1))
            return split.transpose(1, 2)

        q = rotate(heads(self.w_qs), *rope)
        k = rotate(heads(self.w_ks), *rope)
        score = q @ k.transpose(-1, -2)
        score /= q.shape[-1] ** 0.5
        weight = score.masked_fill(~mask, -1e9).softmax(-1) * keep / 0.9
        mixed = weight @ heads(self.w_vs)
        mixed = self.fc(mixed.transpose(1, 2).flatten(2))
        return self.layer_norm(x + mixed)
    return forward


@pytest.mark.parametrize("backend, checkpointing", [
    ("naive", False),
    ("naive", True),
    ("sdpa", False),
    ("sdpa", True),
    pytest.param("triton", True, marks=TRITON)])
def test_gradients(model, golden, backend, checkpointing, monkeypatch):
    arrays, _, windows, n = golden
    model.backend = backend
    model.gradient_checkpointing = checkpointing
    for layer, keep in zip(model.audio_transformer.layer_stack, published_dropout()):
        forward = types.MethodType(attention_keeping(keep), layer.slf_attn)
        monkeypatch.setattr(layer.slf_attn, "forward", forward)
    model.requires_grad_(True).train()
    model.clap.eval()
    _, loss = model(arrays["input_ids"], windows, n, labels=arrays["labels"])
    loss.backward()
    parameters = dict(model.named_parameters())
    names = [key for key in arrays if key.startswith("grad:")]
    gradients = [parameters[our_name(key[5:])].grad for key in names]
    model.requires_grad_(False).eval().zero_grad()
    assert len(names) == 6 and abs(loss - 6.02879) < 1e-4  # the loss of that pass
    for name, ours in zip(names, gradients):
        assert max_error(ours, arrays[name]) < 1e-3


@pytest.mark.parametrize("backend", ["naive", "sdpa"])  # decoding takes minutes in Triton's interpreter
def test_greedy_tokens_batched_alone_and_uncached(model, golden, backend, monkeypatch):
    arrays, facts, windows, n = golden
    model.backend = backend
    monkeypatch.setattr(model, "stop_ids", [])
    prompts = [prompt for prompt, _ in facts["prompts"]]
    expected = arrays["greedy"]

    def greedy(*question):
        items = split_batch(*question)
        *_, answers = decode_stream(model, items, len(items), Sampling(max_new_tokens=24))
        return torch.tensor([answer.ids for answer in answers])

    assert torch.equal(greedy(prompts, windows, n), expected)
    assert model.generate(prompts, windows, n, max_new_tokens=24) == facts["greedy_text"]
    for b, clip in enumerate((windows[:3], windows[3:])):
        row, count = expected[b:b + 1], n[b:b + 1]
        assert torch.equal(greedy([prompts[b]], clip, count), row)
        prompt = torch.tensor(encode_prompts(model.tokenizer, [prompts[b]]))
        text = torch.cat([prompt, row], 1)
        with torch.no_grad():  # no KV cache: the whole text at once
            logits, _ = model(text, clip, count)
        assert torch.equal(logits[:, -25:-1].argmax(-1), row)
