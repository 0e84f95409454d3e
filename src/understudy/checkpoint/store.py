"""The checkpoints of a run: their names, how one becomes the newest, and which are kept. Imports no torch.

A checkpoint is written under a name of its own and renamed when it is complete, so `step-…` is always whole. Nothing
here is a collective; one process commits, retains and cleans.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from understudy.checkpoint.durable import sync_directory
from understudy.checkpoint.manifest import MARKER, DamagedCheckpointError, verify_files
from understudy.checkpoint.progress import Progress, read_progress

__all__ = ["CheckpointStore", "first_verified", "is_checkpoint_name", "step_of", "verify_checkpoint"]

_COMMITTED = re.compile(r"step-(\d{8,})")
_PARTIAL, _DAMAGED, _RETIRED = ".partial", ".damaged", ".retired"


class CheckpointStore:
    """The directory `checkpoints` of a run; it need not exist."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:08}"

    def committed(self) -> list[Path]:
        """Checkpoints under their final names, newest first."""
        return sorted(
            (path for path in self._entries() if _COMMITTED.fullmatch(path.name) and path.is_dir()),
            key=step_of,
            reverse=True,
        )

    def newest(self, report: Callable[[str], None]) -> tuple[Path, Progress] | None:
        """The newest checkpoint that verifies, every byte read; `report` is told of each newer one that does not.
        None when there is no checkpoint at all. Raises `DamagedCheckpointError` when there are only bad ones."""
        return first_verified(self.committed(), report)

    def partial(self, step: int, token: str) -> Path:
        """Where the checkpoint of `step` is written. `token` tells attempts apart: a process of an earlier one that is
        not quite dead must not write into this one's."""
        return self.directory / f"{self.path(step).name}.{token}{_PARTIAL}"

    def begin(self, partial: Path) -> None:
        """Makes `partial` anew."""
        _remove(partial)
        partial.mkdir(parents=True)
        self.directory.chmod(0o700)
        for name in ("model", "optimizer", "parts"):
            (partial / name).mkdir()

    def discard(self, partial: Path) -> None:
        """Removes what no process writes to any more."""
        _remove(partial)

    def commit(self, partial: Path, step: int) -> Path:
        """Gives a complete checkpoint its name, for good."""
        final = self.path(step)
        self._put_away(final, _DAMAGED)
        partial.rename(final)
        sync_directory(self.directory)
        sync_directory(self.directory.parent)  # where `directory` was made, by the first checkpoint
        return final

    def retain(self, keep: int, *, best: bool) -> None:
        """Removes all but the newest `keep` checkpoints, and with `best` the one of the lowest evaluation loss.

        Called once the newest is committed; so are checkpoints that were found damaged no longer of use.
        """
        found = self.committed()
        kept = set(found[:keep])
        if best and (losses := {path: loss for path in found if (loss := _eval_loss(path)) is not None}):
            kept.add(min(losses, key=lambda path: (losses[path], -step_of(path))))
        for path in found:
            if path not in kept:
                self._put_away(path, _RETIRED)
        for path in self._entries():
            if path.name.endswith((_RETIRED, _DAMAGED)):
                _remove(path)

    def set_aside_after(self, step: int) -> None:
        """Takes the names of checkpoints past `step` away: they were found damaged, and training goes on from there."""
        for path in self.committed():
            if step_of(path) > step:
                self._put_away(path, _DAMAGED)

    def clean(self) -> None:
        """Removes what attempts that were killed have left. No other process may be writing."""
        for path in self._entries():
            if path.name.endswith((_PARTIAL, _RETIRED)):
                _remove(path)

    def _put_away(self, path: Path, suffix: str) -> None:
        if path.exists():
            target = path.with_name(path.name + suffix)
            _remove(target)
            path.rename(target)

    def _entries(self) -> Iterator[Path]:
        return iter(sorted(self.directory.iterdir()) if self.directory.is_dir() else [])


def is_checkpoint_name(name: str) -> bool:
    """Whether a directory of that name is a committed checkpoint, whole or not."""
    return _COMMITTED.fullmatch(name) is not None


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    match = _COMMITTED.match(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1])


def first_verified(checkpoints: Iterable[Path], report: Callable[[str], None]) -> tuple[Path, Progress] | None:
    """The first of `checkpoints` that verifies, every byte read; `report` is told of each before it that does not.
    None when there are none. Raises `DamagedCheckpointError` when all are bad."""
    problem: DamagedCheckpointError | None = None
    for path in checkpoints:
        try:
            return path, verify_checkpoint(path)
        except DamagedCheckpointError as error:
            problem = error
            report(f"skipped checkpoint {path.name}: {error}")
    if problem is not None:
        raise problem
    return None


def verify_checkpoint(path: Path) -> Progress:
    """Reads every byte. Raises `DamagedCheckpointError` naming the file that is missing, changed or misplaced."""
    verify_files(path)
    progress = read_progress(path)
    if _COMMITTED.fullmatch(path.name) and step_of(path) != progress.step:
        raise DamagedCheckpointError(f"is of step {progress.step}, not of {path.name}.", file=path / "state.json")
    return progress


def _eval_loss(path: Path) -> float | None:
    """None where there is none that could be the best."""
    try:
        loss = read_progress(path).eval_loss
    except DamagedCheckpointError:
        return None
    return loss if loss is not None and math.isfinite(loss) else None


def _remove(path: Path) -> None:
    """Without its marker first, so that what is left of a removal that is cut short is no checkpoint."""
    if path.is_dir():
        (path / MARKER).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
