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
from tools.sample.attention_map import attention_timeline
from tools.sample.decoding import (Sampling, compile_decoding, decode_stream, decode_text,
                                   encode_audio_kv, sample_tokens, stream_text, warn_once)
from tools.sample.int8 import Int8Linear, quantize


@pytest.fixture(scope="module")
def model(tiny_settings):
    torch.manual_seed(1)
    c = SimpleNamespace(**(config.defaults() | tiny_settings))
    model = checkpoint.new_model(c).eval()
    with torch.no_grad():
        for gated in model.xattn.values():
            gated.attn_gate.fill_(0.9)
            gated.ff_gate.fill_(-0.9)
        for p in model.lm.parameters():  # so small otherwise that every token of an answer is the same
            p.mul_(12 if p.ndim == 2 else 1)
    return model


@pytest.fixture
def endless(model, monkeypatch):
    """The model without tokens that end an answer."""
    monkeypatch.setattr(model, "stop_ids", [])
    return model


def noise(n):
    """n windows."""
    generator = torch.Generator().manual_seed(n)
    windows = torch.randn(n, 40000, generator=generator)
    return windows.clamp(-1, 1)


def questions(n):
    """n items of one to three windows."""
    items = []
    for i in range(n):
        prompt = f"{i} {'what ' * (i % 4)}"
        k = 1 + i * i % 3
        items.append((prompt, noise(k), [k]))
    return items


def decode_ids(model, items, slots, sampling, sync_every=None):
    ids = {}
    for answers in decode_stream(model, iter(items), slots, sampling, sync_every=sync_every):
        for answer in answers:
            ids[answer.index] = answer.ids
    return [ids[index] for index in range(len(items))]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_k": 30, "seed": 3}])
@pytest.mark.parametrize("slots, sync_every", [
    (3, 1),
    (8, 8),
    pytest.param(50, 1, marks=pytest.mark.slow)])
def test_continuous_batches_answer_as_one_by_one(endless, monkeypatch, settings, slots, sync_every):
    """Answers of different lengths. sync_every: decoding steps between two synchronisations of a GPU."""
    items = questions(11)
    sampling = Sampling(max_new_tokens=12, **settings)
    rows = [decode_ids(endless, [item], 1, sampling)[0] for item in items]

    def lengths(token):
        return {row.index(token) for row in rows if token in row}

    stop = max(sum(rows, []), key=lambda token: len(lengths(token)))
    assert len(lengths(stop)) > 2
    monkeypatch.setattr(endless, "stop_ids", [stop])
    expected = [row[:row.index(stop)] if stop in row else row for row in rows]
    assert decode_ids(endless, items, slots, sampling, sync_every) == expected


def test_a_token_attends_to_the_clips_before_it(model):
    """Two clips of a text: the first <audio> token attends to the first clip only."""
    ids = torch.full((1, 2), model.audio_id)
    windows = noise(3)

    def first_logits(windows, counts):
        logits, _ = model(ids[:, :len(counts)], windows, torch.tensor([counts]))
        return logits[0, 0]

    both = first_logits(windows, [1, 2])
    alone = first_logits(windows[:1], [1])
    other = first_logits(windows[1:], [2])
    assert torch.allclose(both, alone, atol=1e-4)
    assert (both - other).abs().max() > 1e-3


@pytest.mark.parametrize("counts", [[3], [1, 2]])
def test_follow_up_questions_reuse_the_audio_kv(model, counts):
    windows, n = noise(3), torch.tensor([counts])
    audio_kv = encode_audio_kv(model, [("", windows, counts)])
    for prompt in ("One?", "And two?"):
        item = prompt, windows * 0, counts
        *_, text = stream_text(model, item, audio_kv, Sampling(max_new_tokens=6))
        assert [text] == model.generate([prompt], windows, n, max_new_tokens=6)


def test_the_kv_cache_grows_and_an_answer_goes_on_from_its_prefix(endless):
    """The tokens are those that the model gives without a cache, after a prompt that holds the prefix."""
    windows = noise(2)
    sampling = Sampling(max_new_tokens=150, answer_prefix="It is a")
    (answer,) = decode_ids(endless, [("What?", windows, [2])], 1, sampling)
    (prompt,) = encode_prompts(endless.tokenizer, ["What?"])
    (prefix,) = encode_text(endless.tokenizer, ["it is a"])
    logits, _ = endless(torch.tensor([prompt + prefix + answer]), windows, torch.tensor([2]))
    likeliest = logits[0, :-1].argmax(-1).tolist()
    assert likeliest[-150:] == answer


def test_a_prefix_before_a_tokenizer_that_drops_the_first_space():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁dog": 1, "<unk>": 2}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    model, answer = SimpleNamespace(tokenizer=tokenizer), SimpleNamespace(ids=[1])
    assert decode_text(model, answer, Sampling(answer_prefix="A")) == "a dog"


def test_an_answer_ends_with_the_positions_of_the_model(endless, capsys):
    item = "x" * 500, noise(1), [1]
    warn_once.cache_clear()
    for ids in decode_ids(endless, [item] * 2, 1, Sampling(max_new_tokens=50)):
        assert len(ids) == 512 + 1 - 502  # <audio>, prompt, <sep>; the last token is not read again
    assert capsys.readouterr().err.count("512") == 1


@pytest.mark.parametrize("prompts, n, kind", [
    (["a", "b"], [1], ValueError),
    (["a", "b"], [1, 0], ValueError),
    (["a"], [0], ValueError),
    (["a"], [2], Exception),
    (["x" * 600], [1], UserError),
    (["\ud83d"], [1], UserError)])
def test_what_cannot_be_asked_is_refused_and_changes_nothing(model, prompts, n, kind):
    model.train()
    with pytest.raises(kind):
        model.generate(prompts, torch.zeros(1, 40000), torch.tensor(n), max_new_tokens=2)
    assert model.training
    model.eval()


def test_a_stream_that_is_left_early_changes_nothing(model):
    items = questions(3)
    sampling = Sampling(max_new_tokens=6)
    expected = decode_ids(model, items, 2, sampling)
    model.train()
    stream = decode_stream(model, items, 2, sampling)
    next(stream)
    stream.close()
    assert model.training
    assert decode_ids(model.eval(), items, 2, sampling) == expected


@pytest.mark.parametrize("settings, logits", [
    ({"temperature": 2.0}, [0, 0.5, 1, -0.5]),
    ({"temperature": 1.0, "top_k": 2}, [-99, 1, 2, -99]),
    ({"temperature": 1.0, "top_p": 0.8}, [-99, 1, 2, -99]),
    ({"temperature": 1e-320}, [0, 0, 99, 0]),
    ({"temperature": 1.0, "top_p": 1e-320, "top_k": 0}, [0, 0, 99, 0])])
def test_sampled_tokens_follow_the_softmax(settings, logits):
    generators = {row: torch.Generator().manual_seed(row) for row in range(4000)}
    rows = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(4000, -1)
    tokens = sample_tokens(rows, Sampling(**settings), generators)
    shares = tokens.bincount(minlength=4) / 4000
    expected = torch.tensor(logits).float().softmax(-1)
    assert torch.allclose(shares, expected, atol=0.03)


def test_sampled_answers_of_different_items_are_independent(endless):
    """The noise of an item is that of its prompt, clip and the seed."""
    prompt, windows, counts = questions(2)[1]
    items = [
        (prompt, windows, counts),
        (prompt + "?", windows, counts),
        (prompt, windows.flip(1), counts)]

    def ask(seed):
        sampling = Sampling(max_new_tokens=20, temperature=50.0, seed=seed)
        return [tuple(ids) for ids in decode_ids(endless, items, 3, sampling)]

    first, again, other = ask(0), ask(0), ask(1)
    assert first == again and len({*first, *other}) == 6


def test_the_weights_of_every_token_are_those_of_naive_attention(model, monkeypatch):
    import model as model_file
    prompt = "What is it?"
    windows = (noise(2) * 32767).to(torch.int16)
    timeline = attention_timeline(model, prompt, "a red dog", windows)
    assert "".join(timeline["tokens"]) == "a red dog"
    many = attention_timeline(model, prompt, "Été 何😀", windows)  # a token of this tokenizer is a byte
    assert many["tokens"] == list("Été 何😀") and len(many["weights"]) == 6
    assert torch.tensor(many["weights"]).sum(1).allclose(torch.ones(6))
    assert timeline["seconds"][0][0] == 0
    assert timeline["seconds"][-1][1] == 5.0
    blocks = []

    def attention(q, k, v, n_keys, gate):
        scores = torch.einsum("bthd,bnhd->bhtn", q, k)
        weights = (scores / q.shape[-1] ** 0.5).softmax(-1)
        blocks.append(weights[0].mean(0))
        o = torch.einsum("bhtn,bnhd->bthd", weights, v)
        return gate.tanh() * o

    monkeypatch.setitem(model_file.BACKENDS, "sdpa", attention)
    (before,) = encode_prompts(model.tokenizer, [prompt])
    (answer,) = encode_text(model.tokenizer, ["a red dog"])
    model(torch.tensor([before + answer]), windows, torch.tensor([2]))
    mean = torch.stack(blocks).mean(0)[-1 - len(answer):-1]
    expected = mean.view(len(answer), 2, 2, -1).sum(2).flatten(1)  # of two frequency bins
    weights = torch.tensor(timeline["weights"])
    assert torch.allclose(weights, expected, atol=1e-5)


def test_two_threads_answer_as_one(model):
    items = questions(3)
    sampling = Sampling(max_new_tokens=6)
    expected = decode_ids(model, items, 3, sampling)
    with ThreadPoolExecutor(2) as pool:
        answers = pool.map(lambda item: decode_ids(model, [item], 1, sampling), items * 2)
        assert sum(answers, []) == expected * 2


@pytest.mark.slow
def test_compiled_decoding_answers_the_same(model, monkeypatch):
    """Clips of more lengths than torch.compile makes graphs for."""
    sampling = Sampling(max_new_tokens=2)
    items = [(f"{n}?", noise(n), [1] * n) for n in range(1, 11)]
    plain = [decode_ids(model, [item], 1, sampling) for item in items]
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compile_decoding(model)
    try:
        assert [decode_ids(model, [item], 1, sampling) for item in items] == plain
    finally:
        del model.compiled_forward


def test_int8_weights(model, tmp_path):
    """Each product within the rounding of its weights; the whole model answers, and is not saved."""
    linear = torch.nn.Linear(64, 96).requires_grad_(False)
    small = Int8Linear(linear.weight, linear.bias)
    for shape in ((3, 64), (40, 64), (1, 3, 64)):
        x = torch.randn(shape)
        expected = linear(x)
        error = (small(x) - expected).abs().max()
        assert error < 0.02 * expected.abs().max()
    small = quantize(copy.deepcopy(model))
    assert torch.nn.Linear not in map(type, small.lm.layers.modules())
    texts = small.generate(["a", "b"], noise(3), torch.tensor([1, 2]), max_new_tokens=3)
    assert len(texts) == 2
    with pytest.raises(ValueError):
        small.save_pretrained(str(tmp_path))
