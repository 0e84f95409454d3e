"""The directory of one run: its layout, who may write to it, and what may be cleared. Imports no torch.

A directory is a run directory when it holds the marker file, by which one run at a time owns it: `run_lock`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from understudy.launch.run_lock import MARKER, in_use, lock_run, read_owner, still_owned, write_errors
from understudy.recipe.source_map import SourceMap

__all__ = ["MARKER", "Claim", "RunDirectory", "claim_run_directory", "require_space"]

OWNED = (
    "recipe.yaml",
    "job.json",
    "metrics.jsonl",
    "logs",
    "tensorboard",
    "model",
    "model.unproven",
    "model.unproven.partial",
)
"""Every name a run writes, apart from the marker; `--overwrite` removes these and nothing else."""

REPLACED = ".understudy-replaced"
"""Where an earlier run waits, until the one that replaces it has proved able to train."""


@dataclass(frozen=True)
class RunDirectory:
    """Where things of a run are."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def job(self) -> Path:
        """What every process of the run is told."""
        return self.path / "job.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def model(self) -> Path:
        """The final model; there once it is proved to load."""
        return self.path / "model"

    @property
    def unproven_model(self) -> Path:
        """The final model until it is proved to load."""
        return self.path / "model.unproven"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def log(self, rank: int) -> Path:
        """What process `rank` and its libraries print."""
        return self.logs / f"rank-{rank}.log"

    def cause(self, rank: int) -> Path:
        """Why process `rank` failed, when it did."""
        return self.logs / f"rank-{rank}.cause.json"


class Claim:
    """The right to write to a run directory. Until `begin`, giving it up leaves no trace."""

    def __init__(self, directory: RunDirectory, token: str, sources: SourceMap) -> None:
        self.directory = directory
        self.token = token
        """Of our ownership, for `run_lock.still_owned` in any process."""
        self.begun = False
        self._sources = sources

    def begin(self, resolved_recipe: str) -> RunDirectory:
        """Puts aside what an earlier run left, when overwriting it was allowed, and writes `recipe.yaml`.

        Raises `UserError` when another run has taken the directory over since it was claimed.
        """
        path = self.directory.path
        if not self._is_ours():
            raise in_use(path, read_owner(path), self._sources)
        replaced = path / REPLACED
        _remove(replaced)
        if any((path / name).exists() for name in OWNED):
            replaced.mkdir()
            _move(path, replaced)
        self.begun = True
        self.directory.logs.mkdir()
        self.directory.recipe.write_text(resolved_recipe, encoding="utf-8")
        return self.directory

    def withdraw(self) -> None:
        """Clears what this run wrote and puts back what it replaced, as if it had not begun. Does nothing once another
        run has taken the directory over."""
        if not self.begun or not self._is_ours():
            return
        for name in OWNED:
            _remove(self.directory.path / name)
        replaced = self.directory.path / REPLACED
        if replaced.exists():
            _move(replaced, self.directory.path)
            replaced.rmdir()
        self.begun = False

    def settle(self) -> None:
        """Removes for good what this run replaced. Does nothing once another run has taken the directory over."""
        if self._is_ours():
            _remove(self.directory.path / REPLACED)

    def _is_ours(self) -> bool:
        return still_owned(self.directory.path, self.token)


@contextmanager
def claim_run_directory(
    path: Path, sources: SourceMap, *, overwrite: bool, report: Callable[[str], None] = lambda line: None
) -> Iterator[Claim]:
    """Holds `path` for one run, creating it where it is missing; on leaving, a directory never begun is as it was, and
    one that was begun has lost the run that it replaced.

    `report` is told when it takes long to find out whether an earlier owner is alive. Raises `UserError` at the
    recipe's `output_dir` when another run is writing there, when it holds an earlier run and `overwrite` is false, when
    it holds files that no run wrote, or when it cannot be created; `StoppedError` when a request to stop comes.
    """
    created = _create(path, sources)
    begun = False
    try:
        _refuse_foreign(path, sources)
        with lock_run(path, sources, report) as lock:
            claim = Claim(RunDirectory(path), lock.token, sources)
            try:
                if not overwrite:
                    _refuse_earlier_run(claim.directory, sources)
                yield claim
            finally:
                begun = claim.begun
                if begun:
                    claim.settle()
                with write_errors(path, sources):
                    (lock.release if begun else lock.undo)()
    finally:
        if not begun:
            for directory in created:
                with suppress(OSError):  # another run may be in it by now
                    directory.rmdir()


def require_space(path: Path, needed_bytes: int, what: str, sources: SourceMap) -> None:
    """Raises `UserError` when the file system of `path` has less than `needed_bytes` free. `what` needs them."""
    free_bytes = shutil.disk_usage(path).free
    if free_bytes < needed_bytes:
        raise sources.error(
            "output_dir",
            f"{what} needs {needed_bytes:,} bytes but {path} has {free_bytes:,} bytes free; "
            "free some space or choose an output_dir on another disk.",
        )


def _create(path: Path, sources: SourceMap) -> list[Path]:
    """Creates `path` and its missing parents. Returns what it created, innermost first."""
    missing: list[Path] = []
    try:
        for directory in (path, *path.parents):
            if directory.exists():
                break
            missing.append(directory)
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise sources.error("output_dir", f"{path} is a file; choose another output_dir.") from None
    except OSError as problem:
        raise sources.error(
            "output_dir", f"{path} cannot be created ({problem.strerror}); choose another output_dir."
        ) from problem
    return missing


def _refuse_foreign(path: Path, sources: SourceMap) -> None:
    if (path / MARKER).exists():
        return
    if names := sorted(entry.name for entry in path.iterdir()):
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        raise sources.error(
            "output_dir",
            f"{path} holds files that no run wrote ({shown}), which are never cleared; choose another output_dir.",
        )


def _refuse_earlier_run(directory: RunDirectory, sources: SourceMap) -> None:
    found = [name for name in (*OWNED, REPLACED) if (directory.path / name).exists()]
    if found:
        state = "a finished run" if directory.model.exists() else "a run that did not finish"
        raise sources.error(
            "output_dir",
            f"{directory.path} holds {state}; replace it with --overwrite, or choose another output_dir.",
        )


def _move(source: Path, target: Path) -> None:
    """Moves every name that a run writes, within one file system."""
    for name in OWNED:
        if (source / name).exists():
            (source / name).rename(target / name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
