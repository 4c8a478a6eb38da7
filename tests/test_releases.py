"""Published releases and exports: every route gives the same numbers, an export replaces an older export and
nothing else, language models bring special tokens and heads of their own."""
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import load
from model import SPECIAL_TOKENS
from tests.full_size import snapshot
from tests.helpers import GOLDEN, ROOT, assert_same_weights, max_error, run, set_gates, settings
from tests.test_checkpoint import assert_same_logits, save_lm, settings_with_lm
from tools.checkpoint import language_models
from tools.checkpoint.releases import UNUSED
from tools.common import UserError

SHARD, LISTING = "safe_ckpt/weight_0.safetensors", "safe_ckpt/metadata.json"
# what the weights of the tiny model do not determine
TINY = dict(window_length=2.5, audio_transformer_n_head=4, clap_spec_size=128)


def hashes(folder):
    found = {}
    for path in Path(folder).rglob("*"):
        if path.is_file():
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def model(tiny_settings):
    torch.manual_seed(1)
    model = checkpoint.new_model(settings(tiny_settings))
    set_gates(model, 0.7, 0.3)
    return model


@pytest.fixture(scope="module")
def release(model, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("release") / "tiny")
    model.save_pretrained(folder)
    return folder


def shards_of(release):
    tensors = {}
    for shard in json.load(open(f"{release}/{LISTING}")):
        tensors |= load_file(f"{release}/safe_ckpt/{shard}.safetensors")
    return tensors


# ------------------------------------------------------------------------------------------------------------
# Golden, by every route


@pytest.fixture(scope="module")
def routes(golden, tmp_path_factory):
    """{route: (folder or file, overrides)}: the golden release; a training checkpoint of the published code's
    form ("module." before each name); a run; and an export of each."""
    folder = tmp_path_factory.mktemp("routes")
    sizes = dict(lang_encoder_path=f"{GOLDEN}/lm", max_num_window=3,
                 audio_transformer_n_head=golden[1]["audio_transformer"]["n_head"])
    state = shards_of(GOLDEN)
    # the language model that the golden release was trained with is not its lm/: take that one's weights
    shutil.copytree(f"{GOLDEN}/lm", folder / "lm")
    lm = {n.replace("lang_encoder.", "").replace("decoder_layer.", ""): t.clone() for n, t in state.items()
          if n.startswith("lang_encoder.") and "_sound." not in n and "lm_head" not in n}
    save_file(lm, folder / "lm/model.safetensors", {"format": "pt"})
    trained = {f"module.{n}": t for n, t in state.items()
               if "decoder_layer" not in n and not n.startswith("clap.")}
    torch.save({"epoch": 0, "model_state_dict": trained}, folder / "published.pt")
    clap = {n.replace("clap.nvclap.", "module.audio_branch."): t for n, t in state.items()
            if n.startswith("clap.nvclap.")}
    torch.save({"epoch": 16, "state_dict": clap}, folder / "clap.pt")
    parts = sizes | {"lang_encoder_path": f"{folder}/lm", "clap_checkpoint": f"{folder}/clap.pt"}
    found = {"release": (GOLDEN, sizes), "published checkpoint": (f"{folder}/published.pt", parts),
             "run": (f"{folder}/run", {})}
    first = load(GOLDEN, **sizes)
    own = {n: t for n, t in first.state_dict().items() if n.startswith(("xattn.", "audio_", "lm.embed"))}
    os.makedirs(folder / "run")
    config = vars(first.config) | parts
    torch.save({"model_state_dict": own, "config": config}, folder / "run/checkpoint_0.pt")
    for name, (path, overrides) in list(found.items()):
        export = f"{folder}/export of {name}"
        checkpoint.save_release(load(path, dtype=None, **overrides), export)
        found["export of " + name] = (export, {})
    return found


@pytest.mark.parametrize("route", [before + r for before in ("", "export of ")
                                   for r in ("release", "run", "published checkpoint")])
def test_golden_by_every_route(routes, golden, route):
    path, overrides = routes[route]
    arrays, _, windows, n = golden
    with torch.no_grad():
        logits, _ = load(path, **overrides)(arrays["input_ids"], windows, n)
    real = arrays["attention_mask"].bool()
    assert max_error(logits[real], arrays["logits"][real]) < 2e-4


def test_an_export_holds_the_published_names_and_bits(routes):
    exported = shards_of(routes["export of release"][0])
    published = {name: tensor for name, tensor in shards_of(GOLDEN).items() if not UNUSED.search(name)}
    assert published.keys() <= exported.keys()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in published.items())


def test_the_other_layout_of_releases(routes, tmp_path, capsys):
    """afclap for nvclap, "module." before all, the same tensors once more under the two other names."""
    folder = shutil.copytree(routes["export of release"][0], tmp_path / "r")
    state = load_file(folder / SHARD)
    copies = {}
    for name, tensor in state.items():
        copy = name.replace("model.layers", "old_decoder_blocks").replace("decoder_layer.", "")
        if "_sound." in name:
            copy = name.replace("model.layers", "gated_cross_attn_layers_sound")
            copy = copy.replace("gated_cross_attn_layer_sound.", "")
        if copy != name:
            copies[copy] = tensor.clone()
    state = {"module." + n.replace("nvclap", "afclap"): t for n, t in (state | copies).items()}
    save_file(state, folder / SHARD)
    json.dump({"weight_0": list(state)}, open(folder / LISTING, "w"))
    assert_same_weights(load(str(folder)), load(routes["export of release"][0]))
    capsys.readouterr()
    code = checkpoint.print_state_report([str(folder)], {})
    counts = {line[:12].strip(): int(line[12:18]) for line in capsys.readouterr().out.splitlines()[1:]}
    assert code == 0 and counts["duplicates"] == len(copies) > 60 and counts["unused"] == 1


# ------------------------------------------------------------------------------------------------------------
# Exports


@pytest.mark.slow
def test_export_import_export_gives_the_same_bytes(release, tmp_path):
    done = run("sample.py", f"--init_from={release}", f"--export={tmp_path}/a")
    assert f"wrote {tmp_path}/a" in done.stdout
    assert hashes(tmp_path / "a") == hashes(release)
    load(f"{tmp_path}/a").save_pretrained(f"{tmp_path}/a")  # in its own place
    assert hashes(tmp_path / "a") == hashes(release) and os.listdir(tmp_path) == ["a"]
    load(release, dtype=torch.bfloat16).save_pretrained(f"{tmp_path}/c")
    load(f"{tmp_path}/c", dtype=None).save_pretrained(f"{tmp_path}/d")  # every weight in its own dtype
    assert hashes(tmp_path / "c") == hashes(tmp_path / "d") != hashes(release)


@pytest.mark.parametrize("is_release", [True, False])
def test_an_export_into_a_folder_with_other_files_is_refused(model, release, tmp_path, is_release):
    if is_release:
        shutil.copytree(release, tmp_path / "r")
    os.makedirs(tmp_path / "r/lm", exist_ok=True)
    (tmp_path / "r/lm/model.safetensors").write_text("mine")
    before = hashes(tmp_path)
    with pytest.raises(UserError, match=str(tmp_path / "r")):
        model.save_pretrained(str(tmp_path / "r"))
    assert hashes(tmp_path) == before


@pytest.mark.slow
def test_an_export_that_is_killed_leaves_a_whole_release(release, tmp_path):
    """At random moments: what stands there is the old one or the new one."""
    folder = str(shutil.copytree(release, tmp_path / "r"))
    code = ("import sys, checkpoint\nmodel = checkpoint.load(sys.argv[1])\n"
            "model.lm.norm.weight.data += 1\nprint('ready', flush=True)\n"
            "while True:\n    model.save_pretrained(sys.argv[1])\n")
    old = load(folder).lm.norm.weight.detach()
    for wait in (0.02, 0.05, 0.11):
        process = subprocess.Popen([sys.executable, "-c", code, folder], cwd=ROOT, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = folder if os.path.isdir(folder) else str(tmp_path / ".r.old")  # between two renamings
        moved = load(found).lm.norm.weight.detach() - old
        assert torch.allclose(moved, moved.round(), atol=1e-5) and moved.round().unique().numel() == 1
        if found != folder:
            os.rename(found, folder)


def test_a_release_needs_nothing_of_the_machine_it_was_made_on(tiny_lm, tiny_settings, tmp_path):
    """A tokenizer in a folder of its own, which is gone."""
    shutil.copytree(tiny_lm, tmp_path / "tokenizer")
    shutil.copytree(tiny_lm, tmp_path / "lm")
    os.remove(tmp_path / "lm/tokenizer.json")
    c = settings_with_lm(tiny_settings, tmp_path / "lm", tokenizer_path=str(tmp_path / "tokenizer"),
                         attention_backend="triton", audio_transformer_n_layers=0)
    checkpoint.new_model(c).save_pretrained(str(tmp_path / "r"))
    shutil.rmtree(tmp_path / "tokenizer")
    shutil.rmtree(tmp_path / "lm")
    model = load(str(tmp_path / "r"))
    assert len(model.audio_transformer.layer_stack) == 0 and model.backend == "auto"
    for file in ("config.json", "README.md"):
        assert str(tmp_path) not in open(tmp_path / "r" / file).read()


@pytest.mark.slow
def test_the_card_tells_what_a_run_was_made_of(tiny_config, release, tmp_path):
    """Trained from a release without a config.json of ours, as NVIDIA's; export and import keep the card."""
    published = shutil.copytree(release, tmp_path / "published")
    os.remove(published / "config.json")
    run("train.py", tiny_config, f"--expdir={tmp_path}", "--run_name=tuned", "--max_steps=1",
        f"--pretrained_path={published}", f"--lang_encoder_path={published}/lm")
    json.dump({"tasks": {"toy-AQA/test": {"accuracy": 0.75}}}, open(tmp_path / "tuned/scores.json", "w"))
    load(f"{tmp_path}/tuned").save_pretrained(f"{tmp_path}/a")
    card = open(tmp_path / "a/README.md").read()
    for words in ("toy-AQA/train | 1.0", "learning_rate | 0.001", "steps | 1", "0.75",
                  "NVIDIA OneWay Noncommercial License"):
        assert words in card, card
    load(f"{tmp_path}/a").save_pretrained(f"{tmp_path}/b")
    assert open(tmp_path / "b/README.md").read() == card


# ------------------------------------------------------------------------------------------------------------
# Language models: determined by the width, with special tokens or a head of their own


def cache_snapshot(cache, repo, folder):
    """Put the files of a folder into a cache of the hub: blobs, and a snapshot of links to them."""
    target = snapshot(cache, repo)
    for name, digest in hashes(folder).items():
        link, blob = Path(target, name), Path(target, "../../blobs", digest)
        for path in (link, blob):
            path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(f"{folder}/{name}", blob)
        link.symlink_to(os.path.relpath(blob, link.parent))


def test_a_hub_id_is_all_that_a_release_needs(model, release, tiny_lm, tmp_path, monkeypatch):
    """As SoundCoT's stands in a cache: no config.json, its language model, by the width, under its own id."""
    published = shutil.copytree(release, tmp_path / "published")
    shutil.rmtree(published / "lm")
    os.remove(published / "config.json")
    cache_snapshot(tmp_path / "cache", "nvidia/audio-flamingo-2-SoundCoT", published)
    cache_snapshot(tmp_path / "cache", "Qwen/Qwen2.5-3B", tiny_lm)
    with pytest.raises(UserError, match="lang_encoder_path"):
        load(str(published), **TINY)  # 64 is the width of none
    assert language_models.LM_OF_WIDTH == {896: "Qwen/Qwen2.5-0.5B", 1536: "Qwen/Qwen2.5-1.5B",
                                           2048: "Qwen/Qwen2.5-3B"}
    monkeypatch.setitem(language_models.LM_OF_WIDTH, 64, "Qwen/Qwen2.5-3B")
    cached = TINY | {"cache_dir": str(tmp_path / "cache")}
    found = load("nvidia/audio-flamingo-2-SoundCoT/", **cached)  # as one types it after a folder
    assert_same_weights(found, model)
    assert found.config.max_num_window == 12
    found.save_pretrained(str(tmp_path / "again"))
    card = open(tmp_path / "again/README.md").read()
    assert "Qwen/Qwen2.5-3B: Qwen Research License" in card and "NVIDIA OneWay" in card
    assert_same_weights(load(str(tmp_path / "again")), model)
    with pytest.raises(FileNotFoundError, match="nvidia/audio-flamingo-3"):
        load("nvidia/audio-flamingo-3", **cached)


@pytest.mark.parametrize("tokens", [["<audio>", "x1", "x2"], ["x1", "<SEP>"], [*SPECIAL_TOKENS[::-1]],
                                    [*SPECIAL_TOKENS, "x1"]])
@pytest.mark.parametrize("special", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_pretrained_rows_are_never_touched(tiny_lm, tiny_settings, tmp_path, tokens, special):
    """A tokenizer with special tokens of ours among its own: their rows are used as they were learnt."""
    from transformers import AutoTokenizer
    hf = save_lm(tmp_path / "lm", tiny_lm, "Llama", vocab_size=300)
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    tokenizer.add_tokens(tokens, special_tokens=special)
    tokenizer.save_pretrained(tmp_path / "lm")
    model = checkpoint.new_model(settings_with_lm(tiny_settings, tmp_path / "lm"))
    known, table = 257 + len(tokens), hf.get_input_embeddings().weight
    with torch.no_grad():
        rows = model.lm.embed_tokens(torch.arange(len(model.tokenizer))[None])[0]
    assert torch.equal(rows[:known], table[:known]) and rows.isfinite().all()
    assert model.tokenizer.convert_tokens_to_ids(tokens) == list(range(257, known))
    model.save_pretrained(str(tmp_path / "r"))
    again = load(str(tmp_path / "r"))
    assert_same_weights(model, again)
    assert again.tokenizer.get_vocab() == model.tokenizer.get_vocab()


@pytest.mark.parametrize("change", [
    lambda c: c.pop("eos_token"), lambda c: c.update(sep_token="<|endofchunk|>"),
    lambda c: c.update(eos_token="<|PAD_TOKEN|>"), lambda c: c.update(added_tokens_decoder={"0": 3})])
def test_a_tokenizer_that_cannot_be_used_is_refused(tiny_lm, tiny_settings, tmp_path, change):
    folder = shutil.copytree(tiny_lm, tmp_path / "lm")
    content = json.load(open(folder / "tokenizer_config.json"))
    change(content)
    json.dump(content, open(folder / "tokenizer_config.json", "w"))
    with pytest.raises(UserError, match=str(folder)):
        checkpoint.new_model(settings_with_lm(tiny_settings, folder))


def test_a_head_of_its_own_is_kept(tiny_lm, tiny_settings, tmp_path, capsys):
    """config.json says tied, the weights hold another head: as in transformers it is used, with a note."""
    hf, c = save_lm(tmp_path / "lm", tiny_lm, "Llama"), settings_with_lm(tiny_settings, tmp_path / "lm")
    file, head = tmp_path / "lm/model.safetensors", torch.randn(300, 48)
    save_file(load_file(file) | {"lm_head.weight": head}, file, {"format": "pt"})
    model = checkpoint.new_model(c)
    assert "head" in capsys.readouterr().err
    hf.lm_head.weight = torch.nn.Parameter(head)
    assert_same_logits(c, hf)
    model.save_pretrained(str(tmp_path / "r"))
    assert_same_weights(load(str(tmp_path / "r")), model)


def test_weights_that_are_not_numbers_are_reported(release, tmp_path, capsys):
    """Answers would be the first token for ever."""
    folder, name = shutil.copytree(release, tmp_path / "r"), "layers.1.decoder_layer.mlp.up_proj.weight"
    state = load_file(folder / SHARD)
    state[f"lang_encoder.model.{name}"][3, 5] = float("nan")
    save_file(state, folder / SHARD)
    assert checkpoint.print_state_report([str(folder)], {}) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "lm.layers.1.mlp.up_proj.weight" in next(line for line in lines if line.startswith("not finite"))
    with pytest.raises(UserError, match="NaN"):
        load(str(folder)).generate(["What?"], torch.ones(1, 40000), torch.tensor([1]), max_new_tokens=2)
