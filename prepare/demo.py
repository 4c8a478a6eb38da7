"""The whole path on real sound (make demo): render, CLAP, pretrain, an answer, evaluation, a picture.

    python prepare/demo.py          # a second run goes on where the first one stopped
    python prepare/demo.py --seed=43 --run_name=demo43 --clap_checkpoint=out/demo43/clap/epoch_16.pt

Settings are handed on to prepare/clap.py and train.py. Leaves out/demo/: clap/epoch_16.pt, checkpoint_0.pt,
log.jsonl, eval/*.jsonl, scores.json, demo.png.
"""
import json
import os
import shlex
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import config as settings  # torch is imported where it is used: the first command starts seconds sooner
from tools.common import atomic_write, read_json

# glibc gives large blocks back to the system at every free; on a CPU, keeping them saves a tenth of a step
os.environ.update(MALLOC_MMAP_THRESHOLD_=str(2 ** 25), MALLOC_TRIM_THRESHOLD_=str(2 ** 32))
SPLITS = ("GM-Family-AQA/test,GM-FamilyMC-AQA/test,GM-Instrument-AQA/test,GM-Register-AQA/test,"
          "GM-Loudness-AQA/test,GM-Count-AQA/test,GM-Order-AQA/test,GM-Family-AQA/test_programs,"
          "GM-FamilyMC-AQA/test_programs")


def start_step(title, *command):
    """Start one command, shown as it would be typed."""
    print(f"\n== {title}\n$ python {shlex.join(command)}", flush=True)
    return subprocess.Popen([sys.executable, *command])


def run_step(title, *command):
    """Run one command; stop where it fails."""
    finish(start_step(title, *command))


def finish(process):
    if process.wait() != 0:
        sys.exit(process.returncode)


def draw_picture(run, clip, prompt):
    """Log-mel, cross-attention over time, prompt and answer as title, the loss curve beside."""
    import torch

    from data import load_audio
    from model import AudioFlamingo
    from tools.html_page import draw_attention, draw_log_mel, new_figure, plain_label, png_bytes
    from tools.sample.attention_map import attention_timeline
    from tools.train.plot import plot_entries, read_log
    model = AudioFlamingo.from_pretrained(run)
    windows = torch.from_numpy(load_audio(clip, **model.audio_config))
    answer = model.generate([prompt], windows, torch.tensor([len(windows)]), 32)[0]
    figure = new_figure(11, 4.2)
    mosaic = figure.subplot_mosaic([["mel", "loss"], ["attention", "loss"]], height_ratios=[3, 1],
                                   width_ratios=[2, 1])
    mel, loss, attention = mosaic.values()
    seconds = draw_log_mel(mel, windows, model.audio_config["sample_rate"])
    timeline = attention_timeline(model, prompt, answer.strip() or "?", windows)
    draw_attention(attention, timeline["weights"][0], seconds)
    plot_entries(loss, read_log(run)[0], "loss")
    loss.set(xlabel="step", ylabel="loss", title="training", yscale="log")
    figure.suptitle(plain_label(f"“{prompt}” → “{answer.strip()}”"))
    with atomic_write(f"{run}/demo.png", "wb") as f:
        f.write(png_bytes(figure, dpi=110))


def main(c):
    start = time.time()
    run = f"{c.expdir}/{c.run_name}"
    own = vars(settings.load(["config/demo.py"], "prepare/demo.py"))
    changed = [f"--{name}={vars(c)[name]}" for name in c.user_set if vars(c)[name] != own[name]]
    unpacking = start_step("language model", "prepare/smollm2.py", "--out", c.lang_encoder_path)
    run_step("real instruments, meanwhile", "prepare/gm_notes.py", "--out", c.data_root)
    finish(unpacking)
    if not os.path.exists(c.clap_checkpoint):
        run_step("audio encoder: CLAP on captions", "prepare/clap.py", "config/demo_clap.py",
                 f"--clap_out={c.clap_checkpoint}", *changed)
    run_step("pretrain: gated cross-attention", "train.py", "config/demo.py", *changed)
    item = read_json(f"{c.dataset_file_root}/GM-Family-AQA/test.json")["data"]["0"]
    clip = f"{c.data_root}/audio/test/{item['name']}"
    run_step(f"a held-out sound ({item['output']})", "sample.py", "--audio", clip, "--prompt",
             item["prompt"], "--init_from", run, "--max_new_tokens", "16")
    run_step("scores on held-out notes", "eval.py", "--split", SPLITS, "--init_from", run, "--scores",
             f"{run}/scores.json", "--max_new_tokens", "16", "--eval_batch_size", "32", "--num_workers", "0")
    draw_picture(run, clip, item["prompt"])
    scores = read_json(f"{run}/scores.json")
    scores["seconds"] = round(time.time() - start, 1)
    with atomic_write(f"{run}/scores.json") as f:
        json.dump(scores, f, indent=1)
    print(f"picture: {run}/demo.png | scores: {run}/scores.json | {scores['seconds']:.0f} s")


if __name__ == "__main__":
    os.chdir(settings.ROOT)
    sys.argv[1:1] = ["config/demo.py"]
    settings.run(main, __file__)
