"""Between disk and tensors: language models of every family, moved and old runs, memory, clear refusals."""
import json
import math
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import config
from checkpoint import load
from data import load_audio
from model import AudioFlamingo, to_float
from prepare.check import audio_config_of
from tests.helpers import ROOT, fails_with_one_line, run
from tools.checkpoint.clap import clap_state
from tools.checkpoint.files import load_pickle
from tools.checkpoint.releases import PUBLISHED, TABLES, rename

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
FAMILIES = {"Qwen2": {"tie_word_embeddings": False},
            "Qwen3": {"head_dim": 24},
            "Mistral": {"sliding_window": None},
            "Llama": {"rope_scaling": LLAMA3, "max_position_embeddings": 256,
                      "attention_bias": True, "mlp_bias": True}}


def save_lm(folder, tokenizer_from, family, dtype=torch.float32, **options):
    """A random language model of a family in a Hugging Face folder; -> transformers' own."""
    import transformers
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
             "num_key_value_heads": 3, "vocab_size": 300, "tie_word_embeddings": True} | options
    c = getattr(transformers, f"{family}Config")(**sizes)
    torch.manual_seed(3)
    hf = getattr(transformers, f"{family}ForCausalLM")(c).to(dtype)
    for name, p in hf.named_parameters():  # norms and biases start at one and zero, which would hide them
        if p.ndim == 1:
            torch.nn.init.normal_(p, mean=float("norm" in name), std=0.3)
    hf.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(folder)
    return hf.eval()


def settings(tiny_settings, folder, **options):
    changed = tiny_settings | {"lang_encoder_path": str(folder)} | options
    return SimpleNamespace(**(config.defaults() | changed))


@pytest.mark.parametrize("family", FAMILIES)
def test_families_give_the_logits_of_transformers(tiny_lm, tiny_settings, tmp_path, family):
    hf = save_lm(tmp_path, tiny_lm, family, **FAMILIES[family])
    lm, _ = checkpoint.load_language_model(settings(tiny_settings, tmp_path))
    ids = torch.randint(0, 257, (2, 120))  # beyond Llama 3's original length
    with torch.no_grad():
        assert (lm.logits(lm(ids))[..., :257] - hf(ids).logits[..., :257]).abs().max() < 1e-4


@pytest.mark.parametrize("change, saying", [
    ({"model_type": "gemma"}, "model_type 'gemma'"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"model_type": "mistral", "sliding_window": 128}, "sliding window 128"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_parameters": None},
     "rotary scaling 'yarn'")])
def test_other_language_models_are_refused_in_one_line(tiny_lm, tiny_settings, tmp_path, change, saying):
    shutil.copytree(tiny_lm, tmp_path / "lm")
    hf = json.load(open(tmp_path / "lm/config.json"))
    hf = {name: value for name, value in (hf | change).items() if value is not None}
    json.dump(hf, open(tmp_path / "lm/config.json", "w"))
    with pytest.raises(ValueError, match=re.escape(saying) + " is not supported"):
        checkpoint.new(settings(tiny_settings, tmp_path / "lm"))


def test_only_the_models_own_weights_are_read(tiny_lm, tiny_settings, tmp_path):
    """Beside them lie other copies, an adapter, a shard that the index does not name."""
    folder = tmp_path / "lm"
    hf = save_lm(folder, tiny_lm, "Llama")
    state = load_file(folder / "model.safetensors")
    wrong = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    os.makedirs(folder / "original")
    for file in ("consolidated.safetensors", "original/model.safetensors", "adapter_model.safetensors"):
        save_file(wrong, folder / file)
    ids, norm = torch.randint(0, 257, (1, 9)), "norm.weight"

    def same():
        lm, _ = checkpoint.load_language_model(settings(tiny_settings, folder))
        return torch.equal(lm.state_dict()[norm], state["model.norm.weight"]) and \
            (lm.logits(lm(ids))[..., :257] - hf(ids).logits[..., :257]).abs().max() < 1e-4

    assert same()
    save_file(state | wrong, folder / "model-old.safetensors")
    assert same()  # model.safetensors is the whole
    os.remove(folder / "model.safetensors")
    names = sorted(state)
    shards = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for file, mine in shards.items():
        save_file({n: state[n] for n in mine}, folder / file)
    save_file({names[0]: wrong[names[0]]}, folder / "model-3.safetensors")
    index = {"weight_map": {n: file for file, mine in shards.items() for n in mine}}
    json.dump(index, open(folder / "model.safetensors.index.json", "w"))
    assert same()  # what the index names
    os.remove(folder / "model-2.safetensors")
    message = "model-2.safetensors: no such file, but .*index.json names it"
    with pytest.raises(FileNotFoundError, match=message):
        same()


@pytest.mark.parametrize("dtype, stored", [
    (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float8_e4m3fn)])
def test_a_model_that_is_built_runs(tiny_lm, tiny_settings, tmp_path, dtype, stored):
    """A bfloat16 or float8 language model, and everything else in the dtype that was asked for."""
    save_lm(tmp_path, tiny_lm, "Llama", torch.bfloat16)
    state = load_file(tmp_path / "model.safetensors")
    save_file({n: t.to(stored) for n, t in state.items()}, tmp_path / "model.safetensors")
    model = checkpoint.new(settings(tiny_settings, tmp_path), dtype=dtype)
    floats = {t.dtype for n, t in model.state_dict().items() if t.is_floating_point() and ".bn0." not in n
              and "fusion_model" not in n}
    assert floats == {dtype}
    logits, _ = model(torch.tensor([[5, 6, 7]]), torch.zeros(1, 40000, dtype=torch.int16), torch.tensor([1]))
    assert logits.dtype == dtype and torch.isfinite(logits).all()


@pytest.fixture(scope="module")
def runs(tiny_config, tmp_path_factory):
    """Two runs, the second started from the first: folder of both."""
    folder = tmp_path_factory.mktemp("exp")
    run("train.py", tiny_config, f"--expdir={folder}", "--run_name=first", "--num_epochs=1")
    run("train.py", tiny_config, f"--expdir={folder}", "--run_name=second", "--num_epochs=1",
        f"--pretrained_path={folder}/first")
    return folder


def test_run_checkpoints_hold_our_names(runs):
    names = set(load_pickle(f"{runs}/first/checkpoint_0.pt")["model_state_dict"])
    model = load(f"{runs}/first")
    assert names < set(model.state_dict()) and "xattn.0.attn.to_q.weight" in names


def test_runs_of_older_versions_load(runs, tmp_path):
    """They hold published names, whole token tables, and the names of what they keep."""
    saved = load_pickle(f"{runs}/first/checkpoint_0.pt")
    state, kept = dict(saved["model_state_dict"]), sorted(saved["model_state_dict"])
    state[TABLES[0]] = torch.cat([state[TABLES[0]], state.pop(TABLES[0].replace("weight", "added"))])
    saved |= {"model_state_dict": {rename(n, PUBLISHED): t for n, t in state.items()}, "kept": kept}
    os.makedirs(tmp_path / "old")
    torch.save(saved, tmp_path / "old/checkpoint_0.pt")
    old, new = load(str(tmp_path / "old")), load(f"{runs}/first")
    assert all(torch.equal(old.state_dict()[n], t) for n, t in new.state_dict().items())


def test_a_moved_run_finds_its_own_parts(runs, tmp_path, tiny_settings):
    """A run that holds its language model; copied elsewhere, and the first place gone."""
    home = tmp_path / "home/first"
    shutil.copytree(f"{runs}/first", home)
    shutil.copytree(tiny_settings["lang_encoder_path"], home / "lm")
    saved = torch.load(home / "checkpoint_0.pt", weights_only=True)
    saved["config"] |= {"expdir": str(tmp_path / "home"), "run_name": "first"}
    saved["config"]["lang_encoder_path"] = str(home / "lm")
    torch.save(saved, home / "checkpoint_0.pt")
    shutil.move(home, tmp_path / "elsewhere")
    model = load(str(tmp_path / "elsewhere"))
    assert model.config.lang_encoder_path == str(tmp_path / "elsewhere/lm")
    shutil.rmtree(tmp_path / "elsewhere/lm")
    with pytest.raises(FileNotFoundError, match="checkpoint_0.pt: a part of this run.*lang_encoder_path = "):
        load(str(tmp_path / "elsewhere"))
    again = load(str(tmp_path / "elsewhere"), lang_encoder_path=tiny_settings["lang_encoder_path"])
    assert torch.equal(again.lm.norm.weight, model.lm.norm.weight)


def test_a_run_with_a_release_of_it_in_its_folder(runs, tmp_path, capsys):
    """The newer of the two is read, with a note when a release is passed over; pretrained_ckpt names one."""
    home = tmp_path / "first"
    shutil.copytree(f"{runs}/first", home)
    model = load(str(home))
    model.lm.norm.weight.data += 1
    model.save_pretrained(str(home))
    assert torch.equal(load(str(home)).lm.norm.weight, model.lm.norm.weight)
    capsys.readouterr()
    os.utime(home / "checkpoint_0.pt", (2e9, 2e9))  # trained on
    assert torch.equal(load(str(home)).lm.norm.weight, model.lm.norm.weight - 1)
    assert "holds a release and a newer checkpoint_0.pt: that is read" in capsys.readouterr().err
    os.utime(home / "checkpoint_0.pt", (0, 0))
    c = settings({}, "", pretrained_path=str(home), pretrained_ckpt="checkpoint_0.pt")
    for name, moved in (("checkpoint_0.pt", 1), ("checkpoint_199.pt", 0), (None, 0)):  # as a config may say
        c.pretrained_ckpt = name
        read, state = checkpoint.open_pretrained(c, {})
        assert torch.equal(state["lm.norm.weight"], model.lm.norm.weight - moved)


def test_a_missing_part_is_named_by_its_setting(runs, tmp_path, tiny_data):
    shutil.copytree(f"{runs}/second", tmp_path / "second")
    saved = torch.load(tmp_path / "second/checkpoint_0.pt", weights_only=True)
    saved["config"]["pretrained_path"] = "gone/first"
    torch.save(saved, tmp_path / "second/checkpoint_0.pt")
    options = (f"--init_from={tmp_path}/second", "--audio", f"{tiny_data}/0.wav", "--max_new_tokens=2")
    fails_with_one_line("sample.py", *options, saying=["pretrained_path = 'gone/first'"])
    run("sample.py", *options, f"--pretrained_path={runs}/first")


def test_relative_paths_mean_the_projects_folder(runs, tmp_path, tiny_data):
    """From another folder, which holds the clip and, misleadingly, a folder of the run's name."""
    place = os.path.join(ROOT, "out", f"test-{os.getpid()}")
    try:
        shutil.copytree(f"{runs}/first", place)
        shutil.copy(f"{tiny_data}/0.wav", tmp_path / "clip.wav")
        relative = os.path.relpath(place, ROOT)
        os.makedirs(tmp_path / relative)
        options = [f"--init_from={relative}", "--audio", "clip.wav", "--max_new_tokens=2", "--input="]
        done = subprocess.run([sys.executable, f"{ROOT}/sample.py", *options],
                              cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "/" + relative not in done.stdout
    finally:
        shutil.rmtree(place, ignore_errors=True)


def test_a_folder_that_is_there_is_never_looked_up_on_the_hub(tiny_lm, tiny_settings, monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    relative = os.path.relpath(tiny_lm, ROOT)
    for path in (tiny_lm, relative):
        checkpoint.load_language_model(settings(tiny_settings, path))


def test_sizes_of_the_encoder_come_from_its_weights(tiny_settings, tmp_path):
    model = checkpoint.new(settings(tiny_settings, tiny_settings["lang_encoder_path"]))
    state = {f"module.audio_branch.{n}": t for n, t in model.clap.htsat.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "clap.pt")
    sizes = ("clap_embed_dim", "clap_depths", "clap_num_heads")
    fewer = {name: value for name, value in tiny_settings.items() if name not in sizes}
    c = settings(fewer, tiny_settings["lang_encoder_path"], clap_checkpoint=str(tmp_path / "clap.pt"))
    again = checkpoint.new(c)
    assert all(getattr(again.config, name) == tiny_settings[name] for name in sizes)
    assert torch.equal(again.clap.htsat.norm.weight, model.clap.htsat.norm.weight)
    with pytest.raises(ValueError, match=r"clap_embed_dim = 96, but the encoder of .*clap.pt has 16"):
        checkpoint.init_from_parts(c, {"clap_embed_dim": 96})


@pytest.mark.parametrize("spec_size, depths, position", [
    (256, [2, 1, 1, 1], False), (128, [1, 1, 1, 1], True), (128, [0, 2, 1, 1], False)])
def test_what_htsat_weights_tell(spec_size, depths, position):
    from model import ClapEncoder
    from tools.checkpoint.htsat import infer_htsat_config
    told = infer_htsat_config(ClapEncoder(8, depths, [1, 2, 2, 4], spec_size, position).htsat.state_dict())
    assert told["clap_embed_dim"] == 8 and told["clap_depths"] == depths
    assert told["clap_num_heads"][1:] == [2, 2, 4] and told.get("clap_spec_size", spec_size) == spec_size
    assert told.get("position", False) == position


def test_a_release_names_what_is_read(tiny_settings, tmp_path):
    """An older export of more shards lies in the folder."""
    model = checkpoint.new(settings(tiny_settings, tiny_settings["lang_encoder_path"]))
    model.save_pretrained(str(tmp_path))
    state = load_file(tmp_path / "safe_ckpt/weight_0.safetensors")
    save_file({n: torch.zeros_like(t) for n, t in state.items()}, tmp_path / "safe_ckpt/weight_1.safetensors")
    again = AudioFlamingo.from_pretrained(str(tmp_path))
    assert all(torch.equal(again.state_dict()[n], t) for n, t in model.state_dict().items())


def test_memory_before_the_first_step(tiny_lm, tiny_config, tmp_path):
    """A billion language-model weights take train.py their final dtypes' bytes, and at most 1 GB beside."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    c = LlamaConfig(hidden_size=2048, intermediate_size=6144, num_hidden_layers=19, num_attention_heads=16,
                    num_key_value_heads=8, vocab_size=264, tie_word_embeddings=True)
    c.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_lm).save_pretrained(tmp_path)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in LlamaForCausalLM(c).named_parameters()}
    row = (0.02 * torch.randn(6144)).to(torch.bfloat16)
    repeated = lambda shape: row[:shape[-1]].expand(shape).clone(memory_format=torch.contiguous_format)
    for i in range(4):  # shards
        names = list(shapes)[i::4]
        save_file({n: repeated(shapes[n]) for n in names}, tmp_path / f"model-{i}.safetensors")
    code = ("import resource, sys, config, train, data\n"
            "def stop(*_, **__):\n"
            "    print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024); sys.exit()\n"
            "train.train_loader = stop\n"
            "train.main(config.load(sys.argv[1:], 'train.py'))\n")
    done = run("-c", code, tiny_config, f"--expdir={tmp_path}", f"--lang_encoder_path={tmp_path}",
               "--cross_attn_every_n_layers=19", "--freeze_lm_embeddings=True")
    peak = int(re.search(r"peak (\d+)", done.stdout)[1])
    count = sum(s.numel() for s in shapes.values())
    assert count > 0.95e9
    weights = count * (2 if "bfloat16" in done.stdout else 4) + 4 * 50e6  # and the gated block's, in float32
    print(f"peak {peak / 1e9:.2f} GB, weights {weights / 1e9:.2f} GB")
    assert peak < weights + 1e9


def naive_log_mel(x, hop, mel):
    """x (n, L) float64 -> (n, frames, 64): the Fourier transform spelled out."""
    frames = torch.nn.functional.pad(x[:, None], (512, 512), mode="reflect")[:, 0].unfold(1, 1024, hop)
    hann = 0.5 - 0.5 * torch.cos(2 * math.pi * torch.arange(1024, dtype=torch.float64) / 1024)
    turns = torch.outer(torch.arange(1024), torch.arange(513)).double() * (-2 * math.pi / 1024)
    spectrum = (frames * hann + 0j) @ torch.polar(torch.ones_like(turns), turns)
    return 10 * torch.log10((spectrum.abs() ** 2 @ mel).clamp(min=1e-10))


def triangles(rate, top):
    """64 HTK mel bands (arXiv 2211.06687's torchaudio settings), bin by bin."""
    edges = [700 * (10 ** (m / 2595) - 1) for m in
             np.linspace(*(2595 * math.log10(1 + f / 700) for f in (50, top)), 66)]
    mel = torch.zeros(513, 64, dtype=torch.float64)
    for i, hz in enumerate(np.linspace(0, rate / 2, 513)):
        for b, (low, mid, high) in enumerate(zip(edges, edges[1:], edges[2:])):
            mel[i, b] = max(0, min((hz - low) / (mid - low), (high - hz) / (high - mid)))
    return mel


@pytest.mark.parametrize("fusion, protocol", [(False, 2), (True, 4)])
def test_laions_own_clap(tiny_settings, tiny_config, tmp_path, monkeypatch, fusion, protocol):
    """48 kHz; tiny and base have no fusion branch and mel bands of their own. A checkpoint as LAION's code
    writes it, numpy's numbers beside the weights, gives the embedding of laion-clap's own forward."""
    from tools.checkpoint.htsat import load_htsat_class
    front_end = SimpleNamespace(sample_rate=48000, window_size=1024, hop_size=480, mel_bins=64, fmin=50,
                                fmax=14000)
    torch.manual_seed(0)
    theirs = load_htsat_class()(
        spec_size=128, embed_dim=16, depths=[2, 1, 1, 1], num_heads=[1, 2, 2, 4], window_size=8,
        config=front_end, enable_fusion=fusion, fusion_type="aff_2d" if fusion else "None").eval()
    theirs.bn0.running_mean.uniform_(-40, 0)
    monkeypatch.setattr(sys.modules[type(theirs).__module__], "interpolate", lambda x, _: x)
    mel = triangles(48000, 14000)
    own = mel * torch.linspace(1, 3, 64)  # in the file: read without a fusion branch, never with one
    state = {f"module.audio_branch.{n}": t for n, t in theirs.state_dict().items()}
    state |= {"module.audio_branch.logmel_extractor.melW": own.float(),
              "module.text_branch.embeddings.position_ids": torch.arange(514)[None],
              "module.text_branch.embeddings.word_embeddings.weight": torch.ones(2, 2)}
    file = tmp_path / "630k-audioset-best.pt"
    saved = {"epoch": 9, "state_dict": state, "optimizer": {"lr": np.float64(1e-4), "steps": np.arange(3)}}
    torch.save(saved, file, pickle_protocol=protocol)

    fewer = {name: value for name, value in tiny_settings.items() if not name.startswith("clap_")}
    c = settings(fewer, tiny_settings["lang_encoder_path"], clap_checkpoint=str(file), given={})
    assert audio_config_of(c)["sample_rate"] == 48000  # of data.py check and convert
    model = checkpoint.new(c)
    assert model.audio_config["sample_rate"] == model.clap.sample_rate == 48000
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "x.wav", 0.1 * rng.standard_normal((3 * 48000, 1)), 48000)
    windows = torch.from_numpy(load_audio(str(tmp_path / "x.wav"), **model.audio_config))
    assert windows.shape == (2, 120000)
    log_mels = naive_log_mel(windows.double() / 32767, 480, mel if fusion else own).float()[:, None]
    theirs.spectrogram_extractor, theirs.logmel_extractor = torch.nn.Identity(), torch.nn.Identity()
    heard = {"waveform": log_mels, "mel_fusion": log_mels, "longer": torch.zeros(2, 1, dtype=torch.bool)}
    with torch.no_grad():
        embedding, tokens = theirs(heard, device="cpu")["embedding"], model.clap(to_float(windows))
    torch.testing.assert_close(tokens.mean(1), embedding, atol=1e-4, rtol=1e-4)

    # a release of it, its CLAP alone, and a run that trains it hear the same
    release, exported = str(tmp_path / "release"), f"{tmp_path}/release/clap_ckpt/epoch_16.pt"
    model.save_pretrained(release)
    others = [load(release, dtype=torch.bfloat16),
              checkpoint.new(settings(fewer, tiny_settings["lang_encoder_path"], clap_checkpoint=exported))]
    assert others[0].clap.mel.dtype == torch.float32
    if not fusion:
        run("train.py", tiny_config, f"--expdir={tmp_path}", "--run_name=run", f"--clap_checkpoint={file}",
            "--clap_depths=[2,1,1,1]", "--clap_finetune=True", "--clap_learning_rate=0", "--max_steps=1",
            "--valid_dataset_config={}")
        others.append(load(str(tmp_path / "run")))
    before = {n: t.bfloat16() for n, t in model.clap.state_dict().items() if "bn" not in n}
    for other in others:
        assert other.audio_config == model.audio_config and torch.equal(other.clap.mel, model.clap.mel)
        state = other.clap.state_dict()
        assert all(torch.equal(state[n].bfloat16(), t) for n, t in before.items())


def test_mel_bands_that_tell_no_rate(tmp_path):
    """AF-CLAP's pass and say nothing; a set of bands that ends elsewhere, or none, is refused in one line."""
    audio = {"module.audio_branch.norm.weight": torch.ones(8)}
    fused = {"module.audio_branch.patch_embed.fusion_model.bias": torch.ones(8)}
    bands = lambda rate, top: {"module.audio_branch.logmel_extractor.melW": triangles(rate, top).float()}
    for more in ({}, bands(16000, 8000)):
        torch.save({"state_dict": audio | fused | more}, tmp_path / "ours.pt")
        assert len(clap_state(str(tmp_path / "ours.pt"))) == 2
    for more, saying in ((bands(32000, 14000), "whose last bin is 447"), ({}, "there is no module.audio")):
        torch.save({"state_dict": audio | more}, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=f"other.pt: .*{saying}"):
            clap_state(str(tmp_path / "other.pt"))
