"""Settings: what a newcomer types is understood, or refused in one line that helps."""
import glob
import re
from dataclasses import fields

import pytest

import config
from tests.helpers import run
from tools.sample.decoding import Sampling


def load(*argv):
    return config.load(list(argv), "train.py")


def test_defaults_files_and_overrides(tmp_path):
    file = tmp_path / "c.py"
    file.write_text('import math\nbatch_size = int(math.sqrt(16))\nrun_name = "a=b"\nlearning_rate = 1\n')
    options = ("--batch_size", "3", "--clap_finetune=true", "--lang_encoder_path=x=y", "--max_steps=7")
    c = load(str(file), *options)
    assert (c.batch_size, c.run_name, c.learning_rate, type(c.learning_rate)) == (3, "a=b", 1.0, float)
    assert c.clap_finetune is True and c.lang_encoder_path == "x=y" and c.max_steps == 7 and c.seed == 42


def test_values():
    c = load("--clap_depths=[1, 1, 2, 1]", "--tokenizer_path=None", "--freeze_lm_embeddings=added",
             "--gate_learning_rate=1e-2", '--dataset_blending_config={"a-AQA/train": 1}',
             "--cross_attn_every_n_layers=[1,2]")
    assert c.clap_depths == [1, 1, 2, 1] and c.tokenizer_path is None and c.freeze_lm_embeddings == "added"
    assert c.gate_learning_rate == 0.01 and c.cross_attn_every_n_layers == [1, 2]
    assert load("--freeze_lm_embeddings=False").freeze_lm_embeddings is False
    c = load("--clap_finetune", "--batch_size", "3", "--cache_audio", "false")
    assert c.clap_finetune is True and c.cache_audio is False and c.batch_size == 3
    # again and again; a comma is a comma
    c = config.load(["--audio", "a,b.wav", "--audio=[1].wav"], "sample.py")
    assert c.audio == ["a,b.wav", "[1].wav"]
    with pytest.raises(ValueError, match="--run_name has no value"):
        load("--run_name", "--batch_size=4")


@pytest.mark.parametrize("argument, message", [
    ("--bach_size=3", "batch_size"), ("--batch_size=big", "expected int"),
    ("--batch_size=1.5", "expected int"), ("--clap_finetune=1", "expected bool"),
    ("--learning_rate=fast", "expected float"), ("nowhere.py", "nowhere.py"),
    ("--seed", "no value"), ("config/defaults.txt", "config file"), ("--learning_rate=1e999", "finite"),
    ("--window_length=-1", "window_length = -1, expected .*more than 0"), ("--run_name= ", "run_name = ' '"),
    ("--run_name=../x", "expected the name of a folder"), ("--run_name=/x", "expected the name of a folder"),
    ("--seed=" + "9" * 400, "seed = 99.* expected a finite number")])
def test_refusals(argument, message):
    with pytest.raises(ValueError, match=message):
        load(argument)


def test_config_file_errors_name_the_file(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("bach_size = 4\n")
    with pytest.raises(ValueError, match=r"c\.py: unknown setting 'bach_size'; nearest: batch_size"):
        load(str(file))


@pytest.mark.parametrize("text, message", [
    ("batch_size = 4\nlearning_rate == 3\n", r"c\.py line 2: NameError: name 'learning_rate' is not defined"),
    ("batch_size = 4\nseed = = 3\n", r"c\.py line 2: SyntaxError: invalid syntax"),
    ("def f():\n    return 1 / 0\nseed = f()\n", r"c\.py line 2: ZeroDivisionError"),
    ("open('nowhere')\n", r"c\.py line 1: FileNotFoundError"),
    ("batch_size = 0\n", r"c\.py: batch_size = 0, expected a finite number, 1 or more"),
    ("batch_size = True\n", r"c\.py: batch_size = True is a bool, expected int"),
    ("learning_rate = 10 ** 400\n", r"c\.py: learning_rate = 10{199}, expected a finite number, 0 or more"),
    ("dataset_blending_config = {'a/train': 10 ** 400}\n", r"a/train = 10{79}, expected a name and a weight"),
    ("dataset_blending_config = {1: 1.0}\n", r"1 = 1.0, expected a name and a weight above 0"),
    ("batch_size = 4\nexit()\n", r"c\.py line 2: SystemExit"),
    ("batch_size = 4\x00\n", r"c\.py: SyntaxError: source code string cannot contain null bytes"),
    ("seed = '\udcff'\n", r"c\.py.*: SyntaxError: .*unicode error.* decode byte 0xff"),
    ("dataset_blending_config = {'a/train': '1'}\n", r"c\.py: dataset_blending_config: a/train = '1'")])
def test_slips_in_a_config_file_name_the_line(tmp_path, text, message):
    file = tmp_path / "c.py"
    file.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=message):
        load(str(file))


def test_a_config_file_may_compute(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("\ufeffimport os\nfrom math import sqrt\nclass Sizes:\n    batch = 3\n"
                    "def twice(n):\n    return 2 * n\nrun_name = os.path.basename(__file__)\n"
                    "batch_size = twice(Sizes.batch)\n"
                    "learning_rate = sqrt(4)\n")
    c = load(str(file))
    assert (c.run_name, c.batch_size) == ("c.py", 6)


@pytest.mark.parametrize("name", config.MINIMUM)
def test_counts_have_a_least_value(name):
    """Of every script that has the setting: the least is taken, less is refused in one line."""
    scripts = ("train.py", "prepare/clap.py", "eval.py", "prepare/check.py")
    shared = config.settings_of("config/defaults.py")
    script = next(s for s in scripts if name in config.settings_of(s) | shared)
    least = config.MINIMUM[name]
    assert getattr(config.load([f"--{name}={least}"], script), name) == least
    for wrong in (least - 1, -5):
        with pytest.raises(ValueError, match=f"{name} = {wrong}.*{least} or more"):
            config.load([f"--{name}={wrong}"], script)


@pytest.mark.parametrize("name", ["pretrain", "sft", "long", "demo", "sft_24gb", "reason"])
def test_shipped_configs(name):
    c = load(f"config/{name}.py")
    assert c.dataset_blending_config and all(key.count("/") == 1 for key in c.dataset_blending_config)
    if name in ("pretrain", "sft", "long"):  # the published schedules
        assert c.num_epochs * c.dataset_blending_global_weight == pytest.approx(1) and c.warmup_steps == 1875


def test_help_lists_every_setting_with_its_reason(capsys):
    with pytest.raises(SystemExit) as end:
        load("--help")
    text = capsys.readouterr().out
    assert end.value.code == 0
    for name, (_, default, reason) in config.settings_of(config.ROOT + "/config/defaults.py").items():
        assert f"--{name}={default!r}" in text and reason and reason in text


@pytest.mark.parametrize("script, own, shared, others", [
    ("sample.py", "prompt", "max_num_window",
     ["learning_rate", "dataset_blending_config", "num_workers", "max_tokens"]),
    ("eval.py", "split", "num_workers",
     ["learning_rate", "batch_size", "warmup_steps", "max_tokens"])])
def test_help_lists_what_a_script_reads_its_own_first(script, own, shared, others):
    text = run(script, "--help").stdout
    assert 0 < text.index(f"--{own}=") < text.index(f"--{shared}=")
    assert not [name for name in others if f"--{name}=" in text]
    files = [f"{config.ROOT}/{script}", f"{config.ROOT}/sample.py", *glob.glob(f"{config.ROOT}/tools/**/*.py", recursive=True)]
    source = "".join(open(file).read() for file in files)
    # each is read: by the script, or by what loads its model
    for name in re.findall(r"^  --(\w+)=", text, re.M):
        handed_on = (*config.LOADING, *(field.name for field in fields(Sampling)))
        assert re.search(rf"\bc\.{name}\b|\"{name}\"", source) or name in handed_on, name


def test_what_shapes_a_model_is_a_list_of_settings():
    defaults = config.defaults()
    assert set(config.LOADING) <= set(defaults) and set(config.ORIGINS) <= set(defaults)
    shapes_nothing = {"clap_finetune", "clap_learning_rate", "attention_backend", "cache_dir"}
    assert not shapes_nothing & set(config.MODEL_SETTINGS)


def test_paths_of_settings_start_at_the_project(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert config.resolve_path("exp/x") == f"{config.ROOT}/exp/x" and config.resolve_path("/exp/x") == "/exp/x"


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("--expdir=~/exp").expdir == f"{tmp_path}/exp" == config.resolve_path("~/exp")
    assert load("--run_name=a~b").run_name == "a~b"
