"""Language models of every family, runs that moved, audio encoders."""
import json
import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import load
from model import ClapEncoder, log_mel, mel_bands
from tests.helpers import assert_same_weights, settings
from tools.checkpoint.clap import clap_state
from tools.checkpoint.files import load_pickle
from tools.common import UserError

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
FAMILIES = {"Qwen2": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},  # not read
            "Qwen3": {"head_dim": 24, "mlp_bias": True},
            "Mistral": {"sliding_window": None, "attention_bias": True},
            "Llama": {"rope_scaling": LLAMA3, "max_position_embeddings": 256,
                      "attention_bias": True, "mlp_bias": True}}


def save_lm(folder, tokenizer_from, family, dtype=torch.float32, **options):
    """Write a random language model of a family to a Hugging Face folder -> transformers' own."""
    import transformers
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
             "num_key_value_heads": 3, "vocab_size": 300, "tie_word_embeddings": True} | options
    torch.manual_seed(3)
    hf_config = getattr(transformers, f"{family}Config")(**sizes)
    hf = getattr(transformers, f"{family}ForCausalLM")(hf_config).to(dtype)
    for name, p in hf.named_parameters():  # norms and biases start at one and zero, which would hide them
        if p.ndim == 1:
            torch.nn.init.normal_(p, mean=float("norm" in name), std=0.3)
    hf.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(folder)
    return hf.eval()


def settings_with_lm(tiny_settings, folder, **options):
    return settings(tiny_settings, {"lang_encoder_path": str(folder)}, options)


def assert_same_logits(c, hf):
    """Ours of the settings c against transformers', 120 tokens: beyond Llama 3's original length."""
    lm, _ = checkpoint.load_language_model(c)
    ids = torch.randint(0, 257, (2, 120))
    with torch.no_grad():
        difference = lm.logits(lm(ids))[..., :257] - hf(ids).logits[..., :257]
    assert difference.abs().max() < 1e-4


# ------------------------------------------------------------------------------------------------------------
# Language models


@pytest.mark.parametrize("family", FAMILIES)
def test_families_give_the_logits_of_transformers(tiny_lm, tiny_settings, tmp_path, family):
    hf = save_lm(tmp_path, tiny_lm, family, **FAMILIES[family])
    assert_same_logits(settings_with_lm(tiny_settings, tmp_path), hf)


@pytest.mark.parametrize("change, name", [
    ({"model_type": "gemma"}, "model_type"), ({"hidden_act": "gelu"}, "hidden_act"),
    ({"model_type": "mistral", "sliding_window": 128}, "sliding_window"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_parameters": None}, "rope_type"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config")])
def test_other_language_models_are_refused_by_name(tiny_lm, tiny_settings, tmp_path, change, name):
    folder = shutil.copytree(tiny_lm, tmp_path / "lm")
    hf = json.load(open(folder / "config.json"))
    hf = {key: value for key, value in (hf | change).items() if value is not None}
    json.dump(hf, open(folder / "config.json", "w"))
    with pytest.raises(UserError, match=f"{folder}.*{name}"):
        checkpoint.new_model(settings_with_lm(tiny_settings, folder))


def test_only_the_models_own_weights_are_read(tiny_lm, tiny_settings, tmp_path):
    """Beside them lie other copies, an adapter, a shard that the index does not name."""
    hf, c = save_lm(tmp_path, tiny_lm, "Llama"), settings_with_lm(tiny_settings, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    wrong = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    os.makedirs(tmp_path / "original")
    for file in ("original/model.safetensors", "adapter_model.safetensors", "model-old.safetensors"):
        save_file(wrong, tmp_path / file)
    assert_same_logits(c, hf)
    os.remove(tmp_path / "model.safetensors")
    names, index = sorted(state), {}
    for file, part in {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}.items():
        save_file({name: state[name] for name in part}, tmp_path / file)
        index |= dict.fromkeys(part, file)
    index_file = tmp_path / "model.safetensors.index.json"
    json.dump({"weight_map": index}, open(index_file, "w"))
    assert_same_logits(c, hf)
    json.dump({"weight_map": index | {names[-1]: "model-1.safetensors"}}, open(index_file, "w"))
    with pytest.raises(UserError, match=f"model-1.safetensors.*{names[-1]}"):  # the wrong shard
        checkpoint.new_model(c)
    json.dump({"weight_map": index}, open(index_file, "w"))
    os.remove(tmp_path / "model-2.safetensors")
    with pytest.raises(FileNotFoundError, match="model-2.safetensors"):
        checkpoint.new_model(c)


# ------------------------------------------------------------------------------------------------------------
# Runs


def edit_run(source, folder, **changes):
    """Copy a run and change the settings in its checkpoint."""
    shutil.copytree(source, folder)
    saved = torch.load(folder / "checkpoint_0.pt", weights_only=True)  # not mapped: it is written to
    saved["config"] |= changes
    torch.save(saved, folder / "checkpoint_0.pt")
    return str(folder)


def test_a_renamed_run_loads_and_a_run_of_a_run(trained, tmp_path):
    model = load(f"{trained}/tiny")
    moved = str(shutil.copytree(f"{trained}/tiny", tmp_path / "renamed"))
    second = edit_run(moved, tmp_path / "second", pretrained_path=moved, pretrained_ckpt="checkpoint_0.pt",
                      data_root="mine/sounds")
    saved = load_pickle(f"{moved}/checkpoint_0.pt")["model_state_dict"]
    assert "xattn.0.attn.to_q.weight" in saved and "lm.norm.weight" not in saved  # trained tensors alone
    assert "clap.htsat.norm.weight" in saved  # frozen, but drawn at random
    for again in (load(moved), load(second), load(f"{second}/checkpoint_0.pt")):
        assert_same_weights(again, model)
    assert again.config.data_root == "mine/sounds"  # not that of the first run


def test_a_moved_run_finds_the_parts_inside_it(trained, tmp_path, tiny_lm):
    home = tmp_path / "home/first"
    edit_run(f"{trained}/tiny", home, expdir=str(tmp_path / "home"), run_name="first",
             lang_encoder_path=str(home / "lm"))
    shutil.copytree(tiny_lm, home / "lm")
    moved = shutil.move(home, tmp_path / "elsewhere")
    assert load(str(moved)).config.lang_encoder_path == str(moved / "lm")


def test_a_missing_or_changed_part_of_a_run_is_named(trained, tmp_path, tiny_lm):
    gone = edit_run(f"{trained}/tiny", tmp_path / "gone", pretrained_path="gone/first")
    with pytest.raises(FileNotFoundError, match="checkpoint_0.pt.*pretrained_path.*gone/first"):
        load(gone)
    load(gone, pretrained_path=f"{trained}/tiny")
    save_lm(tmp_path / "lm", tiny_lm, "Llama", hidden_size=64, intermediate_size=96, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=264)
    with pytest.raises(UserError, match="checkpoint_0.pt.*frozen"):
        load(f"{trained}/tiny", lang_encoder_path=str(tmp_path / "lm"))


def test_a_checkpoint_that_was_cut_is_passed_over(trained, tmp_path, capsys):
    folder = shutil.copytree(f"{trained}/tiny", tmp_path / "run")
    shutil.copy(folder / "checkpoint_0.pt", folder / "checkpoint_1.pt")
    os.truncate(folder / "checkpoint_1.pt", os.path.getsize(folder / "checkpoint_1.pt") // 2)
    load(str(folder))
    assert "checkpoint_1.pt" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# Audio encoders


def settings_with_clap(tiny_settings, file):
    """Settings that leave the encoder's sizes to its file."""
    others = {name: value for name, value in tiny_settings.items() if not name.startswith("clap_")}
    return settings(others, {"clap_checkpoint": str(file)})


@pytest.mark.parametrize("spec_size, depths, position", [
    (256, [2, 1, 1, 1], False), (128, [1, 1, 1, 1], True), (128, [0, 2, 1, 1], False)])
def test_sizes_of_the_encoder_come_from_its_weights(tiny_settings, tmp_path, spec_size, depths, position):
    encoder = ClapEncoder(16, depths, [1, 2, 2, 4], spec_size, position)
    state = {f"module.audio_branch.{n}": t for n, t in encoder.htsat.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "clap.pt")
    c = settings_with_clap(tiny_settings, tmp_path / "clap.pt")
    if depths[0] == 0:  # no mask or embedding determines it
        c.clap_spec_size = spec_size
    model = checkpoint.new_model(c)
    assert_same_weights(model.clap.htsat, encoder.htsat)
    assert model.clap.max_frames == encoder.max_frames and model.config.clap_depths == depths


@pytest.mark.slow
@pytest.mark.parametrize("fusion, protocol", [(False, 2), (True, 4)])
def test_laions_own_clap(tiny_settings, tmp_path, monkeypatch, fusion, protocol):
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
    mel = mel_bands(torch.device("cpu"), 48000, 14000)
    own = mel * torch.linspace(1, 3, 64)  # in the file: used without a fusion branch, never with one
    state = {f"module.audio_branch.{n}": t for n, t in theirs.state_dict().items()}
    state |= {"module.audio_branch.logmel_extractor.melW": own,
              "module.text_branch.embeddings.position_ids": torch.arange(514)[None],
              "module.text_branch.embeddings.word_embeddings.weight": torch.ones(2, 2)}
    file = tmp_path / "630k-audioset-best.pt"
    saved = {"epoch": 9, "state_dict": state, "optimizer": {"lr": np.float64(1e-4), "steps": np.arange(3)}}
    torch.save(saved, file, pickle_protocol=protocol)

    c = settings_with_clap(tiny_settings, file)
    model = checkpoint.new_model(c)
    assert model.audio_config["sample_rate"] == model.clap.sample_rate == 48000
    windows = 0.1 * torch.randn(2, 120000)
    log_mels = log_mel(windows, 48000, mel if fusion else own)[:, None]
    theirs.spectrogram_extractor, theirs.logmel_extractor = torch.nn.Identity(), torch.nn.Identity()
    inputs = {"waveform": log_mels, "mel_fusion": log_mels, "longer": torch.zeros(2, 1, dtype=torch.bool)}
    with torch.no_grad():
        embedding, tokens = theirs(inputs, device="cpu")["embedding"], model.clap(windows)
    torch.testing.assert_close(tokens.mean(1), embedding, atol=1e-4, rtol=1e-4)

    # a release of it, and that release's CLAP file alone
    release, exported = str(tmp_path / "release"), f"{tmp_path}/release/clap_ckpt/epoch_16.pt"
    model.save_pretrained(release)
    c.clap_checkpoint = exported
    assert "module.text_branch.embeddings.position_ids" in load_pickle(exported)["state_dict"]
    for other in (load(release), checkpoint.new_model(c)):
        assert other.audio_config == model.audio_config
        assert_same_weights(other.clap, model.clap)


def test_mel_bands_that_determine_no_rate_are_refused(tmp_path):
    audio = {"module.audio_branch.norm.weight": torch.ones(8)}
    file = str(tmp_path / "clap.pt")
    for rate, top in ((None, None), (16000, 8000), (32000, 14000)):
        mel = {}
        if rate:
            mel["module.audio_branch.logmel_extractor.melW"] = mel_bands(torch.device("cpu"), rate, top)
        torch.save({"state_dict": audio | mel}, file)
        if rate == 16000:
            assert set(clap_state(file)) == {"clap.htsat.norm.weight", "clap.mel"}
        else:
            with pytest.raises(UserError, match="mel"):
                clap_state(file)
