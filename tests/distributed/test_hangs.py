"""A run in which no rank gets on is ended, and the rank that is late is named with what it did."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.forked import run_command
from tests.distributed.small_run import environment, small_recipe, write
from understudy.strategies.ddp import DDPStrategy

pytestmark = pytest.mark.distributed


def plant(fault: str, rank: int) -> None:
    """In the third step of `rank`; workers are forked from the process that this is called in."""
    compute, steps = DDPStrategy.forward_backward, 0

    def forward_backward(self: DDPStrategy, *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3 and os.environ["RANK"] == str(rank):
            if fault == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif fault == "lock held":
                ctypes.PyDLL(None).sleep(600)  # PyDLL keeps the lock
            else:
                time.sleep(600)
        return compute(self, *arguments)

    DDPStrategy.forward_backward = forward_backward  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("fault", "rank", "said"),
    [
        ("stopped", 0, "is stopped"),
        ("lock held", 1, "holds the interpreter's lock"),
        ("asleep", 2, "has not entered"),
    ],
)
def test_a_hang_names_the_late_rank_and_why(fault: str, rank: int, said: str, tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    recipe |= {"evaluation": {}, "cluster": {"processes": 3, "hang_seconds": 3.0}}
    recipe["training"]["max_steps"] = 6
    variables = environment(tmp_path)
    done = run_command(
        ["train", str(write(recipe, tmp_path))], variables, prepare=partial(plant, fault, rank), timeout_seconds=90
    )
    assert done.returncode == 5, done.stderr
    assert f"rank {rank} on " in done.stderr
    assert said in done.stderr
    for other in {0, 1, 2} - {rank}:
        assert f"rank {other} on " not in done.stderr
    assert "forward_backward" in (tmp_path / "run" / "logs" / f"rank-{rank}.stacks").read_text()
