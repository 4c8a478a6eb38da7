"""An answer depends on its clip, prompt and settings: continuous batching, several clips, follow-ups."""
import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import config
from data import encode_prompts, encode_text
from tools.common import UserError
from tools.sample.attention_map import attention_over_time, attention_timeline, write_timeline
from tools.sample.decoding import (Sampling, answer_items, compile_decoding, decode_stream, encode_audio_kv,
                                   sample_tokens, stream_text)
from tools.sample.int8 import Int8Linear, quantize


@pytest.fixture(scope="module")
def model(tiny_settings):
    torch.manual_seed(1)
    model = checkpoint.new_model(SimpleNamespace(**(config.defaults() | tiny_settings))).eval()
    with torch.no_grad():
        for gated in model.xattn.values():
            gated.attn_gate.fill_(0.9)
            gated.ff_gate.fill_(-0.9)
        for p in model.lm.parameters():  # so small otherwise that every token of an answer is the same
            p.mul_(12 if p.ndim == 2 else 1)
    return model


def noise(n):
    """n windows."""
    return torch.randn(n, 40000, generator=torch.Generator().manual_seed(n)).clamp(-1, 1)


def questions(model, n, seed=0):
    """n items of one to three windows."""
    g = torch.Generator().manual_seed(seed)
    count = torch.randint(1, 4, (n,), generator=g).tolist()
    text = lambda n: "".join(chr(97 + int(c)) for c in torch.randint(0, 26, (n,), generator=g))
    sound = lambda k: torch.randn(k, 40000, generator=g).clamp(-1, 1)
    return [(text(5 + 3 * (i % 4)), sound(k), [k]) for i, k in enumerate(count)]


def decode_ids(model, items, slots, sampling, sync_every=None):
    ids = {}
    for answers in decode_stream(model, iter(items), slots, sampling, sync_every=sync_every):
        ids.update({answer.index: answer.ids for answer in answers})
    return [ids[index] for index in range(len(items))]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_k": 30, "seed": 3}])
@pytest.mark.parametrize("slots, sync_every", [(1, 1), (3, 1), (8, 8), (50, 1)])
def test_continuous_batches_answer_as_one_by_one(model, monkeypatch, settings, slots, sync_every):
    """Answers of different lengths. sync_every: decoding steps between two synchronisations of a GPU."""
    items, sampling = questions(model, 11), Sampling(max_new_tokens=12, **settings)
    monkeypatch.setattr(model, "stop_ids", [])
    rows = [decode_ids(model, [item], 1, sampling)[0] for item in items]
    ends = lambda token: {row.index(token) for row in rows if token in row}
    stop = max(sum(rows, []), key=lambda token: len(ends(token)))
    assert len(ends(stop)) > 2
    monkeypatch.setattr(model, "stop_ids", [stop])
    expected = [row[:row.index(stop)] if stop in row else row for row in rows]
    assert decode_ids(model, items, slots, sampling, sync_every) == expected


def test_a_token_attends_to_the_clips_before_it(model):
    """Two clips of a text, each encoded alone: the first <audio> token attends to the first clip only."""
    windows, ids = noise(3), torch.arange(1, 10)[None]
    ids[0, :2] = model.audio_id
    n_windows = torch.tensor([[1, 2]])
    logits, _ = model(ids, windows, n_windows)
    first, n_first = model.encode_audio(windows[:1], torch.tensor([1]))
    second, n_second = model.encode_audio(windows[1:], torch.tensor([2]))
    kv = model.keys_values(torch.cat([first, second], 1))
    n_keys = torch.full((1, 9), int(n_first + n_second))
    n_keys[0, 0] = n_first
    assert (model.lm.logits(model.forward_hidden(ids, kv, n_keys)) - logits).abs().max() < 1e-4
    swapped, _ = model(ids, windows[[1, 2, 0]], torch.tensor([[2, 1]]))
    assert (swapped[0, 0] - logits[0, 0]).abs().max() > 1e-3  # another clip is the first


@pytest.mark.parametrize("counts", [[3], [1, 2]])
def test_follow_up_questions_reuse_the_audio_kv(model, counts):
    windows = noise(3)
    audio_kv = encode_audio_kv(model, [("", windows, counts)])
    for prompt in ("One?", "And two?"):
        *_, text = stream_text(model, (prompt, windows * 0, counts), audio_kv, Sampling(max_new_tokens=6))
        assert text == model.generate([prompt], windows, torch.tensor([counts]), max_new_tokens=6)[0]


def test_an_answer_goes_on_from_its_prefix(model):
    """As if the words had been generated: the same tokens as after a prompt that holds them, uncached."""
    windows = noise(2)
    n = torch.tensor([2])
    answer = model.generate(["What?"], windows, n, max_new_tokens=5, answer_prefix="It is a")[0]
    ids = encode_prompts(model.tokenizer, ["What?"])[0] + encode_text(model.tokenizer, ["It is a"])[0]
    with torch.no_grad():
        for _ in range(5):
            ids.append(int(model(torch.tensor([ids]), windows, n)[0][0, -1].argmax()))
    assert answer == "it is a" + model.tokenizer.decode(ids[-5:], skip_special_tokens=True)


@pytest.mark.parametrize("prompts, n, kind", [
    (["a", "b"], [1], ValueError), (["a"], [0], ValueError), (["a"], [2], Exception),
    (["a", "b"], [1, 0], ValueError), (["x" * 600], [1], UserError)])
def test_what_cannot_be_asked_is_refused_and_changes_nothing(model, prompts, n, kind):
    model.train()
    with pytest.raises(kind):
        model.generate(prompts, torch.zeros(1, 40000), torch.tensor(n, dtype=torch.int64), max_new_tokens=2)
    assert model.training
    model.eval()


def test_sampled_tokens_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    generators = {row: torch.Generator().manual_seed(row) for row in range(4000)}
    for sampling, shares in ((Sampling(temperature=2.0), (logits / 2).softmax(-1)),
                             (Sampling(temperature=1.0, top_k=2), logits[1:3].softmax(-1)),
                             (Sampling(temperature=1.0, top_p=0.8), logits[1:3].softmax(-1))):
        counts = sample_tokens(logits.expand(4000, -1), sampling, generators).bincount(minlength=4) / 4000
        if len(shares) == 2:
            assert counts[0] == counts[3] == 0
            counts = counts[1:3]
        assert (counts - shares).abs().max() < 0.03


def test_sampled_answers_of_different_items_are_independent(model, monkeypatch):
    """The noise of an item is that of its prompt, clip and the seed."""
    monkeypatch.setattr(model, "stop_ids", [])
    (item,) = questions(model, 1)
    prompt, windows, counts = item
    items = [item, item, (prompt + "?", windows, counts), (prompt, windows.flip(1), counts)]
    settings = dict(max_new_tokens=20, temperature=50.0)
    texts = dict(answer_items(model, items, 4, Sampling(**settings)))
    assert texts[0] == texts[1] and len(set(texts.values())) == 3
    assert dict(answer_items(model, items, 4, Sampling(**settings))) == texts
    other = dict(answer_items(model, items, 4, Sampling(seed=1, **settings)))
    assert not set(other.values()) & set(texts.values())


def test_the_weights_of_every_token_are_those_of_naive_attention(model, monkeypatch, tmp_path):
    import model as model_file
    windows = (noise(2) * 32767).to(torch.int16)
    timeline = attention_timeline(model, "What is it?", "a red dog", windows)
    assert "".join(timeline["tokens"]) == "a red dog"
    assert timeline["seconds"][0][0] == 0 and timeline["seconds"][-1][1] == 5.0
    expected = []

    def attention(q, k, v, n_keys, gate):
        weights = (torch.einsum("bthd,bnhd->bhtn", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        expected.append(weights[0].mean(0))
        return gate.tanh() * torch.einsum("bhtn,bnhd->bthd", weights, v)

    monkeypatch.setitem(model_file.BACKENDS, "sdpa", attention)
    before = encode_prompts(model.tokenizer, ["What is it?"])[0]
    ids = before + encode_text(model.tokenizer, ["a red dog"])[0]
    model(torch.tensor([ids]), windows, torch.tensor([2]))
    mean = torch.stack(expected).mean(0).view(len(ids), 2, 2, -1).sum(2).flatten(1)  # of two frequency bins
    weights = torch.tensor(timeline["weights"])
    assert torch.allclose(weights, mean[len(before) - 1:-1], atol=1e-5)
    assert torch.allclose(attention_over_time(model, "What is it?", windows), weights[0], atol=1e-5)
    pytest.importorskip("matplotlib", reason="no matplotlib: pip install -r requirements-eval.txt")
    write_timeline(str(tmp_path / "deep/clip"), timeline, windows)
    assert sorted(f.name for f in (tmp_path / "deep").iterdir()) == ["clip.json", "clip.png"]


def test_two_threads_answer_as_one(model):
    items = questions(model, 3)
    answer = lambda item: model.generate([item[0]], item[1], torch.tensor(item[2]), max_new_tokens=6)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(answer, items * 2)) == list(map(answer, items)) * 2


def test_compiled_decoding_answers_the_same(model, monkeypatch):
    items, sampling = questions(model, 3), Sampling(max_new_tokens=5)
    plain = dict(answer_items(model, items, 3, sampling))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compile_decoding(model)
    try:
        assert dict(answer_items(model, items, 3, sampling)) == plain
    finally:
        del model.compiled_forward


def test_int8_weights(model, tmp_path):
    """Each product within the rounding of its weights; the whole model answers, and is not saved."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 96)
    few, many = torch.randn(3, 64), torch.randn(40, 64)
    with torch.no_grad():
        small = Int8Linear(linear.weight, linear.bias)
        for x in (few, many, few[None]):
            error = (small(x) - linear(x)).abs().max() / linear(x).abs().max()
            assert small(x).shape == linear(x).shape and error < 0.02
    small = quantize(copy.deepcopy(model))
    kinds = {type(module).__name__ for module in small.lm.layers.modules()}
    assert "Int8Linear" in kinds and "Linear" not in kinds
    assert len(small.generate(["a", "b"], noise(3), torch.tensor([1, 2]), max_new_tokens=3)) == 2
    with pytest.raises(ValueError):
        small.save_pretrained(str(tmp_path))
