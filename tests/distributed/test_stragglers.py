"""A rank that the others wait for in each step is named while the run goes on; equal ones are not."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.forked import run_command
from tests.distributed.small_run import environment, small_recipe, write
from understudy.objectives.causal_lm import CausalLMObjective

pytestmark = pytest.mark.distributed

SLOWER_SECONDS = 0.3


def plant(slow_rank: int | None, every_seconds: float) -> None:
    """Each micro-batch takes so long, and longer on that rank; workers are forked from the process that this is called
    in."""
    loss = CausalLMObjective.loss

    def slow_loss(self: CausalLMObjective, *arguments: Any) -> Any:
        time.sleep(every_seconds + SLOWER_SECONDS * (os.environ["RANK"] == str(slow_rank)))
        return loss(self, *arguments)

    CausalLMObjective.loss = slow_loss  # type: ignore[method-assign]


def said_of_three_ranks(tmp_path: Path, strategy: str, steps: int, prepare: Callable[[], None]) -> list[str]:
    recipe = small_recipe(tmp_path)
    recipe |= {"evaluation": {}, "strategy": strategy, "cluster": {"processes": 3}}
    recipe["training"] |= {"max_steps": steps, "micro_batch_tokens": 64}
    recipe["optimizer"]["learning_rate"] = 1.0e-3
    recipe["data"].pop("eval")
    done = run_command(
        ["train", str(write(recipe, tmp_path))], environment(tmp_path), prepare=prepare, timeout_seconds=300
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if "is slow" in line]


def check_named(tmp_path: Path, strategy: str, slow_rank: int) -> None:
    said = said_of_three_ranks(tmp_path, strategy, 45, partial(plant, slow_rank, 0.05))
    assert len(said) == 1
    found = re.fullmatch(
        rf"rank {slow_rank} on \S+ is slow: the others wait ([\d.]+) s for it in each step of ([\d.]+) s", said[0]
    )
    assert found is not None, said
    waited, step = map(float, found.groups())
    assert SLOWER_SECONDS * 0.5 < waited < step
    assert said[0] in (tmp_path / "run" / "logs" / "slow-ranks.log").read_text()


def test_a_rank_that_is_slower_in_each_step_is_named_with_the_time_that_others_wait(tmp_path: Path) -> None:
    check_named(tmp_path, "ddp", 1)


@pytest.mark.matrix
@pytest.mark.parametrize("slow_rank", [0, 2])
@pytest.mark.parametrize("strategy", ["fsdp", "zero2", "zero3"])
def test_a_slower_rank_is_named_under_every_strategy(strategy: str, slow_rank: int, tmp_path: Path) -> None:
    check_named(tmp_path, strategy, slow_rank)


@pytest.mark.matrix
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2"])
@pytest.mark.parametrize(("every_seconds", "steps"), [(0.0, 1500), (0.2, 200)])
def test_equal_ranks_are_not_named(strategy: str, every_seconds: float, steps: int, tmp_path: Path) -> None:
    assert not said_of_three_ranks(tmp_path, strategy, steps, partial(plant, None, every_seconds))
