"""Whatever strikes a rank, the run ends soon, says which one and why, and goes on later from its last checkpoint."""

from __future__ import annotations

import os
import re
import time
from functools import partial
from pathlib import Path

import pytest

from tests.distributed.faults import STEP, plant
from tests.distributed.forked import run_command
from tests.distributed.small_run import environment, rows, small_recipe, understudy, write
from understudy.checkpoint.store import CheckpointStore, verify_checkpoint
from understudy.recipe.environment import host_name

pytestmark = pytest.mark.distributed

RANKS = 3
EXIT_SECONDS = 10.0
HANG_SECONDS = 3.0

WHO = rf"rank {{rank}} on {re.escape(host_name())}"
AFTER = f"after step {STEP - 1}"
LATE = rf"no rank got on for 3 s: {WHO} (?:after step \d|while training)"
LOG = r"\S+/logs/rank-{rank}\.log"
SAID = {
    "exception": (1, rf"ValueError: planted \({WHO}, {AFTER}; traceback in {LOG}\)"),
    "exit 0": (5, rf"{WHO} ended with status 0 {AFTER} without saying why; see {LOG}"),
    "killed": (5, rf"{WHO} was killed by SIGKILL {AFTER} \(most often [^)]+\); its output is in {LOG}"),
    "out of memory": (
        4,
        rf"out of memory: {WHO} ran out of memory, asking for 2\.00 GiB, {AFTER} with strategy ddp .*",
    ),
    "full disk": (2, rf"/full/disk: no space is left on the disk; [^(]* \({WHO}, {AFTER}\)"),
    "connections cut": (5, r"a connection between ranks was lost, and none of them failed before: RuntimeError: \w.*"),
    "another collective": (5, rf"{LATE} went another way: it entered all_gather as its collective \d+ where .*"),
    "collective skipped": (1, rf"{WHO} skipped a collective, or entered another one than the others: .*"),
    "stopped": (5, rf"{LATE} is stopped \(SIGSTOP, or a debugger\);.*"),
    "lock held": (5, rf"{LATE} cannot run Python: something holds the interpreter's lock, .*"),
    "asleep": (5, rf"{LATE} has not entered all_reduce \d+, which .*"),
    "aborted": (5, rf"{WHO} was killed by SIGABRT {AFTER}; its output is in {LOG}"),
    "sys.exit": (1, rf"SystemExit: 0 \({WHO}, {AFTER}; traceback in {LOG}\)"),
    "exit 3": (5, rf"{WHO} ended with status 3 {AFTER} without saying why; see {LOG}"),
}
"""The exit status, and the sentence up to the last collectives of all ranks. What comes after the `FIRST` is much like
one of them, or what `test_hangs` is about."""
FIRST = 8
LAST_COLLECTIVES = r"[.;] [lL]ast collectives: [^\n]+\."
ALL = [(fault, rank) for fault in SAID for rank in range(RANKS)]


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

    status, sentence = SAID[fault]
    end = r"\." if status == 2 else LAST_COLLECTIVES
    assert re.fullmatch(f"error: {sentence.format(rank=rank)}{end}\n", done.stderr), done.stderr
    assert done.returncode == status
    assert left_over(directory) == []
    assert seconds < EXIT_SECONDS + (HANG_SECONDS if "no rank got on" in done.stderr else 0.0)
    return arguments


@pytest.mark.parametrize(("fault", "rank"), [(fault, index % RANKS) for index, fault in enumerate([*SAID][:FIRST])])
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
