"""Whether what is stored in a directory is what was written, and loads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from understudy.checkpoint.adapter_base import BaseNotFoundError, find_base
from understudy.checkpoint.manifest import DamagedCheckpointError
from understudy.checkpoint.places import MODEL, examine
from understudy.checkpoint.reloading import (
    UnloadableModelError,
    has_tokenizer,
    reload_adapter,
    reload_model,
    reload_tokenizer,
)
from understudy.checkpoint.store import verify_checkpoint
from understudy.errors import UserError
from understudy.models.adapters.directory import is_adapter, open_adapter, read_base, read_config
from understudy.models.adapters.peft_package import require_peft

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
    note: str | None = None
    """What could not be looked at; None when everything was."""


def verify_directory(
    path: Path, *, trust_remote_code: bool, report: Callable[[str], None], base: str | None = None
) -> Iterator[Verified]:
    """Each checkpoint in `path`, oldest first, then the model that is part of none: whatever `examine` finds there.

    A checkpoint's files are compared with its manifest, every byte; then, as of a model, weights and tokenizer are
    loaded with transformers, on the CPU, in the stored dtype. An adapter is loaded with peft onto its base, which
    `base` names where it is not where the adapter says; where it is not found, what is stored is read, and noted.
    `report` is told of a base that is being quantized, and of a checkpoint that a running job removed
    meanwhile. Raises `UserError` as `examine` does, and for a `base` that is none.
    """
    place = examine(path)
    models = [
        *([] if place.model is None else [place.model]),
        *(checkpoint / MODEL for checkpoint in place.checkpoints),
    ]
    if base is not None and not any(is_adapter(model) for model in models):
        raise UserError(f"{path} holds no adapter, so no base goes with it; leave --base out.")
    for checkpoint in reversed(place.checkpoints):
        verified = _verify(checkpoint, checkpoint / MODEL, trust_remote_code, report, base, is_checkpoint=True)
        if verified.problem is not None and not checkpoint.is_dir():
            report(f"{checkpoint} was removed while it was verified")
        else:
            yield verified
    if place.model is not None:
        yield _verify(place.model, place.model, trust_remote_code, report, base, is_checkpoint=False)


def _verify(
    path: Path,
    model: Path,
    trust_remote_code: bool,
    report: Callable[[str], None],
    base: str | None,
    *,
    is_checkpoint: bool,
) -> Verified:
    began = time.monotonic()
    step, problem, note = None, None, None
    try:
        if is_checkpoint:
            step = verify_checkpoint(path).step
        if is_adapter(model):
            note = _load_adapter(model, trust_remote_code, report, base)
        else:
            reload_model(model, dtype="auto", trust_remote_code=trust_remote_code)
            reload_tokenizer(model, trust_remote_code=trust_remote_code)
    except (DamagedCheckpointError, UnloadableModelError) as error:
        problem = error
    return Verified(path, step, _bytes_in(path), time.monotonic() - began, problem, note)


def _load_adapter(
    directory: Path, trust_remote_code: bool, report: Callable[[str], None], base: str | None
) -> str | None:
    """Loads the adapter onto its base; the note, where it can only be read. Raises `UnloadableModelError`."""
    try:
        require_peft()
        read_config(directory)
        stored = open_adapter(directory)
        for name in stored.names():
            stored(name)[:]
        read_base(directory)
    except UserError as error:
        raise UnloadableModelError(error.message, file=error.file) from error
    if has_tokenizer(directory):
        reload_tokenizer(directory, trust_remote_code=trust_remote_code)
    try:
        found = find_base(directory, base, report)
    except BaseNotFoundError as error:
        return f"not loaded onto its base: {error}"
    model = reload_model(found.directory, dtype="auto", trust_remote_code=trust_remote_code)
    reload_adapter(model, directory)
    return None


def _bytes_in(directory: Path) -> int:
    total = 0
    for file in directory.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:  # a running job removes old checkpoints
            continue
    return total
