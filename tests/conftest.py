import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not os.path.exists("/dev/nvidia0"):
    # no GPU: the kernels run in Triton's interpreter; to be set before `import model`
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of tensors as small as these, threads wait for each other

import importlib.util
import json

import numpy as np
import pytest

from tests.helpers import GOLDEN, save_byte_tokenizer, train, write_manifest


LONGEST = ["test_full_size.py", "test_kernel.py", "test_readme.py", "test_train.py"]


def pytest_collection_modifyitems(items):
    """Of two processes the one that starts a long file last would end long after the other."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def interpreter_that_works(monkeypatch):
    """Whatever launches a kernel is skipped where Triton's interpreter cannot run one."""
    if os.environ.get("TRITON_INTERPRET") != "1" or not importlib.util.find_spec("triton"):
        return
    import triton
    version = [int(part) for part in triton.__version__.split(".")[:2]]
    if version < [3, 7] and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        import model
        kernels = sys.modules[model.attend.__module__]
        reason = f"Triton {triton.__version__}'s interpreter fails on numpy {np.__version__}, works below 2.4"
        monkeypatch.setattr(kernels, "launch", lambda *_, **__: pytest.skip(reason))


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory):
    """A Hugging Face folder: a random 3-block Llama, with a byte-level tokenizer of its own."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    folder = str(tmp_path_factory.mktemp("lm"))
    save_byte_tokenizer(folder)
    c = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                    num_key_value_heads=2, vocab_size=264, tie_word_embeddings=True,
                    max_position_embeddings=512, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    LlamaForCausalLM(c).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tiny_lm):
    from transformers import AutoTokenizer

    from data import extend_tokenizer
    return extend_tokenizer(AutoTokenizer.from_pretrained(tiny_lm))


@pytest.fixture(scope="session")
def tiny_settings(tiny_lm):
    return dict(lang_encoder_path=tiny_lm, window_length=2.5, max_num_window=2,
                clap_spec_size=128, clap_embed_dim=16, clap_depths=[1, 1, 1, 1], clap_num_heads=[1, 2, 2, 4],
                audio_transformer_n_head=4, audio_transformer_n_layers=1, audio_transformer_d_inner=32)


@pytest.fixture(scope="session")
def golden():
    """Published numbers of a tiny random model: arrays, facts, windows and n_windows of the two clips."""
    import torch
    from safetensors.torch import load_file

    from data import load_audio
    found = os.path.isdir(GOLDEN)
    assert found or not os.environ.get("CI"), "in CI the golden numbers must be there"
    if not found:
        pytest.skip("golden files not found; set SHARED=<the shared folder>")
    with open(f"{GOLDEN}/golden.json") as f:
        facts = json.load(f)
    audio_config = dict(window_length=10.0, window_overlap=0.0, max_num_window=3)
    clips = [load_audio(f"{GOLDEN}/clip_{i}.wav", **audio_config) for i in range(2)]
    windows = torch.from_numpy(np.concatenate(clips))
    n_windows = torch.tensor([len(clip) for clip in clips])
    return load_file(f"{GOLDEN}/golden.safetensors"), facts, windows, n_windows


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A folder of eight short clips and toy-AQA/{train,val,test}: data_root and dataset_file_root in one."""
    import soundfile
    folder = str(tmp_path_factory.mktemp("data"))
    rng, items = np.random.default_rng(0), []
    for i in range(8):
        seconds = 1.5 + 0.4 * i
        t = np.arange(int(seconds * 16000)) / 16000
        sound = np.sin(2 * np.pi * 200 * (1 + i) * t) if i % 2 else rng.standard_normal(len(t)) * 0.1
        soundfile.write(f"{folder}/{i}.wav", sound * 0.5, 16000)
        items.append((f"{i}.wav", "Tone or noise?", ["noise", "tone"][i % 2], seconds))
    for split in ("train", "val", "test"):
        write_manifest(folder, f"toy-AQA/{split}", items)
    return folder


@pytest.fixture(scope="session")
def tiny_config(tiny_settings, tiny_data, tmp_path_factory):
    """A config file for the scripts: tiny sizes on the tiny data."""
    path = str(tmp_path_factory.mktemp("config") / "tiny.py")
    names = tiny_settings | dict(
        dataset_file_root=tiny_data, data_root=tiny_data, num_workers=0, batch_size=2, warmup_steps=2,
        dataset_blending_global_weight=0.5, num_epochs=2, logging_steps=1, learning_rate=1e-3,
        dataset_blending_config={"toy-AQA/train": 1.0}, valid_dataset_config={"toy-AQA/val": 1.0})
    with open(path, "w") as f:
        f.writelines(f"{name} = {value!r}\n" for name, value in names.items())
    return path


@pytest.fixture(scope="session")
def trained(tiny_config, tmp_path_factory):
    """A folder with tiny/, the run of a tiny model after one epoch; read it, do not write to it."""
    out = tmp_path_factory.mktemp("exp")
    train(tiny_config, out / "tiny", "--num_epochs=1")
    return out
