"""The directory of one run: its layout, who may write to it, and what may be cleared. Imports no torch.

A directory is a run directory when it holds the marker file. The marker is locked (`flock`) by the run that is writing
there, and names it, so that a second run can say who is in the way; a lock dies with its process, however that ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TextIO

from understudy.errors import UserError
from understudy.recipe.source_map import SourceMap

__all__ = ["Claim", "RunDirectory", "claim_run_directory", "require_space"]

MARKER = ".understudy-run.json"
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

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self.begun = False

    def begin(self, resolved_recipe: str) -> RunDirectory:
        """Puts aside what an earlier run left, when overwriting it was allowed, and writes `recipe.yaml`."""
        replaced = self.directory.path / REPLACED
        _remove(replaced)
        if any((self.directory.path / name).exists() for name in OWNED):
            replaced.mkdir()
            _move(self.directory.path, replaced)
        self.begun = True
        self.directory.logs.mkdir()
        self.directory.recipe.write_text(resolved_recipe, encoding="utf-8")
        return self.directory

    def withdraw(self) -> None:
        """Clears what this run wrote and puts back what it replaced, as if it had not begun."""
        if not self.begun:
            return
        for name in OWNED:
            _remove(self.directory.path / name)
        replaced = self.directory.path / REPLACED
        if replaced.exists():
            _move(replaced, self.directory.path)
            replaced.rmdir()
        self.begun = False

    def settle(self) -> None:
        """Removes for good what this run replaced."""
        _remove(self.directory.path / REPLACED)


@contextmanager
def claim_run_directory(path: Path, sources: SourceMap, *, overwrite: bool) -> Iterator[Claim]:
    """Holds `path` for one run, creating it where it is missing; on leaving, a directory never begun is as it was, and
    one that was begun has lost the run that it replaced.

    Raises `UserError` at the recipe's `output_dir` when another run is writing there, when it holds an earlier run and
    `overwrite` is false, when it holds files that no run wrote, or when it cannot be created.
    """
    created = _create(path, sources)
    claim = Claim(RunDirectory(path))
    try:
        _refuse_foreign(path, sources)
        marked_before = (path / MARKER).exists()
        with _locked_marker(path, sources) as marker:
            owner_before = marker.read()
            try:
                if not overwrite:
                    _refuse_earlier_run(claim.directory, sources)
                _sign(marker, _this_process(), path, sources)
                yield claim
            finally:
                if claim.begun:
                    claim.settle()
                elif marked_before:
                    _sign(marker, owner_before, path, sources)
                else:
                    (path / MARKER).unlink()
    finally:
        if not claim.begun:
            for directory in created:
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


@contextmanager
def _locked_marker(path: Path, sources: SourceMap) -> Iterator[TextIO]:
    with _write_errors(path, sources):
        descriptor = os.open(path / MARKER, os.O_RDWR | os.O_CREAT, 0o644)
    with os.fdopen(descriptor, "r+", encoding="utf-8") as marker:
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(path, marker.read(), sources) from None
        # The holder before us may have removed the marker between our opening and locking it.
        if os.fstat(descriptor).st_nlink == 0:
            raise _in_use(path, "", sources)
        yield marker


def _this_process() -> str:
    return json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": _now()})


def _sign(marker: TextIO, owner: str, path: Path, sources: SourceMap) -> None:
    with _write_errors(path, sources):
        # Written below the buffer of `marker`, which would try again on closing if the disk is full.
        os.ftruncate(marker.fileno(), 0)
        os.pwrite(marker.fileno(), owner.encode(), 0)


@contextmanager
def _write_errors(path: Path, sources: SourceMap) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise sources.error(
            "output_dir", f"{path} cannot be written to ({problem.strerror}); choose another output_dir."
        ) from problem


def _in_use(path: Path, marker: str, sources: SourceMap) -> UserError:
    try:
        owner = json.loads(marker)
        who = f"process {owner['process']} on {owner['host']}, since {owner['since']}"
    except (ValueError, KeyError):  # it is just being written
        who = "another process"
    return sources.error(
        "output_dir", f"{path} is in use by a running job ({who}); wait for it, stop it, or choose another output_dir."
    )


def _now() -> str:
    return datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds")


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
