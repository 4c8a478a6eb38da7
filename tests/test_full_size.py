"""A release of the 0.5B model's true names, shapes and dtypes: loads, answers, trains and is written again."""
import os
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
windows = torch.from_numpy(load_audio(clip, **model.hearing))
start = time.time()
text, = model.generate(["What happens in this clip?"], windows, torch.tensor([len(windows)]), max_new_tokens=4)
print("answer", len(windows), time.time() - start, peak(), repr(text))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A hub's cache with the release, a clip of two minutes and a manifest of it; removed afterwards: 7 GB."""
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
    load, answer = (line.split()[1:] for line in done.stdout.splitlines()[-2:])
    before, most, weights, seconds = map(float, load)
    print(f"weights {weights / 1e9:.2f} GB, {(most - before) / 1e9:.2f} GB above the interpreter, {seconds:.1f} s; "
          f"an answer {answer}")
    assert 2.1e9 < weights < 2.2e9 and seconds < 60
    assert most - before < weights + 1e9
    assert answer[0] == "12"


def test_trains_and_is_written_again(cache):
    """Two SFT steps on 12 windows; then the run as a release, and that as another: the same bytes."""
    shared = (f"--pretrained_path=nvidia/audio-flamingo-2-0.5B", f"--cache_dir={cache}", f"--expdir={cache}/exp")
    run("train.py", "config/sft.py", *shared, "--run_name=sft", f"--data_root={cache}",
        f"--dataset_file_root={cache}", "--dataset_blending_config={'noise-AQA/train': 1}",
        "--valid_dataset_config={}", "--dataset_blending_global_weight=1", "--num_epochs=1", "--num_workers=0",
        "--batch_size=1", "--gradient_accumulation_steps=1", "--clap_finetune=false",
        "--freeze_lm_embeddings=added", "--gradient_checkpointing=true")
    done = run("sample.py", f"--init_from={cache}/exp/sft", f"--cache_dir={cache}", f"--export={cache}/release")
    assert "wrote" in done.stdout
    shards = os.listdir(f"{cache}/release/safe_ckpt")
    assert "metadata.json" in shards and "noise-AQA/train" in open(f"{cache}/release/README.md").read()
