"""Releases, runs and published training checkpoints: every route gives the same numbers, an export replaces
what stood there, language models bring marks and heads of their own."""
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import config
import data
from checkpoint import load
from model import AudioFlamingo
from tests.helpers import GOLDEN, ROOT, run
from tests.test_checkpoint import save_lm, settings
from tools.checkpoint.files import exchanged
from tools.checkpoint.releases import PUBLISHED, rename

needs_golden = pytest.mark.skipif(not os.path.isdir(GOLDEN), reason="golden files not found; set SHARED=...")


def bytes_of(folder):
    return {os.path.relpath(os.path.join(path, f), folder):
            hashlib.sha256(open(os.path.join(path, f), "rb").read()).hexdigest()
            for path, _, files in os.walk(folder) for f in files}


@pytest.fixture(scope="module")
def model(tiny_settings):
    torch.manual_seed(1)
    model = checkpoint.new(SimpleNamespace(**(config.defaults() | tiny_settings)))
    for block in model.xattn.values():
        block.attn_gate.data.fill_(0.7)
        block.ff_gate.data.fill_(0.3)
    return model


@pytest.fixture(scope="module")
def release(model, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("release") / "tiny")
    model.save_pretrained(folder)
    return folder


def same_weights(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return set(ours) == set(theirs) and all(torch.equal(t, theirs[n]) for n, t in ours.items())


# ------------------------------------------------------------------------------------------------------------
# Golden, by every route


@pytest.fixture(scope="module")
def routes(tmp_path_factory):
    """{route: folder or file}: the golden release, an export of it, a training checkpoint of the published
    code's form (all trained parts and the embeddings, "module." before each name), a run that kept all but
    the language model, and an export of each."""
    folder = tmp_path_factory.mktemp("routes")
    facts = json.load(open(f"{GOLDEN}/golden.json"))
    sizes = dict(lang_encoder_path=f"{GOLDEN}/lm", max_num_window=3,
                 audio_transformer_n_head=facts["audio_transformer"]["n_head"])
    state = {}
    for shard in json.load(open(f"{GOLDEN}/safe_ckpt/metadata.json")):
        state |= load_file(f"{GOLDEN}/safe_ckpt/{shard}.safetensors")
    # the language model that the golden release was trained with is not its lm/: take that one's weights
    shutil.copytree(f"{GOLDEN}/lm", folder / "lm")
    lm = {n.replace("lang_encoder.", "").replace("decoder_layer.", ""): t.clone() for n, t in state.items()
          if n.startswith("lang_encoder.") and "_sound." not in n and "lm_head" not in n}
    save_file(lm, folder / "lm/model.safetensors", {"format": "pt"})
    kept = {f"module.{n}": t for n, t in state.items()
            if "decoder_layer" not in n and not n.startswith("clap.")}
    torch.save({"epoch": 0, "model_state_dict": kept}, folder / "published.pt")
    clap = {f"module.audio_branch.{n.removeprefix('clap.nvclap.')}": t for n, t in state.items()
            if n.startswith("clap.nvclap.")}
    torch.save({"epoch": 16, "state_dict": clap}, folder / "clap.pt")
    parts = sizes | {"lang_encoder_path": f"{folder}/lm", "clap_checkpoint": f"{folder}/clap.pt"}
    found = {"release": (GOLDEN, sizes), "published checkpoint": (f"{folder}/published.pt", parts)}
    first = load(GOLDEN, **sizes)
    own = {n: t for n, t in first.state_dict().items() if n.startswith(("xattn.", "audio_", "lm.embed"))}
    saved = vars(first.config) | parts | {"expdir": str(folder), "run_name": "run"}
    os.makedirs(folder / "run")
    torch.save({"model_state_dict": own, "config": saved}, folder / "run/checkpoint_0.pt")
    found["run"] = (f"{folder}/run", {})
    for name, (path, given) in list(found.items()):
        place = f"{folder}/export of {name}"
        checkpoint.save_release(load(path, dtype=None, **given), place)
        found["export of " + name] = (place, {})
    return found


@needs_golden
@pytest.mark.parametrize("route", [before + r for before in ("", "export of ")
                                   for r in ("release", "run", "published checkpoint")])
def test_golden_by_every_route(routes, route):
    path, given = routes[route]
    model, golden = load(path, **given), load_file(f"{GOLDEN}/golden.safetensors")
    clips = [data.load_audio(f"{GOLDEN}/clip_{i}.wav", **model.audio_config) for i in range(2)]
    windows, n = torch.from_numpy(np.concatenate(clips)), torch.tensor([len(c) for c in clips])
    with torch.no_grad():
        logits, _ = model(golden["input_ids"], windows, n)
        _, loss = model(golden["input_ids"], windows, n, labels=golden["labels"])
    real = golden["attention_mask"].bool()
    error = (logits[real] - golden["logits"][real]).abs().max() / golden["logits"][real].abs().max()
    assert error < 2e-4 and abs(loss - golden["loss"]) < 1e-4


@needs_golden
@pytest.mark.parametrize("prefix", ["", "module."])
def test_both_names_of_the_encoder_and_copies(routes, tmp_path, prefix, capsys):
    """afclap for nvclap, "module." before all, the same tensors once more under the two other names."""
    folder = shutil.copytree(routes["export of release"][0], tmp_path / "r")
    shard = folder / "safe_ckpt/weight_0.safetensors"
    state = load_file(shard)
    blocks = {n.replace("model.layers", "old_decoder_blocks").replace("decoder_layer.", ""): t.clone()
              for n, t in state.items() if "decoder_layer" in n}
    gated = {n.replace("model.layers", "gated_cross_attn_layers_sound").replace("_attn_layer_sound.", "#")
             .replace("gated_cross#", ""): t.clone() for n, t in state.items() if "_sound." in n}
    state = {prefix + n.replace("nvclap", "afclap"): t for n, t in (state | blocks | gated).items()}
    save_file(state, shard)
    json.dump({"weight_0": list(state)}, open(folder / "safe_ckpt/metadata.json", "w"))
    model = load(str(folder))
    assert same_weights(model, load(routes["export of release"][0]))
    assert len(model.skipped["duplicates"]) == len(blocks) + len(gated) + 1 > 60  # and the tied head
    capsys.readouterr()
    code = checkpoint.report([str(folder)], {})
    lines = {line[:12].strip(): int(line[12:18]) for line in capsys.readouterr().out.splitlines()[1:]}
    assert code == 0 and lines["loaded"] == len(model.state_dict())
    assert lines["duplicates"] == len(blocks) + len(gated) + 1 and lines["unused"] == 1
    assert not any(lines[what] for what in ("missing", "unexpected", "wrong shape", "wrong type"))


# ------------------------------------------------------------------------------------------------------------
# Writing


def test_export_import_export_gives_the_same_bytes(release, tmp_path):
    done = run("sample.py", f"--init_from={release}", f"--export={tmp_path}/a")
    assert f"wrote {tmp_path}/a" in done.stdout
    run("sample.py", f"--init_from={tmp_path}/a", f"--export={tmp_path}/b")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b") == bytes_of(release)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    run("sample.py", f"--init_from={tmp_path}/a", f"--export={tmp_path}/a")  # in its own place
    assert bytes_of(tmp_path / "a") == bytes_of(release)
    load(release, dtype=torch.bfloat16).save_pretrained(f"{tmp_path}/c")
    run("sample.py", f"--init_from={tmp_path}/c", f"--export={tmp_path}/d")  # every weight in its own dtype
    assert bytes_of(tmp_path / "c") == bytes_of(tmp_path / "d") != bytes_of(release)


def test_an_export_replaces_a_release_and_nothing_else(model, release, tmp_path):
    """An older one of more shards; notes, a link and a run's checkpoint of the user's in the same folders."""
    folder = shutil.copytree(release, tmp_path / "r")
    stale = ["safe_ckpt/weight_1.safetensors", "lm/vocab.json", "lm/merges.txt"]
    mine = ["notes.txt", "safe_ckpt/notes.txt", "lm/model.safetensors", "checkpoint_0.pt", "eval/x.jsonl"]
    for name in stale + mine:
        os.makedirs(os.path.dirname(folder / name), exist_ok=True)
        (folder / name).write_text(name)
    os.symlink("notes.txt", folder / "link")
    model.save_pretrained(str(folder))
    new = bytes_of(folder)
    assert {name: new[name] for name in bytes_of(release)} == bytes_of(release)
    assert set(new) == set(bytes_of(release)) | set(mine) | {"link"} and os.path.islink(folder / "link")
    assert all((folder / name).read_text() == name for name in mine)
    assert os.listdir(tmp_path) == ["r"]
    (folder / "README.md").write_text("My own words.")
    model.save_pretrained(str(folder))
    assert (folder / "README.md").read_text() == "My own words."


@pytest.mark.parametrize("name", ["config.json", "lm/config.json", "clap_ckpt/epoch_16.pt"])
def test_an_export_never_takes_the_place_of_what_is_no_release(model, tmp_path, name):
    os.makedirs(os.path.dirname(tmp_path / name), exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"is no release, but holds {name}"):
        model.save_pretrained(str(tmp_path))
    assert bytes_of(tmp_path) == {name: hashlib.sha256(b"mine").hexdigest()}


@pytest.mark.parametrize("make", [
    lambda f: (f / "lm").write_text("mine"), lambda f: (f / "config.json").mkdir(),
    lambda f: (f / "safe_ckpt").symlink_to("../elsewhere")])
def test_what_is_in_the_way_of_an_export_stays(model, tmp_path, make):
    """A file, a folder, a link of the user's where a release has something else."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "r").mkdir()
    make(tmp_path / "r")
    there = os.lstat(tmp_path / "r" / os.listdir(tmp_path / "r")[0])
    with pytest.raises(ValueError, match="is in the way: nothing is written"):
        model.save_pretrained(str(tmp_path / "r"))
    assert os.lstat(tmp_path / "r" / os.listdir(tmp_path / "r")[0]).st_ino == there.st_ino
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "r"] and not os.listdir(tmp_path / "elsewhere")


@pytest.mark.parametrize("change, name", [
    (lambda m: m.to("meta"), "not lm.embed_tokens.weight"),
    (lambda m: m.tokenizer.add_tokens(["<mine>"]), "262 tokens and 261 rows"),
    (lambda m: m.add_module("mine", torch.nn.Linear(2, 2)), "not mine.weight, mine.bias"),
    (lambda m: setattr(m, "clap", torch.nn.Linear(2, 2)), "not clap.weight, clap.bias")])
def test_what_a_release_has_no_place_for_is_not_written(release, tmp_path, change, name):
    """No numbers, a part of one's own, another encoder: reading it again would fail."""
    model = load(release)
    change(model)
    with pytest.raises(ValueError, match=f"a release .*{name}"):
        model.save_pretrained(str(tmp_path / "r"))
    assert not os.listdir(tmp_path)


def test_the_folder_one_is_in_is_not_taken_away(model, release, tmp_path, monkeypatch):
    """Its shell would stand in a folder that is gone. A folder above is no better."""
    shutil.copytree(release, tmp_path / "r")
    for place in ("r", "r/lm"):
        monkeypatch.chdir(tmp_path / place)
        with pytest.raises(ValueError, match="an export replaces it, and you are in it"):
            model.save_pretrained("." if place == "r" else "..")
    monkeypatch.setenv("HOME", str(tmp_path))
    model.save_pretrained("~/home")
    assert same_weights(load("~/home"), model)


def test_an_export_that_fails_leaves_the_old_one(model, release, tmp_path, monkeypatch):
    folder = shutil.copytree(release, tmp_path / "r")
    (folder / "notes.txt").write_text("mine")
    before = bytes_of(folder)
    for place in ("tools.checkpoint.releases.model_card", "tools.checkpoint.files.os.fsync", "tools.checkpoint.files.shutil.copytree"):
        with monkeypatch.context() as patched:
            def full(*_, **__):
                raise OSError(28, "No space left on device")
            patched.setattr(place, full)
            with pytest.raises(ValueError, match="not written, what stood there is as it was.*No space"):
                model.save_pretrained(str(folder))
        assert bytes_of(folder) == before and os.listdir(tmp_path) == ["r"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="not written"):
        model.save_pretrained(str(tmp_path / "file/r"))


def test_an_export_that_is_killed_leaves_a_whole_release(release, tmp_path):
    """At random moments: what stands there is the old one or the new one."""
    folder = str(shutil.copytree(release, tmp_path / "r"))
    code = ("import sys, checkpoint\nmodel = checkpoint.load(sys.argv[1])\nmodel.lm.norm.weight.data += 1\n"
            "print('ready', flush=True)\nwhile True:\n    model.save_pretrained(sys.argv[1])\n")
    old = load(folder).lm.norm.weight
    os.makedirs(tmp_path / "a/1")
    os.makedirs(tmp_path / "b/2")
    at_once = exchanged(tmp_path / "a", tmp_path / "b")
    assert os.listdir(tmp_path / "a") == ["2" if at_once else "1"]
    for wait in (0.02, 0.05, 0.11):
        process = subprocess.Popen([sys.executable, "-c", code, folder], cwd=ROOT, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert os.path.isdir(folder) or not at_once
        if os.path.isdir(folder):  # else, between two renamings, the old one waits beside
            new = load(folder).lm.norm.weight
            moved = (new - old).detach()
            assert torch.allclose(moved, moved.round(), atol=1e-5) and moved.unique().numel() == 1


def test_a_release_needs_nothing_of_the_machine_it_was_made_on(tiny_lm, tiny_settings, tmp_path):
    """A tokenizer of its own folder, which is gone, and what a GPU's settings ask for."""
    shutil.copytree(tiny_lm, tmp_path / "tokenizer")
    shutil.copytree(tiny_lm, tmp_path / "lm")
    os.remove(tmp_path / "lm/tokenizer.json")
    c = settings(tiny_settings, tmp_path / "lm", tokenizer_path=str(tmp_path / "tokenizer"),
                 attention_backend="triton", audio_transformer_n_layers=0)
    checkpoint.new(c).save_pretrained(str(tmp_path / "r"))
    shutil.rmtree(tmp_path / "tokenizer")
    shutil.rmtree(tmp_path / "lm")
    assert str(tmp_path) not in open(tmp_path / "r/config.json").read()
    for more in ({}, {"tokenizer_path": "/gone", "attention_backend": "triton"}):
        own = json.load(open(tmp_path / "r/config.json"))
        json.dump(own | more, open(tmp_path / "r/config.json", "w"))
        model = load(str(tmp_path / "r"))
        assert len(model.audio_transformer.layer_stack) == 0
        assert len(model.generate(["What?"], torch.ones(1, 40000), torch.tensor([1]), max_new_tokens=2)) == 1


def test_the_card_tells_what_a_run_was_made_of(tiny_config, release, tmp_path):
    """Trained from a release without a config.json of ours, as NVIDIA's; export and import keep the card."""
    published = shutil.copytree(release, tmp_path / "published")
    os.remove(published / "config.json")
    run("train.py", tiny_config, f"--expdir={tmp_path}", "--run_name=tuned", "--max_steps=1",
        f"--pretrained_path={published}", f"--lang_encoder_path={published}/lm")
    for other in ([1], {"tasks": [1]}, {}):  # somebody else's file of that name
        json.dump(other, open(tmp_path / "tuned/scores.json", "w"))
        assert "scores" not in checkpoint.open_checkpoint(f"{tmp_path}/tuned", {})[0].about
    scores = {"tasks": {"toy-AQA/test": {"accuracy": 0.75, "n": 8}}}
    json.dump(scores, open(tmp_path / "tuned/scores.json", "w"))
    run("sample.py", f"--init_from={tmp_path}/tuned", f"--export={tmp_path}/a")
    card = open(tmp_path / "a/README.md").read()
    for words in ("toy-AQA/train | 1.0", "learning_rate | 0.001", "1 optimizer steps", '"accuracy": 0.75',
                  "NVIDIA OneWay Noncommercial License", "audio-transformer layers"):
        assert words in card, card
    assert str(tmp_path) not in card + open(tmp_path / "a/config.json").read()
    load(f"{tmp_path}/a").save_pretrained(f"{tmp_path}/b")
    assert open(tmp_path / "b/README.md").read() == card
    os.makedirs(tmp_path / "again")  # trained on from there: another model than the one that was scored
    saved = torch.load(tmp_path / "tuned/checkpoint_0.pt", weights_only=True)
    saved["config"] |= {"pretrained_path": f"{tmp_path}/a", "dataset_blending_config": {"Mine/train": 2.0}}
    torch.save(saved, tmp_path / "again/checkpoint_0.pt")
    load(f"{tmp_path}/again").save_pretrained(f"{tmp_path}/c")
    card = open(tmp_path / "c/README.md").read()
    assert "Mine/train | 2.0" in card and "NVIDIA OneWay" in card and "language model lm (3" in card
    assert "toy-AQA" not in card and "Scores" not in card


def test_whose_licences_a_card_names(model, tmp_path):
    from tools.checkpoint.model_card import about_run, model_card, name_of
    home = tmp_path / "models--Qwen--Qwen2.5-3B/snapshots/0a1"
    os.makedirs(home)
    sizes = vars(model.config) | {"about": {}}
    for path in (home, tmp_path / "Qwen2.5-3B", "Qwen/Qwen2.5-3B"):
        os.makedirs(tmp_path / "Qwen2.5-3B", exist_ok=True)
        card = model_card(sizes | {"lang_encoder_path": name_of(str(path))}, model)
        assert "Qwen2.5-3B: Qwen Research License (non-commercial)" in card and str(tmp_path) not in card
    assert name_of("/gone/mine/lm/") == "lm" and name_of("nvidia/x") == "nvidia/x"
    about = about_run({"config": {"clap_checkpoint": "clap_ckpt/epoch_16.pt"}}, str(tmp_path), {})
    card = model_card(sizes | {"lang_encoder_path": "mine", "about": about}, model)
    assert "started from clap_ckpt/epoch_16.pt: that of its publisher; of NVIDIA's releases" in card
    assert "Language model mine: that of its publisher" in card


def test_what_is_exported_can_be_read_again(tiny_lm, tiny_settings, tmp_path):
    """Several chat templates of one tokenizer: transformers puts them into a folder of their own in lm/."""
    from transformers import AutoTokenizer
    shutil.copytree(tiny_lm, tmp_path / "lm")
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "lm")
    model = checkpoint.new(settings(tiny_settings, tmp_path / "lm"))
    model.save_pretrained(str(tmp_path / "r"))
    assert os.path.isfile(tmp_path / "r/lm/additional_chat_templates/tools.jinja")
    again = load(str(tmp_path / "r"))
    assert same_weights(again, model) and again.tokenizer.chat_template == tokenizer.chat_template
    again.tokenizer.chat_template = None
    again.save_pretrained(str(tmp_path / "r"))
    assert not [name for name in bytes_of(tmp_path / "r") if name.endswith(".jinja")]


def test_the_text_tower_of_clap_goes_along(release, tmp_path):
    folder = shutil.copytree(release, tmp_path / "r")
    saved = torch.load(folder / "clap_ckpt/epoch_16.pt", weights_only=True)
    saved["state_dict"]["module.text_branch.x"] = torch.arange(5)
    torch.save(saved, folder / "clap_ckpt/epoch_16.pt")
    load(str(folder)).save_pretrained(str(tmp_path / "again"))
    again = torch.load(tmp_path / "again/clap_ckpt/epoch_16.pt", weights_only=True)["state_dict"]
    assert torch.equal(again["module.text_branch.x"], torch.arange(5))
    assert set(again) == set(saved["state_dict"])


# ------------------------------------------------------------------------------------------------------------
# Language models: told by the width, with marks or a head of their own


def test_a_release_tells_its_language_model_by_its_width(model, tmp_path, monkeypatch):
    from tools.checkpoint import language_models
    model.save_pretrained(str(tmp_path / "r"))
    shutil.move(tmp_path / "r/lm", tmp_path / "lm")
    own = json.load(open(tmp_path / "r/config.json"))
    monkeypatch.setitem(language_models.BY_WIDTH, 64, str(tmp_path / "lm"))
    unnamed = {n: v for n, v in own.items() if n != "lang_encoder_path"}
    json.dump(unnamed, open(tmp_path / "r/config.json", "w"))
    assert same_weights(load(str(tmp_path / "r")), model)
    os.remove(tmp_path / "r/config.json")  # as published
    published = load(str(tmp_path / "r"), window_length=2.5, audio_transformer_n_head=4, clap_spec_size=128)
    assert published.config.max_num_window == 12
    assert same_weights(published, model)
    monkeypatch.setitem(language_models.BY_WIDTH, 64, "gone/gone")
    json.dump(own | {"lang_encoder_path": str(tmp_path / "lm")}, open(tmp_path / "r/config.json", "w"))
    assert same_weights(load(str(tmp_path / "r")), model)  # config.json names one
    with pytest.raises(FileNotFoundError, match="lang_encoder_path = 'other/other'"):
        load(str(tmp_path / "r"), lang_encoder_path="other/other")
    assert list(language_models.BY_WIDTH.items())[:3] == [
        (896, "Qwen/Qwen2.5-0.5B"), (1536, "Qwen/Qwen2.5-1.5B"), (2048, "Qwen/Qwen2.5-3B")]


@pytest.fixture(scope="module")
def published(model, tmp_path_factory):
    """A training checkpoint of the published code: -> its tensors, all trained ones and the token table; what
    weights do not tell, with an encoder's file."""
    folder, state = tmp_path_factory.mktemp("published"), model.state_dict()
    clap = {"module.audio_branch." + n: t for n, t in model.clap.htsat.state_dict().items()}
    torch.save({"state_dict": clap}, folder / "clap.pt")
    kept = {rename(n, PUBLISHED): t for n, t in state.items() if n.startswith(("xattn.", "audio_"))}
    kept[TABLE] = torch.cat([model.lm.embed_tokens.weight, model.lm.embed_tokens.added]).detach()
    return kept, dict(clap_checkpoint=f"{folder}/clap.pt", window_length=2.5, audio_transformer_n_head=4,
                      clap_spec_size=128, max_num_window=2)


TABLE = "lang_encoder.model.embed_tokens.weight"


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_published_checkpoint_tells_its_language_model_by_its_width(model, published, tiny_lm, tmp_path,
                                                                      monkeypatch, prefix):
    from tools.checkpoint import language_models
    (state, given), file = published, str(tmp_path / "checkpoint_9.pt")
    torch.save({"epoch": 9, "model_state_dict": {prefix + n: t for n, t in state.items()}}, file)
    with pytest.raises(ValueError, match=r"checkpoint_9.pt: its .* width 64, .* 2048: .*--lang_encoder_path"):
        load(file, **given)
    monkeypatch.setitem(language_models.BY_WIDTH, 64, tiny_lm)
    read = load(file, **given)
    assert same_weights(read, model) and read.config.lang_encoder_path == tiny_lm
    assert same_weights(load(str(tmp_path), **given), model)  # the folder it lies in


PUBLISHED_FAULTS = {
    "no table": (lambda s: s.pop(TABLE), {}, "missing: lm.embed_tokens.added"),
    "no block": (lambda s: [s.pop(n) for n in list(s) if "layers.1.gated" in n], {}, "missing: xattn.1."),
    "no encoder": (lambda s: None, {"clap_checkpoint": None}, "no audio encoder in it: .*--clap_checkpoint"),
    "heads": (lambda s: None, {"audio_transformer_n_head": 7}, "n_head = 7 does not divide"),
    "copies": (lambda s: s.update({"module." + TABLE: s[TABLE] + 1}), {}, "should be copies, but differ")}


@pytest.mark.parametrize("kind", PUBLISHED_FAULTS)
def test_what_a_published_checkpoint_lacks_is_not_made_up(published, tiny_lm, tmp_path, kind):
    change, options, saying = PUBLISHED_FAULTS[kind]
    state = dict(published[0])
    change(state)
    torch.save({"model_state_dict": state}, tmp_path / "checkpoint_9.pt")
    with pytest.raises(ValueError, match=f"checkpoint_9.pt.*{saying}"):
        load(str(tmp_path / "checkpoint_9.pt"), **published[1] | {"lang_encoder_path": tiny_lm} | options)


def in_a_cache(cache, repo, folder):
    """The files of a folder in a cache of the hub: blobs, and a snapshot of links to them."""
    home = os.path.join(cache, "models--" + repo.replace("/", "--"))
    os.makedirs(f"{home}/refs")
    os.makedirs(f"{home}/blobs")
    open(f"{home}/refs/main", "w").write("0" * 40)
    for path, _, files in os.walk(folder):
        place = os.path.normpath(f"{home}/snapshots/{'0' * 40}/{os.path.relpath(path, folder)}")
        os.makedirs(place, exist_ok=True)
        for file in files:
            blob = f"{home}/blobs/{hashlib.sha256(os.path.join(path, file).encode()).hexdigest()}"
            shutil.copyfile(os.path.join(path, file), blob)
            os.symlink(os.path.relpath(blob, place), f"{place}/{file}")


def test_a_hub_id_is_all_that_a_release_needs(model, release, tiny_lm, tmp_path, monkeypatch):
    """As SoundCoT's stands in a cache: no config.json, its language model under an id of its own."""
    from tools.checkpoint import language_models
    shutil.copytree(release, tmp_path / "published")
    shutil.rmtree(tmp_path / "published/lm")
    os.remove(tmp_path / "published/config.json")
    in_a_cache(tmp_path / "cache", "nvidia/audio-flamingo-2-SoundCoT", tmp_path / "published")
    in_a_cache(tmp_path / "cache", "Qwen/Qwen2.5-3B", tiny_lm)
    monkeypatch.setitem(language_models.BY_WIDTH, 64, "Qwen/Qwen2.5-3B")
    monkeypatch.chdir(tmp_path)
    given = dict(window_length=2.5, audio_transformer_n_head=4, clap_spec_size=128,
                 cache_dir=str(tmp_path / "cache"))
    found = load("nvidia/audio-flamingo-2-SoundCoT/", **given)  # as one types it after a folder
    assert same_weights(found, model) and found.config.max_num_window == 12
    found.save_pretrained("again")
    card = open("again/README.md").read()
    assert "Qwen/Qwen2.5-3B: Qwen Research License" in card and "NVIDIA OneWay" in card
    assert same_weights(load(str(tmp_path / "again")), model)
    with pytest.raises(FileNotFoundError, match="nvidia/audio-flamingo-3' is not a folder here"):
        load("nvidia/audio-flamingo-3", **given)


def lm_with_tokens(folder, tiny_lm, tokens, options=(), rows=300):
    """A language model whose tokenizer holds `tokens` beside its alphabet; -> its embeddings."""
    hf = save_lm(folder, tiny_lm, "Llama", vocab_size=rows)
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    tokenizer.add_tokens(list(tokens), **dict(options))
    tokenizer.save_pretrained(folder)
    return hf.get_input_embeddings().weight.detach()


SPECIAL_TOKENS = list(data.SPECIAL_TOKENS)


@pytest.mark.parametrize("tokens", [["<audio>", "x1", "x2"], ["x1", "<audio>"], ["<SEP>", "x1"],
                                    ["x1", "<SEP>"], ["<|PAD_TOKEN|>", "x1"], ["<|endofchunk|>"], SPECIAL_TOKENS,
                                    SPECIAL_TOKENS[::-1], SPECIAL_TOKENS + ["x1"]])
@pytest.mark.parametrize("special", [True, False])
def test_pretrained_rows_are_never_touched(tiny_lm, tiny_settings, tmp_path, tokens, special):
    """A tokenizer with marks of ours among its own: their rows are used as they were learnt."""
    table = lm_with_tokens(tmp_path / "lm", tiny_lm, tokens, {"special_tokens": special})
    model = checkpoint.new(settings(tiny_settings, tmp_path / "lm"))
    known = 257 + len(tokens)
    with torch.no_grad():
        rows = model.lm.embed_tokens(torch.arange(len(model.tokenizer))[None])[0]
        assert torch.equal(rows[:known], table[:known]) and rows.isfinite().all()
        assert not (rows[known:] == table[known:len(rows)]).all(1).any()
    assert model.tokenizer.convert_tokens_to_ids(tokens) == list(range(257, known))
    ids, labels, cut = data.Collate(model.tokenizer, 64, 40000).encode([("Is <audio> <SEP> it?", "Yes.")])
    place = ids[0].tolist()
    assert place.count(model.audio_id) == 1 and place.count(model.sep_id) == 1 and cut == 0
    assert place[0] == model.audio_id and labels[0, -1] == model.tokenizer.eos_token_id
    assert len(model.generate(["What?"], torch.ones(1, 40000), torch.tensor([1]), max_new_tokens=2)) == 1
    model.save_pretrained(str(tmp_path / "r"))
    again = load(str(tmp_path / "r"))
    assert same_weights(model, again) and again.tokenizer.get_vocab() == model.tokenizer.get_vocab()


def test_a_tokenizer_that_appends_eos_and_cuts_on_the_left(tiny_lm, tiny_settings, tmp_path):
    """Answering sees what training saw; a long text keeps <audio>."""
    from tokenizers.processors import TemplateProcessing
    shutil.copytree(tiny_lm, tmp_path / "lm")
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm, truncation_side="left", padding_side="left",
                                              model_max_length=16)
    eos = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"$A {eos}", None, [(eos, 0)])
    tokenizer.save_pretrained(tmp_path / "lm")
    model = checkpoint.new(settings(tiny_settings, tmp_path / "lm"))
    t = model.tokenizer
    assert t("a")["input_ids"][-1] == t.eos_token_id and t.truncation_side == "left"
    prompt, = data.encode_prompts(t, ["What is it?"])
    ids, labels, _ = data.Collate(t, 64, 40000).encode([("What is it?", "Rain")])
    answer = len(data.encode_text(t, ["rain"])[0])
    assert prompt[0] == model.audio_id and prompt[-1] == model.sep_id and t.eos_token_id not in prompt
    assert ids[0, :len(prompt)].tolist() == prompt and ids.shape[1] == len(prompt) + answer + 2
    long, labels, cut = data.Collate(t, 32, 40000).encode([("What is it? " * 9, "Rain")])
    assert long[0, 0] == model.audio_id and long.shape[1] == 32 and cut == 1 and (labels == -100).all()


TWO = "lm: the tokenizer means two things by one of <audio>, "


@pytest.mark.parametrize("change, saying", [
    (lambda c: c.update(sep_token="<audio>"), TWO), (lambda c: c.update(sep_token="<|PAD_TOKEN|>"), TWO),
    (lambda c: c.update(sep_token="<|endofchunk|>"), TWO),
    (lambda c: c.update(eos_token="<|PAD_TOKEN|>"), TWO),
    (lambda c: c.update(sep_token="a"), "lm: the tokenizer's mark 'a' is part of its plain texts"),
    (lambda c: c.pop("eos_token"), "lm: the tokenizer has no eos token"),
    (lambda c: c.update(added_tokens_decoder={"0": 3}), "lm: no usable tokenizer")])
def test_a_tokenizer_that_cannot_be_used_is_refused(tiny_lm, tiny_settings, tmp_path, change, saying):
    shutil.copytree(tiny_lm, tmp_path / "lm")
    file = tmp_path / "lm/tokenizer_config.json"
    content = json.load(open(file))
    change(content)
    json.dump(content, open(file, "w"))
    with pytest.raises(ValueError, match=saying):
        checkpoint.new(settings(tiny_settings, tmp_path / "lm"))


def test_a_head_of_its_own_is_kept(tiny_lm, tiny_settings, tmp_path, capsys):
    """config.json says tied, the weights hold another head: as in transformers it is used, with a note."""
    hf = save_lm(tmp_path / "lm", tiny_lm, "Llama")
    file = tmp_path / "lm/model.safetensors"
    state = load_file(file)
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    c = settings(tiny_settings, tmp_path / "lm")
    assert checkpoint.new(c).lm.config.tied and "another head" not in capsys.readouterr().err
    head = torch.randn(300, 48)
    save_file(state | {"lm_head.weight": head}, file, {"format": "pt"})
    model = checkpoint.new(c)
    assert "another head" in capsys.readouterr().err
    with torch.no_grad():
        hf.lm_head.weight = torch.nn.Parameter(head)
        ids = torch.randint(0, 257, (1, 20))
        assert (model.lm.logits(model.lm(ids))[..., :257] - hf(ids).logits[..., :257]).abs().max() < 1e-4
    model.save_pretrained(str(tmp_path / "r"))
    assert same_weights(load(str(tmp_path / "r")), model)
    lm, _ = checkpoint.load_language_model(c)
    assert torch.equal(lm.lm_head.weight, model.lm.lm_head.weight)
    trained = {n: t for n, t in model.state_dict().items() if n.startswith(("xattn", "audio_"))}
    saved = {rename(n, PUBLISHED): t for n, t in trained.items()}
    table = torch.cat([model.lm.embed_tokens.weight, model.lm.embed_tokens.added])
    saved |= {"lang_encoder.model.embed_tokens.weight": table, "lang_encoder.lm_head.weight": table * 2}
    clap = {"module.audio_branch." + n: t for n, t in model.clap.htsat.state_dict().items()}
    torch.save({"state_dict": clap}, tmp_path / "clap.pt")
    save_file(state, file, {"format": "pt"})
    torch.save({"model_state_dict": saved}, tmp_path / "published.pt")
    given = tiny_settings | {"lang_encoder_path": f"{tmp_path}/lm", "clap_checkpoint": f"{tmp_path}/clap.pt"}
    published = AudioFlamingo.from_pretrained(f"{tmp_path}/published.pt", **given)
    assert torch.equal(published.lm.lm_head.weight, 2 * table[:257])


def test_weights_that_are_not_numbers_are_told(model, release, tmp_path, capsys):
    """Answers would be the first token for ever, and scores of it would be printed."""
    folder = shutil.copytree(release, tmp_path / "r")
    shard = folder / "safe_ckpt/weight_0.safetensors"
    state, name = load_file(shard), "lang_encoder.model.layers.1.decoder_layer.mlp.up_proj.weight"
    state[name][3, 5] = float("nan")
    save_file(state, shard)
    broken = load(str(folder))
    with pytest.raises(ValueError, match="the model's logits are NaN"):
        broken.generate(["What?"] * 2, torch.ones(2, 40000), torch.tensor([1, 1]), max_new_tokens=2)
    code = checkpoint.report([str(folder)], {})
    lines = capsys.readouterr().out.splitlines()
    row, = [line for line in lines if line.startswith("not finite")]
    assert code == 1 and row.split()[2:] == ["1", "lm.layers.1.mlp.up_proj.weight"]


def test_nothing_large_is_drawn_when_a_model_is_read(release):
    model, state = checkpoint.open_checkpoint(release, {})
    held = {n for n, p in model.named_parameters() if not p.is_meta}
    assert all(n.endswith("relative_position_bias_table") for n in held), "in memory before it is read"
    checkpoint.materialize(model, state, "cpu", torch.float32, release)
    assert not any(p.is_meta for p in model.parameters())
