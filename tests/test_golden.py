"""The published numbers of a tiny random model (shared golden files): forward, backward, batched or not."""
import json
import os
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data import Collate, encode_prompts, load_audio
from model import AudioFlamingo, log_mel, rotate, to_float
from tests.helpers import GOLDEN
from tools.checkpoint.releases import our_name
from tools.sample.decoding import stream

FOUND = os.path.isdir(GOLDEN)
assert FOUND or not os.environ.get("CI"), "in CI the golden numbers must be there"
pytestmark = pytest.mark.skipif(not FOUND, reason="golden files not found; set SHARED=<the shared folder>")
BACKENDS = ["naive", "sdpa"] + ["triton"] * bool(os.environ.get("TRITON_INTERPRET"))


@pytest.fixture(scope="module")
def golden():
    """arrays, facts, windows and n_windows of the two clips."""
    arrays, facts = load_file(f"{GOLDEN}/golden.safetensors"), json.load(open(f"{GOLDEN}/golden.json"))
    audio_config = dict(window_length=10.0, window_overlap=0.0, max_num_window=3)
    clips = [load_audio(f"{GOLDEN}/clip_{i}.wav", **audio_config) for i in range(2)]
    windows = torch.from_numpy(np.concatenate(clips))
    return arrays, facts, windows, torch.tensor([len(c) for c in clips])


@pytest.fixture(scope="module")
def model(golden):
    n_head = golden[1]["audio_transformer"]["n_head"]
    return AudioFlamingo.from_pretrained(GOLDEN, lang_encoder_path=f"{GOLDEN}/lm", max_num_window=3,
                                         audio_transformer_n_head=n_head)


def check_close(ours, theirs, tolerance):
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error <= tolerance, error


def test_sizes_and_tokens(model, golden):
    arrays, facts, *_ = golden
    clap, special, c = facts["clap"], facts["special"], model.config
    assert (c.clap_embed_dim, c.clap_depths) == (clap["embed_dim"], clap["depths"])
    assert c.clap_num_heads == clap["num_heads"]
    assert c.audio_transformer_d_inner == facts["audio_transformer"]["d_inner"]
    ids, labels, cut = Collate(model.tokenizer, 512, 160000).encode(facts["prompts"])
    assert torch.equal(ids, arrays["input_ids"]) and torch.equal(labels, arrays["labels"]) and cut == 0
    assert [model.audio_id, model.pad_id, model.sep_id] == [special[k] for k in ("audio", "pad", "sep")]
    assert model.stop_ids == [special["endofchunk"], special["eos"]]


def test_audio_tokens(model, golden):
    arrays, _, windows, n = golden
    real = arrays["audio_mask"].bool()
    assert n.tolist() == real.sum(1).tolist() == [3, 1]
    windows_float = to_float(windows)
    check_close(log_mel(windows_float), arrays["log_mel"][real], 2e-4)
    with torch.no_grad():
        check_close(model.clap(windows_float), arrays["clap_tokens"][real], 2e-4)
        audio, n_keys = model.encode_audio(windows, n)
    for ours, theirs, keys in zip(audio, arrays["audio_tokens"], n_keys):
        check_close(ours[:keys], theirs[:keys], 2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_and_loss(model, golden, backend):
    arrays, _, windows, n = golden
    model.backend = backend
    with torch.no_grad():
        logits, none = model(arrays["input_ids"], windows, n)
        _, loss = model(arrays["input_ids"], windows, n, labels=arrays["labels"])
        alone, _ = model(arrays["input_ids"][1:], windows[3:], n[1:])
    mask = arrays["attention_mask"].bool()
    check_close(logits[mask], arrays["logits"][mask], 2e-4)
    check_close(alone[0], arrays["logits"][1], 2e-4)
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
    outputs = np.random.RandomState(0).randint(0, 2 ** 32, position + 2 * n, dtype=np.uint32)
    draws = outputs[position:].astype(np.uint64)
    uniform = (((draws[0::2] << np.uint64(32)) | draws[1::2]) & np.uint64(2 ** 53 - 1)) / 2 ** 53
    return torch.from_numpy(uniform < 0.9).view(layers, *shape)


def attention_keeping(keep):
    """AudioAttention.forward, naive, with attention weights dropped."""
    def forward(self, x, rope, mask):
        heads = lambda w: w(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        q, k, v = heads(self.w_qs), heads(self.w_ks), heads(self.w_vs)
        score = rotate(q, *rope) @ rotate(k, *rope).transpose(-1, -2) / q.shape[-1] ** 0.5
        weight = score.masked_fill(~mask, -1e9).softmax(-1) * keep / 0.9
        return self.layer_norm(x + self.fc((weight @ v).transpose(1, 2).flatten(2)))
    return forward


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(model, golden, backend, checkpointing, monkeypatch):
    arrays, _, windows, n = golden
    model.backend, model.gradient_checkpointing = backend, checkpointing
    for layer, keep in zip(model.audio_transformer.layer_stack, published_dropout()):
        forward = types.MethodType(attention_keeping(keep), layer.slf_attn)
        monkeypatch.setattr(layer.slf_attn, "forward", forward)
    model.requires_grad_(True).train()
    model.clap.eval()
    loss = model(arrays["input_ids"], windows, n, labels=arrays["labels"])[1]
    loss.backward()
    parameters = dict(model.named_parameters())
    gradients = {key: parameters[our_name(key[5:])].grad for key in arrays if key.startswith("grad:")}
    model.requires_grad_(False).eval().zero_grad()
    assert len(gradients) == 6 and abs(loss - 6.02879) < 1e-4  # the loss of that pass
    for key, ours in gradients.items():
        check_close(ours, arrays[key], 1e-3)


@pytest.mark.parametrize("backend", ["naive", "sdpa"])  # decoding takes minutes in Triton's interpreter
def test_greedy_tokens_batched_alone_and_uncached(model, golden, backend, monkeypatch):
    arrays, facts, windows, n = golden
    model.backend = backend
    monkeypatch.setattr(model, "stop_ids", [])
    prompts = [prompt for prompt, _ in facts["prompts"]]
    batched = torch.stack(list(stream(model, prompts, windows, n, max_new_tokens=24)), 1)
    assert torch.equal(batched, arrays["greedy"])
    assert model.generate(prompts, windows, n, max_new_tokens=24) == facts["greedy_text"]
    for b, clip in enumerate((windows[:3], windows[3:])):
        alone = torch.stack(list(stream(model, [prompts[b]], clip, n[b:b + 1], max_new_tokens=24)), 1)
        assert torch.equal(alone[0], arrays["greedy"][b])
        ids = torch.tensor(encode_prompts(model.tokenizer, prompts[b:b + 1]))
        with torch.no_grad():
            for _ in range(24):  # no KV cache: the whole text again for every token
                logits, _ = model(ids, clip, n[b:b + 1])
                ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(ids[0, -24:], arrays["greedy"][b])
