"""A release of the 0.5B model's true names, shapes and dtypes: it loads, answers, trains, is exported."""
import json
import shutil

import numpy as np
import pytest
import soundfile
import torch

from tests.helpers import run, write_manifest
from tools.checkpoint.devices import pick_precision
from tools.checkpoint.files import load_pickle

pytestmark = pytest.mark.slow
REPO = "nvidia/audio-flamingo-2-0.5B"
LOAD_AND_ANSWER = """
import sys, time, torch
import checkpoint, transformers
from data import load_audio
from transformers import AutoConfig, AutoTokenizer
from tools.train.log import peak_memory
peak = lambda: peak_memory() * 2 ** 30
cache, source, clip = sys.argv[1:]
before, start = peak(), time.time()
model = checkpoint.load(source, dtype=torch.bfloat16, cache_dir=cache)
seconds, most = time.time() - start, peak()
weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
windows = torch.from_numpy(load_audio(clip, **model.audio_config))
model.generate(["What happens in this clip?"], windows[:2], torch.tensor([2]), max_new_tokens=2)
print(most - before, weights, seconds, len(windows))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A hub's cache with the release, a clip of two minutes and its manifest; removed afterwards: 7 GB."""
    folder = tmp_path_factory.mktemp("full")
    if shutil.disk_usage(folder).free < 20e9:
        pytest.skip(f"{folder} has less than the 20 GB free that a release, a run and an export take")
    assert run("tests/full_size.py", "0.5B", folder).stdout.strip() == REPO
    sound = np.random.default_rng(0).standard_normal(125 * 16000) * 0.1
    soundfile.write(f"{folder}/clip.wav", sound, 16000)
    write_manifest(str(folder), "noise-AQA/train", [("clip.wav", "What is it?", "noise", 125.0)] * 2)
    yield str(folder)
    shutil.rmtree(folder)


def test_loads_and_answers(cache):
    """By its hub id alone: the width determines the language model. Two minutes, as published."""
    done = run("-c", LOAD_AND_ANSWER, cache, REPO, f"{cache}/clip.wav")
    peak, weights, seconds, windows = map(float, done.stdout.split())
    print(f"weights {weights / 1e9:.2f} GB, {peak / 1e9:.2f} GB above the interpreter, {seconds:.1f} s")
    assert 2.1e9 < weights < 2.2e9 and weights / 2 < peak < weights + 1e9
    assert seconds < 60 and windows == 12


def test_trains_and_is_written_again(cache):
    """Two SFT steps on two windows; the run as a release, with nothing lost of what it was made of."""
    run("train.py", "config/sft.py", f"--pretrained_path={REPO}", f"--cache_dir={cache}",
        f"--expdir={cache}", f"--data_root={cache}", f"--dataset_file_root={cache}", "--num_epochs=1",
        "--max_num_window=2", "--dataset_blending_config={'noise-AQA/train': 1}",
        "--dataset_blending_global_weight=1", "--valid_dataset_config={}", "--num_workers=0",
        "--batch_size=1", "--gradient_accumulation_steps=1", "--clap_finetune=false",
        "--freeze_lm_embeddings=added")
    done = [json.loads(line) for line in open(f"{cache}/sft/log.jsonl")]
    assert done[-1]["step"] == 2
    moments = load_pickle(f"{cache}/sft/checkpoint_0.pt")["optimizer_state_dict"]["state"].values()
    trained = sum(moment["exp_avg"].numel() for moment in moments)
    dtype, _ = pick_precision("amp_bf16", torch.device("cpu"))  # float32 where a CPU has no bf16 units
    # trained weights, gradients and two moments in float32, frozen weights, all else
    bound = 16 * trained + dtype.itemsize * (1.07e9 - trained) + 1e9
    assert done[-1]["mem_gb"] * 2 ** 30 < bound, (done, bound)
    run("sample.py", f"--init_from={cache}/sft", f"--cache_dir={cache}", f"--export={cache}/release")
    card = open(f"{cache}/release/README.md").read()
    assert "noise-AQA/train" in card and "Qwen/Qwen2.5-0.5B: Apache-2.0" in card and "NVIDIA" in card
