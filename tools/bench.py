"""Measure what time and memory depend on.

    python tools/bench.py kernel    # gated cross-attention: naive, SDPA, Triton; the compiler's report
    python tools/bench.py decode    # a token of an answer: float32, bf16, int8, batches, the published way
    python tools/bench.py train     # an optimizer step, beside one written the published way
    python tools/bench.py data      # index, batches and decoding of a large blend; --items=10000000
    python tools/bench.py fit config/sft.py --gpu=24   # what a recipe needs, before a GPU is rented

Prints a table for people; the last line of stdout is one JSON object.
"""
import importlib
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import config

MODES = ("kernel", "decode", "train", "data", "fit")  # functions of tools/bench/<mode>.py


def main(mode="--help", *options):
    if mode in ("--help", "-h"):
        print(__doc__)
    elif mode not in MODES or (options and mode not in ("data", "fit")):
        print(f"bench.py: expected one of {', '.join(MODES)}, got {[mode, *options]}", file=sys.stderr)
        sys.exit(2)
    elif mode == "fit":  # settings of its own, and config files
        del sys.argv[1]
        config.run(importlib.import_module("tools.bench.fit").fit, "tools/bench/fit.py")
    else:
        print(json.dumps(getattr(importlib.import_module(f"tools.bench.{mode}"), mode)()))


if __name__ == "__main__":
    main(*sys.argv[1:])
