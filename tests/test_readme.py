"""Every command of README and docs is run on small data, or named with the reason why not."""
import glob
import os
import re
import shlex
import shutil

import pytest

import config
from tests.helpers import ROOT, run, write_manifest

README = open(f"{ROOT}/README.md").read()
TEXT = README + "".join(open(path).read() for path in sorted(glob.glob(f"{ROOT}/docs/*.md")))
BLOCKS = re.findall(r"^ *```\w*\n(.*?)^ *```", TEXT, re.S | re.M)
LINES = [line.strip() for block in BLOCKS for line in block.splitlines()]
COMMANDS = {line for line in LINES if re.match("(python|torchrun|make|pip) ", line)}
COMMANDS |= set(re.findall(r"`((?:python|torchrun) [^`\n]+)`", TEXT))
NOT_HERE = {  # beginning of a command: why it is not run here
    "make": "takes minutes; its scripts are run by the other tests",
    "pip": "needs a package registry; the Makefile's setup ran it",
    "python sample.py --serve": "is run by test_page.py",
    "python prepare/datasets.py": "is run by test_datasets.py",
    "python prepare/table.py": "is run by test_table.py",
    "python prepare/clap.py": "is run by test_clap.py",
    "python eval.py score": "is run by test_scores.py",
    "python eval.py compare": "is run by test_scores.py",
    "python tools/bench.py decode": "takes minutes",
    "python tools/bench.py train": "takes minutes",
    "python tools/bench.py kernel": "is run by test_kernel.py",
}
STAGES = ["config/pretrain.py", "config/sft.py", "config/long.py"]  # each starts from the one before


def shipped_config_made_small(name, sizes, folder, data):
    """A shipped config with the sizes of the tiny one, and copies of the tiny manifests under its names."""
    shipped = config.load([f"{ROOT}/config/{name}.py"], "train.py")
    for key in [*shipped.dataset_blending_config, *shipped.valid_dataset_config]:
        task, split = key.split("/")
        os.makedirs(f"{data}/{task}", exist_ok=True)
        shutil.copy(f"{data}/toy-AQA/{split}.json", f"{data}/{task}/{split}.json")
    small = sizes | {"clap_checkpoint": None, "gradient_accumulation_steps": 1,
                     "dataset_blending_global_weight": 1.0 if name == "long" else 0.2}
    if name != "pretrain":
        before = {"sft": "pretrain", "long": "sft"}[name]
        small |= {"pretrained_path": f"{folder}/exp/{before}", "pretrained_ckpt": "checkpoint_0.pt"}
    write_config(folder / f"{name}.py", open(f"{ROOT}/config/{name}.py").read(), small)


def write_config(path, text, settings):
    path.write_text(text + "\n" + "".join(f"{name} = {value!r}\n" for name, value in settings.items()))


@pytest.fixture(scope="module")
def stage(tiny_config, tiny_data, tmp_path_factory):
    """A folder with small stand-ins for what the documents name; its data."""
    folder = tmp_path_factory.mktemp("readme")
    tiny = config.load([tiny_config], "train.py")
    of_data = ("dataset_blending_config", "valid_dataset_config")
    sizes = {name: getattr(tiny, name) for name in tiny.user_set if name not in of_data}
    sizes |= {"num_epochs": 1, "expdir": f"{folder}/exp"}
    for name in ("pretrain", "sft", "long"):
        shipped_config_made_small(name, sizes, folder, tiny_data)
    shutil.copytree(f"{tiny_data}/toy-AQA", f"{tiny_data}/Mine-AQA", dirs_exist_ok=True)
    items = [("0.wav", "Is it?", "yes, yes, yes"), ("1.wav", "What?", "a, b, c")]
    write_manifest(tiny_data, "Clotho-AQA-AQA/test", items)
    run("train.py", tiny_config, f"--expdir={folder}/exp", "--run_name=mine", "--num_epochs=1")
    run("sample.py", f"--init_from={folder}/exp/mine", "--export", f"{folder}/release")
    (folder / "questions.jsonl").write_text(f'{{"path": "{tiny_data}/0.wav", "prompt": "What?"}}\n')
    snippet = next(block for block in BLOCKS if 'run_name = "mine"' in block)
    mine = sizes | {"run_name": "mine2", "pretrained_path": f"{folder}/release"}
    write_config(folder / "mine.py", re.sub(r"(?m)^   ", "", snippet), mine)
    return folder, tiny_data


def local_arguments(command, folder, data):
    """The arguments of a command, with local paths for what only a hub, a GPU node or the demo can give."""
    table = {"nvidia/audio-flamingo-2": f"{folder}/release", "clip.wav": f"{data}/0.wav",
             "questions.jsonl": f"{folder}/questions.jsonl", "answers.jsonl": f"{folder}/answers.jsonl",
             "config/pretrain.py": f"{folder}/pretrain.py", "config/sft.py": f"{folder}/sft.py",
             "config/long.py": f"{folder}/long.py", " mine.py": f" {folder}/mine.py",
             "exp/mine": f"{folder}/exp/mine", "exp/sft": f"{folder}/exp/mine",
             "data/manifests/Mine-AQA": f"{data}/Mine-AQA", "--data_root=data": f"--data_root={data}",
             "data/gm/audio/test/00000.wav": f"{data}/1.wav", "out/demo": f"{folder}/exp/mine",
             "=out/": f"={folder}/", "my-release": f"{folder}/my-release",
             "--nproc_per_node=8": "--nproc_per_node=2"}
    for documented, local in table.items():
        command = command.replace(documented, local)
    program, *arguments = shlex.split(command)
    if program == "torchrun":
        arguments = ["-m", "torch.distributed.run", *arguments]
    if "eval.py" in arguments:
        arguments += [f"--dataset_file_root={data}", f"--data_root={data}", "--max_new_tokens=3"]
    if "sample.py" in arguments:
        arguments += ["--max_new_tokens=3", f"--expdir={folder}/exp"]
    return arguments


def by_stage(command):
    return next((i for i, path in enumerate(STAGES, 1) if path in command), 0), command


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(COMMANDS, key=by_stage))
def test_command(command, stage):
    for beginning, reason in NOT_HERE.items():
        if command.startswith(beginning):
            pytest.skip(f"{command}: {reason}")
    run(*local_arguments(command, *stage))


def test_what_users_were_promised_is_in_the_readme():
    for command in ("torchrun --nproc_per_node=8 train.py config/pretrain.py",
                    "python train.py config/sft.py", "python sample.py --audio clip.wav",
                    "python eval.py --split Clotho-AQA-AQA/test"):
        assert any(c.startswith(command) for c in COMMANDS), command
    assert len(README.splitlines()) <= 160


def test_files_named_in_the_documents_exist():
    for path in re.findall(r"`((?:config|prepare|tests|tools|docs)/[\w./]*|[\w]+\.py)`", TEXT):
        assert path == "mine.py" or os.path.exists(f"{ROOT}/{path}"), path
