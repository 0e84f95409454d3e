"""Sizes of memory as a user writes them, and the limit that a recipe sets a process. Imports no torch."""

from __future__ import annotations

import re

__all__ = ["bytes_of", "is_limit", "is_size", "limited_bytes"]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)?\s*", re.IGNORECASE)


def bytes_of(text: str) -> int | None:
    """`24GiB` (2^30), `24GB` (10^9) or a plain number in bytes; None for what is no size."""
    found = _SIZE.fullmatch(text)
    return None if found is None else int(float(found[1]) * _UNITS[(found[2] or "").upper()])


def limited_bytes(limit: float | str | None, total_bytes: int) -> int | None:
    """What a process may take of a device: `limit` is `training.memory_limit`, a fraction of `total_bytes` or a size.

    `total_bytes` is the memory of the device, and on a host without accelerators that which one of its processes may
    have; 0 where nobody knows it. None where there is no limit, or it is a fraction of what nobody knows.
    """
    if isinstance(limit, str):
        return bytes_of(limit)
    return None if limit is None or not total_bytes else int(limit * total_bytes)


def is_size(text: str) -> bool:
    """Whether `text` is a size above 0 with its unit."""
    return bool(bytes_of(text)) and text.strip()[-1] in "Bb"


def is_limit(limit: float | str | None) -> bool:
    """Whether `training.memory_limit` is a fraction above 0 and at most 1, a size with its unit, or null."""
    if isinstance(limit, str):
        return is_size(limit)
    return limit is None or 0 < limit <= 1
