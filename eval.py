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
import sys

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

import config as settings
from checkpoint import fingerprint
from data import Clips, Manifest
from sample import load_weights, read_model
from tools.common import (RANK_TIMEOUT, UserError, check_folder_writable, check_not_read, check_writable,
                          commit)
from tools.eval import records
from tools.eval.captions import captioning
from tools.eval.clap_text import pick_text_encoder
from tools.eval.parsing import (answer_text, fold, item_options, marks_in, normalise, option_named,
                                reference_option, references_of, split_mark)
from tools.eval.report import result_lines, results_row, write_report
from tools.eval.rules import closed_set, cmm, entailment, exact_match, multi_label, nsynth, per_item
from tools.eval.stats import compare_systems
from tools.html_page import clip_html
from tools.sample.asking import answer_key, append_line, truncation_note
from tools.sample.decoding import Sampling, answer_items, encode_questions

split: str = ""  # Name-Task/split, or several separated by commas
init_from: str | None = None  # run, checkpoint file, release directory or hub id; None: the newest run
metric: str | None = None  # name of a rule below instead of the one chosen by the task's name
task: str | None = None  # Name-Task or Name-Task/split of the answers to score
labels: str | None = None  # file of a closed label set, one a line; None: the labels of the split
matching: str = "auto"  # closed sets: retrieval (CLAP's text encoder), exact; auto: what there is
text_encoder: str = "google/flan-t5-large"  # directory or hub id of that encoder's config and tokenizer
results: str | None = None  # folder of the answers; None: eval/ in the run, or out/eval/<model> for a release
report: bool = True  # write <results>/report.html: the table, and the worst items to listen to
scores: str | None = None  # JSON file to add {"tasks": {split: {"accuracy", "chance", "n", "intervals"}}} to
max_new_tokens: int = 256  # at most, per answer
eval_batch_size: int = 16  # clips answered at once
int8: bool = False  # weights of a byte each, on a CPU: less time per token
compile: bool = False  # torch.compile for the decoding step: a minute first, then less per token
READS = (*settings.LOADING, "expdir", "dataset_file_root", "data_root", "num_workers", "device", "precision")

# ------------------------------------------------------------------------------------------------------------
# Rules: items {"prompt", "output" (the reference answer), "answer"} -> {figure: value}, the headline first. A
# list holds a value per item (None: the item does not count in this figure) and gets a mean and an interval;
# numbers and words are printed as they are. An empty answer is wrong under every rule. Rules that need no
# other items than the one they score are per_item: item -> {figure: its value}.


def official_mmau(reference, answer, options):
    """MMAU's token rule: all tokens of the right option, and none that only another option has."""

    def tokens(text):
        return set(re.findall(r"\b\w+\b", text.lower()))

    right, answer = tokens(reference), tokens(answer)
    wrong = set().union(*map(tokens, options)) - right
    return bool(answer) and right <= answer and not answer & wrong


@per_item
def multiple_choice(item):
    """MMAU's official rule on the options' texts: "accuracy" with the answer as it is. Beside it without a
    leading mark: "(A) woman and child" is wrong officially where another option holds "a". And "as read": the
    option that the answer names to a reader, by letter, text or both."""
    options, answer = item_options(item), answer_text(item)
    references = [reference_option(text, options) for text in references_of(item)]
    right = set(map(normalise, references))
    named = option_named(answer, options) if answer else None
    without_mark = split_mark(answer, options)[1] or answer
    official, stripped = (any(official_mmau(reference, text, options) for reference in references)
                          for text in (answer, without_mark))
    return {"accuracy": official, "mark stripped": official or stripped,
            "as read": named is not None and normalise(options[named]) in right,
            "chance": sum(normalise(option) in right for option in options) / max(len(options), 1)}


@per_item
def muchomusic(item):
    """MuChoMusic: the one option letter that stands alone, else the first option whose text is contained,
    else unanswered. An answer that is an option's text names it: the A of "A female voice" is an article."""
    options, answer = item_options(item), answer_text(item)
    right = {normalise(reference_option(text, options)) for text in references_of(item)}
    chosen = [option for option in options if normalise(option) == normalise(answer)][:1]
    if not chosen:
        chosen = [options[mark] for mark in marks_in(answer, options, capitals=True)]
    if len(chosen) != 1:
        chosen = [option for option in options if fold(option) in fold(answer)]
    return {"accuracy": bool(chosen) and normalise(chosen[0]) in right, "unanswered": not chosen,
            "chance": len(right) / len(options) if options else 0}


@per_item
def clotho_aqa(item):
    """Three answers, a list or joined by ", ". Unanimous: the questions answered yes or no by all three
    alike; non-binary: those that none answered with yes or no, right if the answer equals any of the three.
    Others do not count."""
    answer, three = answer_text(item), item.get("references") or [item["output"]]
    if len(three) == 1:
        three = three[0].split(",")
    three = [normalise(text) for text in three if text.strip()]
    binary = [text in ("yes", "no") for text in three]
    right = bool(answer) and normalise(answer) in three
    unanimous = right if all(binary) and len(set(three)) == 1 else None
    non_binary = None if any(binary) else right
    return {"accuracy": non_binary if unanimous is None else unanimous, "unanimous": unanimous,
            "non-binary": non_binary}


# The first pattern found in Name-Task decides; instead of the last two, prompts with options take
# multiple_choice.
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
    with_options = sum(bool(item_options(item)) for item in items)
    return multiple_choice if rule in (exact_match, closed_set) and with_options > len(items) / 2 else rule


def scored_part(name, items, c):
    """-> the rule of the task, the items that it counts, and the label set of a file. Items without a
    reference (MMAU's test split) do not count."""
    rule = choose_rule(name.split("/")[0], items, c.metric)
    counted = [item for item in items if item["output"].strip() or rule is captioning]
    return rule, counted, records.read_labels(c.labels, counted if rule in (closed_set, multi_label) else ())


def score_split(name, items, c, clap_checkpoint=None):
    """Set "score" on the items by their task's rule, print the results row and return it. clap_checkpoint:
    its text encoder is used for closed sets."""
    rule, counted, labels = scored_part(name, items, c)
    context = {}
    for item in items:
        item["score"] = None
        item.pop("predicted", None)  # by an earlier rule
    if rule in (closed_set, multi_label, nsynth):
        context = {"labels": labels, "embed": pick_text_encoder(clap_checkpoint, c)}
    figures = rule(counted, **context) if counted else {"accuracy": None}
    if context:
        figures["matching"] = "retrieval" if context["embed"] else "exact"
    headline = next(iter(figures.values()))
    if isinstance(headline, list):
        for item, score in zip(counted, headline):
            item["score"] = None if score is None else float(score)
    row = results_row(figures, counted, rule.__name__)
    if len(counted) < len(items):
        row["without a reference"] = len(items) - len(counted)
    print(*result_lines(name, row), sep="\n", flush=True)
    return row


# ------------------------------------------------------------------------------------------------------------
# Answers


def check_question(model, clip):
    """A clip of Clips -> an item of decoding.py; UserError where it is unreadable or its prompt too long."""
    if "error" in clip:
        raise UserError(clip["error"])
    item = clip["prompt"], clip["windows"], clip["n_windows"]
    encode_questions(model, [item])
    return item


def answer_split(model, manifest, cache, identity, c, rank, world):
    """Answer what is not cached, this rank's share of it; -> on rank 0 all items, in the manifest's order."""
    keys = []
    for clip in map(manifest.__getitem__, range(len(manifest))):
        asked = [identity, clip["paths"], clip["start"], clip["duration"]]
        keys.append(answer_key(asked, clip["prompt"], clip["paths"]))
    cached = records.read_cache(cache)
    uncached = [i for i, key in enumerate(keys) if key not in cached]
    if rank == 0 and cached and uncached:
        print(f"{manifest.name}: asking {len(uncached)} of {len(keys)} questions that have no cached answer",
              "of these weights, dtype, token limit, audio settings, clip and prompt", file=sys.stderr)
    wait_for_ranks()  # all ranks have read the cache before one writes: the same shares
    share = uncached[rank::world]
    loader = DataLoader(Clips([manifest], None, model.audio_config), batch_size=None, sampler=share,
                        num_workers=min(c.num_workers, len(share)))
    pending = []  # (key, truncated seconds) in the order of asking
    path = f"{cache}{rank}.jsonl"

    def questions():
        bar = tqdm(loader, manifest.name, len(share), unit="clip", disable=rank > 0 or None)
        for i, clip in zip(share, bar):
            try:
                item = check_question(model, clip)
            except UserError as error:  # it counts as wrong, and is reported
                append_line(path, {"key": keys[i], "answer": "", "error": str(error)})
                continue
            pending.append((keys[i], round(clip["truncated_seconds"], 2)))
            yield item

    sampling = Sampling(max_new_tokens=c.max_new_tokens)
    for index, text in answer_items(model, questions(), c.eval_batch_size, sampling):
        key, truncated = pending[index]
        append_line(path, {"key": key, "answer": text, "truncated_seconds": truncated})
    wait_for_ranks()
    if rank:
        return []
    cached = records.read_cache(cache)
    return [records.item_of(manifest, i, cached[key]) for i, key in enumerate(keys)]


def start_ranks(c):
    """-> rank, number of ranks, from torchrun's environment; each rank takes a GPU of its own."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo", timeout=RANK_TIMEOUT)
        if c.device == "auto" and torch.cuda.is_available():
            c.device = f"cuda:{os.environ['LOCAL_RANK']}"
    return rank, world


def wait_for_ranks():
    if dist.is_initialized():
        dist.barrier()


def open_split(name, c):
    """The manifest Name-Task/split, also MMAU's official question file in its place, with its items checked
    as scoring needs them."""
    path = os.path.join(settings.resolve_path(c.dataset_file_root), name + ".json")
    data_root = settings.resolve_path(c.data_root)
    official = os.path.isfile(path) and records.is_json_list(path)
    manifest = records.open_questions(path, name, data_root) if official else Manifest(path, data_root)
    items = [records.item_of(manifest, i, {"answer": ""}) for i in range(len(manifest))]
    if not items:
        raise UserError(f"{path}: holds no item to score")
    scored_part(name, items, c)
    return manifest


def results_folder(c, source):
    """--results; else eval/ in the run, or out/eval/<model> for a release."""
    run = settings.resolve_path(source)
    run = os.path.dirname(run) if os.path.isfile(run) else run
    folder = os.path.join(run, "eval")
    if os.path.isdir(os.path.join(run, "safe_ckpt")) or not os.path.isdir(run):
        folder = os.path.join("out/eval", source.strip("/").replace("/", "--"))
    return settings.resolve_path(c.results or folder)


def check_files(c, folder):
    """Fail before the long work where results cannot be written."""
    if folder:
        check_folder_writable(folder)
    if c.scores:
        c.scores = settings.resolve_path(c.scores)
        check_writable(c.scores)
        records.read_scores(c.scores)


def results_file(folder, name, ending=".jsonl"):
    return os.path.join(folder, name.replace("/", "--") + ending)


def report_file(folder):
    return os.path.join(folder, "report.html")


def save_scores(c, folder, rows, items, sound_of):
    if c.scores:
        records.add_scores(c.scores, rows)
    if c.report and folder:
        write_report(report_file(folder), rows, items, sound_of)


def main(c):
    names = [name.strip() for name in c.split.split(",") if name.strip()]
    if not names or not all(re.fullmatch(r"[^./][^/]*/[^/]+", name) for name in names):
        raise UserError("give --split Name-Task/split, of dataset_file_root, e.g. Clotho-AQA-AQA/test")
    choose_rule("", [], c.metric)
    rank, world = start_ranks(c)
    source, model, state = read_model(c)
    for root in {"dataset_file_root", "data_root"} - set(c.user_set):  # by default the run's own data
        setattr(c, root, getattr(model.config, root))
    manifests = {name: open_split(name, c) for name in names}
    folder = results_folder(c, source)
    check_files(c, folder)
    model = load_weights(c, source, model, state)
    identity = {"weights": fingerprint(model.state_dict()), "dtype": str(model.lm.norm.weight.dtype),
                "max_new_tokens": c.max_new_tokens, "audio": model.audio_config}
    os.makedirs(folder, exist_ok=True)
    rows, items = {}, {}
    for name, manifest in manifests.items():
        cache = results_file(folder, name, ".cache")
        items[name] = answer_split(model, manifest, cache, identity, c, rank, world)
        if rank == 0:
            rows[name] = score_split(name, items[name], c, model.config.clap_checkpoint)
            header = {"identity": identity, "model": source, "manifest": manifest.file, "commit": commit()}
            records.write_items(results_file(folder, name), [header, *items[name]])
            if "audio_id" in manifest.items[0]:
                records.write_official(results_file(folder, name, ".json"), manifest.items, items[name])
            if note := truncation_note([item.get("truncated_seconds", 0) for item in items[name]], model):
                print(note, flush=True)

    def sound_of(name, item):
        """The windows as the model got them."""
        clip = Clips([manifests[name]], None, model.audio_config)[items[name].index(item)]
        return "" if "error" in clip else clip_html(clip["windows"], model.audio_config["sample_rate"])

    if rank == 0:
        save_scores(c, folder, rows, items, sound_of)
    wait_for_ranks()


def score_file(c):
    """Score the answers of any system."""
    if not c.task or len(c.files) != 1:
        raise UserError("usage: eval.py score answers.jsonl --task=Name-Task")
    items = records.read_answers(c.files[0])
    folder = c.results and settings.resolve_path(c.results)
    check_files(c, folder)
    if folder:
        for output in (results_file(folder, c.task), report_file(folder)):
            check_not_read(output, c.files)
    row = score_split(c.task, items, c, c.clap_checkpoint)
    if folder:
        os.makedirs(folder, exist_ok=True)
        records.write_items(results_file(folder, c.task), items)
    save_scores(c, folder, {c.task: row}, {c.task: items}, lambda name, item: "")


def compare_files(c):
    """The paired comparison of two systems' answers; --task scores them first."""
    if len(c.files) != 2:
        raise UserError("usage: eval.py compare a.jsonl b.jsonl [--task=Name-Task]")
    systems = [records.read_answers(path) for path in c.files]
    if c.task:
        for items in systems:
            score_split(c.task, items, c, c.clap_checkpoint)
    compare_systems(*systems, names=c.files)


if __name__ == "__main__":
    command = {"score": score_file, "compare": compare_files}.get("".join(sys.argv[1:2]))
    if command:
        del sys.argv[1]
    settings.run(command or main, "eval.py", READS, files=bool(command))
