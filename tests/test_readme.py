"""Every command of the README: those that fit a CPU are run, on small data; the others are accounted for."""
import os
import re
import shutil

import pytest

import config
from tests.helpers import ROOT, run, write_manifest

TEXT = open(f"{ROOT}/README.md").read()
BLOCKS = re.findall(r"^ *```\w*\n(.*?)^ *```", TEXT, re.S | re.M)
COMMANDS = sorted({line.strip() for block in BLOCKS for line in block.splitlines()
                   if re.match(r" *(python|torchrun|make|pip) ", line)} |
                  set(re.findall(r"`((?:python|torchrun) [^`\n]+)`", TEXT)))
NOT_HERE = {  # command: why it is not run by this test
    "make demo": "takes many minutes; its scripts are run on tiny data by the other tests",
    "make test": "is running",
    "make gpu": "needs a GPU; tests/test_gpu_tool.py lets the CPU stand in",
    "pip install -r requirements.txt": "needs the registry; the Makefile's setup ran it",
    "pip install --no-deps laion-clap torchlibrosa": "needs the registry; the Makefile's setup ran it",
    "pip install -r requirements-eval.txt": "needs the registry",
    "python sample.py --serve": "is run by test_page.py",
    "python prepare/datasets.py clotho_aqa --from=/data/clotho_aqa": "is run by test_datasets.py",
    "python prepare/datasets.py --help": "is run by test_datasets.py",
    next(c for c in COMMANDS if c.startswith("python prepare/table.py")): "is run by test_datasets.py",
    "python eval.py score answers.jsonl --task=Clotho-AQA-AQA": "is run by test_scores.py",
    "python eval.py compare ours.jsonl theirs.jsonl": "is run by test_scores.py",
}


@pytest.fixture(scope="module")
def stage(tiny_config, tiny_settings, tiny_data, tmp_path_factory):
    """A folder that looks like the project's, with tiny stand-ins for what the README says; its data."""
    folder = tmp_path_factory.mktemp("readme")
    options = [f"--expdir={folder}/exp"]
    tiny = dict(vars(config.load([tiny_config], "train.py")))
    of_data = lambda name: name.endswith("dataset_config") or "blending_c" in name
    sizes = {k: v for k, v in tiny.items() if k in tiny["given"] and not of_data(k)}
    sizes |= {"num_epochs": 1, "expdir": f"{folder}/exp"}
    for name in ("pretrain", "sft", "long"):  # the shipped configs, with the tiny one's sizes and data
        shipped = config.load([f"{ROOT}/config/{name}.py"], "train.py")
        for key in [*shipped.dataset_blending_config, *shipped.valid_dataset_config]:
            task, split = key.split("/")
            os.makedirs(f"{tiny_data}/{task}", exist_ok=True)
            shutil.copy(f"{tiny_data}/toy-AQA/{split}.json", f"{tiny_data}/{task}/{split}.json")
        small = sizes | {"clap_checkpoint": None, "gradient_accumulation_steps": 1,
                         "dataset_blending_global_weight": 1.0 if name == "long" else 0.2}
        if name != "pretrain":
            before = {"sft": "pretrain", "long": "sft"}[name]
            small |= {"pretrained_path": f"{folder}/exp/{before}", "pretrained_ckpt": "checkpoint_0.pt"}
        with open(folder / f"{name}.py", "w") as f:
            f.write(open(f"{ROOT}/config/{name}.py").read())
            f.writelines(f"{k} = {v!r}\n" for k, v in small.items())
    shutil.copytree(f"{tiny_data}/toy-AQA", f"{tiny_data}/Mine-AQA", dirs_exist_ok=True)
    run("train.py", tiny_config, *options, "--run_name=mine", "--num_epochs=1")
    from model import AudioFlamingo
    AudioFlamingo.from_pretrained(f"{folder}/exp/mine").save_pretrained(f"{folder}/release")
    (folder / "questions.jsonl").write_text(f'{{"path": "{tiny_data}/0.wav", "prompt": "What?"}}\n')
    snippet = next(block for block in BLOCKS if 'run_name = "mine"' in block)
    mine = sizes | {"run_name": "mine2", "pretrained_path": f"{folder}/release"}
    with open(folder / "mine.py", "w") as f:
        f.write(re.sub(r"(?m)^   ", "", snippet))
        f.writelines(f"{k} = {v!r}\n" for k, v in mine.items())
    return folder, tiny_data


def words(command, folder, data):
    """The README's words with local stand-ins for what only a hub, a GPU node or the demo can give."""
    swaps = [("nvidia/audio-flamingo-2", f"{folder}/release"), ("clip.wav", f"{data}/0.wav"),
             ("questions.jsonl", f"{folder}/questions.jsonl"), ("answers.jsonl", f"{folder}/answers.jsonl"),
             ("config/pretrain.py", f"{folder}/pretrain.py"), ("config/sft.py", f"{folder}/sft.py"),
             ("config/long.py", f"{folder}/long.py"), ("train.py mine.py", f"train.py {folder}/mine.py"),
             ("exp/mine", f"{folder}/exp/mine"), ("exp/sft", f"{folder}/exp/mine"),
             ("data/manifests/Mine-AQA", f"{data}/Mine-AQA"),
             ("--data_root=data", f"--data_root={data}"), ("data/gm/audio/test/00000.wav", f"{data}/1.wav"),
             ("out/demo", f"{folder}/exp/mine"), ("=out/", f"={folder}/"),
             ("my-release", f"{folder}/my-release"), ("--nproc_per_node=8", "--nproc_per_node=2")]
    for old, new in swaps:
        command = command.replace(old, new)
    import shlex
    parts = shlex.split(command)
    parts = ["-m", "torch.distributed.run", *parts[1:]] if parts[0] == "torchrun" else parts[1:]
    if "eval.py" in parts:
        os.makedirs(f"{data}/Clotho-AQA-AQA", exist_ok=True)
        items = [("0.wav", "Is it?", "yes, yes, yes"), ("1.wav", "What?", "a, b, c")]
        write_manifest(data, "Clotho-AQA-AQA/test", items)
        parts += [f"--dataset_file_root={data}", f"--data_root={data}", "--max_new_tokens=3"]
    if "sample.py" in parts:
        parts += ["--max_new_tokens=3", f"--expdir={folder}/exp"]
    return parts


STAGES = ["config/pretrain.py", "config/sft.py", "config/long.py"]  # each starts from the one before


def turn(command):
    return next((i for i, path in enumerate(STAGES, 1) if path in command), 0)


@pytest.mark.parametrize("command", sorted(COMMANDS, key=turn))
def test_command(command, stage):
    if command in NOT_HERE:
        pytest.skip(f"{command}: {NOT_HERE[command]}")
    if command.startswith("python prepare/clap.py"):
        command += f" {stage[0]}/mine.py --clap_steps=2 --clap_batch_size=2 --clap_out={stage[0]}/clap.pt"
        command += " --clap_config='{\"Mine-AQA/train\": 1}'"
    result = run(*words(command, *stage))
    assert "Traceback" not in result.stderr


def test_the_users_card_is_in_the_readme():
    for command in ("torchrun --nproc_per_node=8 train.py config/pretrain.py",
                    "python train.py config/sft.py", "python sample.py --audio clip.wav",
                    "python eval.py --split Clotho-AQA-AQA/test"):
        assert any(c.startswith(command) for c in COMMANDS), command


def test_files_named_in_the_readme_exist():
    for path in re.findall(r"`((?:config|prepare|tests|tools|docs)/[\w./]*|[\w]+\.py)`", TEXT):
        places = [f"{ROOT}/{folder}/{path}" for folder in (".", "prepare", "tools", "config")]
        assert path == "mine.py" or any(map(os.path.exists, places)), path
