"""What a directory that a user names is: a run, its checkpoints, one of them, a plain model or an adapter. Imports no
torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from understudy.checkpoint.manifest import MANIFEST, MARKER, verify_sizes
from understudy.checkpoint.store import CheckpointStore, is_checkpoint_name
from understudy.errors import UserError
from understudy.launch.run_directory import RunDirectory
from understudy.launch.run_lock import MARKER as RUN_MARKER
from understudy.models.adapters.directory import is_adapter

__all__ = ["CONFIG", "MODEL", "ModelPlace", "Place", "examine", "find_model"]

CONFIG = "config.json"
"""What makes a directory a Hugging Face model."""
MODEL = "model"
"""The directory of the weights inside a checkpoint, a model or adapter directory like any other."""


@dataclass(frozen=True)
class Place:
    """What is in a directory. At least one of the two is there."""

    checkpoints: tuple[Path, ...]
    """Newest first; they need not verify."""
    model: Path | None
    """A model or adapter directory that is part of no checkpoint: the final one of a run, or the directory itself."""


@dataclass(frozen=True)
class ModelPlace:
    """One model or adapter directory."""

    directory: Path
    checkpoint: Path | None
    """The checkpoint that it is part of."""


def examine(path: Path) -> Place:
    """What a run directory, a `checkpoints` directory, a checkpoint, its `model`, a plain model or an adapter holds.

    Raises `UserError` for anything else, and for a run or a `checkpoints` directory with nothing in it yet.
    """
    if not path.is_dir():
        raise UserError(_no_directory(path))
    run = RunDirectory(path)
    if (path / RUN_MARKER).is_file():
        return _examine_run(run)
    if (checkpoint := _checkpoint_around(path)) is not None:
        return Place((checkpoint,), None)
    if (path / CONFIG).is_file() or is_adapter(path):
        return Place((), path)
    if run.model.is_dir() or CheckpointStore(run.checkpoints).committed():
        return _examine_run(run)  # copied from elsewhere without its marker, which is a hidden file
    if found := CheckpointStore(path).committed():
        return Place(tuple(found), None)
    if path.name == run.checkpoints.name:
        raise UserError("holds no committed checkpoint yet.", file=path)
    raise UserError(
        f"is neither a model (no {CONFIG} in it) nor a run, a checkpoint, an adapter or a directory of checkpoints.",
        file=path,
    )


def find_model(path: Path, report: Callable[[str], None]) -> ModelPlace:
    """The model or adapter directory that `path` stands for, whatever `examine` says it is: of a run its final model
    or, while there is none, the newest checkpoint's; `report` is told when a checkpoint was chosen among others.

    A checkpoint is looked at, not read: every file it lists must be there and have its size. Raises `UserError` as
    `examine` does, and `DamagedCheckpointError`.
    """
    place = examine(path)
    if place.model is not None:
        return ModelPlace(place.model, None)
    newest = place.checkpoints[0]
    verify_sizes(newest)
    if newest != path and newest.resolve() not in (path.resolve(), path.resolve().parent):
        report(f"the newest checkpoint of {path} is taken: {newest.name}")
    return ModelPlace(newest / MODEL, newest)


def _examine_run(run: RunDirectory) -> Place:
    checkpoints = tuple(CheckpointStore(run.checkpoints).committed())
    model = run.model if run.model.is_dir() else None
    if model is None and not checkpoints:
        raise UserError(
            f"is a run without a final model (no {run.model.name}/ in it) and without a committed checkpoint; let the "
            "run go on, or name a model directory.",
            file=run.path,
        )
    return Place(checkpoints, model)


def _checkpoint_around(path: Path) -> Path | None:
    """The checkpoint that `path` is, or is the model of, whatever it was renamed to and whatever is missing of it."""
    if _is_checkpoint(path):
        return path
    whole = path.resolve()
    if whole.name == MODEL and _is_checkpoint(whole.parent):
        # Named as the user named it, where that is possible.
        return path.parent if path.name == MODEL else whole.parent
    return None


def _is_checkpoint(path: Path) -> bool:
    if all((path / name).is_file() for name in (MANIFEST, MARKER)):
        return True
    # Other programs give such names to plain models and adapters.
    return is_checkpoint_name(path.resolve().name) and not (path / CONFIG).exists() and not is_adapter(path)


def _no_directory(path: Path) -> str:
    if path.exists():
        return f"{path} is a file; name its directory."
    return f"there is no directory {path}; name that of a run, a checkpoint or a model."
