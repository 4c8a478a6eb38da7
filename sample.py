"""Ask a model about sounds.

    python sample.py --audio clip.wav                                     # the newest run under exp/ or out/
    python sample.py --audio clip.wav --prompt "What happens?" --init_from=nvidia/audio-flamingo-2
    python sample.py --audio "a.wav,b.flac" --prompt "Describe the sound."     # several clips, one batch
    python sample.py --input questions.jsonl --output answers.jsonl      # {"path": ..., "prompt": ...} a line
"""
import json
import os
import sys

import torch
from tqdm import tqdm

import config as settings
from checkpoint import finished, newest_checkpoint, pick_device, pick_precision, read
from data import read_clip, unheard_note
from model import Sampling, pick_backend

audio: str = ""  # audio file, or several separated by commas
prompt: str = "Describe the sound in a sentence."  # what to ask about each
input: str | None = None  # JSONL of {"path", "prompt"} instead; paths relative to its folder or to here
output: str | None = None  # JSONL to write the answers of --input to; None: only printed
init_from: str | None = None  # run directory, checkpoint, release directory or hub id; None: the newest run
max_new_tokens: int = 256  # at most, per answer
temperature: float = 0.0  # 0: greedy
top_k: int | None = None  # sample among the k likeliest tokens
top_p: float | None = None  # sample among the likeliest tokens of this total probability
READS = (*settings.LOADING, "expdir", "batch_size", "seed", "device", "precision")  # of config/defaults.py


def newest_run(folders):
    """The run (a folder with a checkpoint) changed last; FileNotFoundError says how to get one."""
    runs = []
    for folder in filter(os.path.isdir, map(settings.place, folders)):
        runs += [os.path.join(folder, name) for name in os.listdir(folder)]
    files = {run: file for run in runs if (file := newest_checkpoint(run))}
    if not files:
        where = " or ".join(f"{folder}/" for folder in folders)
        raise FileNotFoundError(f"no --init_from given and no run under {where}: train one (make demo, or "
                                f"python train.py config/sft.py) or give --init_from=nvidia/audio-flamingo-2")
    return max(files, key=lambda run: os.path.getmtime(files[run]))


def read_model(c):
    """-> where the model that settings ask for comes from, the model without weights, and its state."""
    source = c.init_from or newest_run(dict.fromkeys([c.expdir, "exp", "out"]))
    return source, *read(source, settings.given(c))


def load_weights(c, source, model, state):
    """The model on its device, with one line about what was chosen."""
    device = pick_device(c.device)
    dtype, reason = pick_precision(c.precision, device)
    model = finished(model, state, device, dtype, source)
    backend = (model.backend, "asked for") if model.backend != "auto" else pick_backend(device)
    print(f"model {source} | {device} | {dtype} ({reason}) | cross-attention: {backend[0]} ({backend[1]})",
          file=sys.stderr)
    return model


def load_clips(paths, model):
    """-> windows (sum W, L) int16, n_windows (B,), and of each clip the seconds that are not heard."""
    clips = [read_clip(path, 0.0, **model.hearing) for path in paths]
    windows = [torch.from_numpy(clip) for clip, _ in clips]
    return torch.cat(windows), torch.tensor([len(w) for w in windows]), [seconds for _, seconds in clips]


def sampling(c):
    return {name: getattr(c, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}


def read_questions(path):
    """[(audio path, prompt)] of a JSONL file; every line checked before any is answered."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    questions = []
    for number, line in enumerate(open(path), 1):
        if line.strip():
            try:
                item = json.loads(line)
                audio_path, question = item["path"], item["prompt"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f'{path} line {number}: expected {{"path": ..., "prompt": ...}} '
                                 f'({error!r})') from error
            beside = os.path.join(os.path.dirname(path), audio_path)
            if not os.path.exists(audio_path) and os.path.exists(beside):
                audio_path = beside
            questions.append((audio_path, question))
    return questions


def say_unheard(seconds, model):
    """Once, on stderr: how many clips were longer than what was heard of them."""
    if note := unheard_note(len(seconds), sum(s > 0 for s in seconds), sum(seconds), model.hearing):
        print(note, file=sys.stderr)


def stream_answer(model, question, windows, n_windows, c):
    """Print an answer as its tokens come."""
    ids, shown = [], ""
    for token in model.stream([question], windows, n_windows, **sampling(c)):
        ids += [t for t in token.tolist() if t >= 0]
        text = model.tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # a character may be several tokens: wait until it is whole
            print(text[len(shown):], end="", flush=True)
            shown = text
    print(flush=True)


def main(c):
    if bool(c.audio) == bool(c.input):
        raise ValueError("give either --audio clip.wav (or a.wav,b.wav) or --input questions.jsonl")
    questions = read_questions(c.input) if c.input else [(path, c.prompt) for path in c.audio.split(",")]
    for path, _ in questions:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: no such audio file")
    if c.output:
        os.makedirs(os.path.dirname(c.output) or ".", exist_ok=True)
    Sampling(**sampling(c))  # what makes no sense is refused before the model is loaded
    model = load_weights(c, *read_model(c))
    if len(questions) == 1 and not c.output:
        windows, n_windows, unheard = load_clips([questions[0][0]], model)
        say_unheard(unheard, model)
        return stream_answer(model, questions[0][1], windows, n_windows, c)
    answers, all_unheard = [], []
    for first in tqdm(range(0, len(questions), c.batch_size), desc="answer", unit="batch", disable=None):
        part = questions[first:first + c.batch_size]
        windows, n_windows, unheard = load_clips([path for path, _ in part], model)
        all_unheard += unheard
        texts = model.generate([question for _, question in part], windows, n_windows, **sampling(c))
        for (path, question), text in zip(part, texts):
            answers.append(json.dumps({"path": path, "prompt": question, "output": text}, ensure_ascii=False))
            tqdm.write(answers[-1] if c.input else f"{path}: {text}")
    say_unheard(all_unheard, model)
    if c.output:
        with open(c.output + ".tmp", "w") as f:
            f.writelines(line + "\n" for line in answers)
        os.replace(c.output + ".tmp", c.output)


if __name__ == "__main__":
    settings.run(main, "sample.py", READS)
