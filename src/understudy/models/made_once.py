"""Directories of the cache that are made once: one process builds, others wait, and they appear whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from understudy.recipe.cache_disk import writing_cache

__all__ = ["made_once"]


def made_once(place: Path, build: Callable[[Path], None]) -> Path:
    """`place`, a directory named by a digest of all that decides its contents. Where it is not there, `build` fills one
    that then takes its name, its files synced to the disk. What `build` raises leaves nothing behind."""
    if place.is_dir():
        return place
    with writing_cache(place.parent):
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{place}.lock"):
            if place.is_dir():
                return place
            building = Path(tempfile.mkdtemp(prefix=f"{place.name}.", dir=place.parent))
            try:
                build(building)
                for file in building.rglob("*"):
                    if file.is_file():
                        with file.open("rb") as written:
                            os.fsync(written.fileno())
                building.rename(place)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    return place
