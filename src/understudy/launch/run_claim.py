"""Who may write to a run directory, begin a run there or go on with one, and what may be cleared. Imports no torch.

A directory is a run directory when it holds the marker file, by which one run at a time owns it: `run_lock`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from understudy.launch.run_directory import (
    REPLACED,
    RunDirectory,
    keep_rows,
    move_written,
    remove_path,
    replace_file,
    written_by_runs,
)
from understudy.launch.run_lock import MARKER, in_use, lock_run, read_owner, still_owned, write_errors
from understudy.recipe.source_map import SourceMap

__all__ = ["Claim", "claim_run_directory", "require_space"]


class Claim:
    """The right to write to a run directory. Until `begin` or `go_on`, giving it up leaves no trace."""

    def __init__(self, directory: RunDirectory, token: str, sources: SourceMap, *, may_go_on: bool) -> None:
        self.directory = directory
        self.may_go_on = may_go_on
        """The directory holds a run that this one may go on with; `begin` is for any other."""
        self.token = token
        """Of our ownership, for `run_lock.still_owned` in any process."""
        self.begun = False
        self._sources = sources
        self._before: dict[Path, bytes | None] = {}
        """Files of a run that is gone on with, as they were."""

    def begin(self, resolved_recipe: str) -> RunDirectory:
        """Puts aside what an earlier run left, when overwriting it was allowed, and writes `recipe.yaml`.

        Raises `UserError` when another run has taken the directory over since it was claimed.
        """
        path = self.directory.path
        self._require_ours()
        replaced = path / REPLACED
        remove_path(replaced)
        if written_by_runs(path):
            replaced.mkdir()
            move_written(path, replaced)
        self.begun = True
        self.directory.logs.mkdir()
        self.directory.recipe.write_text(resolved_recipe, encoding="utf-8")
        return self.directory

    def go_on(self, resolved_recipe: str, step: int) -> RunDirectory:
        """Goes on with the run that is here, after its step `step`: keeps all but what lies past that step, and what a
        final model needs the place of. Raises `UserError` as `begin` does."""
        self._require_ours()
        directory = self.directory
        for path in (directory.unproven_model, directory.path / "model.unproven.partial"):
            remove_path(path)
        if directory.model.exists():
            remove_path(directory.previous_model)
            directory.model.rename(directory.previous_model)
        for file in (directory.recipe, directory.job, directory.metrics):
            self._before[file] = file.read_bytes() if file.exists() else None
        keep_rows(directory.metrics, step)
        directory.logs.mkdir(exist_ok=True)
        self.begun = True
        replace_file(directory.recipe, resolved_recipe.encode())
        return directory

    def start_again(self, resolved_recipe: str, step: int) -> None:
        """Goes back to step `step` of the run that was begun here and failed; its processes have ended. Raises
        `UserError` as `begin` does."""
        self._require_ours()
        directory = self.directory
        for path in (directory.unproven_model, directory.path / "model.unproven.partial"):
            remove_path(path)
        if step == 0:
            remove_path(directory.tensorboard)
        keep_rows(directory.metrics, step)
        replace_file(directory.recipe, resolved_recipe.encode())

    def withdraw(self) -> None:
        """Clears what this run wrote and puts back what it replaced, as if it had not begun; a run that was gone on
        with stays, as it could be gone on with before. Does nothing once another run has taken the directory over."""
        if not self.begun or not self._is_ours():
            return
        if self.may_go_on:
            if self.directory.previous_model.exists() and not self.directory.model.exists():
                self.directory.previous_model.rename(self.directory.model)
            for file, content in self._before.items():
                if content is None:
                    file.unlink(missing_ok=True)
                else:
                    replace_file(file, content)
            return
        for entry in written_by_runs(self.directory.path):
            remove_path(entry)
        replaced = self.directory.path / REPLACED
        if replaced.exists():
            move_written(replaced, self.directory.path)
            replaced.rmdir()
        self.begun = False

    def settle(self) -> None:
        """Removes for good what this run replaced. Does nothing once another run has taken the directory over."""
        if self._is_ours():
            remove_path(self.directory.path / REPLACED)

    def _require_ours(self) -> None:
        path = self.directory.path
        if not self._is_ours():
            raise in_use(path, read_owner(path), self._sources)

    def _is_ours(self) -> bool:
        return still_owned(self.directory.path, self.token)


@contextmanager
def claim_run_directory(
    path: Path,
    sources: SourceMap,
    *,
    overwrite: bool,
    resume: str = "never",
    report: Callable[[str], None] = lambda line: None,
) -> Iterator[Claim]:
    """Holds `path` for one run, creating it where it is missing; on leaving, a directory never begun is as it was, and
    one that was begun has lost the run that it replaced.

    `report` is told when it takes long to find out whether an earlier owner is alive. Raises `UserError` at the
    recipe's `output_dir` when another run is writing there, when it holds an earlier run that is neither to be
    overwritten nor, by `checkpoint.resume`, to be gone on with, when it holds files that no run wrote, or when it
    cannot be created; `StoppedError` when a request to stop comes.
    """
    created = _create(path, sources)
    begun = False
    try:
        _refuse_foreign(path, sources)
        with lock_run(path, sources, report) as lock:
            directory = RunDirectory(path)
            earlier = not overwrite and _holds_run(directory)
            claim = Claim(directory, lock.token, sources, may_go_on=earlier)
            try:
                if earlier:
                    _refuse_to_go_on(directory, resume, sources)
                yield claim
            finally:
                begun = claim.begun
                if begun:
                    claim.settle()
                with write_errors(path, sources):
                    (lock.release if begun else lock.undo)()
    finally:
        if not begun:
            for made in created:
                with suppress(OSError):  # another run may be in it by now
                    made.rmdir()


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


def _holds_run(directory: RunDirectory) -> bool:
    return bool(written_by_runs(directory.path)) or (directory.path / REPLACED).exists()


def _refuse_to_go_on(directory: RunDirectory, resume: str, sources: SourceMap) -> None:
    """A finished run goes on only if a checkpoint is named, and once: the same command again finds it finished."""
    if directory.model.exists() and (resume in ("auto", "never") or resume == directory.recorded_resume):
        raise sources.error(
            "output_dir",
            f"{directory.path} holds a finished run; replace it with --overwrite, go on from its last checkpoint with "
            "checkpoint.resume=PATH and more steps, or choose another output_dir.",
        )
    if resume == "never":
        raise sources.error(
            "output_dir",
            f"{directory.path} holds a run that did not finish; go on with it by leaving checkpoint.resume at auto, "
            "replace it with --overwrite, or choose another output_dir.",
        )
