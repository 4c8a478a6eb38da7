"""The README.md of a release: what it was made of and how, whose licences hold."""
import json
import os
import re

import config as settings
from tools.common import UserError, read_json

CARD_OF_OURS = "<!-- written by save_release; without this line your changes stay when it writes again -->"
TOLD = ("learning_rate", "clap_learning_rate", "lr_scheduler", "warmup_steps", "weight_decay", "batch_size",
        "gradient_accumulation_steps", "num_epochs", "dataset_blending_global_weight", "precision", "seed",
        "freeze_lm_embeddings", "unfreeze_full_lm", "clap_finetune")
LICENCES = {"Qwen/Qwen2.5-0.5B": "Apache-2.0", "Qwen/Qwen2.5-1.5B": "Apache-2.0",
            "Qwen/Qwen2.5-3B": "Qwen Research License (non-commercial)",
            "HuggingFaceTB/SmolLM2-135M": "Apache-2.0", "smollm2": "Apache-2.0"}
NVIDIA = ("Derived from NVIDIA's Audio Flamingo 2 weights: NVIDIA OneWay Noncommercial License, for "
          "non-commercial use; the training sets, some written by OpenAI's models, have their own terms.")


def name_of(path):
    """What others may know of a path in a setting: a hub id, or the name of a file or folder of a machine."""
    if cached := re.search(r"models--(.+?)--(.+?)/snapshots/", path):  # of the hub's cache
        return "/".join(cached.groups())
    ours = path[:1] in "/~" or os.path.exists(settings.resolve_path(path))
    return os.path.basename(os.path.normpath(path)) if ours else path


def licence_of(lm):
    """Of a language model, named by hub id, or by a folder that is called like it."""
    return next((text for name, text in LICENCES.items() if lm in (name, name.split("/")[-1])),
                "that of its publisher")


def about_run(saved, folder, base):
    """{what a card tells of a training run} from the content of its checkpoint, its scores.json, and what is
    told of the model that it started from: its scores and data are not the run's."""
    c, about = saved.get("config", {}), dict(base)
    if c:
        about = {name: base[name] for name in ("language_model", "nvidia", "encoder") if name in base}
        about |= {"data": c.get("dataset_blending_config", {}), "steps": saved.get("step"),
                  "settings": {name: c[name] for name in TOLD if name in c}}
        if c.get("clap_checkpoint") and not c.get("pretrained_path"):
            about["encoder"] = name_of(c["clap_checkpoint"])
    scores = os.path.join(folder, "scores.json")
    if os.path.isfile(scores):
        content = read_json(scores)
        tasks = content.get("tasks") if isinstance(content, dict) else None  # else it is somebody else's file
        about |= {"scores": tasks} if isinstance(tasks, dict) else {}
    return checked_about(about, folder)


def checked_about(about, source):
    """The same, or a ValueError: parts that a card shows as tables are {name: value}."""
    tables = ("data", "settings", "scores")
    parts = [about.get(name, {}) for name in tables] if isinstance(about, dict) else [about]
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{source}: about = {str(about)[:99]}, expected an object, and in it objects "
                         f"{', '.join(tables)}")
    return about


def table(rows, heads):
    lines = [heads, ["---"] * len(heads), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def model_card(sizes, model):
    """sizes: the content of the release's config.json -> Markdown."""
    about, lm, c = sizes["about"], sizes["lang_encoder_path"], model.lm.config
    minutes = (sizes["max_num_window"] * (sizes["window_length"] - sizes["window_overlap"])) / 60
    count = sum(p.numel() for p in model.parameters())
    text = [f"---\nbase_model: {json.dumps(lm)}\npipeline_tag: audio-text-to-text\n---\n{CARD_OF_OURS}\n",
            "# An Audio Flamingo 2 model\n",
            f"Answers questions about sounds of up to {minutes:.3g} minutes. {count:,} parameters: the "
            f"language model {lm} ({c.layers} blocks of width {c.width}), a CLAP encoder (HTS-AT) of width "
            f"{model.clap.width}, {len(model.audio_transformer.layer_stack)} audio-transformer layers and "
            f"{len(model.xattn)} gated cross-attention blocks. Paper: arXiv 2503.03983.\n",
            "```\npython sample.py --audio clip.wav --init_from <this folder>\n```\n"]
    if about.get("data"):
        text += ["## Data\n", table(about["data"].items(), ["manifest", "weight"])]
    if about.get("settings"):
        steps = f"{about['steps']} optimizer steps.\n" if about.get("steps") else ""
        text += ["## Training\n", steps, table(about["settings"].items(), ["setting", "value"])]
    if about.get("scores"):
        rows = [(task, json.dumps(row)) for task, row in about["scores"].items()]
        text += ["## Scores\n", table(rows, ["task", "scores"])]
    text += ["## Licences\n", f"- Language model {lm}: {licence_of(lm)}."]
    if about.get("encoder") and not about.get("nvidia"):
        text += [f"- Audio encoder, started from {about['encoder']}: that of its publisher; of NVIDIA's "
                 f"releases, NVIDIA OneWay Noncommercial License."]
    text += [f"- {NVIDIA}"] if about.get("nvidia") else []
    return "\n".join(text) + "\n"
