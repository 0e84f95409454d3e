"""What a process of a run is told, and what it leaves when it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from understudy.errors import DivergedError, UserError
from understudy.recipe.schema import Recipe
from understudy.recipe.source_map import SourceMap
from understudy.training.failure import cause_of
from understudy.training.job import Job, TeacherPlace, read_job, write_job
from understudy.training.seeding import step_seed

pytestmark = pytest.mark.unit

RECIPE = Recipe.model_validate(
    {
        "name": "x",
        "output_dir": "runs/x",
        "model": {"path": "somewhere"},
        "data": {"train": [{"path": "a.json", "weight": 0.5}]},
        "optimizer": {"kind": "adamw", "betas": [0.8, 0.9]},
        "strategy": "zero3-offload",
        "evaluation": {"every": 0.1},
    }
)


@pytest.mark.parametrize("evaluation", [None, Path("cache/e")])
def test_a_job_is_read_back_as_it_was_written(tmp_path: Path, evaluation: Path | None) -> None:
    sources = SourceMap("recipe.yaml", {"model.path": 3}, frozenset({"optimizer.kind"}))
    job = Job(
        recipe=RECIPE,
        sources=sources,
        run_directory=Path("run"),
        model_directory=Path("model"),
        adapter_directory=Path("adapter"),
        tokenizer_directory=Path("tokenizer"),
        teachers=(
            TeacherPlace(Path("teacher"), None, 7),
            TeacherPlace(None, None, 9, ("http://127.0.0.1:1/v1",), 11),
            TeacherPlace(Path("teacher"), None, 0, alignment=Path("a"), examples=(Path("t"), Path("e"))),
        ),
        train=Path("cache/t"),
        evaluation=evaluation,
        memory_predicted_bytes=None if evaluation is None else 12345,
    )
    write_job(tmp_path / "job.json", job)
    assert read_job(tmp_path / "job.json") == job


def raised(error: Exception) -> Exception:
    try:
        raise error
    except type(error) as caught:
        return caught


def test_a_failure_that_is_a_sentence_keeps_it_and_its_status() -> None:
    cause = cause_of(raised(DivergedError("the loss is not finite")), rank=1, step=7)
    assert (cause.exit_status, cause.message, cause.rank, cause.step) == (3, "the loss is not finite", 1, 7)
    cause = cause_of(raised(UserError("no", file="r.yaml", line=2)), rank=0, step=None)
    assert (cause.exit_status, cause.message) == (2, "r.yaml:2: no")


def test_any_other_failure_is_named_by_its_type_and_first_line_and_keeps_its_traceback() -> None:
    cause = cause_of(raised(ValueError("bad shape\nmore")), rank=0, step=None)
    assert (cause.exit_status, cause.message) == (1, "ValueError: bad shape")
    assert "in raised" in cause.traceback


def test_running_out_of_memory_has_its_own_status_and_says_what_to_do() -> None:
    cause = cause_of(raised(torch.OutOfMemoryError("tried to allocate 2 GiB")), rank=0, step=3)
    assert cause.exit_status == 4
    assert "training.micro_batch_tokens" in cause.message


def test_a_full_disk_is_wrong_input() -> None:
    full = raised(OSError(28, "No space left on device", "/runs/a"))
    cause = cause_of(full, rank=0, step=None)
    assert (cause.exit_status, cause.refused) == (2, True)
    assert cause.message.startswith("/runs/a: no space is left on the disk;")
    assert not cause_of(full, rank=0, step=1).refused, "a run that has trained is kept"


def test_a_failed_collective_points_to_a_peer() -> None:
    gloo = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    cause = cause_of(raised(gloo), rank=0, step=3)
    assert (cause.peer_failed, cause.exit_status) == (True, 5)
    assert cause.message == "RuntimeError: Connection closed by peer"
    assert cause_of(raised(torch.distributed.DistNetworkError("reset")), rank=0, step=3).peer_failed
    assert not cause_of(raised(RuntimeError("shape")), rank=0, step=3).peer_failed


FAILING = """
import sys, json
from pathlib import Path
from understudy.launch.cause import write_cause
from understudy.training.failure import StepNote, ending_on_failure
with ending_on_failure(2, StepNote(), lambda cause: write_cause(Path(sys.argv[1]) / "rank-2.cause.json", cause)):
    raise ValueError("boom")
"""


def test_a_failing_process_leaves_its_cause_and_goes_at_once(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FAILING, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: boom\n")
    cause = json.loads((tmp_path / "rank-2.cause.json").read_text())
    assert (cause["rank"], cause["exit_status"], cause["step"]) == (2, 1, None)


def test_seeds_differ_by_seed_step_and_rank_and_by_nothing_else() -> None:
    seeds = {step_seed(seed, step, rank) for seed in range(4) for step in range(4) for rank in range(4)}
    assert len(seeds) == 64
    assert step_seed(1, 2, 3) == step_seed(1, 2, 3)
    assert all(0 <= seed < 2**63 for seed in seeds)
