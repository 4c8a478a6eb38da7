"""The README.md of a release: its data, training settings, scores and licences."""
import json
import os
import re

import config as settings
from tools.common import read_json_object

SETTINGS_SHOWN = ("learning_rate", "clap_learning_rate", "lr_scheduler", "warmup_steps", "weight_decay",
                  "batch_size", "gradient_accumulation_steps", "num_epochs", "dataset_blending_global_weight",
                  "precision", "seed", "freeze_lm_embeddings", "unfreeze_full_lm", "clap_finetune")
SECTIONS = (("Data", "data", "manifest | weight"), ("Training", "settings", "setting | value"),
            ("Scores", "scores", "task | scores"))  # heading, name among the facts, columns
LICENCES = {"Qwen2.5-0.5B": "Apache-2.0", "Qwen2.5-1.5B": "Apache-2.0",
            "Qwen2.5-3B": "Qwen Research License (non-commercial)", "SmolLM2-135M": "Apache-2.0",
            "smollm2": "Apache-2.0"}  # the last part of a hub id, or of a folder's path
NVIDIA = ("Derived from NVIDIA's Audio Flamingo 2 weights: NVIDIA OneWay Noncommercial License, for "
          "non-commercial use; the training sets, some written by OpenAI's models, have their own terms.")


def public_name(path):
    """A hub id, or the last part of a path on this machine: cards tell nothing of its folders."""
    if cached := re.search(r"models--(.+?)--(.+?)/snapshots/", path):  # in a cache of the hub
        return "/".join(cached.groups())
    is_local = path.startswith(("/", "~")) or os.path.exists(settings.resolve_path(path))
    return os.path.basename(os.path.normpath(path)) if is_local else path


def run_facts(saved, folder, base):
    """{what a card tells of a training run}, from its checkpoint and scores.json. base: facts of the model
    that it started from, whose data and scores are not the run's."""
    c = saved.get("config")
    if c is None:  # of the published code
        return base
    facts = settings.pick(base, ("language_model", "nvidia", "encoder"))
    facts["data"] = c.get("dataset_blending_config")
    facts["settings"] = settings.pick(c, SETTINGS_SHOWN) | {"steps": saved.get("step")}
    if c.get("clap_checkpoint") and not c.get("pretrained_path"):
        facts["encoder"] = public_name(c["clap_checkpoint"])
    scores = os.path.join(folder, "scores.json")
    if os.path.isfile(scores):
        facts["scores"] = read_json_object(scores).get("tasks")
    return facts


def markdown_table(columns, rows):
    lines = [columns, "--- | ---", *(f"{name} | {value}" for name, value in rows.items())]
    return "".join(f"| {line} |\n" for line in lines)


def model_card(config, model):
    """config: the content of the release's config.json -> Markdown."""
    facts, lm = config["about"], config["lang_encoder_path"]
    minutes = config["max_num_window"] * (config["window_length"] - config["window_overlap"]) / 60
    count = sum(p.numel() for p in model.parameters())
    parts = [f"---\nbase_model: {json.dumps(lm)}\npipeline_tag: audio-text-to-text\n---\n",
             "# An Audio Flamingo 2 model\n",
             f"Answers questions about sounds of up to {minutes:.3g} minutes. {count:,} parameters, those of "
             f"the language model {lm} included. Paper: arXiv 2503.03983.\n",
             "```\npython sample.py --audio clip.wav --init_from <this folder>\n```\n"]
    for heading, name, columns in SECTIONS:
        if facts.get(name):
            parts += [f"## {heading}\n", markdown_table(columns, facts[name])]
    licence = LICENCES.get(lm.split("/")[-1], "that of its publisher")
    parts += ["## Licences\n", f"- Language model {lm}: {licence}."]
    if facts.get("nvidia"):
        parts.append(f"- {NVIDIA}")
    elif facts.get("encoder"):
        parts.append(f"- Audio encoder, started from {facts['encoder']}: that of its publisher; of NVIDIA's "
                     f"releases, NVIDIA OneWay Noncommercial License.")
    return "\n".join(parts) + "\n"
