"""What checkpoints promise holds, and each of many bugs that would break a promise is told by the check of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.checkpoint_checks import (
    completeness_problems,
    crash_problems,
    failed_writer_problems,
    unmarked_tensors,
    unshared_disk_problems,
)
from tests.exact_resume import STEPS_PER_EPOCH, TOTAL_STEPS, resume_problems
from tests.planted_bugs import PLANTED_BUGS, Check
from understudy.parallel.world import process_group
from understudy.recipe.environment import ProcessEnvironment

pytestmark = pytest.mark.distributed

CHECKS: dict[Check, Callable[[Path], list[str]]] = {
    "crash": crash_problems,
    "completeness": completeness_problems,
    "failed writer": failed_writer_problems,
    "resume": resume_problems,
    "resume in fp16": lambda scratch: resume_problems(scratch, precision="fp16"),
}


@pytest.fixture(autouse=True, scope="module")
def _group_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    rendezvous = tmp_path_factory.mktemp("group") / "rendezvous"
    with process_group(ProcessEnvironment(0, 1, 0, 1, f"file://{rendezvous}"), torch.device("cpu"), "gloo"):
        yield


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("background", [False, True])
def test_a_crash_at_any_change_of_the_disk_leaves_the_last_checkpoint(
    tmp_path: Path, background: bool, keep: int
) -> None:
    assert crash_problems(tmp_path, background=background, keep=keep) == []


def test_a_checkpoint_is_committed_once_every_rank_has_written_and_holds_all_of_it(tmp_path: Path) -> None:
    assert completeness_problems(tmp_path) == []


def test_a_writer_that_fails_behind_the_loop_is_told_of(tmp_path: Path) -> None:
    assert failed_writer_problems(tmp_path) == []


@pytest.mark.parametrize("background", [False, True])
def test_each_tensor_that_a_save_writes_shows_that_it_gets_on(background: bool, tmp_path: Path) -> None:
    assert unmarked_tensors(tmp_path, background=background) == 0


def test_a_host_on_another_disk_is_told_so(tmp_path: Path) -> None:
    assert unshared_disk_problems(tmp_path) == []


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_that_goes_on_is_bitwise_the_one_that_never_stopped(tmp_path: Path, precision: str) -> None:
    assert resume_problems(tmp_path, precision=precision) == []


def test_every_step_is_one_to_stop_in_epochs_ends_included(tmp_path: Path) -> None:
    assert STEPS_PER_EPOCH in range(1, TOTAL_STEPS)
    assert resume_problems(tmp_path, stops=range(1, TOTAL_STEPS), lost=TOTAL_STEPS - 1) == []


@pytest.mark.parametrize("name", PLANTED_BUGS)
def test_a_planted_bug_is_caught_and_named(tmp_path: Path, name: str) -> None:
    bug = PLANTED_BUGS[name]
    with bug.plant():
        problems = CHECKS[bug.caught_by](tmp_path)
    assert any(re.search(bug.says, problem) for problem in problems), problems
