"""The published system's numbers for a tiny random model (shared golden files), forward and backward, batched or not."""
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data import Collate, load_audio
from model import AudioFlamingo, log_mel, rename, RENAMES

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GOLDEN = next((p for p in (os.environ.get("GOLDEN", ""), f"{ROOT}/tests/golden/af2_nano", f"{ROOT}/../shared/golden/af2_nano")
               if os.path.isdir(p)), None)
assert GOLDEN or not os.environ.get("CI"), "in CI the golden numbers must be there"
pytestmark = pytest.mark.skipif(GOLDEN is None, reason="golden files not found; set GOLDEN=<folder of af2_nano>")
BACKENDS = ["naive", "sdpa"] + ["triton"] * bool(os.environ.get("TRITON_INTERPRET"))


@pytest.fixture(scope="module")
def golden():
    arrays, facts = load_file(f"{GOLDEN}/golden.safetensors"), json.load(open(f"{GOLDEN}/golden.json"))
    clips = [load_audio(f"{GOLDEN}/clip_{i}.wav", max_num_window=3) for i in range(2)]
    windows = torch.from_numpy(np.concatenate(clips))
    return arrays, facts, windows, torch.tensor([len(c) for c in clips])


@pytest.fixture(scope="module")
def model(golden):
    facts = golden[1]
    return AudioFlamingo.from_pretrained(GOLDEN, lang_encoder_path=f"{GOLDEN}/lm", max_num_window=3,
                                         audio_transformer_n_head=facts["audio_transformer"]["n_head"])


def close(ours, theirs, tolerance):
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error <= tolerance, error


def test_sizes_are_inferred_from_weights(model, golden):
    clap, c = golden[1]["clap"], model.config
    assert (c.clap_embed_dim, c.clap_depths, c.clap_num_heads) == (clap["embed_dim"], clap["depths"], clap["num_heads"])
    assert c.audio_transformer_d_inner == golden[1]["audio_transformer"]["d_inner"]


def test_text(model, golden):
    arrays, facts, *_ = golden
    ids, labels, cut = Collate(model.tokenizer, 512, 160000).encode(facts["prompts"])
    assert torch.equal(ids, arrays["input_ids"]) and torch.equal(labels, arrays["labels"]) and cut == 0
    special = facts["special"]
    assert [model.audio_id, model.end_id, model.pad_id, model.sep_id, model.tokenizer.eos_token_id] == \
        [special[k] for k in ("audio", "endofchunk", "pad", "sep", "eos")]


def test_audio_to_tokens(model, golden):
    arrays, _, windows, n = golden
    real = arrays["audio_mask"].bool()
    assert n.tolist() == real.sum(1).tolist() == [3, 1]
    close(log_mel(windows), arrays["log_mel"][real], 2e-4)
    with torch.no_grad():
        close(model.clap(windows), arrays["clap_tokens"][real], 2e-4)
        audio, n_keys = model.listen(windows, n)
    for b in range(2):
        close(audio[b, :n_keys[b]], arrays["audio_tokens"][b, :n_keys[b]], 2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_and_loss(model, golden, backend):
    arrays, _, windows, n = golden
    model.backend = backend
    with torch.no_grad():
        logits, none = model(arrays["input_ids"], windows, n)
        _, loss = model(arrays["input_ids"], windows, n, labels=arrays["labels"])
        alone, _ = model(arrays["input_ids"][1:], windows[3:], n[1:])
    mask = arrays["attention_mask"].bool()
    close(logits[mask], arrays["logits"][mask], 2e-4)
    close(alone[0], arrays["logits"][1], 2e-4)
    assert none is None and abs(loss - arrays["loss"]) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(model, golden, backend, checkpointing):
    arrays, _, windows, n = golden
    model.backend, model.config.gradient_checkpointing = backend, checkpointing
    model.requires_grad_(True).train()
    model.clap.eval()
    model(arrays["input_ids"], windows, n, labels=arrays["labels"])[1].backward()
    parameters, compared = dict(model.named_parameters()), 0
    for key, theirs in arrays.items():
        if key.startswith("grad:"):
            close(parameters[rename(key[5:], RENAMES)].grad, theirs, 1e-3)
            compared += 1
    model.requires_grad_(False).eval().zero_grad()
    assert compared == 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_tokens_batched_alone_and_uncached(model, golden, backend):
    arrays, facts, windows, n = golden
    model.backend = backend
    stops, model.stop_ids = model.stop_ids, []
    prompts = [p for p, _ in facts["prompts"]]
    batched = torch.stack(list(model.stream(prompts, windows, n, max_new_tokens=24)), 1)
    assert torch.equal(batched, arrays["greedy"])
    assert model.generate(prompts, windows, n, max_new_tokens=24) == facts["greedy_text"]
    for b, clip in enumerate((windows[:3], windows[3:])):
        alone = torch.stack(list(model.stream([prompts[b]], clip, n[b:b + 1], max_new_tokens=24)), 1)
        assert torch.equal(alone[0], arrays["greedy"][b])
        ids = torch.tensor([model.prompt_ids(prompts[b])])  # no cache: the whole text again for every token
        with torch.no_grad():
            for _ in range(24):
                ids = torch.cat([ids, model(ids, clip, n[b:b + 1])[0][:, -1].argmax(-1, keepdim=True)], 1)
        assert torch.equal(ids[0, -24:], arrays["greedy"][b])
    model.stop_ids = stops
