"""Score a model on manifests: run the split, keep every answer, print the metric that belongs to the task.

    python eval.py --split Clotho-AQA-AQA/test                                       # the newest run
    python eval.py --split GM-Family-AQA/test,GM-Order-AQA/test --init_from=out/demo
    python eval.py --split MMAU/test --init_from=nvidia/audio-flamingo-2 --metric=multiple_choice

Answers go to <results>/<Name-Task>--<split>.jsonl, one item a line; started again, only what is missing is
answered. Decoding is greedy, 256 new tokens at most. Rules by task name, see METRICS; --metric overrides.
"""
import json
import os
import re
from collections import Counter

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import config as settings
from data import Clips, open_manifests, unheard_note
from sample import load_model

split: str = ""  # Name-Task/split, or several separated by commas
init_from: str | None = None  # run directory, checkpoint file, release directory or hub id; None: the newest run
metric: str | None = None  # name of a rule below instead of the one chosen by the task's name
results: str | None = None  # folder of the answers; None: eval/ in the run, or out/eval/<model> for a release
scores: str | None = None  # JSON file to add {"tasks": {split: {"accuracy", "chance", "n"}}} to
max_new_tokens: int = 256  # at most, per answer
eval_batch_size: int = 16  # clips answered at once
READS = (*settings.LOADING, "expdir", "dataset_file_root", "data_root", "num_workers", "device", "precision")

# ------------------------------------------------------------------------------------------------------------
# Rules: items [{"prompt", "output" (what the manifest says), "answer" (what the model said), "labels"}] ->
# scores dict. "score" is set on every item; the first entry of the dict is the headline, in [0, 1].


def tokens(text):
    return set(re.findall(r"\b\w+\b", text.lower()))


def normalise(text):
    """Lower case, no punctuation, no articles, single spaces."""
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(w for w in words if w not in ("a", "an", "the"))


def choices_of(prompt):
    """The options of "... (A) xxx. (B) yyy." as ["(A) xxx.", "(B) yyy."]; [] if there are not two of them."""
    parts = re.split(r"(?=\([A-Z]\)\s)", prompt)
    options = [part.strip() for part in parts if re.match(r"\([A-Z]\)\s", part)]
    return options if len(options) > 1 else []


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else float("nan")


def multiple_choice(items):
    """MMAU's official token rule: all tokens of the right option said, and none that only a wrong option has.
    The manifest gives the right option with its letter or as its text alone."""
    for item in items:
        right, said = tokens(item["output"]), tokens(item["answer"])
        wrong = set().union(*(tokens(c) - right for c in choices_of(item["prompt"])
                              if right not in (tokens(c), tokens(c[3:]))))
        item["score"] = float(bool(said) and right <= said and not said & wrong)
    return {"accuracy": mean(i["score"] for i in items),
            "chance": mean(1 / max(len(choices_of(i["prompt"])), 1) for i in items)}


def muchomusic(items):
    """The one capital A-D that stands alone, else the first option whose text is contained, else
    unanswered."""
    unanswered = 0
    for item in items:
        options = choices_of(item["prompt"])
        letters = set(re.findall(r"\b[A-D]\b", item["answer"]))
        if len(letters) == 1:
            chosen = letters.pop()
        else:
            texts = [(o[1], re.sub(r"^\(\w\)\s*|\.$", "", o).lower()) for o in options]
            chosen = next((letter for letter, text in texts if text and text in item["answer"].lower()), None)
        unanswered += chosen is None
        right = re.match(r"\(?([A-D])\b", item["output"])
        right = right[1] if right else next((o[1] for o in options if normalise(item["output"]) == normalise(o[3:])), None)
        item["score"] = float(chosen is not None and chosen == right)
    return {"accuracy": mean(i["score"] for i in items), "unanswered": unanswered / len(items), "chance": 0.25}


def clotho_aqa(items):
    """Three answers joined by ", ". Unanimous: the questions answered yes or no by all three alike;
    non-binary: the questions no one answered with yes or no, right if the answer equals any of the three."""
    groups = {"unanimous": [], "non-binary": []}
    for item in items:
        said, three = normalise(item["answer"]), [normalise(x) for x in item["output"].split(", ")]
        item["score"] = float(said in three)
        if all(x in ("yes", "no") for x in three):
            if len(set(three)) == 1:
                groups["unanimous"].append(item["score"])
        elif not any(x in ("yes", "no") for x in three):
            groups["non-binary"].append(item["score"])
    return {"accuracy": mean(groups["unanimous"] + groups["non-binary"]), **{k: mean(v) for k, v in groups.items()},
            "n unanimous": len(groups["unanimous"]), "n non-binary": len(groups["non-binary"])}


def exact_match(items):
    """Equal after lower-casing and dropping punctuation and articles. Chance: the share of one of the set's
    answers."""
    for item in items:
        item["score"] = float(normalise(item["answer"]) == normalise(item["output"]))
    return {"accuracy": mean(i["score"] for i in items), "chance": 1 / len({normalise(i["output"]) for i in items})}


def closed_set(items):
    """Closed label set (that of the manifest), "exact": the normalised answer is the label. No text encoder
    is used."""
    return exact_match(items) | {"labels": len({normalise(i["output"]) for i in items}), "matching": "exact"}


def entailment(items):
    """The first of entailment, neutral, contradiction that the answer names."""
    for item in items:
        said = re.search(r"entailment|neutral|contradiction", item["answer"].lower())
        item["score"] = float(bool(said) and said[0] in item["output"].lower())
    return {"accuracy": mean(i["score"] for i in items), "chance": 1 / 3}


def cmm(items):
    """yes or no within the first five characters: accuracy on yes items (perception) and no items
    (hallucination)."""
    for item in items:
        said = re.search(r"yes|no", item["answer"].strip().lower()[:5])
        item["score"] = float(bool(said) and said[0] == normalise(item["output"])[:len(said[0])])
    part = lambda word: mean(i["score"] for i in items if normalise(i["output"]).startswith(word))
    return {"accuracy": mean(i["score"] for i in items), "perception": part("yes"), "hallucination resistance": part("no"),
            "chance": 0.5}


def captioning(items):
    """Answers are kept with their references (items of the same clip and prompt are one); no metric is
    computed yet."""
    for item in items:
        item["score"] = None
    return {"captions kept": len(items)}


# The first pattern found in Name-Task decides; prompts that list their options go by multiple_choice before
# the rest.
METRICS = ((r"MuChoMusic", muchomusic), (r"Clotho-AQA", clotho_aqa), (r"Entailment", entailment), (r"CMM", cmm),
           (r"AudioCaptioning|AudioDescription|Tagging", captioning),
           (r"(Event|Scene|Emotion|Sentiment|Genre|Instr|Vocal)Classification|MIR$", closed_set), (r"", exact_match))
RULES = {rule.__name__: rule for _, rule in METRICS} | {"multiple_choice": multiple_choice}

# Published 3B scores, in percent (Audio Flamingo 2, reported by its authors; not measured here)
PUBLISHED = {"Clotho-AQA-AQA/test": "unanimous 86.9, non-binary 52.6", "Music-AVQA-AQA_All/test": "72.3",
             "CochlScene-SceneClassification/test": "82.1", "NonSpeech7k-EventClassification/test": "84.3",
             "GTZAN-GenreClassification/test": "69.1", "Clotho-v2-AudioCaptioning/test": "CIDEr 0.46",
             "audiocaps-AudioCaptioning/test": "CIDEr 0.58", "FSD50k-EventClassification/test": "mAP 49.2"}


def choose_rule(task, items, name=None):
    if name is not None:
        if name not in RULES:
            raise ValueError(f"metric = {name!r}, expected one of {', '.join(RULES)}")
        return RULES[name]
    rule = next(rule for pattern, rule in METRICS if re.search(pattern, task))
    options = sum(bool(choices_of(item["prompt"])) for item in items)
    return multiple_choice if rule in (exact_match, closed_set) and options > len(items) / 2 else rule


# ------------------------------------------------------------------------------------------------------------
# Answers


def collate(items):
    return items


def answer_split(model, manifest, path, c):
    """Answer what the JSONL at `path` does not hold yet; -> all items in manifest order."""
    done = {}
    if os.path.exists(path):
        for line in open(path):
            try:
                item = json.loads(line)
            except ValueError:  # a line cut off when a run was killed: answered again
                continue
            done[item["id"]] = item
    for i, item in done.items():
        if i >= len(manifest) or (item["prompt"], item["audio"]) != (manifest[i]["prompt"], manifest[i]["path"]):
            raise ValueError(f"{path}: item {i} is not that of {manifest.file}; remove the file or give another --results")
    clips = Clips([manifest], None, model.hearing)
    todo = sorted((i for i in range(len(manifest)) if i not in done), key=lambda i: len(manifest[i]["prompt"]))
    batches = [todo[first:first + c.eval_batch_size] for first in range(0, len(todo), c.eval_batch_size)]
    loader = DataLoader(clips, batch_sampler=batches, collate_fn=collate, num_workers=min(c.num_workers, len(batches)))
    bar = tqdm(total=len(manifest), initial=len(done), desc=manifest.name, unit="clip", disable=None)
    with open(path, "a") as f, bar:
        if done:
            f.write("\n" if not open(path).read().endswith("\n") else "")
        for ids, loaded in zip(batches, loader):
            good = [(i, clip["windows"]) for i, clip in zip(ids, loaded) if clip["windows"] is not None]
            texts = model.generate([manifest[i]["prompt"] for i, _ in good], torch.cat([w for _, w in good]),
                                   torch.tensor([len(w) for _, w in good]), c.max_new_tokens) if good else []
            answers = {i: text for (i, _), text in zip(good, texts)}
            for i, clip in zip(ids, loaded):
                item = {"id": i, "audio": clip["path"], "prompt": clip["prompt"], "output": clip["output"],
                        "answer": answers.get(i, "")}
                if clip["windows"] is None:
                    item["error"] = clip["error"]  # an unreadable clip counts as wrong, and is reported
                elif clip["unheard"]:
                    item["unheard"] = round(clip["unheard"], 2)  # seconds beyond what is heard
                done[i] = item
                f.write(json.dumps(item, ensure_ascii=False) + "\n")
            f.flush()
            bar.update(len(ids))
    return [done[i] for i in range(len(manifest))]


def answers_folder(c, source):
    """--results; else eval/ in the run, or out/eval/<model> for a release."""
    if c.results:
        return settings.place(c.results)
    run = settings.place(source)
    run = os.path.dirname(run) if os.path.isfile(run) else run
    if not os.path.isdir(run) or os.path.isdir(os.path.join(run, "safe_ckpt")):
        return settings.place(os.path.join("out/eval", source.strip("/").replace("/", "--")))
    return os.path.join(run, "eval")


def main(c):
    if not c.split:
        raise ValueError("give --split Name-Task/split, a manifest under dataset_file_root, e.g. Clotho-AQA-AQA/test")
    names = c.split.split(",")
    if c.metric is not None:
        choose_rule("", [], c.metric)
    source, model = load_model(c)
    for name in ("dataset_file_root", "data_root"):  # not given: where the run's own data is
        if name not in c.given:
            setattr(c, name, getattr(model.config, name))
    manifests = open_manifests(c, names)
    folder = answers_folder(c, source)
    os.makedirs(folder, exist_ok=True)
    table = {}
    for name, manifest in manifests.items():
        path = os.path.join(folder, name.replace("/", "--") + ".jsonl")
        items = answer_split(model, manifest, path, c)
        if not items:
            raise ValueError(f"{manifest.file}: holds no item to score")
        rule = choose_rule(name.split("/")[0], items, c.metric)
        table[name] = rule(items) | {"n": len(items), "rule": rule.__name__}
        with open(path + ".tmp", "w") as f:
            f.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        os.replace(path + ".tmp", path)
        unheard = [item["unheard"] for item in items if "unheard" in item]
        if unheard:
            print(unheard_note(len(items), len(unheard), sum(unheard), model.hearing), flush=True)
        errors = Counter(bool(item.get("error")) for item in items)[True]
        shown = ", ".join(f"{k} {v:.1%}" if isinstance(v, float) else f"{k} {v}" for k, v in table[name].items())
        print(f"{name}: {shown}" + (f", unreadable clips {errors}" if errors else "") +
              (f" | published 3B: {PUBLISHED[name]}" if name in PUBLISHED else ""), flush=True)
    if c.scores:
        c.scores = settings.place(c.scores)
        kept = json.load(open(c.scores)) if os.path.exists(c.scores) else {}
        kept.setdefault("tasks", {}).update({n: {k: t[k] for k in ("accuracy", "chance", "n") if k in t}
                                             for n, t in table.items()})
        with open(c.scores + ".tmp", "w") as f:
            json.dump(kept, f, indent=1)
        os.replace(c.scores + ".tmp", c.scores)


if __name__ == "__main__":
    settings.run(main, "eval.py", READS)
