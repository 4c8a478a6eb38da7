"""The model against Hugging Face's language model, and against itself computed another way."""
import itertools
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

import checkpoint
from data import Collate, encode_prompts, extend_tokenizer
from model import AudioFlamingo, ClapEncoder, UserError, attention, gated_blocks, swin_block
from tests.helpers import max_error, set_gates, settings
from tools.bench import reference
from tools.sample.decoding import compile_decoding

TEXTS, WINDOWS = (9, 14, 5), (2, 1, 2)  # tokens and windows of a batch


@pytest.fixture
def build(tiny_settings):
    """A function: settings and the value of the gates -> a tiny model with random weights."""
    def build_model(gates=0.6, **changes):
        torch.manual_seed(1)
        model = checkpoint.new_model(settings(tiny_settings, changes))
        set_gates(model, gates, -gates)
        for layer in model.audio_transformer.layer_stack:  # they start at 0, and would mix nothing
            layer.slf_attn.fc.weight.data.normal_(std=0.1)
            layer.pos_ffn.w_2.weight.data.normal_(std=0.1)
        return model
    return build_model


def make_batch(model, T=TEXTS):
    """-> input_ids, windows, n_windows, labels of the second half of each text."""
    rng = torch.Generator().manual_seed(0)
    windows = torch.randn(sum(WINDOWS), 40000, generator=rng).clamp(-1, 1)
    ids = torch.full((len(T), max(T)), model.pad_id)
    labels = torch.full_like(ids, -100)
    for b, t in enumerate(T):
        ids[b, :t] = torch.randint(1, 250, (t,), generator=rng)
        labels[b, t // 2:t] = ids[b, t // 2:t]
    return ids, windows, torch.tensor(WINDOWS), labels


def gradients(loss, model):
    loss.backward()
    grads = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            grads[name], p.grad = p.grad, None
    return grads


def assert_close(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, right in theirs.items():
        error = (ours[name] - right).abs().max()
        assert error <= tolerance * right.abs().max() + 1e-8, name


def test_closed_gates_are_the_plain_language_model_exactly(build):
    model = build(gates=0.0)
    ids, windows, n, _ = make_batch(model)
    logits, _ = model(ids, windows, n)
    assert torch.equal(logits, model.lm.logits(model.lm(ids)))


def test_batched_or_alone(build):
    """Logits, greedy and sampled answers of a ragged batch equal those of each text alone; int16 or float."""
    model = build()
    ids, windows, n, _ = make_batch(model)
    windows = (windows * 32767).to(torch.int16)
    prompts = ["What?", "A much longer question about the sound, is it a dog?", "hm"]
    logits, _ = model(ids, windows.float() / 32767, n)
    samplings = {}, {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 5}
    answers = [model.generate(prompts, windows, n, 12, **sampling) for sampling in samplings]
    for b, clip in enumerate(windows.split(WINDOWS)):
        count, t = n[b:b + 1], TEXTS[b]
        alone, _ = model(ids[b:b + 1, :t], clip, count)
        assert (alone[0] - logits[b, :t]).abs().max() < 1e-4
        for together, sampling in zip(answers, samplings):
            assert model.generate([prompts[b]], clip, count, 12, **sampling) == [together[b]]
    with pytest.raises(ValueError):
        model.generate(prompts[:2], windows, n)


@pytest.mark.slow
def test_a_decoding_step_is_one_graph(build, monkeypatch):
    """Compiled once for all steps of an answer: without a graph break, and not again."""
    model, graphs = build(), []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    question = ["What?", "And this?"], torch.ones(3, 40000), torch.tensor([1, 2]), 6
    plain = model.generate(*question)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counting))
    compile_decoding(model)
    assert model.generate(*question) == plain and len(graphs) == 1


def test_loss_is_the_naive_loss_also_in_parts(build):
    """1500 labelled tokens: the head runs on at most 1024 at a time."""
    model = build().requires_grad_(True).eval()
    ids, windows, n, labels = make_batch(model, T=(1200, 1100, 700))
    _, loss = model(ids, windows, n, labels)
    logits = model(ids, windows, n)[0][:, :-1].double()
    naive = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert abs(loss - naive) < 1e-5 * naive
    assert_close(gradients(loss, model), gradients(naive, model), 1e-4)
    assert model(ids, windows, n, labels=torch.full_like(labels, -100))[1] == 0  # nothing to learn is no NaN


def test_gradient_checkpointing(build):
    model = build().requires_grad_(True).train()
    ids, windows, n, labels = make_batch(model)
    results = []
    for checkpointing in (False, True):
        model.gradient_checkpointing = model.clap.gradient_checkpointing = checkpointing
        torch.manual_seed(0)  # drop path and SpecAugment of the encoder
        results.append(gradients(model(ids, windows, n, labels)[1], model))
    assert_close(*results, 1e-5)


def test_settings_that_fit_no_model_are_named(build):
    assert gated_blocks(1, 3) == [0, 1, 2]
    assert gated_blocks(2, 5) == [1, 3]
    for bad in (4, [3], []):
        with pytest.raises(UserError, match="cross_attn_every_n_layers"):
            gated_blocks(bad, 3)
    with pytest.raises(UserError, match="audio_transformer_n_head"):
        build(audio_transformer_n_head=7)
    model = build()
    with pytest.raises(UserError, match="freeze_lm_embeddings"):
        model.set_trainable(settings({"freeze_lm_embeddings": "some"}))
    with pytest.raises(UserError, match="window_length"):
        model.clap(torch.zeros(1, 60000))


@pytest.mark.parametrize("spec_size", [128, pytest.param(256, marks=pytest.mark.slow)])
def test_swin_blocks_equal_htsats_own(spec_size):
    """Outputs, and gradients of inputs and weights, against laion-clap's own forward: shifted and not."""
    torch.manual_seed(0)
    encoder = ClapEncoder(16, [2, 2, 2, 2], [2, 4, 4, 8], spec_size).train().double()
    for block in itertools.chain(*(stage.blocks for stage in encoder.htsat.layers)):
        torch.nn.init.normal_(block.attn.relative_position_bias_table)
        tokens = block.input_resolution[0] ** 2
        x, dy = torch.randn(2, 3, tokens, block.dim, dtype=torch.float64)
        leaves = [x.requires_grad_(), *block.parameters()]
        results = []
        for forward in (lambda x: swin_block(block, x), lambda x: block(x)[0]):
            torch.manual_seed(1)  # drop path
            y = forward(x)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
        torch.testing.assert_close(*results)


def test_a_step_equals_the_reference(build):
    """Loss and every gradient, against clips padded, encoded one by one, and scores and logits in full."""
    model = build()
    model.set_trainable(settings())
    ids, windows, n, labels = make_batch(model)
    _, loss = model(ids, windows, n, labels)
    theirs = reference.loss(model, ids, windows, n, labels)
    assert abs(loss.item() - theirs.item()) < 1e-5
    assert_close(gradients(loss, model), gradients(theirs, model), 1e-4)


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "added"])
def test_attention_learns_in_bfloat16_on_a_cpu(mask):
    torch.manual_seed(0)
    heads = 2 if mask == "causal" else 6  # GQA
    exact = [torch.randn(2, h, 20, 16, dtype=torch.float64) for h in (6, heads, heads)]
    options = {
        "none": {},
        "causal": {"causal": True},
        "bool": {"mask": torch.rand(2, 1, 20, 20) > 0.1},
        "added": {"mask": torch.randn(1, 6, 20, 20)}}
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        inputs = [x.to(dtype).requires_grad_() for x in exact]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            o = attention(*inputs, **options[mask])
        assert o.dtype is dtype
        results.append([o.detach(), *torch.autograd.grad(o, inputs, torch.ones_like(o))])
    for ours, right in zip(*results):
        assert max_error(ours.double(), right) < 0.02


def test_a_mistake_in_code_keeps_its_traceback(build, tmp_path, monkeypatch):
    """A misspelt setting in the model is no fault of the release that is loaded."""
    build().save_pretrained(str(tmp_path / "release"))

    class Misspelt(AudioFlamingo):
        def __init__(self, c, *more):
            self.scale = c.gate_scal

    monkeypatch.setattr(checkpoint, "AudioFlamingo", Misspelt)
    with pytest.raises(AttributeError, match="gate_scal"):
        checkpoint.load(str(tmp_path / "release"))


@pytest.mark.parametrize("token", ["<audio>", "<|endofchunk|>", "<SEP>", "<|PAD_TOKEN|>", "<|endoftext|>"])
def test_special_tokens_inside_texts_are_plain_text(build, token):
    """In training as in answering: one <audio>, one sep, and every character of the token read as such."""
    model = build()
    tokenizer, text = model.tokenizer, f"what is {token} here"
    ids, labels, _ = Collate(tokenizer, 512, 40000).encode([(text, f"a {token} b")])
    special = [model.audio_id, model.sep_id, *model.stop_ids]
    assert [t for t in ids[0].tolist() if t in (*special, model.pad_id)] == special
    (prompt,) = encode_prompts(tokenizer, [text])
    assert ids[0].tolist()[:len(prompt)] == prompt
    assert tokenizer.decode(prompt[1:-1]) == text.lower()
    answer = [t for t in labels[0].tolist() if t >= 0]
    assert tokenizer.decode(answer[:-2]) == f"a {token.lower()} b"
    assert answer[-2:] == model.stop_ids


def test_a_bos_token_stays_and_an_eos_token_goes(tiny_lm):
    """Of what a tokenizer puts around a text, the prompt keeps what is before it."""
    from tokenizers import processors
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    special = [("<s>", tokenizer.bos_token_id), ("<|endoftext|>", tokenizer.eos_token_id)]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|endoftext|>", pair="<s> $A $B <|endoftext|>", special_tokens=special)
    extend_tokenizer(tokenizer)
    (prompt,) = encode_prompts(tokenizer, ["Hi"])
    assert prompt[:2] == [tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("<audio>")]
    assert prompt[-1] == tokenizer.sep_token_id and tokenizer.eos_token_id not in prompt


@pytest.mark.slow
def test_one_batch_overfits(build):
    model = build(gates=0.0)
    model.set_trainable(settings())
    ids, windows, n, labels = make_batch(model)
    windows[0] = 0  # silence trains like any other window
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0)
    for _ in range(60):
        _, loss = model(ids, windows, n, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_training_encoder_gets_no_remainder_of_one_window(build):
    """Which BatchNorm would normalise by itself."""
    model = build()
    model.set_trainable(settings({"clap_finetune": True}))
    model.train()
    sizes = []
    model.clap.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    model.encode_audio(torch.randn(65, 40000), torch.tensor([65]))
    assert sizes == [33, 32]
