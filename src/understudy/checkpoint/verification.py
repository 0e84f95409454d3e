"""Whether what is stored in a directory is what was written, and loads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from understudy.checkpoint.manifest import DamagedCheckpointError
from understudy.checkpoint.places import MODEL, examine
from understudy.checkpoint.reloading import UnloadableModelError, reload_model, reload_tokenizer
from understudy.checkpoint.store import verify_checkpoint
from understudy.errors import UserError

__all__ = ["Verified", "verify_directory"]


@dataclass(frozen=True)
class Verified:
    """One checkpoint or model that was read to its last byte."""

    path: Path
    step: int | None
    """Of a checkpoint; None for a model, and where the checkpoint does not tell it any more."""
    num_bytes: int
    """All files together."""
    seconds: float
    problem: UserError | None
    """What is wrong, with the file at fault; None when nothing is."""


def verify_directory(path: Path, *, trust_remote_code: bool, report: Callable[[str], None]) -> Iterator[Verified]:
    """Each checkpoint in `path`, oldest first, then the model that is part of none: whatever `examine` finds there.

    A checkpoint's files are compared with its manifest, every byte; then, as of a model, weights and tokenizer are
    loaded with transformers, on the CPU, in the stored dtype. `report` is told of a checkpoint that a running job
    removed meanwhile. Raises `UserError` as `examine` does.
    """
    place = examine(path)
    for checkpoint in reversed(place.checkpoints):
        verified = _verify(checkpoint, checkpoint / MODEL, trust_remote_code, is_checkpoint=True)
        if verified.problem is not None and not checkpoint.is_dir():
            report(f"{checkpoint} was removed while it was verified")
        else:
            yield verified
    if place.model is not None:
        yield _verify(place.model, place.model, trust_remote_code, is_checkpoint=False)


def _verify(path: Path, model: Path, trust_remote_code: bool, *, is_checkpoint: bool) -> Verified:
    began = time.monotonic()
    step, problem = None, None
    try:
        if is_checkpoint:
            step = verify_checkpoint(path).step
        reload_model(model, dtype="auto", trust_remote_code=trust_remote_code)
        reload_tokenizer(model, trust_remote_code=trust_remote_code)
    except (DamagedCheckpointError, UnloadableModelError) as error:
        problem = error
    return Verified(path, step, _bytes_in(path), time.monotonic() - began, problem)


def _bytes_in(directory: Path) -> int:
    total = 0
    for file in directory.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:  # a running job removes old checkpoints
            continue
    return total
