"""The whole path on real sound (make demo): render, CLAP, pretrain, an answer, evaluation, a picture.

    python prepare/demo.py          # a second run goes on where the first one stopped

Leaves out/demo/: clap/epoch_16.pt, checkpoint_0.pt, log.jsonl, eval/*.jsonl, scores.json, demo.png.
"""
import json
import os
import shlex
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

import config as settings  # torch is imported where it is used: the first command starts seconds sooner

# glibc gives large blocks back to the system at every free; on a CPU, keeping them saves a tenth of a step
os.environ.update(MALLOC_MMAP_THRESHOLD_=str(2 ** 25), MALLOC_TRIM_THRESHOLD_=str(2 ** 32))
RUN = "out/demo"
SPLITS = ["GM-Family-AQA/test", "GM-FamilyMC-AQA/test", "GM-Instrument-AQA/test", "GM-Register-AQA/test",
          "GM-Loudness-AQA/test", "GM-Count-AQA/test", "GM-Order-AQA/test", "GM-Family-AQA/test_programs",
          "GM-FamilyMC-AQA/test_programs"]


def start(title, *command):
    """Start one command, shown as a person would type it."""
    print(f"\n== {title}\n$ python {shlex.join(command)}", flush=True)
    return subprocess.Popen([sys.executable, *command])


def finish(process):
    """Wait for a command; stop where it fails."""
    if process.wait() != 0:
        sys.exit(process.returncode)


def step(title, *command):
    finish(start(title, *command))


def picture(path, clip, prompt):
    """Log-mel, cross-attention over time, prompt and answer as title, the loss curve beside."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from model import AudioFlamingo, log_mel, to_float
    from sample import load_clips
    from tools.sample.attention_map import attention_over_time
    model = AudioFlamingo.from_pretrained(RUN)
    windows, n_windows, _ = load_clips([clip], model)
    answer = model.generate([prompt], windows, n_windows, 32)[0]
    mel = log_mel(to_float(windows)).flatten(0, 1)
    weight = attention_over_time(model, prompt, windows)
    losses = [json.loads(line) for line in open(f"{RUN}/log.jsonl")]
    losses = [(entry["step"], entry["loss"]) for entry in losses if "loss" in entry]
    panels = [["mel", "loss"], ["attention", "loss"]]
    figure, axes = plt.subplot_mosaic(panels, height_ratios=[3, 1], width_ratios=[2, 1],
                                      figsize=(11, 4.2), layout="constrained")
    seconds = len(mel) / 100
    axes["mel"].imshow(mel.T, origin="lower", aspect="auto", extent=(0, seconds, 0, 64), cmap="magma")
    axes["mel"].set(ylabel="mel band", xticks=[])
    axes["attention"].stairs(weight, np.linspace(0, seconds, len(weight) + 1), fill=True)
    axes["attention"].set(xlabel="seconds", ylabel="attention", xlim=(0, seconds))
    axes["loss"].plot(*zip(*losses), lw=1.5)
    axes["loss"].set(xlabel="step", ylabel="loss", title="training", yscale="log")
    axes["loss"].grid(alpha=0.3)
    figure.suptitle(f"“{prompt}” → “{answer.strip()}”")
    figure.savefig(path + ".tmp.png", dpi=110)
    os.replace(path + ".tmp.png", path)
    return answer


def main(c):
    began = time.time()
    manifests, test = c.dataset_file_root, "GM-Family-AQA/test"
    # one thread for half a minute
    unpacking = start("language model", "prepare/smollm2.py", "--out", c.lang_encoder_path)
    step("real instruments, meanwhile", "prepare/gm_notes.py", "--out", c.data_root)
    finish(unpacking)
    if not os.path.exists(c.clap_checkpoint):
        step("audio encoder: CLAP on captions", "prepare/clap.py", "config/demo_clap.py")
    step("pretrain: gated cross-attention", "train.py", "config/demo.py")
    item = json.load(open(f"{manifests}/{test}.json"))
    item, folder = item["data"]["0"], item["split_path"]
    clip = f"{c.data_root}/{folder}/{item['name']}"
    step(f"a sound it never heard ({item['output']})", "sample.py", "--audio", clip,
         "--prompt", item["prompt"], "--init_from", RUN, "--max_new_tokens", "16")
    step("scores on held-out notes", "eval.py", "--split", ",".join(SPLITS), "--init_from", RUN,
         "--scores", f"{RUN}/scores.json", "--max_new_tokens", "16",
         "--eval_batch_size", "32", "--num_workers", "0")
    picture(f"{RUN}/demo.png", clip, item["prompt"])
    scores = json.load(open(f"{RUN}/scores.json"))
    scores["seconds"] = round(time.time() - began, 1)
    with open(f"{RUN}/scores.json", "w") as f:
        json.dump(scores, f, indent=1)
    print(f"\n{'task':34} {'accuracy':>9} {'chance':>8} {'n':>5}")
    for name, row in scores["tasks"].items():
        print(f"{name:34} {row['accuracy']:9.1%} {row['chance']:8.1%} {row['n']:5}")
    print(f"\npicture: {RUN}/demo.png | scores: {RUN}/scores.json | {scores['seconds']:.0f} s")


if __name__ == "__main__":
    os.chdir(settings.ROOT)
    sys.argv[1:1] = ["config/demo.py"]
    settings.run(main, "prepare/demo.py")
