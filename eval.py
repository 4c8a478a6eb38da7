"""Score a model on manifests: run the split, keep every answer, print the metric that belongs to the task.

    python eval.py --split Clotho-AQA-AQA/test                                 # the newest run
    python eval.py --split GM-Family-AQA/test,GM-Order-AQA/test --init_from=out/demo
    python eval.py --split MMAU/test-mini --init_from=nvidia/audio-flamingo-2  # MMAU's own JSON file will do
    python eval.py score answers.jsonl --task=Clotho-AQA-AQA                   # the answers of any system
    python eval.py compare a.jsonl b.jsonl                                     # paired test of two of them

Answers go to <results>/<Name-Task>--<split>.jsonl, one item a line; started again, only missing ones are
answered. Decoding is greedy, 256 new tokens at most. Rules by task name, see METRICS; --metric overrides.
"""
import json
import os
import re
import signal
import sys

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

import config as settings
from checkpoint import fingerprint
from data import Clips, Manifest, truncation_warning
from sample import load_weights, read_model
from tools.common import UserError, commit, name_disk_errors
from tools.eval import answers
from tools.eval import records
from tools.eval import report as pages
from tools.eval import results as table
from tools.eval.captions import captioning
from tools.eval.clap_text import text_tower
from tools.eval.rules import closed_set, cmm, entailment, multi_label, nsynth
from tools.eval.compare import compare
from tools.sample.decoding import Sampling, answer_items
from tools.sample.attention_map import attention_over_time
from tools.eval.parsing import (labels_of, mark_of, marks_in, normalise, option_named, options_of,
                           reference_option, said)

split: str = ""  # Name-Task/split, or several separated by commas
init_from: str | None = None  # run, checkpoint file, release directory or hub id; None: the newest run
metric: str | None = None  # name of a rule below instead of the one chosen by the task's name
task: str | None = None  # Name-Task or Name-Task/split of the answers to score
labels: str | None = None  # file of a closed label set, one a line; None: the labels of the split
matching: str = "auto"  # closed sets: retrieval (CLAP's text encoder), exact; auto: what there is
text_tokenizer: str = "google/flan-t5-large"  # directory or hub id of that encoder's tokenizer
results: str | None = None  # folder of the answers; None: eval/ in the run, or out/eval/<model> for a release
report: bool = True  # write <results>/report.html: the table, and the worst items to listen to
scores: str | None = None  # JSON file to add {"tasks": {split: {"accuracy", "chance", "n", "intervals"}}} to
max_new_tokens: int = 256  # at most, per answer
eval_batch_size: int = 16  # clips answered at once
int8: bool = False  # weights of a byte each, on a CPU: less time per token
compile: bool = False  # torch.compile for the decoding step: a minute first, then less per token
READS = (*settings.LOADING, "expdir", "dataset_file_root", "data_root", "num_workers", "device", "precision")

# ------------------------------------------------------------------------------------------------------------
# Rules: items [{"prompt", "output" (what the manifest says), "answer" (what the model said)}] -> figures, the
# headline first: a list of what every item counts (None: it does not), or a number or word as it is. They set
# "score" on the items, the headline's value. An empty answer is wrong under every rule.


def official_mmau(right, answer, options):
    """MMAU's token rule: all tokens of the right option said, and none that only another option has."""
    right, answer, *others = (set(re.findall(r"\b\w+\b", text.lower())) for text in (right, answer, *options))
    return float(bool(answer) and right <= answer and not answer & (set().union(*others) - right))


def multiple_choice(items):
    """MMAU's official rule on the options' texts: "accuracy" with the answer as it is. Beside it without a
    leading mark: "(A) woman and child" is wrong as it is where another option holds "a". And "as read": the
    option that the answer names to a reader, by letter, text or both."""
    bare, read, chances = [], [], []
    for item in items:
        options, answer = item.get("choices") or options_of(item["prompt"]), said(item)
        right = reference_option(item["output"], options)
        named = option_named(answer, options) if answer else None
        item["predicted"] = None if named is None else options[named]
        item["score"] = official_mmau(right, answer, options)
        bare.append(official_mmau(right, mark_of(answer, len(options))[1] or answer, options))
        read.append(float(named is not None and normalise(options[named]) == normalise(right)))
        chances.append(1 / max(len(options), 1))
    return {"accuracy": [item["score"] for item in items], "mark stripped": bare, "as read": read,
            "chance": sum(chances) / len(chances)}


def muchomusic(items):
    """MuChoMusic: the one option letter that stands alone, else the first option whose text is contained,
    else unanswered. An answer that is an option's text names it: the A of "A female voice" is an article."""
    for item in items:
        options, answer = item.get("choices") or options_of(item["prompt"]), said(item)
        whole = [i for i, option in enumerate(options) if normalise(option) == normalise(answer)]
        chosen = whole[:1] or list(marks_in(answer, len(options), capitals=True))
        if len(chosen) != 1:
            chosen = [i for i, option in enumerate(options) if option.lower() in answer.lower()]
        item["predicted"] = options[chosen[0]] if chosen else None
        right = normalise(reference_option(item["output"], options))
        item["score"] = float(bool(chosen) and normalise(item["predicted"]) == right)
    return {"accuracy": [item["score"] for item in items],
            "unanswered": [float(item["predicted"] is None) for item in items], "chance": 0.25}


def clotho_aqa(items):
    """Three answers joined by ", ". Unanimous: the questions answered yes or no by all three alike;
    non-binary: those no one answered with yes or no, right if the answer equals any of the three. Others do
    not count."""
    unanimous, other = [], []
    for item in items:
        three, answer = [normalise(text) for text in item["output"].split(",")], said(item)
        binary = [text in ("yes", "no") for text in three]
        right = float(bool(answer) and normalise(answer) in three)
        unanimous.append(right if all(binary) and len(set(three)) == 1 else None)
        other.append(None if any(binary) else right)
        item["score"] = unanimous[-1] if unanimous[-1] is not None else other[-1]
    return {"accuracy": [item["score"] for item in items], "unanimous": unanimous, "non-binary": other}


def exact_match(items):
    """The same labels in any order, after lower-casing and dropping punctuation and articles."""
    for item in items:
        item["predicted"] = said(item)
        item["score"] = float(bool(said(item)) and labels_of(said(item)) == labels_of(item["output"]))
    return {"accuracy": [item["score"] for item in items],
            "chance": 1 / len({normalise(item["output"]) for item in items})}


# The first pattern found in Name-Task decides; of the last two, prompts with options go by multiple_choice.
METRICS = ((r"MuChoMusic", muchomusic), (r"MMAU", multiple_choice), (r"Clotho-AQA", clotho_aqa),
           (r"Entailment", entailment), (r"CMM", cmm), (r"FSD50k", multi_label), (r"NSynth", nsynth),
           (r"AudioCaptioning|AudioDescription|Tagging", captioning),
           (r"(Event|Scene|Emotion|Sentiment|Genre|Instr|Vocal)Classification|MIR$", closed_set),
           (r"", exact_match))
RULES = {rule.__name__: rule for _, rule in METRICS}


def choose_rule(task, items, name=None):
    if name is not None:
        if name not in RULES:
            raise UserError(f"metric = {name!r}, expected one of {', '.join(RULES)}")
        return RULES[name]
    rule = next(rule for pattern, rule in METRICS if re.search(pattern, task, re.I))
    listed = sum(bool(options_of(item["prompt"])) for item in items)
    return multiple_choice if rule in (exact_match, closed_set) and listed > len(items) / 2 else rule


def score_split(name, items, c, clap=None):
    """Score the items by their task's rule, print the row of the table and return it. Items without a
    reference (MMAU's test split) are not scored. clap: a CLAP checkpoint, whose text encoder closed sets
    use."""
    rule = choose_rule(name.split("/")[0], items, c.metric)
    counted = []
    for item in items:
        item["score"] = None
        if item["output"].strip() or rule is captioning:
            counted.append(item)
    extra = {}
    if rule in (closed_set, multi_label, nsynth):
        extra = {"labels": c.labels and records.read_labels(c.labels), "embed": text_tower(clap, c)}
    figures = rule(counted, **extra) if counted else {"accuracy": None}
    row = table.row_of(figures, counted, rule.__name__)
    if len(counted) < len(items):
        row["without a reference"] = len(items) - len(counted)
    print(*table.lines_of(name, row), sep="\n", flush=True)
    return row


# ------------------------------------------------------------------------------------------------------------
# Answers


def answer_split(model, manifest, path, c, matters, about, rank, world):
    """Answer what is not kept yet, this rank's share of it; -> on rank 0 all items in manifest order."""
    if rank == 0:
        answers.set_aside(path, matters)
    wait(world)
    done = answers.kept(path, manifest, matters)
    wait(world)  # all ranks have read before one writes: the same shares
    clips = Clips([manifest], None, model.audio_config)
    todo = sorted(set(range(len(manifest))) - set(done))[rank::world]
    loader = DataLoader(clips, batch_size=None, sampler=todo, num_workers=min(c.num_workers, len(todo)))
    bar = tqdm(total=len(todo), desc=manifest.name, unit="clip", disable=None if rank == 0 else True)
    heard = []  # (index, clip) of the items that can be answered, in the order in which they are read
    with name_disk_errors(path), answers.open_part(path, matters, rank, about) as f, bar:
        def write(i, clip, text):
            item = {"id": i} | answers.question_of(manifest, i) | {"answer": text}
            if "error" in clip:
                item["error"] = clip["error"]  # an unreadable clip counts as wrong, and is reported
            elif clip["truncated_seconds"]:
                item["unheard"] = round(clip["truncated_seconds"], 2)  # seconds beyond what is heard
            f.write(json.dumps(item, ensure_ascii=False) + "\n")
            f.flush()
            bar.update()

        def questions():
            for i, clip in zip(todo, loader):
                if "error" in clip:
                    write(i, clip, "")
                else:
                    heard.append((i, clip))
                    yield clip["prompt"], clip.pop("windows"), clip["n_windows"]

        for index, text in answer_items(model, questions(), c.eval_batch_size,
                                        Sampling(max_new_tokens=c.max_new_tokens)):
            write(*heard[index], text)
    wait(world)
    if rank:
        return []
    done = answers.kept(path, manifest, matters)
    items = [done[i] for i in range(len(manifest))]
    for item, question in zip(items, manifest.items):  # references, choices, sub-categories: those of now
        item.update({key: question[key] for key in records.KEPT if key in question})
    return items


def wait(world):
    if world > 1:
        dist.barrier()


def open_split(name, c):
    """The manifest Name-Task/split; also MMAU's official question file in its place, or by its path."""
    data_root, folder = settings.resolve_path(c.data_root), settings.resolve_path(c.dataset_file_root)
    path = name if name.endswith(".json") else os.path.join(folder, name + ".json")
    if os.path.isfile(path) and records.is_official(path):
        return records.open_questions(path, name, lambda file: Manifest(file, data_root))
    return Manifest(path, data_root)


def main(c):
    names = [name.strip() for name in c.split.split(",") if name.strip()]
    if not names:
        raise UserError("give --split Name-Task/split, of dataset_file_root, e.g. Clotho-AQA-AQA/test")
    if c.metric is not None:
        choose_rule("", [], c.metric)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")
        if c.device == "auto" and torch.cuda.is_available():
            c.device = f"cuda:{os.environ['LOCAL_RANK']}"
    roots = {"dataset_file_root", "data_root"} - set(c.user_set)
    if "dataset_file_root" not in roots:  # a wrong split is told before a model is looked for, ...
        manifests = {name: open_split(name, c) for name in names}
    source, model, state = read_model(c)
    for root in roots:  # not given: where the run's own data is
        setattr(c, root, getattr(model.config, root))
    if roots:  # ... or at least before weights are loaded
        manifests = {name: open_split(name, c) for name in names}
    for manifest in manifests.values():
        if not len(manifest):
            raise UserError(f"{manifest.file}: holds no item to score")
    folder = answers_folder(c, source)
    records.check_places(c, folder)
    model = load_weights(c, source, model, state)
    matters = {"weights": fingerprint(model.state_dict()), "dtype": str(model.lm.norm.weight.dtype),
               "max_new_tokens": c.max_new_tokens, "hearing": model.audio_config}
    os.makedirs(folder, exist_ok=True)
    rows, kept = {}, {}
    for name, manifest in manifests.items():
        path = os.path.join(folder, name.replace("/", "--") + ".jsonl")
        about = {"model": source, "manifest": manifest.file, "commit": commit()}
        items = answer_split(model, manifest, path, c, matters, about, rank, world)
        if rank == 0:
            kept[name] = items
            rows[name] = score_split(name, items, c, model.config.clap_checkpoint)
            answers.finish(path, items, matters, about)
            if "audio_id" in manifest.items[0]:
                records.write_official(path.removesuffix("l"), manifest.items, items)
            unheard = [item["unheard"] for item in items if "unheard" in item]
            if unheard:
                print(truncation_warning(len(items), len(unheard), sum(unheard), model.audio_config), flush=True)
    if rank == 0 and c.scores:
        table.add_scores(settings.resolve_path(c.scores), rows)
    if rank == 0 and c.report:
        def load(name, item):  # as the model heard it
            clip = Clips([manifests[name]], None, model.audio_config)[item["id"]]
            if "error" in clip:
                raise UserError(clip["error"])
            windows, several = clip["windows"], len(clip["n_windows"]) > 1
            return windows, None if several else attention_over_time(model, item["prompt"], windows)

        pages.write_report(os.path.join(folder, "report.html"), rows, kept, load,
                           rate=model.audio_config["sample_rate"])
    wait(world)


def answers_folder(c, source):
    """--results; else eval/ in the run, or out/eval/<model> for a release."""
    if c.results:
        return settings.resolve_path(c.results)
    run = settings.resolve_path(source)
    run = os.path.dirname(run) if os.path.isfile(run) else run
    if not os.path.isdir(run) or os.path.isdir(os.path.join(run, "safe_ckpt")):
        return settings.resolve_path(os.path.join("out/eval", source.strip("/").replace("/", "--")))
    return os.path.join(run, "eval")


def score_files(c):
    """Score the answers of any system."""
    if not c.task or len(c.files) != 1:
        raise UserError("usage: eval.py score answers.jsonl --task=Name-Task")
    items, folder = records.read_answers(c.files[0]), c.results and settings.resolve_path(c.results)
    records.check_places(c, folder)
    row = score_split(c.task, items, c, c.clap_checkpoint)
    if folder:
        os.makedirs(folder, exist_ok=True)
        records.write_items(os.path.join(folder, c.task.replace("/", "--") + ".jsonl"), items)
        if c.report:
            pages.write_report(os.path.join(folder, "report.html"), {c.task: row}, {c.task: items})
    if c.scores:
        table.add_scores(settings.resolve_path(c.scores), {c.task: row})


def compare_files(c):
    """The paired test of two systems' answers; --task scores them first."""
    if len(c.files) != 2:
        raise UserError("usage: eval.py compare a.jsonl b.jsonl [--task=Name-Task]")
    both = [records.read_answers(path) for path in c.files]
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # | head
    for items in both if c.task else ():
        score_split(c.task, items, c, c.clap_checkpoint)
    compare(*both, names=c.files)


if __name__ == "__main__":
    command = {"score": score_files, "compare": compare_files}.get("".join(sys.argv[1:2]))
    if command:
        del sys.argv[1]
    settings.run(command or main, "eval.py", READS, files=bool(command))
