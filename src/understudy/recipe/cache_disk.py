"""What goes wrong on the disk that the cache is on, as sentences. Imports no torch."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from understudy.errors import UserError, is_full_disk

__all__ = ["writing_cache"]

_UNWRITABLE = (
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)


@contextmanager
def writing_cache(root: Path) -> Iterator[None]:
    """Inside, a disk of `root` that is full or cannot be written to raises `UserError` with the way out."""
    try:
        yield
    except Exception as error:
        if is_full_disk(error):
            message = "no space is left for the cache; free some, or name a directory on another disk in"
        elif isinstance(error, OSError) and error.errno in _UNWRITABLE and _lies_in(error.filename, root):
            message = f"the cache cannot be written here ({error.strerror}); name another directory in"
        else:
            raise
        raise UserError(f"{message} UNDERSTUDY_CACHE.", file=root) from error


def _lies_in(name: object, root: Path) -> bool:
    """Errors without a name come from writing to a file that is open."""
    return name is None or str(name).startswith(str(root))
