"""A rank that runs out of memory twice: in its third step, and as it saves the checkpoint of step 4."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from understudy.checkpoint.progress import Progress
from understudy.checkpoint.saver import CheckpointSaver
from understudy.strategies.ddp import DDPStrategy


def plant(rank: int, notes: Path) -> None:
    """Plants it in this process when it is `rank`; `notes` is a directory that tells what has happened before."""
    if os.environ["RANK"] == str(rank):
        _starve_in_step(3, notes / "starved-in-step")
        _abort_at_checkpoint(4, notes / "aborted-at-checkpoint")


def _starve_in_step(number: int, note: Path) -> None:
    compute, steps = DDPStrategy.forward_backward, 0

    def forward_backward(self: DDPStrategy, *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == number and not note.exists():
            note.touch()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has none free.")
        return compute(self, *arguments)

    DDPStrategy.forward_backward = forward_backward  # type: ignore[method-assign]


def _abort_at_checkpoint(step: int, note: Path) -> None:
    save = CheckpointSaver.save

    def saving(self: CheckpointSaver, progress: Progress) -> None:
        if progress.step == step and not note.exists():
            note.touch()
            sys.stderr.write("terminate called after throwing an instance of 'std::bad_alloc'\n")
            sys.stderr.flush()
            os.abort()
        save(self, progress)

    CheckpointSaver.save = saving  # type: ignore[method-assign]
