"""`understudy train` with a teacher behind a server: as if the teacher were here, and whatever becomes of the server, a
committed checkpoint to go on from."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.distributed import small_run
from tests.teacher_server import Fault, Handler, TeacherServer, cutting, dropping, failing, garbled, hanging, late
from understudy.checkpoint.store import CheckpointStore, verify_checkpoint

pytestmark = pytest.mark.distributed

TRAIN = [sys.executable, "-m", "understudy", "train"]
STEPS, EXAMPLES = 12, 8
"""Of the run, and of a step: each is a request. The first request is that before the run."""
VOCABULARY = 13
"""All of it is asked for, so that nothing is left out and losses are those of the teacher itself."""


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    recipe = small_run.small_recipe(tmp_path)
    recipe["model"]["config"]["vocab_size"] = VOCABULARY
    recipe["training"]["max_steps"] = STEPS
    recipe["optimizer"]["learning_rate"] = 2e-3
    recipe["evaluation"] = {"every": 10}
    sizes = {name: value for name, value in recipe["model"]["config"].items() if name != "model_type"}
    torch.manual_seed(7)
    config = LlamaConfig(**{**sizes, "hidden_size": 48, "initializer_range": 0.3})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "teacher")
    small_run.write_tokenizer(tmp_path / "teacher")
    return recipe


def from_the(number: int, fault: Fault) -> dict[str, Any]:
    return {"fault": lambda request: fault if request >= number else None}


def dying(handler: Handler, content: bytes) -> None:
    handler.server_of.close()
    dropping(handler, content)


@contextmanager
def started(file: Path, tmp_path: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [*TRAIN, str(file), *arguments],
        env=small_run.environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as command:
        try:
            yield command
        finally:
            command.kill()


def wait_for_rows(tmp_path: Path, count: int) -> None:
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_bytes().splitlines()) >= count):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def of_the_run(tmp_path: Path) -> list[str]:
    """Processes that work in its directory."""
    run, found = str(tmp_path / "run").encode(), []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [process.parent.name] if run in process.read_bytes() else []
        except OSError:  # gone
            continue
    return found


def newest(tmp_path: Path) -> Path:
    return CheckpointStore(tmp_path / "run" / "checkpoints").committed()[0]


def test_a_run_survives_its_teachers_server_and_learns_the_same(tmp_path: Path, recipe: dict[str, Any]) -> None:
    directory = tmp_path / "teacher"
    network = AutoModelForCausalLM.from_pretrained(directory).double()
    resident = {"kind": "distillation", "teacher": {"kind": "resident", "path": str(directory)}}
    alone = tmp_path / "alone"
    here = {**recipe, "objective": resident, "output_dir": str(alone), "cluster": {"processes": 1}}
    done = small_run.understudy(["train", str(small_run.write(here, tmp_path))], tmp_path)
    assert done.returncode == 0, done.stderr

    # A server that hangs: the run waits, and stops when it is asked to.
    with TeacherServer(network, **from_the(1 + 4 * EXAMPLES, hanging)) as server:
        address, port = server.address, server.port
        section = {"kind": "server", "path": str(directory), "model": server.name, "endpoints": [address], "k": 13}
        asked = {"kind": "distillation", "teacher": {**section, "timeout": 600.0, "retries": 1}}
        file = small_run.write({**recipe, "objective": asked}, tmp_path)
        with started(file, tmp_path) as command:
            wait_for_rows(tmp_path, 4)
            command.send_signal(signal.SIGTERM)
            _, errors = command.communicate(timeout=120)
    assert command.returncode == 75, errors
    assert verify_checkpoint(newest(tmp_path)).step == 4
    assert errors == (
        f"stopped by SIGTERM; the checkpoint of step 4 is {newest(tmp_path)}. Run the same command again to go on.\n"
    )

    # A server that dies: the run ends by itself, on all ranks, and says where it is.
    with TeacherServer(network, port=port, **from_the(1 + 4 * EXAMPLES, dying)):
        done = small_run.run([*TRAIN, str(file)], tmp_path)
    assert done.returncode == 5, done.stderr
    assert verify_checkpoint(newest(tmp_path)).step == 8
    assert done.stderr.startswith(f"error: the teacher cannot be asked: {address} ")
    assert f"the checkpoint of step 8 is {newest(tmp_path)}. Put that right, then run the same" in done.stderr
    assert done.stderr.count("\n") == 1
    assert of_the_run(tmp_path) == []

    # Under another strategy, with all that may pass, it goes on to the end.
    troubles = [failing(500), failing(429, Retry_After="1"), dropping, cutting, garbled, late(0.5), failing(503)]
    troubled = {1 + 4 * i: trouble for i, trouble in enumerate(troubles)}
    with TeacherServer(network, port=port, fault=troubled.get) as server:
        more = ["objective.teacher.retries=10", "strategy=zero3"]
        done = small_run.understudy(["train", str(file), *more], tmp_path)
        assert server.number() > 1 + 4 * EXAMPLES + len(troubles)
    assert done.returncode == 0, done.stderr
    assert f"teacher: {address} answers again" in done.stdout

    expected, found = (small_run.read_rows(path) for path in (alone, tmp_path / "run"))
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, other in zip(found, expected):
        for name in ("loss", "divergence", "grad_norm", "eval_loss", "eval_teacher_agreement"):
            if name in other:
                assert row[name] == pytest.approx(other[name], rel=1e-4), (row["step"], name)
