"""A new directory that appears under its name once it is whole, or not at all."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from understudy.checkpoint.durable import sync_directory
from understudy.checkpoint.places import ModelPlace
from understudy.checkpoint.store import CheckpointStore
from understudy.errors import UserError, is_full_disk

__all__ = ["made_whole", "refuse_place"]


def refuse_place(source: Path, place: ModelPlace, out: Path) -> None:
    """Raises `UserError` when `out` is inside what is exported, or where training would remove it."""
    target = out.resolve()
    for directory in (source, place.checkpoint or source):
        if target.is_relative_to(directory.resolve()):
            raise UserError(f"is inside {directory}, which is to be exported; name a directory elsewhere.", file=out)
    for parent in target.parents:
        if CheckpointStore(parent).committed():
            raise UserError(
                f"is among the checkpoints of {parent}, which training clears; name a directory elsewhere.", file=out
            )


@contextmanager
def made_whole(out: Path, needed_bytes: int) -> Iterator[Path]:
    """A new directory that gets the name `out` when the block ends well, and leaves nothing behind when it does not."""
    created: list[Path] = []
    partial: Path | None = None
    try:
        _require_space(out, needed_bytes)
        created = _make_parents(out)
        partial = out.with_name(f"{out.name}.{secrets.token_hex(4)}.partial")
        partial.mkdir()
        yield partial
        partial.rename(out)
        sync_directory(out.parent)
    except BaseException as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for directory in created:
            with suppress(OSError):
                directory.rmdir()
        if is_full_disk(error):
            raise _no_space(out, needed_bytes) from error
        if isinstance(error, OSError):
            raise UserError(
                f"cannot be read or written ({error.strerror or error}).", file=error.filename or out
            ) from error
        raise


def _make_parents(out: Path) -> list[Path]:
    """Creates what `out` is to be in. Returns what it created, innermost first."""
    there = _nearest(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    return [parent for parent in out.absolute().parents if there in parent.parents]


def _nearest(out: Path) -> Path:
    """The innermost directory around `out` that exists."""
    return next(parent for parent in out.absolute().parents if parent.exists())


def _require_space(out: Path, needed_bytes: int) -> None:
    if shutil.disk_usage(_nearest(out)).free < needed_bytes:
        raise _no_space(out, needed_bytes)


def _no_space(out: Path, needed_bytes: int) -> UserError:
    directory = _nearest(out)
    return UserError(
        f"the disk has no room: the model needs {needed_bytes:,} bytes and {shutil.disk_usage(directory).free:,} are "
        "free; free some space or name a directory on another disk.",
        file=directory,
    )
