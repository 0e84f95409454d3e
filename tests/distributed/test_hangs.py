"""A run in which no rank gets on is ended, and the rank that is late is named with what it did. One that takes long
over something, and gets on with it, is not."""

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
from tests.distributed.small_run import environment, rows, small_recipe, write
from understudy.objectives.causal_lm import CausalLMObjective
from understudy.strategies.ddp import DDPStrategy

pytestmark = pytest.mark.distributed

HANG_SECONDS = 3.0


def hang(fault: str) -> None:
    if fault == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(600)  # it is made to go on, to leave its stacks
    elif fault == "lock held":
        ctypes.PyDLL(None).sleep(600)  # PyDLL keeps the lock
    else:
        time.sleep(600)


def plant(method: str, call: int, rank: int, fault: str) -> None:
    """In that call, from 1, of a strategy's method on `rank`; workers are forked from the process that this is called
    in."""
    real, calls = getattr(DDPStrategy, method), 0

    def planted(self: DDPStrategy, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and os.environ["RANK"] == str(rank):
            hang(fault)
        return real(self, *arguments)

    setattr(DDPStrategy, method, planted)


@pytest.mark.parametrize(
    ("method", "call", "fault", "rank", "said"),
    [
        ("forward_backward", 3, "lock held", 1, "holds the interpreter's lock"),
        ("forward_backward", 3, "asleep", 2, "has not entered"),
        ("load_state", 1, "stopped", 0, "while loading the model is stopped (SIGSTOP"),
    ],
)
def test_a_hang_names_the_late_rank_and_why(
    method: str, call: int, fault: str, rank: int, said: str, tmp_path: Path
) -> None:
    recipe = small_recipe(tmp_path)
    recipe |= {"evaluation": {}, "cluster": {"processes": 3, "hang_seconds": HANG_SECONDS}}
    recipe["training"]["max_steps"] = 6
    variables = environment(tmp_path)
    prepare = partial(plant, method, call, rank, fault)
    done = run_command(["train", str(write(recipe, tmp_path))], variables, prepare=prepare, timeout_seconds=90)
    assert done.returncode == 5, done.stderr
    assert f"rank {rank} on " in done.stderr
    assert said in done.stderr
    for other in {0, 1, 2} - {rank}:
        assert f"rank {other} on " not in done.stderr
    assert "in hang" in (tmp_path / "run" / "logs" / f"rank-{rank}.stacks").read_text()


def plant_slow_evaluation() -> None:
    """Each micro-batch takes a third of what counts as a hang. In the second evaluation rank 1 stands."""
    evaluate, loss, evaluations, evaluates = DDPStrategy.evaluate, CausalLMObjective.loss, 0, False

    def slow_evaluate(self: DDPStrategy, *arguments: Any) -> Any:
        nonlocal evaluations, evaluates
        evaluations, evaluates = evaluations + 1, True
        if evaluations == 2 and os.environ["RANK"] == "1":
            hang("asleep")
        result = evaluate(self, *arguments)
        evaluates = False
        return result

    def slow_loss(self: CausalLMObjective, *arguments: Any) -> Any:
        if evaluates:
            time.sleep(HANG_SECONDS / 3)
        return loss(self, *arguments)

    DDPStrategy.evaluate, CausalLMObjective.loss = slow_evaluate, slow_loss  # type: ignore[method-assign]


def test_a_long_evaluation_that_gets_on_is_no_hang_and_one_that_stands_is(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    recipe |= {"evaluation": {"every": 2}, "cluster": {"processes": 2, "hang_seconds": HANG_SECONDS}}
    recipe["training"] |= {"max_steps": 4, "micro_batch_tokens": 8}
    recipe["data"] |= {"max_length": 8}
    done = run_command(
        ["train", str(write(recipe, tmp_path))],
        environment(tmp_path),
        prepare=plant_slow_evaluation,
        timeout_seconds=90,
    )
    assert done.returncode == 5, done.stderr
    assert [row["step"] for row in rows(tmp_path) if "eval_loss" in row] == [2], "the first came to its end"
    assert "rank 1 on " in done.stderr
    assert "after step 4 has not entered" in done.stderr
