"""Ask a model about sounds.

    python sample.py --audio clip.wav                                     # the newest run under exp/ or out/
    python sample.py --audio clip.wav --prompt "What happens?" --init_from=nvidia/audio-flamingo-2
    python sample.py --audio a.wav --audio b.wav --prompt "What differs?"     # several clips, one question
    python sample.py --audio clip.wav --chat                                  # question after question
    python sample.py --input questions.jsonl --output answers.jsonl      # {"path": ..., "prompt": ...} a line
    python sample.py --serve                                  # a page to record or drop a clip, and to ask
"""
import itertools
import os
import sys
from dataclasses import asdict

from tqdm import tqdm

import config as settings
from checkpoint import export_release, fingerprint, materialize, open_checkpoint
from tools.checkpoint.devices import pick_compute, pick_device
from tools.checkpoint.run_dir import newest_run
from tools.common import UserError, atomic_write, check_folder_writable, check_not_read, check_writable
from tools.sample.asking import (answer_key, append_line, load_clips, load_item, read_part, read_questions,
                                 sampling_of, to_json_line, truncation_note)
from tools.sample.attention_map import attention_timeline, write_timeline
from tools.sample.decoding import (answer_items, check_text, compile_decoding, encode_questions,
                                   stream_text)
from tools.sample.int8 import quantize
from tools.sample.page import import_gradio, serve_page

audio: list = []  # audio file; again for each further clip of the same prompt
prompt: str = "Describe the sound in a sentence."  # what to ask
chat: bool = False  # ask on: a question a line from standard input, about the same clips
answer_prefix: str = ""  # words that the answer begins with
int8: bool = False  # int8 weights on a CPU: less time per token
compile: bool = False  # torch.compile for the decoding step: a minute first, then less per token
timeline: str | None = None  # write <this>.json and .png: cross-attention over time, token by token
input: str | None = None  # JSONL of {"path", "prompt"} instead; paths relative to its folder or to here
serve: bool = False  # a page instead, at http://host:port
host: str = "127.0.0.1"  # of the page: this machine alone; 0.0.0.0: whoever reaches it
port: int = 7860  # of the page; 0: a free one
upload_mb: int = 300  # largest file that the page takes
export: str | None = None  # folder to write the model to as a release; nothing is asked then
output: str | None = None  # JSONL of answers; a killed run goes on from <output>.part; None: only printed
init_from: str | None = None  # run directory, checkpoint, release directory or hub id; None: the newest run
max_new_tokens: int = 256  # at most, per answer
temperature: float = 0.0  # 0: greedy
top_k: int | None = None  # sample among the k likeliest tokens
top_p: float | None = None  # sample among the likeliest tokens of this total probability
READS = (*settings.LOADING, "expdir", "batch_size", "seed", "device", "precision")  # of config/defaults.py


# ------------------------------------------------------------------------------------------------------------
# The model


def read_model(c):
    """-> where the model comes from, the model without weights, and its state."""
    source = c.init_from or newest_run(dict.fromkeys([c.expdir, "exp", "out"]))
    return source, *open_checkpoint(source, settings.overrides(c))


def load_weights(c, source, model, state):
    """The model on its device; prints one line about what was chosen."""
    device = pick_device(c.device)
    dtype, compute = pick_compute(c, device)
    model = materialize(model, state, device, dtype, source)
    if c.int8:
        quantize(model)
    if c.compile:
        compile_decoding(model)
    print_note(f"model {source} | {compute}")
    return model


# ------------------------------------------------------------------------------------------------------------
# Answers


def print_stream(texts):
    """Print an answer as it grows, and return it."""
    shown = ""
    for text in texts:
        print(text[len(shown):] if text.startswith(shown) else "\n" + text, end="", flush=True)
        shown = text
    print(flush=True)
    return shown


def print_note(text):
    if text:
        print(text, file=sys.stderr)


def prompts_of(c):
    """--prompt, and with --chat the lines of standard input; at a terminal after a prompt sign."""
    if c.prompt or not c.chat:
        yield c.prompt
    if c.chat:
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no UTF-8 is not answered
    while c.chat:
        print("> " if sys.stdin.isatty() else "", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def answer_audio(model, c):
    """--audio: one clip, or several of one prompt; with --chat one question after the other. A question of a
    chat that cannot be answered does not end it -> exit code."""
    windows, counts, audio_kv, note = load_clips(c.audio, model)
    print_note(note)
    sampling, failed = sampling_of(c), 0
    for number, prompt in enumerate(prompts_of(c)):
        try:
            texts = stream_text(model, (prompt, windows, counts), audio_kv, sampling)
            text = print_stream(texts)
        except (UserError, KeyboardInterrupt) as error:
            if not c.chat:
                raise
            failed = 1
            print_note(f"not answered: {str(error) or 'interrupted'}")
            continue
        if c.timeline:
            base = f"{c.timeline}-{number}" if number else c.timeline
            write_timeline(base, attention_timeline(model, prompt, text, windows, audio_kv), windows)
        if c.output:
            append_line(c.output, {"path": c.audio, "prompt": prompt, "answer": text})
    return failed


def answer_input(model, questions, c):
    """--input: print a line for every question, in their order. Answers are kept in <output>.part as they
    end, where a killed run goes on; <output> is written when all are there -> exit code."""
    sampling, dtype = sampling_of(c), str(model.lm.norm.weight.dtype)
    identity = fingerprint(model.state_dict()), dtype, model.audio_config, asdict(sampling)
    keys = [answer_key(identity, question["prompt"], paths) for question, paths in questions]
    part = f"{c.output}.part"
    answers = read_part(part, keys) if c.output else {}  # {key: {"answer"}, with "error" where it is None}
    asked, lines, seconds = [], [], []

    def items():
        for key, (question, paths) in zip(keys, questions):
            if key in answers:
                continue
            try:
                item, truncated = load_item(question["prompt"], paths, model)
                encode_questions(model, [item], c.answer_prefix)
            except (UserError, FileNotFoundError) as error:
                answers[key] = {"answer": None, "error": str(error)}
                continue
            seconds.extend(truncated)
            asked.append((key, question))
            yield item

    texts = answer_items(model, items(), min(c.batch_size, len(questions)), sampling)
    for key, (question, _) in zip(tqdm(keys, "answer", unit="question", disable=None), questions):
        while key not in answers:  # they end in any order
            for index, text in itertools.islice(texts, 1):
                done, about = asked[index]
                answers[done] = {"answer": text}
                if c.output:
                    append_line(part, about | {"answer": text, "key": done})
        lines.append(to_json_line(question | answers[key]))
        tqdm.write(lines[-1], end="")
    if c.output:
        with atomic_write(c.output, "wb") as f:
            f.write("".join(lines).encode())
        os.remove(part)
    print_note(truncation_note(seconds, model))
    errors = [answers[key]["error"] for key in keys if "error" in answers[key]]
    if errors:
        print_note(f"{len(errors)} of {len(questions)} could not be answered, e.g. {errors[0]}")
    return 1 if errors else 0


# ------------------------------------------------------------------------------------------------------------


def check_arguments(c):
    """Fail fast, before the model is loaded -> the questions of --input."""
    if bool(c.audio) + bool(c.input) + c.serve != 1:
        raise UserError("give one of --audio clip.wav, --input questions.jsonl and --serve")
    if c.timeline and len(c.audio) != 1:
        raise UserError("--timeline takes one --audio")
    for file in filter(None, (c.output, c.timeline and c.timeline + ".json")):
        check_writable(file)
        os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
    if not 0 <= c.port < 2 ** 16:
        raise UserError(f"port = {c.port}, expected 0 to 65535")
    sampling_of(c)
    check_text(c.prompt)
    questions = read_questions(c.input) if c.input else []
    if c.output:
        clips = itertools.chain(c.audio, *(paths for _, paths in questions))
        check_not_read(c.output, [c.input or "", *clips])
    return questions


def main(c):
    if c.export:
        check_folder_writable(c.export)
        return export_release(*read_model(c), c.export)
    questions = check_arguments(c)
    if c.serve:
        import_gradio()
    model = load_weights(c, *read_model(c))
    if c.serve:
        return serve_page(model, c)
    if c.audio:
        return answer_audio(model, c)
    return answer_input(model, questions, c)


if __name__ == "__main__":
    settings.run(main, "sample.py", READS)
