"""Batches that never wait, several clips, questions about what was heard before: all answer as one by one."""
import math
from functools import partial

import pytest
import torch

from tests.test_model import batch, build
from tools.sample.decoding import Sampling, answer, hear, stream


@pytest.fixture(scope="module")
def model(tiny_settings):
    model = build(tiny_settings, gates=0.9)
    for p in model.lm.parameters():  # its weights are so small that it would say one token for ever
        p.mul_(12 if p.ndim == 2 else 1)
    return model


def questions(model, n, seed=0):
    """n items of one to three windows."""
    g = torch.Generator().manual_seed(seed)
    count = torch.randint(1, 4, (n,), generator=g).tolist()
    text = lambda n: "".join(chr(97 + int(c)) for c in torch.randint(0, 26, (n,), generator=g))
    sound = lambda k: torch.randn(k, 40000, generator=g).clamp(-1, 1)
    return [(text(5 + 3 * (i % 4)), sound(k), [k]) for i, k in enumerate(count)]


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "top_k": 30, "seed": 3}])
@pytest.mark.parametrize("slots", [1, 3, 8, 50])
def test_rows_taken_by_the_next_item_answer_as_one_by_one(model, monkeypatch, how, slots):
    items = questions(model, 13)
    monkeypatch.setattr(model, "stop_ids", [])
    said = lambda p, w, k: [int(t) for t in stream(model, [p], w, torch.tensor(k), max_new_tokens=12, **how)]
    ids = [said(*item) for item in items]
    # the token that makes them end at the most different steps
    ends = lambda token: {row.index(token) if token in row else 12 for row in ids}
    stop = max({token for row in ids for token in row}, key=lambda token: len(ends(token)))
    assert len(ends(stop)) > 2
    monkeypatch.setattr(model, "stop_ids", [stop])
    alone = [model.generate([p], w, torch.tensor(k), max_new_tokens=12, **how)[0] for p, w, k in items]
    found = list(answer(model, iter(items), slots, max_new_tokens=12, **how))
    assert sorted(index for index, _ in found) == list(range(13))
    assert dict(found) == dict(enumerate(alone))


def test_a_device_that_is_asked_every_few_steps(model, monkeypatch):
    """What a GPU does: eight steps between two looks."""
    items = questions(model, 5)
    plain = dict(answer(model, items, 2, max_new_tokens=11))
    monkeypatch.setattr("tools.sample.decoding.asks_every_step", lambda device: False)
    assert dict(answer(model, items, 2, max_new_tokens=11)) == plain


def test_a_text_hears_the_clips_before_it(model):
    """Two clips of a text: keys of both, each mixed alone; the first mark hears the first clip only."""
    ids, windows, _, _ = batch(model, n=(3,), T=(9,))
    ids[0, :2] = model.audio_id
    n_windows = torch.tensor([[1, 2]])
    logits, _ = model(ids, windows, n_windows)
    first, n_first = model.encode_audio(windows[:1], torch.tensor([1]))
    second, n_second = model.encode_audio(windows[1:], torch.tensor([2]))
    kv = model.keys_values(torch.cat([first, second], 1))
    heard = torch.full((1, 9), int(n_first + n_second))
    heard[0, 0] = n_first
    assert (model.lm.logits(model.forward_hidden(ids, kv, heard)) - logits).abs().max() < 1e-4
    swapped, _ = model(ids, windows[[1, 2, 0]], torch.tensor([[2, 1]]))
    assert (swapped[0, 0] - logits[0, 0]).abs().max() > 1e-3  # the order of clips tells at the first mark


def test_texts_about_one_clip_and_several_in_one_batch(model):
    ids, windows, _, _ = batch(model, n=(2, 3), T=(9, 9))
    ids[0, 0] = ids[1, :2] = model.audio_id
    together, _ = model(ids, windows, torch.tensor([[2, 0], [1, 2]]))
    first, _ = model(ids[:1], windows[:2], torch.tensor([2]))
    second, _ = model(ids[1:], windows[2:], torch.tensor([[1, 2]]))
    for alone, row in zip((first, second), together):
        assert (alone[0] - row).abs().max() < 1e-4
    _, loss = model(ids, windows, torch.tensor([[2, 0], [1, 2]]), labels=ids)
    assert torch.isfinite(loss)


def test_what_was_heard_serves_the_next_question(model, monkeypatch):
    _, windows, _, _ = batch(model, n=(3,), T=(4,))
    for n_windows in (torch.tensor([3]), torch.tensor([[1, 2]])):
        with torch.no_grad():
            heard = hear(model, windows, n_windows)
        plain = [model.generate([p], windows, n_windows, max_new_tokens=6) for p in ("One?", "And two?")]
        with monkeypatch.context() as m:
            m.setattr(model, "listen", lambda *_: pytest.fail("listened again"))
            for prompt, expected in zip(("One?", "And two?"), plain):
                steps = stream(model, [prompt], windows, n_windows, heard=heard, max_new_tokens=6)
                ids = [int(step[0]) for step in steps if step[0] >= 0]
                assert model.tokenizer.decode(ids, skip_special_tokens=True) == expected[0]


def test_an_answer_goes_on_from_given_words(model):
    """As if the words had been said: the same tokens as after a prompt that holds them, uncached."""
    from data import encode_prompts, encode_text
    _, windows, _, _ = batch(model, n=(2,), T=(4,))
    n = torch.tensor([2])
    said = model.generate(["What?"], windows, n, max_new_tokens=5, answer_prefix="It is a")[0]
    ids = encode_prompts(model.tokenizer, ["What?"])[0] + encode_text(model.tokenizer, ["It is a"])[0]
    with torch.no_grad():
        for _ in range(5):
            ids.append(int(model(torch.tensor([ids]), windows, n)[0][0, -1].argmax()))
    assert said == "it is a" + model.tokenizer.decode(ids[-5:], skip_special_tokens=True)


def test_a_reasoning_answer_without_conclusion_is_asked_for_it(model, monkeypatch):
    from tools.sample import asking
    asked = []

    def said(model, items, slots, answer_prefix="", **how):
        asked.append(answer_prefix)
        return iter([(0, answer_prefix + " a dog")])

    monkeypatch.setattr(asking, "answer", said)
    whole = "<summary> s. <conclusion> a cat"
    assert asking.concluded(model, None, whole, {}) == whole and not asked
    cut = "<summary> one. <reasoning> it barks. it may be 3.5 khz hi"
    assert asking.concluded(model, None, cut, {}) == "<summary> one. <reasoning> it barks. <conclusion> a dog"
    assert asked == ["<summary> one. <reasoning> it barks. <conclusion>"]


@pytest.mark.parametrize("prompts, n, message", [
    ([], [], "belong together"), (["a", "b"], [1], "belong together"), (["a"], [0], "belong together"),
    (["a"], [-1, 2], "belong together"), (["a"], [2], "belong together"),
    (["a", "b"], [1, 0], "clip or more"),
    (["x" * 600], [1], "a text of 602 tokens: the language model was made for 512")])
def test_what_cannot_be_asked_is_one_line_and_changes_nothing(model, prompts, n, message):
    model.train()
    with pytest.raises(ValueError, match=message):
        model.generate(prompts, torch.zeros(1, 40000), torch.tensor(n, dtype=torch.int64), max_new_tokens=2)
    assert model.training
    model.eval()


def test_a_million_tokens_do_not_ask_for_their_memory(model):
    _, windows, _, _ = batch(model, n=(1,), T=(4,))
    for _ in zip(range(3), stream(model, ["a"], windows, torch.tensor([1]), max_new_tokens=10 ** 6)):
        pass


def test_the_whole_model_is_saved_by_torch(model, tmp_path):
    import subprocess
    import sys

    from tests.helpers import ROOT
    ids, windows, n, _ = batch(model)
    torch.save(model, tmp_path / "model.pt")
    torch.save((ids, windows, n, model(ids, windows, n)[0]), tmp_path / "case.pt")
    code = (f"import torch\nmodel = torch.load('{tmp_path}/model.pt', weights_only=False)\n"
            f"ids, windows, n, logits = torch.load('{tmp_path}/case.pt')\n"
            "assert torch.equal(model(ids, windows, n)[0], logits)")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_noise_is_that_of_seed_and_step():
    from tools.sample.decoding import pick
    logits = torch.zeros(2, 50)
    how = Sampling(temperature=1.0, seed=4)
    together = pick(logits, how, [3, 7])
    assert [int(pick(logits[:1], how, [step])) for step in (3, 7)] == together.tolist()
    assert math.prod(together.shape) == 2


def test_where_it_listened_at_every_word(model, tmp_path):
    """Against the weights of the naive attention, token by token."""
    from data import encode_prompts, encode_text
    from tools.sample.attention_map import attention_over_time, timeline, write_timeline
    _, windows, _, _ = batch(model, n=(2,), T=(4,))
    windows = (windows * 32767).to(torch.int16)
    told = timeline(model, "What is it?", "a red dog", windows)
    assert told["words"] == ["a", "red", "dog"] and told["tokens"] == [[0, 1], [1, 5], [5, 9]]
    weights = torch.tensor(told["weights"])
    assert weights.shape == (3, len(told["seconds"]))
    assert torch.allclose(weights.sum(1), torch.ones(3), atol=1e-5)
    assert told["seconds"][0][0] == 0 and told["seconds"][-1][1] == 5.0
    seen = []

    def look(q, k, v, n_keys, gate):
        scores = torch.einsum("bthd,bnhd->bhtn", q, k) / q.shape[-1] ** 0.5
        seen.append(scores.softmax(-1)[0].mean(0))
        return gate.tanh() * torch.einsum("bhtn,bnhd->bthd", scores.softmax(-1), v)

    import model as model_file
    before = encode_prompts(model.tokenizer, ["What is it?"])[0]
    ids = before + encode_text(model.tokenizer, ["a red dog"])[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model_file.BACKENDS, "sdpa", look)
        model(torch.tensor([ids]), windows, torch.tensor([2]))
    mean = torch.stack(seen).mean(0).view(len(ids), 2, 2, -1).sum(2).flatten(1)
    assert torch.allclose(weights[1], mean[len(before):len(before) + 4].mean(0), atol=1e-5)
    last = attention_over_time(model, "What is it?", windows)
    assert torch.allclose(last, mean[len(before) - 1], atol=1e-5)
    pytest.importorskip("matplotlib")
    write_timeline(str(tmp_path / "deep/clip"), told, windows)
    assert sorted(f.name for f in (tmp_path / "deep").iterdir()) == ["clip.json", "clip.png"]


def test_compiled_decoding_answers_the_same(model, monkeypatch):
    import tools.sample.decoding as decoding
    items = questions(model, 3)
    plain = dict(answer(model, items, 3, max_new_tokens=5))
    monkeypatch.setattr(decoding.torch, "compile", partial(torch.compile, backend="aot_eager"))
    decoding.compile_decoding(model)
    try:
        assert dict(answer(model, items, 3, max_new_tokens=5)) == plain
    finally:
        del model.one_token


def test_int8_weights(tiny_settings, tmp_path):
    """Each product within the rounding of its weights; the whole model answers, and is not saved."""
    from tools.sample.int8 import Int8Linear, quantize
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 96)
    few, many = torch.randn(3, 64), torch.randn(40, 64)
    with torch.no_grad():
        small = Int8Linear(linear.weight, linear.bias)
        for x in (few, many, few[None]):
            error = (small(x) - linear(x)).abs().max() / linear(x).abs().max()
            assert small(x).shape == linear(x).shape and error < 0.02
    model = build(tiny_settings, gates=0.5)
    _, windows, n, _ = batch(model)
    kinds = {type(module).__name__ for module in quantize(model).lm.layers.modules()}
    assert "Int8Linear" in kinds and "Linear" not in kinds
    assert len(model.generate(["a", "b", "c"], windows, n, max_new_tokens=3)) == 3
    with pytest.raises(ValueError, match="int8 weights"):
        model.save_pretrained(str(tmp_path))
