"""Every command of README and docs is run on small data, or named with the reason why not."""
import glob
import os
import re
import shlex
import shutil

import pytest

from tests.helpers import ROOT, run, train, write_manifest

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


@pytest.fixture(scope="module")
def stage(tiny_config, tiny_data, tmp_path_factory):
    """A folder with small stand-ins for what the documents name; its data."""
    folder = tmp_path_factory.mktemp("readme")
    with open(tiny_config) as f:
        small = f.read()
    small += f"expdir = '{folder}/exp'\nclap_checkpoint = None\n"
    small += "num_epochs = gradient_accumulation_steps = 1\n"
    (folder / "small.py").write_text(small)
    shutil.copytree(f"{tiny_data}/toy-AQA", f"{tiny_data}/Mine-AQA", dirs_exist_ok=True)
    items = [("0.wav", "Is it?", "yes, yes, yes"), ("1.wav", "What?", "a, b, c")]
    write_manifest(tiny_data, "Clotho-AQA-AQA/test", items)
    train(f"{folder}/small.py", folder / "exp/mine")
    run("sample.py", f"--init_from={folder}/exp/mine", "--export", f"{folder}/release")
    (folder / "questions.jsonl").write_text(f'{{"path": "{tiny_data}/0.wav", "prompt": "What?"}}\n')
    snippet = re.sub("(?m)^   ", "", next(block for block in BLOCKS if 'run_name = "mine"' in block))
    own = f"run_name = 'mine2'\npretrained_path = '{folder}/release'\n"
    (folder / "mine.py").write_text(small + snippet + own)
    return folder, tiny_data


def local_arguments(command, folder, data):
    """The arguments of a command, with local paths for what only a hub, a GPU node or the demo can give."""
    first = f"{folder}/small.py --pretrained_ckpt=checkpoint_0.pt --pretrained_path={folder}/exp"
    table = {"nvidia/audio-flamingo-2": f"{folder}/release", "clip.wav": f"{data}/0.wav",
             "questions.jsonl": f"{folder}/questions.jsonl", "answers.jsonl": f"{folder}/answers.jsonl",
             "config/pretrain.py": f"config/pretrain.py {folder}/small.py",
             "config/sft.py": f"config/sft.py {first}/pretrain",
             "config/long.py": f"config/long.py {first}/sft",
             " mine.py": f" {folder}/mine.py",
             "exp/mine": f"{folder}/exp/mine", " exp/sft": f" {folder}/exp/mine",
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
