"""The demo's audio encoder: HTS-AT for 2.5 s windows on the captions of the embedded instruments. 2 cores, minutes.

Launch: python prepare/clap.py config/demo_clap.py
"""
from config.demo import *  # noqa: F403  the same encoder sizes and data

clap_checkpoint = None  # from scratch
clap_out = "out/demo/clap/epoch_16.pt"
clap_config = {"GM-Note-AudioCaptioning/train": 1}
clap_valid_config = {"GM-Note-AudioCaptioning/val": 1}
clap_text_layers = 2  # the captions' few words are told apart early; all 30 blocks would take a minute
clap_augment = False
clap_steps = 650
clap_batch_size = 32
