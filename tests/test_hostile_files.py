"""Checkpoints that are not what they should be: one line that says what and where, exit code 2, nothing run,
nothing written."""
import json
import os
import pickle
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from tools.checkpoint.clap import clap_state
import config
import sample
from tests.helpers import fails_with_one_line


@pytest.fixture(scope="module")
def release(tiny_settings, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("release") / "tiny")
    checkpoint.new(SimpleNamespace(**(config.defaults() | tiny_settings))).save_pretrained(folder)
    return folder


def files_under(folder):
    """What stands there: {path: size and time}."""
    return {os.path.join(path, f): (s.st_size, s.st_mtime_ns) for path, _, files in os.walk(folder)
            for f in files for s in [os.lstat(os.path.join(path, f))]}


def refused(folder, monkeypatch, capsys, *options, clip):
    """What sample.py says about --init_from=folder when it ends with code 2 and leaves all as it is."""
    there = files_under(os.path.dirname(folder))
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--init_from={folder}", f"--audio={clip}", *options])
    with pytest.raises(SystemExit) as ended:
        config.run(sample.main, "sample.py", sample.READS)
    lines = [line for line in capsys.readouterr().err.splitlines() if "skipped" not in line]
    assert ended.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert len(lines[0]) < 1000 and files_under(os.path.dirname(folder)) == there
    print(lines[0])
    return lines[0]


SHARD, LISTING = "safe_ckpt/weight_0.safetensors", "safe_ckpt/metadata.json"
BAD = "weight_0.safetensors: not a readable"


def edit_json(file, change):
    content = json.load(open(file))
    content = change(content) or content
    json.dump(content, open(file, "w"))


def edit_shard(folder, change, listed=True):
    """Change the tensors of the one shard, and what metadata.json says of them unless it is to lie."""
    state = load_file(f"{folder}/{SHARD}")
    change(state)
    save_file(state, f"{folder}/{SHARD}")
    if listed:
        json.dump({"weight_0": list(state)}, open(f"{folder}/{LISTING}", "w"))


NORM, TABLE = "lang_encoder.model.norm.weight", "lang_encoder.model.embed_tokens.weight"
FF = "lang_encoder.model.layers.1.gated_cross_attn_layer_sound.ff.1.weight"
OLD = "lang_encoder.old_decoder_blocks.0.mlp.up_proj.weight"


def lose(state, words):
    for name in [name for name in state if words in name]:
        del state[name]


SHARDS = {
    "missing": (lambda s: s.pop(NORM), True, ["missing: lm.norm.weight"]),
    "missing and named": (lambda s: s.pop(NORM), False, ["weight_0.safetensors", "missing: " + NORM]),
    "extra": (lambda s: s.update(extra=torch.zeros(2)), True, ["unexpected: extra"]),
    "extra and not named": (lambda s: s.update(extra=torch.zeros(2)), False, ["weight_0", "unexpected"]),
    "shape": (lambda s: s.update({FF: s[FF][:-1].clone()}), True, ["wrong shape: xattn.1.ff.1.weight (255"]),
    "type": (lambda s: s.update({NORM: s[NORM].long()}), True, ["wrong type: lm.norm.weight torch.int64"]),
    "narrow": (lambda s: s.update({TABLE: s[TABLE][:, :32].clone()}), True, ["width 32"]),
    "no table": (lambda s: s.pop(TABLE), True, ["not an Audio Flamingo 2 release"]),
    "no encoder": (lambda s: [s.pop(n) for n in list(s) if n.startswith("clap.")], True, ["not an Audio"]),
    "most": (lambda s: [s.pop(n) for n in list(s) if "attn." in n], True, ["missing: ", " more"]),
    "no xattn": (lambda s: [s.pop(n) for n in list(s) if "_sound." in n], True, ["missing: "]),
    "a block less": (lambda s: lose(s, "layers.1.gated"), True, ["missing: xattn.1.attn_gate"]),
    "a layer less": (lambda s: lose(s, "layer_stack.0"), True, ["missing: audio_transformer.layer_stack.0."]),
    "copies": (lambda s: s.update({OLD: torch.ones(96, 64)}), True, ["decoder_layer.mlp.up", OLD, "differ"]),
    "both encoders": (lambda s: s.update({"clap.afclap.norm.weight": torch.ones(128) * 3}), True,
                      ["clap.nvclap.norm.weight", "clap.afclap.norm.weight", "differ"]),
    "names": (lambda s: s.update({"clap.nvclap.layers.9.blocks.0.attn.relative_position_bias_table":
                                  torch.ones(225, 1)}), True, ["not what a run or a release holds"])}


@pytest.mark.parametrize("kind", SHARDS)
def test_tensors(release, tmp_path, monkeypatch, capsys, tiny_data, kind):
    change, named, saying = SHARDS[kind]
    folder = shutil.copytree(release, tmp_path / "r")
    edit_shard(folder, change, named)
    line = refused(str(folder), monkeypatch, capsys, clip=f"{tiny_data}/0.wav")
    assert all(words in line for words in saying), line


def cut(file, part):
    os.truncate(file, int(os.path.getsize(file) * part))


def out_of_the_folder(folder):
    shutil.move(f"{folder}/{SHARD}", f"{folder}/../elsewhere.safetensors")
    os.symlink("../../elsewhere.safetensors", f"{folder}/{SHARD}")


def lead_out(folder, name):
    shutil.copytree(f"{folder}/{name}", f"{folder}/../outside")
    shutil.rmtree(f"{folder}/{name}")
    os.symlink("../outside", f"{folder}/{name}")


def named_outside(path):
    def change(folder):
        shutil.copy(f"{folder}/{SHARD}", f"{folder}/../x.safetensors")
        edit_json(f"{folder}/{LISTING}", lambda m: {path.format(os.path.dirname(folder)): m["weight_0"]})
    return change


def config_with(**changes):
    return lambda folder: edit_json(f"{folder}/config.json", lambda c: c | changes)


def config_without(name):
    return lambda folder: edit_json(f"{folder}/config.json", lambda c: {n: c[n] for n in c if n != name})


def lm_with(**changes):
    return lambda folder: edit_json(f"{folder}/lm/config.json", lambda c: c | changes)


def rewritten(file, text):
    return lambda folder: open(f"{folder}/{file}", "w").write(text)


NO_NAME = ["metadata.json names 'safe_ckpt/", "which is no file's name"]
FILES = {
    "truncated": (lambda f: cut(f"{f}/{SHARD}", 0.6), [BAD]),
    "truncated in its header": (lambda f: cut(f"{f}/{SHARD}", 0.001), [BAD]),
    "empty": (lambda f: cut(f"{f}/{SHARD}", 0), [BAD]),
    "absent": (lambda f: os.remove(f"{f}/{SHARD}"), ["weight_0.safetensors: no such file, but"]),
    "a folder": (lambda f: os.remove(f"{f}/{SHARD}") or os.mkdir(f"{f}/{SHARD}"), ["safetensors: no such"]),
    "link": (out_of_the_folder, ["weight_0.safetensors, which", "leads out of"]),
    "link of the shards": (lambda f: lead_out(f, "safe_ckpt"), ["leads out of"]),
    "link of lm": (lambda f: lead_out(f, "lm"), ["leads out of"]),
    "above": (named_outside("../../x"), ["metadata.json names", "leads out of"]),
    "elsewhere": (named_outside("{}/x"), ["metadata.json names", "leads out of"]),
    "a zero byte": (rewritten(LISTING, '{"a\\u0000b": []}'), NO_NAME),
    "half a letter": (rewritten(LISTING, '{"\\ud800": []}'), NO_NAME),
    "a long name": (rewritten(LISTING, json.dumps({"x" * 9999: []})), NO_NAME),
    "long names": (rewritten(LISTING, json.dumps({"weight_0": ["x" * 9999] * 9})), ["missing: xx", "4 m"]),
    "a list": (rewritten(LISTING, '["weight_0"]'), ["metadata.json: a list, expected an object"]),
    "no lists": (rewritten(LISTING, '{"weight_0": 3}'), ["metadata.json: 'weight_0' is not a list"]),
    "numbers": (rewritten(LISTING, '{"weight_0": [1]}'), ["metadata.json: 'weight_0' is not a list"]),
    "nothing": (rewritten(LISTING, "{}"), ["not an Audio Flamingo 2 release"]),
    "no JSON": (rewritten(LISTING, "{"), ["metadata.json: not JSON"]),
    "bytes": (lambda f: open(f"{f}/{LISTING}", "wb").write(b"\xff\xfe\x00"), ["metadata.json: not JSON"]),
    "config a list": (rewritten("config.json", "[]"), ["config.json: a list, expected an object"]),
    "config no JSON": (rewritten("config.json", "max_num_window = 3"), ["config.json: not JSON"]),
    "config nested": (rewritten("config.json", '{"a": ' + "[" * 100000), ["config.json: not JSON"]),
    "wrong type": (config_with(max_num_window="3"), ["config.json: max_num_window = '3' is a str"]),
    "a truth": (config_with(max_num_window=True), ["config.json: max_num_window = True is a bool"]),
    "zero heads": (config_with(audio_transformer_n_head=0), ["config.json: audio_transformer_n_head = 0"]),
    "no divisor": (config_with(audio_transformer_n_head=7), ["audio_transformer_n_head = 7 does not divide"]),
    "absurd": (config_with(max_num_window=-1), ["config.json: max_num_window = -1, expected"]),
    "long": (config_with(window_length=1e9), ["config.json: window_length = 1000000000.0"]),
    "longer than CLAP": (config_with(window_length=11.0), ["window_length = 11.0", "at most 2.55 s"]),
    "overlap": (config_with(window_overlap=2.5), ["window_overlap = 2.5", "shorter overlap"]),
    "infinite": (rewritten("config.json", '{"window_length": Infinity}'), ["config.json"]),
    "depths": (config_with(clap_depths=[2, "2"]), ["config.json: clap_depths"]),
    "other blocks": (config_with(cross_attn_every_n_layers=2), ["unexpected: xattn"]),
    "no such block": (config_with(cross_attn_every_n_layers=[0, 9]), ["[0, 9]", "some of 0...2"]),
    "block of floats": (config_with(cross_attn_every_n_layers=[0.0, 1, 2]), ["config.json: cross_attn"]),
    "more layers": (config_with(audio_transformer_n_layers=3), ["missing: audio_transformer.layer"]),
    "inner": (config_with(audio_transformer_d_inner=8), ["wrong shape: audio_transformer.layer"]),
    "another encoder": (config_with(clap_embed_dim=32), ["wrong shape: "]),
    "three stages": (config_with(clap_depths=[1, 1, 1]), ["config.json: clap_depths = [1, 1, 1]", "four"]),
    "stages": (config_with(clap_num_heads=[3, 2, 2, 4]), ["clap_num_heads = [3, 2, 2, 4] do not"]),
    "no key": (config_without("max_num_window"), ["config.json: no max_num_window in it"]),
    "no heads": (config_without("audio_transformer_n_head"), ["no audio_transformer_n_head in it"]),
    "about": (config_with(about=[1]), ["config.json: about = [1], expected an object"]),
    "about data": (config_with(about={"data": [1]}), ["config.json: about = {'data': [1]}, expected"]),
    "lm no JSON": (rewritten("lm/config.json", "{"), ["r/lm"]),
    "lm type": (lm_with(hidden_size="64"), ["r/lm"]),
    "lm heads": (lm_with(num_attention_heads=0), ["r/lm"]),
    "lm heads do not divide": (lm_with(num_key_value_heads=3), ["r/lm"]),
    "lm width": (lm_with(hidden_size=128), ["width 64", "config.json says 3 of 128"]),
    "lm layers": (lm_with(num_hidden_layers=10 ** 9), ["3 blocks", "config.json says 1000000000"]),
    "lm inner": (lm_with(intermediate_size=10 ** 18), ["r"]),
    "lm code": (lm_with(auto_map={"AutoConfig": "evil.Config"}, model_type="evil"), ["r/lm"]),
    "lm eps": (lm_with(rms_norm_eps=float("nan")), ["lm/config.json: rms_norm_eps = nan"]),
    "lm theta": (lm_with(rope_parameters={"rope_theta": 0, "rope_type": "default"}),
                 ["rope_theta = 0"]),
    "lm positions": (lm_with(max_position_embeddings=-1), ["config.json: max_position_embeddings = -1"]),
    "no lm config": (lambda f: os.remove(f"{f}/lm/config.json"), ["r/lm"]),
    "no tokenizer": (lambda f: os.remove(f"{f}/lm/tokenizer.json"), ["r/lm"]),
    "tokenizer no JSON": (rewritten("lm/tokenizer.json", "{"), ["r/lm"]),
    "no lm": (lambda f: shutil.rmtree(f"{f}/lm"), ["width 64", "--lang_encoder_path"]),
}


@pytest.mark.parametrize("kind", FILES)
def test_files(release, tmp_path, monkeypatch, capsys, tiny_data, kind):
    change, saying = FILES[kind]
    folder = str(shutil.copytree(release, tmp_path / "r"))
    if kind == "no lm":
        config_without("lang_encoder_path")(folder)
    change(folder)
    line = refused(folder, monkeypatch, capsys, clip=f"{tiny_data}/0.wav")
    assert all(words in line for words in saying), line


OVERRIDES = {
    "cross_attn_every_n_layers": (2, "every_n_layers = 2, but the model of .* has .0, 1, 2."),
    "audio_transformer_n_layers": (3, "n_layers = 3, but the model of .* has 1"),
    "audio_transformer_d_inner": (8, "d_inner = 8, but the model of .* has 32"),
    "clap_embed_dim": (96, "clap_embed_dim = 96, but the encoder of .* has 16"),
    "max_num_window": ("3", "from_pretrained: max_num_window = '3' is a str, expected int"),
    "window_length": (float("nan"), "from_pretrained: window_length = nan, expected a finite number"),
    "audio_transformer_n_head": (10 ** 9, "audio_transformer_n_head = 1000000000, expected 1 to 10000"),
    "bach_size": (1, "unknown setting 'bach_size'; nearest: batch_size"),
    "dtype": (torch.int8, "dtype = torch.int8, expected torch.float32"),
    "device": ("nope", "device = 'nope', expected auto, cpu, cuda")}


@pytest.mark.parametrize("name", OVERRIDES)
def test_what_a_model_cannot_be_loaded_with(release, name):
    value, saying = OVERRIDES[name]
    with pytest.raises(ValueError, match=saying):
        checkpoint.load(release, **{name: value})


class Evil:
    """Unpickled by anything that trusts it, it makes a folder."""
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def test_pickles_run_nothing(tiny_settings, tmp_path, monkeypatch, capsys, tiny_data):
    mark, run = str(tmp_path / "run-by-it"), tmp_path / "run"
    os.makedirs(run)
    with open(tmp_path / "plain", "wb") as f:
        pickle.dump(Evil(mark), f)
    with pytest.raises(FileExistsError):  # it would
        os.mkdir(mark)
        pickle.load(open(tmp_path / "plain", "rb"))
    os.rmdir(mark)
    contents = {"legacy": Evil(mark), "zip": {"model_state_dict": {"x": Evil(mark)}}, "list": [1],
                "nothing": {}, "numbers": {"model_state_dict": {"x": 1}},
                "meta": {"model_state_dict": {"x": torch.ones(2, device="meta")}},
                "sparse": {"model_state_dict": {"x": torch.ones(2).to_sparse()}},
                "a block's name": {"model_state_dict": {"xattn.x.y": torch.ones(2)},
                                   "config": tiny_settings | {"window_overlap": 0.0}},
                "itself": {"model_state_dict": {}, "config": {"pretrained_path": str(run)}},
                "config": {"model_state_dict": {}, "config": [1]},
                "config type": {"model_state_dict": {}, "config": {"max_num_window": "3"}}}
    for kind, content in contents.items():
        if kind == "legacy":
            shutil.copy(tmp_path / "plain", run / "checkpoint_0.pt")
        else:
            torch.save(content, run / "checkpoint_0.pt")
        line = refused(str(run), monkeypatch, capsys, clip=f"{tiny_data}/0.wav")
        assert "checkpoint_0.pt" in line and "Recursion" not in line and not os.path.exists(mark)
        torch.save({"state_dict": content} if kind == "zip" else content, tmp_path / "clap.pt")
        with pytest.raises(ValueError, match=r"clap\.pt"):
            clap_state(str(tmp_path / "clap.pt"))
        assert not os.path.exists(mark)
    torch.save({"model_state_dict": {"x": torch.ones(9)}}, run / "checkpoint_0.pt")
    cut(run / "checkpoint_0.pt", 0.7)
    assert "not a readable checkpoint" in refused(str(run), monkeypatch, capsys, clip=f"{tiny_data}/0.wav")


def test_through_the_script(release, tmp_path, tiny_data):
    folder = str(shutil.copytree(release, tmp_path / "r"))
    out_of_the_folder(folder)
    for option in (f"--audio={tiny_data}/0.wav", f"--export={tmp_path}/e"):
        fails_with_one_line("sample.py", f"--init_from={folder}", option, saying="leads out of")
    assert sorted(os.listdir(tmp_path)) == ["elsewhere.safetensors", "r"]


INDEX = "model.safetensors.index.json"
LM_FILES = {
    "a list": (lambda f, n: json.dump([1], open(f"{f}/{INDEX}", "w")), "index.json: a list"),
    "no map": (lambda f, n: json.dump({}, open(f"{f}/{INDEX}", "w")), "no weight_map"),
    "numbers": (lambda f, n: write_index(f, {name: 1 for name in n}), "no weight_map"),
    "above": (lambda f, n: write_index(f, {name: "../model-1.safetensors" for name in n}), "leads out of"),
    "lies": (lambda f, n: write_index(f, dict.fromkeys([*n, "model.more"], "model-1.safetensors")),
             "model-1.safetensors: not in it, though .*index.json says so: model.more"),
    "cut": (lambda f, n: cut(f"{f}/model-1.safetensors", 0.5), "model-1.safetensors: not a readable"),
    "another": (lambda f, n: write_index(f, {x: "model-1.safetensors" for x in n if ".layers.2." not in x}),
                "its weights are 2 blocks of width 64, config.json says 3"),
    "less": (lambda f, n: write_index(f, {x: "model-1.safetensors" for x in n if "layers.2.mlp.up" not in x}),
             r"does not fit the model: missing: lm\.layers\.2\.mlp\.up_proj\.weight$"),
    "no rows": (lambda f, n: edit_lm(f, lambda s: torch.zeros(())), r"3 blocks of width \(\), .* 3 of 64"),
    "flat": (lambda f, n: edit_lm(f, lambda s: s.flatten()), r"3 blocks of width \(16896,\), .* 3 of 64"),
    "head": (lambda f, n: edit_lm(f, lambda s: s[0], "lm_head.weight"), r"lm_head.weight has shape \(64,\)"),
    "no index, copies that differ": (lambda f, n: two_files(f), "norm.weight should be copies, but differ")}


def edit_lm(folder, change, name="model.embed_tokens.weight"):
    """Change the token table, or write the head that it changes to: in the one file, whole."""
    state = load_file(f"{folder}/model-1.safetensors")
    state[name] = change(state["model.embed_tokens.weight"]).clone()
    save_file(state, f"{folder}/model.safetensors")


def write_index(folder, named):
    json.dump({"weight_map": named}, open(f"{folder}/{INDEX}", "w"))


def two_files(folder):
    os.remove(f"{folder}/{INDEX}")
    save_file({"model.norm.weight": torch.zeros(64)}, f"{folder}/model-2.safetensors")


@pytest.mark.parametrize("kind", LM_FILES)
def test_files_of_a_language_model(tiny_lm, tiny_settings, tmp_path, kind):
    change, saying = LM_FILES[kind]
    folder = str(shutil.copytree(tiny_lm, tmp_path / "lm"))
    os.rename(f"{folder}/model.safetensors", f"{folder}/model-1.safetensors")
    names = list(load_file(f"{folder}/model-1.safetensors"))
    write_index(folder, dict.fromkeys(names, "model-1.safetensors"))
    change(folder, names)
    c = SimpleNamespace(**(config.defaults() | tiny_settings | {"lang_encoder_path": folder}))
    with pytest.raises((ValueError, FileNotFoundError), match=saying) as told:
        checkpoint.new(c)
    assert re.search("lm", str(told.value)) and len(str(told.value)) < 700
