"""A release of the 0.5B model's true names, shapes and dtypes: it loads, answers, trains, is written."""
import json
import shutil

import numpy as np
import pytest
import soundfile

from tests import full_size
from tests.helpers import run, write_manifest

LOAD_AND_ANSWER = """
import resource, sys, time, torch
import checkpoint, transformers
from data import load_audio
from transformers import AutoConfig, AutoTokenizer
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
cache, source, clip = sys.argv[1:]
before, start = peak(), time.time()
model = checkpoint.load(source, dtype=torch.bfloat16, cache_dir=cache)
seconds, most = time.time() - start, peak()
weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
print("load", before, most, weights, seconds, flush=True)
windows = torch.from_numpy(load_audio(clip, **model.audio_config))
start = time.time()
model.generate(["What happens in this clip?"], windows, torch.tensor([len(windows)]), max_new_tokens=4)
print("answer", len(windows), time.time() - start, peak())
"""


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A hub's cache with the release, a clip of two minutes and its manifest; removed afterwards: 7 GB."""
    folder = tmp_path_factory.mktemp("full")
    if shutil.disk_usage(folder).free < 20e9:
        pytest.skip(f"{folder} has less than the 20 GB free that a release, a run and an export take")
    assert full_size.write("0.5B", str(folder)) == "nvidia/audio-flamingo-2-0.5B"
    sound = np.random.default_rng(0).standard_normal(125 * 16000) * 0.1
    soundfile.write(f"{folder}/clip.wav", sound, 16000)
    write_manifest(str(folder), "noise-AQA/train", [("clip.wav", "What is it?", "noise", 125.0)] * 2)
    yield str(folder)
    shutil.rmtree(folder)


def test_loads_and_answers_about_two_minutes(cache):
    """By its hub id alone: the language model is told by the width."""
    done = run("-c", LOAD_AND_ANSWER, cache, "nvidia/audio-flamingo-2-0.5B", f"{cache}/clip.wav")
    load, answer = ([float(x) for x in line.split()[1:]] for line in done.stdout.splitlines()[-2:])
    before, most, weights, seconds = load
    print(f"weights {weights / 1e9:.2f} GB, {(most - before) / 1e9:.2f} GB above the interpreter, "
          f"{seconds:.1f} s; {answer[0]:.0f} windows, {answer[1]:.1f} s an answer, {answer[2] / 1e9:.2f} GB")
    assert 2.1e9 < weights < 2.2e9 and seconds < 60
    assert most - before < weights + 1e9
    assert answer[0] == 12


def test_trains_and_is_written_again(cache):
    """Two SFT steps on 12 windows; the run as a release, with nothing lost of what it was made of."""
    run("train.py", "config/sft.py", "--pretrained_path=nvidia/audio-flamingo-2-0.5B", f"--cache_dir={cache}",
        f"--expdir={cache}", f"--data_root={cache}", f"--dataset_file_root={cache}", "--num_epochs=1",
        "--dataset_blending_config={'noise-AQA/train': 1}", "--dataset_blending_global_weight=1",
        "--valid_dataset_config={}", "--num_workers=0", "--batch_size=1", "--gradient_accumulation_steps=1",
        "--clap_finetune=false", "--freeze_lm_embeddings=added")
    done = [json.loads(line) for line in open(f"{cache}/sft/log.jsonl")]
    assert done[-1]["step"] == 2 and done[-1]["mem_gb"] < 8, done
    print(f"two steps: {done[-1]}")
    run("sample.py", f"--init_from={cache}/sft", f"--cache_dir={cache}", f"--export={cache}/release")
    card = open(f"{cache}/release/README.md").read()
    assert "noise-AQA/train" in card and "Qwen/Qwen2.5-0.5B: Apache-2.0" in card and "NVIDIA" in card
