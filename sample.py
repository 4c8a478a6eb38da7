"""Ask a model about sounds.

    python sample.py --audio clip.wav                                          # the newest run under exp/ or out/
    python sample.py --audio clip.wav --prompt "What happens in this clip?" --init_from=nvidia/audio-flamingo-2
    python sample.py --audio "a.wav,b.flac" --prompt "Describe the sound."     # several clips, one batch
    python sample.py --input questions.jsonl --output answers.jsonl            # {"path": ..., "prompt": ...} a line
"""
import json
import os
import sys

import torch
from tqdm import tqdm

import config as settings
from data import load_audio
from model import AudioFlamingo, newest_checkpoint, pick_backend, pick_device, pick_precision

audio: str = ""  # audio file, or several separated by commas
prompt: str = "Describe the sound in a sentence."  # what to ask about each
input: str | None = None  # JSONL of {"path", "prompt"} instead; paths relative to the file's folder or to here
output: str | None = None  # JSONL to write the answers of --input to; None: only printed
init_from: str | None = None  # run directory, checkpoint file, release directory or hub id; None: the newest run
max_new_tokens: int = 256  # at most, per answer
temperature: float = 0.0  # 0: greedy
top_k: int | None = None  # sample among the k likeliest tokens
top_p: float | None = None  # sample among the likeliest tokens of this total probability


def newest_run(folders):
    """The run (a folder with a checkpoint) changed last; FileNotFoundError says how to get one."""
    runs = [os.path.join(folder, name) for folder in folders if os.path.isdir(folder) for name in os.listdir(folder)]
    files = {run: file for run in runs if (file := newest_checkpoint(run))}
    if not files:
        raise FileNotFoundError(f"no --init_from given and no run under {' or '.join(f'{f}/' for f in folders)}: train one "
                                f"(make demo, or python train.py config/sft.py), or give --init_from=nvidia/audio-flamingo-2")
    return max(files, key=lambda run: os.path.getmtime(files[run]))


def load_model(c):
    """The model that a script's settings ask for, on its device, with one line about what was chosen."""
    source = c.init_from or newest_run(dict.fromkeys([c.expdir, "exp", "out"]))
    device = pick_device(c.device)
    dtype, reason = pick_precision(c.precision, device)
    model = AudioFlamingo.from_pretrained(source, device=device, dtype=dtype, **settings.model_settings(c))
    backend = (model.backend, "asked for") if model.backend != "auto" else pick_backend(device)
    print(f"model {source} | {device} | {dtype} ({reason}) | cross-attention: {backend[0]} ({backend[1]})", file=sys.stderr)
    return source, model


def load_clips(paths, model):
    """-> windows (sum W, L), n_windows (B,)."""
    m = model.config
    clips = [torch.from_numpy(load_audio(p, 0.0, m.window_length, m.window_overlap, m.max_num_window)) for p in paths]
    return torch.cat(clips), torch.tensor([len(clip) for clip in clips])


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
                raise ValueError(f'{path} line {number}: expected {{"path": ..., "prompt": ...}} ({error!r})') from error
            beside = os.path.join(os.path.dirname(path), audio_path)
            questions.append((beside if not os.path.exists(audio_path) and os.path.exists(beside) else audio_path, question))
    return questions


def stream_answer(model, question, windows, n_windows, c):
    """Print an answer as its tokens come."""
    ids, shown = [], ""
    for token in model.stream([question], windows, n_windows, c.max_new_tokens, c.temperature, c.top_k, c.top_p, c.seed):
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
    _, model = load_model(c)
    if len(questions) == 1 and not c.output:
        return stream_answer(model, questions[0][1], *load_clips([questions[0][0]], model), c)
    answers = []
    for first in tqdm(range(0, len(questions), c.batch_size), desc="answer", unit="batch", disable=None):
        part = questions[first:first + c.batch_size]
        texts = model.generate([q for _, q in part], *load_clips([p for p, _ in part], model), c.max_new_tokens,
                               c.temperature, c.top_k, c.top_p, c.seed)
        for (path, question), text in zip(part, texts):
            answers.append(json.dumps({"path": path, "prompt": question, "output": text}, ensure_ascii=False))
            tqdm.write(answers[-1] if c.input else f"{path}: {text}")
    if c.output:
        with open(c.output + ".tmp", "w") as f:
            f.writelines(line + "\n" for line in answers)
        os.replace(c.output + ".tmp", c.output)


if __name__ == "__main__":
    settings.run(main, "sample.py")
