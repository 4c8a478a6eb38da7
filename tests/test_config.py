"""Settings: what a newcomer types is understood, or refused in one line that helps."""
import pytest

import config


def load(*argv):
    return config.load(list(argv), "train.py")


def test_defaults_files_and_overrides(tmp_path):
    file = tmp_path / "c.py"
    file.write_text('import math\nbatch_size = int(math.sqrt(16))\nrun_name = "a=b"\nlearning_rate = 1\n')
    c = load(str(file), "--batch_size", "3", "--clap_finetune=true", "--lang_encoder_path=x=y", "--max_steps=7")
    assert (c.batch_size, c.run_name, c.learning_rate, type(c.learning_rate)) == (3, "a=b", 1.0, float)
    assert c.clap_finetune is True and c.lang_encoder_path == "x=y" and c.max_steps == 7 and c.seed == 42


def test_values():
    c = load("--clap_depths=[1, 1, 2, 1]", "--tokenizer_path=None", "--freeze_lm_embeddings=added", "--gate_learning_rate=1e-2",
             '--dataset_blending_config={"a-AQA/train": 1}', "--cross_attn_every_n_layers=[1,2]")
    assert c.clap_depths == [1, 1, 2, 1] and c.tokenizer_path is None and c.freeze_lm_embeddings == "added"
    assert c.gate_learning_rate == 0.01 and c.cross_attn_every_n_layers == [1, 2]
    assert load("--freeze_lm_embeddings=False").freeze_lm_embeddings is False


@pytest.mark.parametrize("argument, message", [("--bach_size=3", "batch_size"), ("--batch_size=big", "expected int"),
                                               ("--batch_size=1.5", "expected int"), ("--clap_finetune=1", "expected bool"),
                                               ("--learning_rate=fast", "expected float"), ("nowhere.py", "nowhere.py"),
                                               ("--seed", "no value"), ("config/defaults.txt", "config file")])
def test_refusals(argument, message):
    with pytest.raises(ValueError, match=message):
        load(argument)


def test_config_file_errors_name_the_file(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("bach_size = 4\n")
    with pytest.raises(ValueError, match=r"c\.py: unknown setting 'bach_size'; nearest: batch_size"):
        load(str(file))


@pytest.mark.parametrize("name", ["pretrain", "sft", "long", "demo"])
def test_shipped_configs(name):
    c = load(f"config/{name}.py")
    assert c.dataset_blending_config and all(key.count("/") == 1 for key in c.dataset_blending_config)
    if name != "demo":
        assert c.num_epochs * c.dataset_blending_global_weight == pytest.approx(1) and c.warmup_steps == 1875


def test_help_lists_every_setting_with_its_reason(capsys):
    with pytest.raises(SystemExit) as end:
        load("--help")
    text = capsys.readouterr().out
    assert end.value.code == 0
    for name, (_, default, reason) in config.settings_of(config.ROOT + "/config/defaults.py").items():
        assert f"--{name}={default!r}" in text and reason and reason in text
