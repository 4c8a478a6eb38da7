"""Ranks wait for each other longer than torch's own time limits, here set to two seconds."""
import sys

import pytest

from tests.helpers import run

SCRIPT = """
import sys, time
from datetime import timedelta
from torch.distributed import distributed_c10d
distributed_c10d.default_pg_timeout = timedelta(seconds=2)  # of torch, where a group has none of its own
import config, eval
from tools.train.run import Run

def slow_rank_0(rank):
    if rank == 0:
        time.sleep(5)

c = config.load([f"--expdir={sys.argv[2]}"], f"{sys.argv[1]}.py")
if sys.argv[1] == "train":
    ranks = Run(c)
    slow_rank_0(ranks.rank)
    assert ranks.any_rank(ranks.rank == 1) == [True]
    import torch
    count = torch.ones(())
    slow_rank_0(ranks.rank)
    ranks.sum_over_ranks(count)
    assert count == 2
else:
    rank, _ = eval.start_ranks(c)
    slow_rank_0(rank)
    eval.wait_for_ranks()
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train", "eval"])
def test_a_slow_rank_is_waited_for(tmp_path, script):
    file = tmp_path / "ranks.py"
    file.write_text(f"import sys\nsys.path.insert(0, {sys.path[0]!r})\n{SCRIPT}")
    run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", file, script, tmp_path)
