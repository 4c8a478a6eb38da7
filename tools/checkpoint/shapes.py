"""What the settings that shape a model may be, on a command line and in files."""
import config as settings
from tools.common import UserError, join_names

BOUNDS = {"window_length": (0.02, 600), "window_overlap": (0, 600), "max_num_window": (1, 10 ** 6),
          "clap_spec_size": (64, 1024), "clap_embed_dim": (1, 10 ** 4), "clap_depths": (0, 1000),
          "clap_num_heads": (1, 10 ** 4), "audio_transformer_n_head": (1, 10 ** 4),
          "audio_transformer_n_layers": (0, 1000), "audio_transformer_d_inner": (1, 10 ** 6),
          "cross_attn_every_n_layers": (0, 10 ** 4)}
NOT_IN_WEIGHTS = ("window_length", "window_overlap", "max_num_window", "audio_transformer_n_head")


def checked(saved, file, given=()):
    """The settings of a model that a file holds, or a ValueError that names it: a missing one that weights
    do not tell, a wrong type, a value that no model has."""
    if not isinstance(saved, dict):
        raise UserError(f"{file}: the settings are a {type(saved).__name__}, expected {{name: value}}")
    saved = {name: value for name, value in saved.items() if name in settings.MODEL_SETTINGS}
    if missing := [name for name in NOT_IN_WEIGHTS if saved and name not in saved and name not in given]:
        raise UserError(f"{file}: no {join_names(missing)} in it: give --{missing[0]}")
    known = settings.settings_of("config/defaults.py")
    return bounded({name: settings.check(name, value, known, file) for name, value in saved.items()}, file)


def bounded(sizes, file):
    """The same settings, or a ValueError that names one that no model has."""
    for name, (least, most) in BOUNDS.items():
        value = sizes.get(name, least)
        kinds, numbers = ((int,), value) if type(value) is list else ((int, float), [value])
        stages = type(value) is list and name.startswith("clap_")
        good = all(type(n) in kinds and least <= n <= most for n in numbers)
        if not good or (stages and len(value) != 4):
            raise UserError(f"{file}: {name} = {value!r}, expected {least} to {most}" +
                             ", for each of four stages" * stages)
    width, heads = sizes.get("clap_embed_dim"), sizes.get("clap_num_heads")
    if width and heads and any(width * 2 ** i % n for i, n in enumerate(heads)):
        raise UserError(f"{file}: clap_num_heads = {heads!r} do not divide clap_embed_dim = {width}, twice "
                         f"as wide in every further stage")
    return sizes
