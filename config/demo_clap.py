"""The demo's audio encoder: HTS-AT for 2.5 s windows on the captions of the embedded instruments. 2 cores,
minutes.

Launch: python prepare/clap.py config/demo_clap.py
"""
from config.demo import *  # noqa: F403  the same data and language model

clap_checkpoint = None  # from scratch
clap_spec_size = 128  # 2.56 s at most, 16 tokens
clap_embed_dim = 32
clap_depths = [0, 1, 2, 1]  # no block on the finest grid: a step takes a third less, accuracy is the same
clap_num_heads = [2, 4, 8, 16]
clap_position = True  # position embedding: without it, the order of two sounds stays at chance
clap_out = "out/demo/clap/epoch_16.pt"
clap_config = {"GM-Note-AudioCaptioning/train": 1}
clap_text_layers = 2  # enough for the few words of the captions; all 30 blocks would take a minute
clap_augment = False
clap_steps = 650
clap_batch_size = 32
