"""Measure what time and memory depend on.

    python tools/bench.py kernel    # gated cross-attention: naive, SDPA, Triton; the compiler's report
    python tools/bench.py decode    # a token of an answer: float32, bf16, int8, batches, the published way
    python tools/bench.py train     # an optimizer step, beside one written the published way
    python tools/bench.py data      # index, batches and decoding of a large blend; --items=10000000
    python tools/bench.py fit config/sft.py --gpu=24   # what a recipe needs, before a GPU is rented

Prints times and figures; the last line of stdout is one JSON object.
Settings: python tools/bench.py fit --help
"""
import importlib
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

import config
from tools.bench.common import print_figures


def main():
    mode = sys.argv.pop(1) if sys.argv[1:] else "--help"
    if mode in ("--help", "-h"):
        print(__doc__)
        return

    def run_bench(c):
        bench = getattr(importlib.import_module(f"tools.bench.{mode}"), mode)
        figures = {"mode": mode, "torch": torch.__version__} | bench(c)
        print_figures(figures)
        print(json.dumps(figures))

    config.run(run_bench, f"tools/bench/{mode}.py")


if __name__ == "__main__":
    main()
