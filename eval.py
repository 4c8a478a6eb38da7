"""Score a model on manifests: run the split, keep every answer, print the metric that belongs to the task.

    python eval.py --split Clotho-AQA-AQA/test                                 # the newest run
    python eval.py --split GM-Family-AQA/test,GM-Order-AQA/test --init_from=out/demo
    python eval.py --split MMAU/test-mini --init_from=nvidia/audio-flamingo-2  # MMAU's own JSON file will do
    python eval.py score answers.jsonl --task=Clotho-AQA-AQA                   # the answers of any system
    python eval.py compare a.jsonl b.jsonl                                     # paired test of two of them

Answers go to <results>/<Name-Task>--<split>.jsonl, one item a line; started again, only missing ones are
answered. Decoding is greedy, 256 new tokens at most. Rules by task name, see METRICS; --metric overrides.
"""
import os
import re
import signal
import sys
from functools import partial

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

import config as settings
from checkpoint import fingerprint
from data import Clips, Manifest, truncation_warning
from sample import load_weights, read_model
from tools.common import UserError, check_folder_writable, check_writable, commit, name_disk_errors
from tools.eval import records
from tools.eval.captions import captioning
from tools.eval.clap_text import pick_text_encoder
from tools.eval.parsing import (answer_text, item_options, labels_of, marks_in, normalise, option_named, options_of,
                                reference_option, split_mark)
from tools.eval.report import result_lines, results_row, write_report
from tools.eval.rules import closed_set, cmm, entailment, multi_label, nsynth
from tools.eval.stats import compare_systems
from tools.sample.attention_map import attention_over_time
from tools.sample.decoding import Sampling, answer_items

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
# Rules: items {"prompt", "output" (the reference answer), "answer"} -> {figure: value}, the headline first. A list
# holds a value per item (None: the item does not count in this figure) and gets a mean and an interval; numbers and
# words are printed as they are. An empty answer is wrong under every rule.


def official_mmau(reference, answer, options):
    """MMAU's token rule: all tokens of the right option, and none that only another option has."""
    right, answer, *others = (set(re.findall(r"\b\w+\b", text.lower())) for text in (reference, answer, *options))
    return float(bool(answer) and right <= answer and not answer & (set().union(*others) - right))


def multiple_choice(items):
    """MMAU's official rule on the options' texts: "accuracy" with the answer as it is. Beside it without a leading
    mark: "(A) woman and child" is wrong officially where another option holds "a". And "as read": the option that
    the answer names to a reader, by letter, text or both."""
    official, mark_stripped, as_read, chances = [], [], [], []
    for item in items:
        options, answer = item_options(item), answer_text(item)
        right = reference_option(item["output"], options)
        named = option_named(answer, options) if answer else None
        item["predicted"] = None if named is None else options[named]
        official.append(official_mmau(right, answer, options))
        mark_stripped.append(official_mmau(right, split_mark(answer, len(options))[1] or answer, options))
        as_read.append(float(named is not None and normalise(options[named]) == normalise(right)))
        chances.append(1 / max(len(options), 1))
    return {"accuracy": official, "mark stripped": mark_stripped, "as read": as_read,
            "chance": sum(chances) / len(chances)}


def muchomusic(items):
    """MuChoMusic: the one option letter that stands alone, else the first option whose text is contained, else
    unanswered. An answer that is an option's text names it: the A of "A female voice" is an article."""
    right, unanswered = [], []
    for item in items:
        options, answer = item_options(item), answer_text(item)
        chosen = [i for i, option in enumerate(options) if normalise(option) == normalise(answer)][:1]
        chosen = chosen or list(marks_in(answer, len(options), capitals=True))
        if len(chosen) != 1:
            chosen = [i for i, option in enumerate(options) if option.lower() in answer.lower()]
        item["predicted"] = options[chosen[0]] if chosen else None
        reference = normalise(reference_option(item["output"], options))
        right.append(float(bool(chosen) and normalise(item["predicted"]) == reference))
        unanswered.append(float(not chosen))
    return {"accuracy": right, "unanswered": unanswered, "chance": 0.25}


def clotho_aqa(items):
    """Three answers joined by ", ". Unanimous: the questions answered yes or no by all three alike; non-binary:
    those that none answered with yes or no, right if the answer equals any of the three. Others do not count."""
    accuracy, unanimous, non_binary = [], [], []
    for item in items:
        three, answer = [normalise(text) for text in item["output"].split(",")], answer_text(item)
        binary = [text in ("yes", "no") for text in three]
        right = float(bool(answer) and normalise(answer) in three)
        unanimous.append(right if all(binary) and len(set(three)) == 1 else None)
        non_binary.append(None if any(binary) else right)
        accuracy.append(non_binary[-1] if unanimous[-1] is None else right)
    return {"accuracy": accuracy, "unanimous": unanimous, "non-binary": non_binary}


def exact_match(items):
    """The same labels in any order, after lower-casing and dropping punctuation and articles."""
    right = []
    for item in items:
        item["predicted"] = answer_text(item)
        right.append(float(bool(item["predicted"]) and labels_of(item["predicted"]) == labels_of(item["output"])))
    return {"accuracy": right, "chance": 1 / len({normalise(item["output"]) for item in items})}


# The first pattern found in Name-Task decides; instead of the last two, prompts with options take multiple_choice.
METRICS = [(r"MuChoMusic", muchomusic), (r"MMAU", multiple_choice), (r"Clotho-AQA", clotho_aqa),
           (r"Entailment", entailment), (r"CMM", cmm), (r"FSD50k", multi_label), (r"NSynth", nsynth),
           (r"AudioCaptioning|AudioDescription|Tagging", captioning),
           (r"(Event|Scene|Emotion|Sentiment|Genre|Instr|Vocal)Classification|MIR$", closed_set),
           (r"", exact_match)]


def choose_rule(task, items, metric=None):
    """The rule of that name, else the one that belongs to the task."""
    rules = {rule.__name__: rule for _, rule in METRICS}
    if metric is not None:
        if metric not in rules:
            raise UserError(f"metric = {metric!r}, expected one of {', '.join(rules)}")
        return rules[metric]
    rule = next(rule for pattern, rule in METRICS if re.search(pattern, task, re.I))
    with_options = sum(bool(options_of(item["prompt"])) for item in items)
    return multiple_choice if rule in (exact_match, closed_set) and with_options > len(items) / 2 else rule


def score_split(name, items, c, clap_checkpoint=None):
    """Set "score" on the items by their task's rule, print the results row and return it. Items without a reference
    (MMAU's test split) are not scored. clap_checkpoint: its text encoder is used for closed sets."""
    rule = choose_rule(name.split("/")[0], items, c.metric)
    counted, context = [item for item in items if item["output"].strip() or rule is captioning], {}
    for item in items:
        item["score"] = None
    if rule in (closed_set, multi_label, nsynth):
        context = {"labels": records.read_labels(c.labels), "embed": pick_text_encoder(clap_checkpoint, c)}
    figures = rule(counted, **context) if counted else {"accuracy": None}
    headline = next(iter(figures.values()))
    if isinstance(headline, list):
        for item, score in zip(counted, headline):
            item["score"] = score
    row = results_row(figures, counted, rule.__name__)
    if len(counted) < len(items):
        row["without a reference"] = len(items) - len(counted)
    print(*result_lines(name, row), sep="\n", flush=True)
    return row


# ------------------------------------------------------------------------------------------------------------
# Answers


def answer_split(model, manifest, stem, identity, c, rank, world):
    """Answer what is not cached, this rank's share of it; -> on rank 0 all items, in the manifest's order."""
    keys = [records.answer_key(identity, manifest[i]) for i in range(len(manifest))]
    cached = records.read_cache(stem)
    missing = [i for i, key in enumerate(keys) if key not in cached]
    changed = records.changed_identity(stem + ".jsonl", identity)
    if rank == 0 and missing and (cached or changed):
        print(f"{manifest.name}: asking {len(missing)} of {len(keys)} questions, the other answers are cached",
              *changed, sep=" | ", file=sys.stderr, flush=True)
    barrier(world)  # all ranks have read the cache before one writes: the same shares
    clips, share = Clips([manifest], None, model.audio_config), missing[rank::world]
    loader = DataLoader(clips, batch_size=None, sampler=share, num_workers=min(c.num_workers, len(share)))
    pending = []  # (index, clip) of the questions that the model was asked
    path = f"{stem}.cache{rank}.jsonl"
    bar = tqdm(total=len(share), desc=manifest.name, unit="clip", disable=None if rank == 0 else True)
    with name_disk_errors(path), open(path, "a") as f, bar:

        def keep(i, clip, text):
            entry = {"answer": text}
            if "error" in clip:
                entry["error"] = clip["error"]  # an unreadable clip counts as wrong, and is reported
            elif clip["truncated_seconds"]:
                entry["truncated_seconds"] = round(clip["truncated_seconds"], 2)
            records.append_answer(f, keys[i], entry)
            bar.update()

        def questions():
            for i, clip in zip(share, loader):
                if "error" in clip:
                    keep(i, clip, "")
                else:
                    pending.append((i, clip))
                    yield clip["prompt"], clip.pop("windows"), clip["n_windows"]

        sampling = Sampling(max_new_tokens=c.max_new_tokens)
        for index, text in answer_items(model, questions(), c.eval_batch_size, sampling):
            keep(*pending[index], text)
    barrier(world)
    cached = records.read_cache(stem) if rank == 0 else {}
    return [records.item_of(manifest, i, cached[key]) for i, key in enumerate(keys) if rank == 0]


def barrier(world):
    if world > 1:
        dist.barrier()


def open_split(name, c):
    """The manifest Name-Task/split; also MMAU's official question file in its place."""
    path = os.path.join(settings.resolve_path(c.dataset_file_root), name + ".json")
    open_manifest = partial(Manifest, data_root=settings.resolve_path(c.data_root))
    if os.path.isfile(path) and records.is_official(path):
        return records.open_questions(path, name, open_manifest)
    return open_manifest(path)


def start_ranks(c):
    """-> rank, number of ranks; each takes a GPU of its own where there are any."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")
        if c.device == "auto" and torch.cuda.is_available():
            c.device = f"cuda:{os.environ['LOCAL_RANK']}"
    return rank, world


def check_outputs(c, folder):
    """Fail before the long work where results could not be written or labels not be read."""
    if folder:
        check_folder_writable(folder)
    if c.scores:
        check_writable(settings.resolve_path(c.scores))
        records.read_scores(settings.resolve_path(c.scores))
    records.read_labels(c.labels)


def results_folder(c, source):
    """--results; else eval/ in the run, or out/eval/<model> for a release."""
    if c.results:
        return settings.resolve_path(c.results)
    path = settings.resolve_path(source)
    path = os.path.dirname(path) if os.path.isfile(path) else path
    if os.path.isdir(path) and not os.path.isdir(os.path.join(path, "safe_ckpt")):
        return os.path.join(path, "eval")
    return settings.resolve_path(os.path.join("out/eval", source.strip("/").replace("/", "--")))


def main(c):
    names = [name.strip() for name in c.split.split(",") if name.strip()]
    if not names:
        raise UserError("give --split Name-Task/split, of dataset_file_root, e.g. Clotho-AQA-AQA/test")
    choose_rule("", [], c.metric)
    rank, world = start_ranks(c)
    source, model, state = read_model(c)
    for root in {"dataset_file_root", "data_root"} - set(c.user_set):  # by default the run's own data
        setattr(c, root, getattr(model.config, root))
    manifests = {name: open_split(name, c) for name in names}
    folder = results_folder(c, source)
    check_outputs(c, folder)
    model = load_weights(c, source, model, state)
    identity = {"weights": fingerprint(model.state_dict()), "dtype": str(model.lm.norm.weight.dtype),
                "max_new_tokens": c.max_new_tokens, "audio": model.audio_config}
    os.makedirs(folder, exist_ok=True)
    rows, items = {}, {}
    for name, manifest in manifests.items():
        stem = os.path.join(folder, name.replace("/", "--"))
        items[name] = answer_split(model, manifest, stem, identity, c, rank, world)
        if rank == 0:
            rows[name] = score_split(name, items[name], c, model.config.clap_checkpoint)
            header = {"identity": identity, "model": source, "manifest": manifest.file, "commit": commit()}
            records.write_items(stem + ".jsonl", items[name], header)
            if "audio_id" in manifest.items[0]:
                records.write_official(stem + ".json", manifest.items, items[name])
            truncated = [item["truncated_seconds"] for item in items[name] if "truncated_seconds" in item]
            if truncated:
                print(truncation_warning(len(items[name]), len(truncated), sum(truncated), model.audio_config))
    if rank == 0 and c.scores:
        records.add_scores(settings.resolve_path(c.scores), rows)
    if rank == 0 and c.report:
        def load(name, item):
            """-> the windows as the model got them, and its attention after the prompt (of one clip)."""
            clip = Clips([manifests[name]], None, model.audio_config)[item["id"]]
            if "error" in clip:
                raise UserError(clip["error"])
            windows, single = clip["windows"], len(clip["n_windows"]) == 1
            return windows, attention_over_time(model, item["prompt"], windows) if single else None

        write_report(os.path.join(folder, "report.html"), rows, items, load, model.audio_config["sample_rate"])
    barrier(world)


def score_file(c):
    """Score the answers of any system."""
    if not c.task or len(c.files) != 1:
        raise UserError("usage: eval.py score answers.jsonl --task=Name-Task")
    items, folder = records.read_answers(c.files[0]), c.results and settings.resolve_path(c.results)
    check_outputs(c, folder)
    row = score_split(c.task, items, c, c.clap_checkpoint)
    if folder:
        os.makedirs(folder, exist_ok=True)
        records.write_items(os.path.join(folder, c.task.replace("/", "--") + ".jsonl"), items)
        if c.report:
            write_report(os.path.join(folder, "report.html"), {c.task: row}, {c.task: items})
    if c.scores:
        records.add_scores(settings.resolve_path(c.scores), {c.task: row})


def compare_files(c):
    """The paired comparison of two systems' answers; --task scores them first."""
    if len(c.files) != 2:
        raise UserError("usage: eval.py compare a.jsonl b.jsonl [--task=Name-Task]")
    systems = [records.read_answers(path) for path in c.files]
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # | head
    if c.task:
        for items in systems:
            score_split(c.task, items, c, c.clap_checkpoint)
    compare_systems(*systems, names=c.files)


if __name__ == "__main__":
    command = {"score": score_file, "compare": compare_files}.get("".join(sys.argv[1:2]))
    if command:
        del sys.argv[1]
    settings.run(command or main, "eval.py", READS, files=bool(command))
