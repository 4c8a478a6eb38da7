"""Settings: what a newcomer types is understood, or refused in one line that names it."""
import glob
import os
import re
from dataclasses import fields

import pytest

import config
from tests.helpers import ROOT, run
from tools.common import UserError, check_not_read
from tools.sample.decoding import Sampling

NUMBERS = sorted(config.MINIMUM)


def load(*argv, script="train.py"):
    return config.load(list(argv), script)


def test_defaults_then_files_then_the_command_line(tmp_path):
    file = tmp_path / "c.py"
    file.write_text('import math\nbatch_size = int(math.sqrt(16))\nrun_name = "a=b"\nlearning_rate = 1\n')
    c = load("--batch_size", "3", str(file), "--clap_finetune=true", "--lang_encoder_path=x=y")
    assert (c.batch_size, c.run_name, c.learning_rate, type(c.learning_rate)) == (3, "a=b", 1.0, float)
    assert c.clap_finetune is True and c.lang_encoder_path == "x=y" and c.seed == 42
    assert c.user_set == ["batch_size", "clap_finetune", "lang_encoder_path", "learning_rate", "run_name"]


@pytest.mark.parametrize("script, argv, name, value", [
    ("train.py", ["--clap_depths=[1, 1, 2, 1]"], "clap_depths", [1, 1, 2, 1]),
    ("train.py", ["--tokenizer_path=None"], "tokenizer_path", None),
    ("train.py", ["--freeze_lm_embeddings=added"], "freeze_lm_embeddings", "added"),
    ("train.py", ["--freeze_lm_embeddings=False"], "freeze_lm_embeddings", False),
    ("train.py", ["--gate_learning_rate=1e-2"], "gate_learning_rate", 0.01),
    ("train.py", ["--cross_attn_every_n_layers=[1,2]"], "cross_attn_every_n_layers", [1, 2]),
    ("train.py", ['--valid_dataset_config={"a-AQA/val": 1}'], "valid_dataset_config", {"a-AQA/val": 1}),
    ("train.py", ["--clap_finetune", "--batch_size", "3"], "clap_finetune", True),
    ("train.py", ["--cache_audio", "false"], "cache_audio", False),
    ("train.py", ["--cache_dir=7"], "cache_dir", "7"),
    ("eval.py", ["--results=2025"], "results", "2025"),
    ("sample.py", ["--audio", "a,b.wav", "--audio=[1].wav"], "audio", ["a,b.wav", "[1].wav"])])
def test_values(script, argv, name, value):
    assert getattr(load(*argv, script=script), name) == value


@pytest.mark.parametrize("argument, name", [
    ("--bach_size=3", "batch_size"), ("--batch_size=big", "batch_size"), ("--batch_size=1.5", "batch_size"),
    ("--clap_finetune=1", "clap_finetune"), ("--learning_rate=fast", "learning_rate"),
    ("nowhere.py", "nowhere.py"), ("--seed", "--seed"), ("config/defaults.txt", "config/defaults.txt"),
    ("--learning_rate=1e999", "learning_rate"), ("--window_length=-1", "window_length"),
    ("--run_name= ", "run_name"), ("--run_name=../x", "run_name"), ("--seed=" + "9" * 40, "seed")])
def test_refused_arguments_are_named(argument, name):
    with pytest.raises(UserError, match=name):
        load(argument)


@pytest.mark.parametrize("text, where", [
    ("bach_size = 4\n", "c.py.*batch_size"), ("batch_size = True\n", "c.py: batch_size"),
    ("batch_size = 4\nlearning_rate == 3\n", "c.py line 2: NameError"),
    ("batch_size = 4\nseed = = 3\n", "c.py line 2: SyntaxError"),
    ("def f():\n    return 1 / 0\nseed = f()\n", "c.py line 2: ZeroDivisionError"),
    ("open('nowhere')\n", "c.py line 1: FileNotFoundError"),
    ("dataset_blending_config = {1: 1.0}\n", "c.py: dataset_blending_config"),
    ("dataset_blending_config = {'a/train': '1'}\n", "c.py: dataset_blending_config.*a/train")])
def test_mistakes_in_a_config_file_name_file_and_line(tmp_path, text, where):
    file = tmp_path / "c.py"
    file.write_text(text)
    with pytest.raises(UserError, match=where):
        load(str(file))


def test_a_config_file_may_compute(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("\ufeffimport os\nfrom math import sqrt\nclass Sizes:\n    batch = 3\n"
                    "def twice(n):\n    return 2 * n\nrun_name = os.path.basename(__file__)\n"
                    "batch_size = twice(Sizes.batch)\n")
    c = load(str(file))
    assert (c.run_name, c.batch_size) == ("c.py", 6)


def test_numbers_have_a_minimum():
    scripts = ("train.py", "prepare/clap.py", "eval.py", "prepare/check.py", "prepare/gm_notes.py")
    for name in NUMBERS:
        script = next(s for s in scripts if name in config.settings_of(s) | config.defaults())
        least = config.MINIMUM[name]
        assert getattr(load(f"--{name}={least}", script=script), name) == least
        with pytest.raises(UserError, match=name):
            load(f"--{name}={least - 1}", script=script)


@pytest.mark.parametrize("name", ["pretrain", "sft", "long", "demo", "sft_24gb", "reason"])
def test_shipped_configs(name):
    c = load(f"config/{name}.py")
    assert c.dataset_blending_config and all(key.count("/") == 1 for key in c.dataset_blending_config)
    if name in ("pretrain", "sft", "long"):  # the published schedules
        assert c.num_epochs * c.dataset_blending_global_weight == pytest.approx(1) and c.warmup_steps == 1875


@pytest.mark.slow
@pytest.mark.parametrize("script, own, shared, others", [
    ("train.py", "learning_rate", "max_num_window", []),
    ("sample.py", "prompt", "max_num_window", ["learning_rate", "num_workers", "max_tokens"]),
    ("eval.py", "split", "num_workers", ["learning_rate", "batch_size", "max_tokens"])])
def test_help_lists_what_a_script_reads(script, own, shared, others):
    text = run(script, "--help").stdout
    assert 0 < text.index(f"--{own}=") < text.index(f"--{shared}=")
    assert not [name for name in others if f"--{name}=" in text]
    files = [f"{ROOT}/{script}", f"{ROOT}/sample.py", *glob.glob(f"{ROOT}/tools/**/*.py", recursive=True)]
    source = "".join(open(file).read() for file in [*files, *glob.glob(f"{ROOT}/[cdm]*.py")])
    handed_on = (*config.LOADING, *(field.name for field in fields(Sampling)))
    for name in re.findall(r"^  --(\w+)=", text, re.M):
        assert re.search(rf"\b(c|config)\.{name}\b|\"{name}\"", source) or name in handed_on, name


def test_paths_of_settings_start_at_the_project(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config.resolve_path("exp/x") == f"{ROOT}/exp/x" and config.resolve_path("/exp/x") == "/exp/x"
    assert load("--expdir=~/exp").expdir == f"{tmp_path}/exp" == config.resolve_path("~/exp")


@pytest.mark.parametrize("main, code, output", [
    ("lambda c: c.no_such_setting", 1, "AttributeError"), ("lambda c: dict([1])", 1, "TypeError"),
    ("mine", 1, "not enough values to unpack"), ("lambda c: open('/nowhere')", 2, "error: .*/nowhere"),
    ("wrong_input", 2, "error: clip.wav: empty$"), ("lambda c: 3", 3, "^$")])
def test_a_users_mistake_is_one_line_a_programmers_a_traceback(main, code, output):
    script = ("import config\nfrom tools.common import UserError\ndef mine(c):\n    a, b = [1]\n"
              "def wrong_input(c):\n    raise UserError('clip.wav: empty')\n"
              f"config.run({main}, 'sample.py')")
    result = run("-c", script, ok=False)
    assert result.returncode == code and re.search(output, result.stderr.strip()), result.stderr
    assert ("Traceback" in result.stderr) == (code == 1)


@pytest.mark.parametrize("output", ["in", "link", "hard link", "a/../in", "temporary"])
def test_a_file_that_is_read_is_never_written(tmp_path, output):
    (tmp_path / "a").mkdir()
    for name in ("in", "temporary.tmp"):
        (tmp_path / name).write_text("content")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    os.link(tmp_path / "in", tmp_path / "hard link")
    inputs = [f"{tmp_path}/{name}" for name in ("missing", "in", "temporary.tmp")]
    check_not_read(f"{tmp_path}/out", inputs)
    with pytest.raises(UserError, match=output):
        check_not_read(f"{tmp_path}/{output}", inputs)
