"""Whatever strikes a rank, the run ends soon, says which one and why, and goes on later from its last checkpoint."""

from __future__ import annotations

import os
import re
import time
from functools import partial
from pathlib import Path

import pytest

from tests.distributed.faults import FAULTS, HANG_SECONDS, STEP, plant
from tests.distributed.forked import run_command
from tests.distributed.small_run import environment, rows, small_recipe, understudy, write
from understudy.checkpoint.store import CheckpointStore, verify_checkpoint
from understudy.recipe.environment import host_name

pytestmark = pytest.mark.distributed

RANKS = 3
EXIT_SECONDS = 10.0

FIRST = 8
"""Of the faults; the others are much like one of them, or what `test_hangs` is about."""
ALL = [(fault, rank) for fault in FAULTS for rank in range(RANKS)]


def strike(fault: str, rank: int, directory: Path) -> list[str]:
    """Has a run end by a fault, and checks how it does. Returns the command's arguments."""
    recipe = small_recipe(directory)
    recipe |= {"evaluation": {}, "checkpoint": {"every": STEP - 1, "background": False}}
    recipe["cluster"] = {"processes": RANKS, "hang_seconds": HANG_SECONDS}
    recipe["training"] |= {"max_steps": STEP + 1, "out_of_memory_retries": 0}
    recipe["data"]["eval"] = None
    arguments = ["train", str(write(recipe, directory))]
    note, variables = directory / "struck", environment(directory)
    done = run_command(arguments, variables, prepare=partial(plant, fault, rank, note), timeout_seconds=90)
    seconds = time.time() - float(note.read_text())

    assert re.fullmatch(f"{FAULTS[fault].line(rank, host_name())}\n", done.stderr), done.stderr
    assert done.returncode == FAULTS[fault].status
    assert left_over(directory) == []
    assert seconds < EXIT_SECONDS + (HANG_SECONDS if "no rank got on" in done.stderr else 0.0)
    return arguments


@pytest.mark.parametrize(("fault", "rank"), [(fault, index % RANKS) for index, fault in enumerate([*FAULTS][:FIRST])])
def test_a_fault_is_told_with_its_rank_and_cause(fault: str, rank: int, tmp_path: Path) -> None:
    strike(fault, rank, tmp_path)
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    assert [verify_checkpoint(path).step for path in store.committed()] == [STEP - 1]


@pytest.mark.matrix
@pytest.mark.parametrize(("fault", "rank"), ALL)
def test_a_run_goes_on_after_any_fault_of_any_rank(fault: str, rank: int, tmp_path: Path) -> None:
    arguments = strike(fault, rank, tmp_path)
    again = understudy(arguments, tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"(step {STEP - 1})" in again.stdout
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, STEP + 2))


def left_over(directory: Path) -> list[int]:
    """Processes of a run in `directory`, known by where their output goes."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            output = (entry / "fd" / "1").readlink()
        except OSError:
            continue
        if output.is_relative_to(directory) and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found
