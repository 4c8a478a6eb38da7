"""Ask a model about sounds.

    python sample.py --audio clip.wav                                     # the newest run under exp/ or out/
    python sample.py --audio clip.wav --prompt "What happens?" --init_from=nvidia/audio-flamingo-2
    python sample.py --audio a.wav --audio b.wav --prompt "What differs?"     # several clips, one question
    python sample.py --audio clip.wav --chat                                  # question after question
    python sample.py --input questions.jsonl --output answers.jsonl      # {"path": ..., "prompt": ...} a line
    python sample.py --serve                                  # a page to record or drop a clip, and to ask
"""
import itertools
import json
import os
import sys

from tqdm import tqdm

import config as settings
from checkpoint import export_release, materialize, open_checkpoint
from data import truncation_warning
from model import pick_backend
from tools.sample import attention_map as listening
from tools.sample import page
from tools.sample.asking import concluded, growing, hear_clips, load_clips, read_questions, sampling
from tools.sample.decoding import Sampling, answer, compile_decoding
from tools.checkpoint.devices import pick_device, pick_precision
from tools.sample.int8 import quantize
from tools.checkpoint.run_dir import newest_run
from tools.common import UserError, check_folder_writable, check_writable, name_disk_errors

audio: list = []  # audio file; again for each further clip of the same prompt
prompt: str = "Describe the sound in a sentence."  # what to ask
chat: bool = False  # ask on: a question a line from standard input, about the same clips
reasoning: bool = False  # of SoundCoT checkpoints: an answer without its conclusion is asked for it once more
answer_prefix: str = ""  # words that the answer begins with
int8: bool = False  # weights of a byte each, on a CPU: less time per token
compile: bool = False  # torch.compile for the decoding step: a minute first, then less per token
timeline: str | None = None  # write <this>.json and .png: where in the clip it listened, word by word
input: str | None = None  # JSONL of {"path", "prompt"} instead; paths relative to its folder or to here
serve: bool = False  # a page instead, at http://host:port
host: str = "127.0.0.1"  # of the page: this machine alone; 0.0.0.0: whoever reaches it
port: int = 7860  # of the page; 0: a free one
upload_mb: int = 300  # largest file that the page takes
upload_seconds: int = 14400  # longest
export: str | None = None  # folder to write the model to as a release; nothing is asked then
output: str | None = None  # JSONL to write the answers to; None: only printed
init_from: str | None = None  # run directory, checkpoint, release directory or hub id; None: the newest run
max_new_tokens: int = 256  # at most, per answer
temperature: float = 0.0  # 0: greedy
top_k: int | None = None  # sample among the k likeliest tokens
top_p: float | None = None  # sample among the likeliest tokens of this total probability
READS = (*settings.LOADING, "expdir", "batch_size", "seed", "device", "precision")  # of config/defaults.py


def read_model(c):
    """-> where the model that settings ask for comes from, the model without weights, and its state."""
    source = c.init_from or newest_run(dict.fromkeys([c.expdir, "exp", "out"]))
    return source, *open_checkpoint(source, settings.overrides(c))


def load_weights(c, source, model, state):
    """The model on its device, with one line about what was chosen."""
    device = pick_device(c.device)
    dtype, reason = pick_precision(c.precision, device)
    model = materialize(model, state, device, dtype, source)
    if c.int8:
        quantize(model)
    if c.compile:
        compile_decoding(model)
    backend = (model.backend, "asked for") if model.backend != "auto" else pick_backend(device)
    print(f"model {source} | {device} | {dtype} ({reason}) | cross-attention: {backend[0]} ({backend[1]})",
          file=sys.stderr)
    return model


def say_unheard(seconds, model):
    """Once, on stderr: how many clips were longer than what was heard of them."""
    if note := truncation_warning(len(seconds), sum(s > 0 for s in seconds), sum(seconds), model.audio_config):
        print(note, file=sys.stderr)


def print_answer(model, item, heard, c):
    """Print an answer as its tokens come, and return it."""
    shown = ""
    for text in growing(model, item, heard, c):
        print(text[len(shown):] if text.startswith(shown) else "\n" + text, end="", flush=True)
        shown = text
    print(flush=True)
    return shown


def ask(model, c):
    """One clip, or several of one prompt; with --chat one question after the other."""
    windows, n_windows, unheard = load_clips(c.audio, model)
    say_unheard(unheard, model)
    heard = hear_clips(windows, n_windows, model)
    for prompt in itertools.chain([c.prompt], map(str.strip, sys.stdin) if c.chat else ()):
        if not prompt:
            continue
        text = print_answer(model, (prompt, windows, n_windows.tolist()), heard, c)
        if c.timeline:
            told = listening.timeline(model, prompt, text, windows, heard)
            listening.write_timeline(c.timeline, told, windows)
        if c.output:
            line = {"path": c.audio, "prompt": prompt, "output": text}
            with name_disk_errors(c.output), open(c.output, "a") as f:
                f.write(json.dumps(line, ensure_ascii=False) + "\n")


def ask_all(model, questions, c):
    """The answers of --input, written in its order as they come; -> how many clips could not be read."""
    lines, asked, all_unheard, written = {}, [], [], 0

    def items():
        for number, (item, places) in enumerate(questions):
            try:
                windows, n_windows, unheard = load_clips(places, model)
            except (UserError, FileNotFoundError) as error:  # told in its line; the others are answered
                lines[number] = item | {"output": None, "error": str(error)}
                continue
            all_unheard.extend(unheard)
            asked.append((number, (item["prompt"], windows, n_windows.tolist())))
            yield asked[-1][1]

    part = open(c.output + ".part", "w") if c.output else None
    bar = tqdm(total=len(questions), desc="answer", unit="question", disable=None)

    def write():
        nonlocal written
        while written in lines:
            line = json.dumps(lines[written], ensure_ascii=False)
            tqdm.write(line)
            if part:
                with name_disk_errors(c.output):
                    part.write(line + "\n")
                    part.flush()
            written += 1
            bar.update()

    how = sampling(c)
    for index, text in answer(model, items(), c.batch_size, **how):
        number, item = asked[index]
        asked[index] = (number, None)  # its windows may go
        text = concluded(model, item, text, how) if c.reasoning else text
        lines[number] = questions[number][0] | {"output": text}
        write()
    write()
    bar.close()
    say_unheard(all_unheard, model)
    if part:
        part.close()
        os.replace(c.output + ".part", c.output)
    bad = [line["path"] for line in lines.values() if line.get("error")]
    if bad:
        print(f"{len(bad)} of {len(questions)} could not be read, e.g. {bad[0]}", file=sys.stderr)
    return len(bad)


def main(c):
    if c.export:
        check_folder_writable(c.export)
        asks = ("audio", "input", "output", "serve", "chat", "timeline", "int8")
        if more := ", ".join(name for name in asks if getattr(c, name)):
            raise UserError(f"--export writes the weights as they are, and asks nothing: leave out {more}")
        return export_release(*read_model(c), c.export)
    if bool(c.audio) + bool(c.input) + c.serve != 1:
        raise UserError("give one of --audio clip.wav (again for each further clip of the same prompt), "
                         "--input questions.jsonl and --serve")
    questions = read_questions(c.input) if c.input else []
    if c.timeline and len(c.audio) != 1:
        raise UserError("--timeline is of one --audio clip")
    for path in c.audio:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: no such audio file")
    for file in filter(None, (c.output, c.timeline and c.timeline + ".json")):
        check_writable(file)
        os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
    Sampling(**sampling(c))  # what makes no sense is refused before the model is loaded
    if c.serve:
        page.check(c)
    model = load_weights(c, *read_model(c))
    if c.serve:
        return page.serve(model, c)
    if c.audio:
        return ask(model, c)
    if ask_all(model, questions, c):
        sys.exit(1)


if __name__ == "__main__":
    settings.run(main, "sample.py", READS)
