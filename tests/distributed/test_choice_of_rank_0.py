"""Under a launcher each process plans for its own host; rank 0's choice is everybody's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import run_processes

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).parent / "choice_worker.py"


def test_processes_that_choose_differently_train_as_rank_0_chose(tmp_path: Path) -> None:
    choices = [
        ({"strategy": "zero2", "training": {"micro_batch_tokens": 4096, "precision": "bf16"}}, 5),
        ({"strategy": "ddp", "training": {"micro_batch_tokens": 2048, "precision": "fp32"}}, None),
    ]
    first, second = run_processes(WORKER, 2, tmp_path, {"choices": choices})
    assert first == second
    recipe: Any = first["recipe"]
    predicted: Any = first["predicted"]
    assert (recipe["strategy"]["kind"], recipe["strategy"]["stage"]) == ("deepspeed", 2)
    assert (recipe["training"]["micro_batch_tokens"], recipe["training"]["precision"], predicted) == (4096, "bf16", 5)
