"""The model's promises, against Hugging Face's own language model and against itself computed another way."""
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

import checkpoint
import config
from model import AudioFlamingo, ClapEncoder, attention, gated_blocks, swin_block
from tools.bench import reference as plain
from tests.helpers import ROOT

torch.manual_seed(0)


def build(settings, gates=0.0):
    torch.manual_seed(1)
    model = checkpoint.new_model(SimpleNamespace(**(config.defaults() | settings)))
    for gated in model.xattn.values():
        gated.attn_gate.fill_(gates)
        gated.ff_gate.fill_(-gates)
    for layer in model.audio_transformer.layer_stack:  # they start at 0, and would mix nothing
        for weight in (layer.slf_attn.fc.weight, layer.pos_ffn.w_2.weight):
            weight.normal_(std=0.1)
    return model


def batch(model, n=(2, 1, 2), T=(9, 14, 5), seed=0):
    g = torch.Generator().manual_seed(seed)
    windows = torch.randn(sum(n), 40000, generator=g).clamp(-1, 1)
    ids = torch.full((len(T), max(T)), model.pad_id)
    labels = torch.full_like(ids, -100)
    for b, t in enumerate(T):
        ids[b, :t] = torch.randint(1, 250, (t,), generator=g)
        labels[b, t // 2:t] = ids[b, t // 2:t]
    return ids, windows, torch.tensor(n), labels


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_closed_gates_are_the_plain_language_model_exactly(tiny_lm, tiny_settings, tmp_path, family):
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    folder = tiny_lm
    if family == "qwen2":
        folder = str(tmp_path)
        c = Qwen2Config(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
                        num_key_value_heads=3, vocab_size=300, tie_word_embeddings=False)
        torch.manual_seed(3)
        Qwen2ForCausalLM(c).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_lm).save_pretrained(folder)
    model = build(tiny_settings | {"lang_encoder_path": folder})
    ids, windows, n, _ = batch(model)
    ids = ids.clamp(max=256)
    logits, _ = model(ids, windows, n)
    assert torch.equal(logits, model.lm.logits(model.lm(ids)))  # exactly
    theirs = AutoModelForCausalLM.from_pretrained(folder)(ids).logits  # and the plain one is Hugging Face's
    assert (logits[..., :257] - theirs[..., :257]).abs().max() < 1e-5 * theirs.abs().max()


def test_batched_or_alone_packed_or_padded(tiny_settings):
    model = build(tiny_settings, gates=0.7)
    ids, windows, n, _ = batch(model)
    logits, _ = model(ids, windows, n)
    first = 0
    for b, t in enumerate((9, 14, 5)):
        alone, _ = model(ids[b:b + 1, :t], windows[first:first + n[b]], n[b:b + 1])
        assert (alone[0] - logits[b, :t]).abs().max() < 1e-4
        first += n[b]


def test_answers_do_not_depend_on_the_batch(tiny_settings):
    model = build(tiny_settings, gates=0.9)
    _, windows, n, _ = batch(model)
    prompts = ["What?", "A much longer question about the sound, is it a dog?", "hm"]
    for options in ({}, {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 5}):
        together = model.generate(prompts, windows, n, max_new_tokens=12, **options)
        first = 0
        for b, prompt in enumerate(prompts):
            own = windows[first:first + n[b]]
            alone = model.generate([prompt], own, n[b:b + 1], max_new_tokens=12, **options)
            assert alone == [together[b]]
            first += n[b]
    sampled = [model.generate(prompts, windows, n, 12, temperature=1.0, seed=seed) for seed in (1, 2)]
    assert sampled[0] != sampled[1]
    with pytest.raises(ValueError, match="do not belong together"):
        model.generate(prompts[:2], windows, n)


def test_a_stream_left_early_leaves_training_mode(tiny_settings):
    model = build(tiny_settings).train()
    _, windows, n, _ = batch(model)
    for _ in model.stream(["a", "b", "c"], windows, n, max_new_tokens=5):
        assert not model.training
        break
    assert model.training


def test_loss_is_the_naive_loss(tiny_settings):
    model = build(tiny_settings, gates=0.5)
    ids, windows, n, labels = batch(model)
    logits, _ = model(ids, windows, n)
    _, loss = model(ids, windows, n, labels=labels)
    predictions, targets = logits[:, :-1].double().flatten(0, 1), labels[:, 1:].flatten()
    naive = cross_entropy(predictions, targets, ignore_index=-100)
    assert abs(loss - naive) < 1e-5
    assert model(ids, windows, n, labels=torch.full_like(labels, -100))[1] == 0  # nothing to learn is no NaN


def test_the_loss_of_many_tokens_in_parts(tiny_settings, monkeypatch):
    """Of 1500 labelled tokens: no more logits at once than of 1024; the naive loss and its gradients."""
    model, rows = build(tiny_settings, gates=0.5), []
    ids, windows, n, labels = batch(model, T=(1200, 1100, 700))
    heard = listen_double(model.double(), windows, n)
    monkeypatch.setattr(model, "encode_audio", lambda *_: heard)
    model.requires_grad_(True)
    logits_of = model.lm.logits
    monkeypatch.setattr(model.lm, "logits", lambda x: rows.append(x.numel() // x.shape[-1]) or logits_of(x))
    logits, _ = model(ids, windows, n)
    naive = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    naive.backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    _, loss = model(ids, windows, n, labels)
    loss.backward()
    assert rows == [3600, 1024, 476, 476, 1024]  # the naive one; ours, and again for its gradients
    assert abs(loss - naive) < 1e-6 * naive and len(theirs) > 40
    for name, p in model.named_parameters():
        if name in theirs:
            assert (p.grad - theirs[name]).abs().max() <= 1e-6 * theirs[name].abs().max(), name


def test_gradient_checkpointing_and_finite_differences(tiny_settings):
    model = build(tiny_settings, gates=0.3)
    model.requires_grad_(True)
    ids, windows, n, labels = batch(model)
    gradients = []
    for recompute, encoder in ((True, True), (False, True), (False, False), (True, False)):
        model.gradient_checkpointing = model.clap.gradient_checkpointing = recompute
        model.train()
        model.clap.train(encoder)
        model.zero_grad()
        torch.manual_seed(0)  # drop path and SpecAugment of the encoder
        model(ids, windows, n, labels=labels)[1].backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.eval()
    for once, again in (gradients[1::-1], gradients[2:]):
        for name, g in again.items():
            assert (once[name] - g).abs().max() <= 1e-5 * max(g.abs().max(), 1e-3), name
    model.double()
    for name in ("xattn.0.attn_gate", "xattn.2.ff_gate"):
        p, difference = dict(model.named_parameters())[name], []
        for shift in (1e-4, -1e-4):
            with torch.no_grad():
                p += shift
                audio, n_keys = listen_double(model, windows, n)
                logits = model.lm.logits(model.forward_hidden(ids, model.keys_values(audio), n_keys))
                loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
                difference.append(loss.item())
                p -= shift
        slope = (difference[0] - difference[1]) / 2e-4
        assert slope == pytest.approx(gradients[2][name].item(), rel=2e-3, abs=1e-6)


def listen_double(model, windows, n):
    model.clap.float()
    tokens = model.clap(windows).double()
    model.clap.double()
    slots = torch.arange(int(n.max())) < n[:, None]
    audio = tokens.new_zeros(*slots.shape, *tokens.shape[1:])
    audio[slots] = tokens
    n_keys = slots.sum(1) * model.clap.tokens_per_window
    return model.audio_transformer(audio.flatten(1, 2), n_keys), n_keys


def test_silence_and_one_batch_overfits(tiny_settings):
    model = build(tiny_settings)
    model.set_trainable(SimpleNamespace(**config.defaults()))
    ids, windows, n, labels = batch(model)
    windows[0] = 0  # a silent window answers, and trains, like any other
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    for _ in range(60):
        _, loss = model(ids, windows, n, labels=labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05 and all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("settings, trained", [
    ({}, {"audio_transformer", "xattn", "lm.embed_tokens"}),
    ({"freeze_lm_embeddings": True}, {"audio_transformer", "xattn"}),
    ({"freeze_lm_embeddings": "added"}, {"audio_transformer", "xattn", "lm.embed_tokens.added"}),
    ({"clap_finetune": True, "freeze_lm_embeddings": True}, {"audio_transformer", "xattn", "clap"}),
    ({"unfreeze_full_lm": True}, {"audio_transformer", "xattn", "lm"})])
def test_what_trains(tiny_settings, settings, trained):
    model = build(tiny_settings)
    model.set_trainable(SimpleNamespace(**(config.defaults() | settings)))
    model.train()
    ids, windows, n, labels = batch(model)
    for gated in model.xattn.values():  # behind a closed gate no gradient flows
        gated.attn_gate.data.fill_(0.5)
        gated.ff_gate.data.fill_(0.5)
    model(ids, windows, n, labels=labels)[1].backward()
    for name, p in model.named_parameters():
        expected = name.startswith(tuple(trained)) and "mel_conv2d" not in name and "fusion_model" not in name
        assert p.requires_grad == expected and (p.grad is not None) == expected, name
    assert model.clap.training == bool(settings.get("clap_finetune"))


@pytest.mark.parametrize("depths", [[1, 1, 1, 1], [0, 1, 2, 1]])
def test_release_round_trip(tiny_settings, tmp_path, depths):
    model = build(tiny_settings | {"clap_depths": depths}, gates=0.4)
    ids, windows, n, _ = batch(model)
    model.save_pretrained(str(tmp_path / "release"))
    again = AudioFlamingo.from_pretrained(str(tmp_path / "release"))
    assert torch.equal(again(ids, windows, n)[0], model(ids, windows, n)[0])
    assert again.config.clap_spec_size == 128 and again.config.max_num_window == 2
    assert again.config.clap_depths == depths


def test_strict_loading_lists_what_is_wrong(tiny_settings, tmp_path):
    import json

    from safetensors.torch import load_file, save_file
    model = build(tiny_settings)
    model.save_pretrained(str(tmp_path))
    file = str(tmp_path / "safe_ckpt/weight_0.safetensors")
    state = load_file(file)
    gone = state.pop("audio_transformer_clap.layer_stack.0.slf_attn.fc.weight")
    state["surprise"] = gone
    state["lang_encoder.model.norm.weight"] = torch.ones(7)
    save_file(state, file)
    json.dump({"weight_0": list(state)}, open(tmp_path / "safe_ckpt/metadata.json", "w"))
    lists = r"missing: audio_transformer.*fc.weight; unexpected: surprise; wrong shape: lm.norm.weight"
    with pytest.raises(ValueError, match=lists):
        AudioFlamingo.from_pretrained(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        AudioFlamingo.from_pretrained(str(tmp_path / "nothing"))


def test_gated_blocks():
    assert gated_blocks(1, 3) == [0, 1, 2] and gated_blocks(2, 5) == [1, 3]
    assert gated_blocks([0, 2], 3) == [0, 2]
    for bad in (4, [3], []):
        with pytest.raises(ValueError, match="cross_attn_every_n_layers"):
            gated_blocks(bad, 3)


@pytest.mark.parametrize("spec_size", [128, 256])
def test_swin_blocks_equal_htsats_own(spec_size):
    """Outputs, and gradients of inputs and weights, against laion-clap's own forward: shifted and not."""
    torch.manual_seed(0)
    stages = ClapEncoder(16, [2, 2, 2, 2], [2, 4, 4, 8], spec_size).train().double().htsat.layers
    for block in (block for stage in stages for block in stage.blocks):
        torch.nn.init.normal_(block.attn.relative_position_bias_table)
        L, C = block.input_resolution[0] ** 2, block.norm1.weight.shape[0]
        x, dy = torch.randn(2, 3, L, C, dtype=torch.float64)
        results = []
        for forward in (lambda x: swin_block(block, x), lambda x: block(x)[0]):
            wanted = [x.requires_grad_(), *block.parameters()]
            torch.manual_seed(1)  # drop path
            y = forward(x)
            results.append([y.detach(), *torch.autograd.grad(y, wanted, dy)])
        for ours, theirs in zip(*results):
            torch.testing.assert_close(ours, theirs)


def test_a_step_equals_the_plain_one(tiny_settings):
    """Loss and every gradient, against clips padded, encoded one by one, and scores and logits in full."""
    model = build(tiny_settings, gates=0.6)
    model.set_trainable(SimpleNamespace(**config.defaults()))
    ids, windows, n, labels = batch(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _, loss = model(ids, windows, n, labels)
    theirs = plain.loss(model, ids, *plain.padded(windows, n), labels)
    assert abs(loss.item() - theirs.item()) < 1e-5
    pairs = zip(torch.autograd.grad(loss, trained.values()), torch.autograd.grad(theirs, trained.values()))
    for name, (a, b) in zip(trained, pairs):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-9, name


@pytest.mark.parametrize("mask", ["none", "causal", "seen", "added"])
def test_attention_spelled_out_equals_the_fused_one(mask):
    """Where a CPU learns in bfloat16, against float64 by the fused one."""
    torch.manual_seed(0)
    heads = 2 if mask == "causal" else 6
    exact = [torch.randn(2, h, 20, 16, dtype=torch.float64) for h in (6, heads, heads)]
    options = {"none": {}, "causal": {"causal": True}, "seen": {"mask": torch.rand(2, 1, 20, 20) > 0.4},
               "added": {"mask": torch.randn(1, 6, 20, 20)}}[mask]
    if mask == "seen":
        options["mask"][..., 0] = True

    if mask == "added":  # in bfloat16's numbers
        options["mask"] = options["mask"].bfloat16()

    def results(dtype):
        some = {n: x.to(dtype) if n == "mask" and x.is_floating_point() else x for n, x in options.items()}
        inputs = [x.detach().to(dtype).requires_grad_() for x in exact]
        o = attention(*inputs, **some)
        return [o.detach(), *torch.autograd.grad(o, inputs, torch.ones_like(o))]

    for ours, right in zip(results(torch.bfloat16), results(torch.float64)):
        assert (ours.double() - right).abs().max() < 0.02 * right.abs().max()


def test_import_needs_no_network_and_no_torchvision():
    code = ("import sys, socket\n"
            "socket.socket.connect = lambda *a: (_ for _ in ()).throw(OSError('network'))\n"
            "import model, data, train, sample, eval\n"
            "model.load_htsat_class()\n"
            "assert 'torchvision' not in sys.modules and 'laion_clap' not in sys.modules")
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=offline)


def test_a_decoding_step_is_one_graph(tiny_settings, monkeypatch):
    """Shapes stay the same while answers grow, and a second, shorter prompt falls into the same ones."""
    model = build(tiny_settings, gates=0.6)
    _, windows, n, _ = batch(model)
    prompts = ["What?", "A longer question about the sound", "hm"]
    plain = [list(model.stream(p, windows, n, max_new_tokens=8)) for p in (prompts, ["a", "b", "c"])]
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(model.forward_hidden, fullgraph=True, dynamic=False, backend=count)
    prefill = model.forward_hidden
    hidden = lambda ids, *rest: (step if ids.shape[1] == 1 else prefill)(ids, *rest)
    monkeypatch.setattr(model, "forward_hidden", hidden)
    monkeypatch.setattr("tools.sample.decoding.CACHE_STEP", 64)  # one length for both prompts
    monkeypatch.setattr(model, "stop_ids", [])
    compiled = [list(model.stream(p, windows, n, max_new_tokens=20)) for p in (prompts, ["a", "b", "c"])]
    assert len(graphs) == 1
    for ours, theirs in zip(compiled, plain):
        for a, b in zip(ours, theirs):
            assert all(x == y or y < 0 for x, y in zip(a.tolist(), b.tolist()))


def test_a_growing_cache_changes_nothing(tiny_settings, monkeypatch):
    model = build(tiny_settings, gates=0.6)
    _, windows, n, _ = batch(model)
    model.stop_ids = []
    answers = []
    for step in (256, 4):  # slots at first: all that are needed, or some, doubled again and again
        monkeypatch.setattr("tools.sample.decoding.CACHE_STEP", step)
        answers.append(model.generate(["What?", "A longer question", "hm"], windows, n, max_new_tokens=50))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("wrong", [
    {"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1},
    {"top_p": 0.0}, {"top_p": 1.5}, {"max_new_tokens": -1}])
def test_sampling_that_makes_no_sense_is_refused(tiny_settings, wrong):
    model = build(tiny_settings)
    _, windows, n, _ = batch(model)
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*expected"):
        model.generate(["a", "b", "c"], windows, n, **wrong)
    assert model.generate(["a", "b", "c"], windows, n, max_new_tokens=0) == ["", "", ""]


def test_gradients_reach_the_sound_after_an_answer(tiny_settings):
    from model import mel_bands
    mel_bands.cache_clear()
    model = build(tiny_settings, gates=0.5)
    ids, windows, n, labels = batch(model)
    model.generate(["a", "b", "c"], windows, n, max_new_tokens=2)
    windows.requires_grad_(True)
    model(ids, windows, n, labels=labels)[1].backward()
    assert windows.grad.abs().sum() > 0


def test_int16_windows_are_the_floats(tiny_settings):
    model = build(tiny_settings, gates=0.5)
    ids, windows, n, _ = batch(model)
    windows = (windows * 32767).to(torch.int16)
    assert torch.equal(model(ids, windows, n)[0], model(ids, windows.float() / 32767, n)[0])


@pytest.mark.parametrize("mark", ["<audio>", "<|endofchunk|>", "<SEP>", "<|PAD_TOKEN|>", "<|endoftext|>"])
def test_marks_inside_texts_are_text(tiny_settings, mark):
    """In training as in answering: one <audio>, one sep, and every character of the mark read as such."""
    from data import Collate, encode_prompts
    model = build(tiny_settings, gates=0.5)
    tokenizer, text = model.tokenizer, f"what is {mark} here"
    ids, labels, cut = Collate(tokenizer, 512, 40000).encode([(text, f"a {mark} b")])
    marks = [model.audio_id, model.sep_id, model.end_id, tokenizer.eos_token_id]
    assert [t for t in ids[0].tolist() if t in marks or t == model.pad_id] == marks and cut == 0
    prompt = encode_prompts(tokenizer, [text])[0]
    assert ids[0].tolist()[:len(prompt)] == prompt
    assert tokenizer.decode(prompt[1:-1]) == text.lower()
    said = [t for t in labels[0].tolist() if t >= 0]
    assert tokenizer.decode(said[:-2]) == f"a {mark.lower()} b" and said[-2:] == marks[2:]
    other = encode_prompts(tokenizer, [text.replace(mark, "x")])[0]
    assert len(prompt) == len(other) + len(mark) - 1  # a byte-level vocabulary: a token a character


def test_what_the_tokenizer_puts_before_a_text_stays(tiny_lm):
    """A tokenizer begins texts with a mark of its own and ends them with another: only the first is kept."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    from data import Collate, extend_tokenizer, encode_prompts
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    special = [("<s>", tokenizer.bos_token_id), ("<|endoftext|>", tokenizer.eos_token_id)]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|endoftext|>", pair="<s> $A $B <|endoftext|>", special_tokens=special)
    extend_tokenizer(tokenizer)
    (prompt,) = encode_prompts(tokenizer, ["Hi"])
    audio, end = tokenizer.convert_tokens_to_ids(["<audio>", "<|endofchunk|>"])
    assert prompt[:2] == [tokenizer.bos_token_id, audio] and prompt[-1] == tokenizer.sep_token_id
    assert prompt.count(tokenizer.bos_token_id) == 1 and tokenizer.eos_token_id not in prompt
    ids, _, _ = Collate(tokenizer, 64, 40000).encode([("Hi", "yo")])
    assert ids[0].tolist()[:len(prompt)] == prompt and ids[0].tolist()[-2:] == [end, tokenizer.eos_token_id]
