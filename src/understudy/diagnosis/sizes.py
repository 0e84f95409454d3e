"""Numbers of bytes, as people read them."""

from __future__ import annotations

__all__ = ["GIB", "KIB", "MIB", "shown"]

KIB, MIB, GIB = 2**10, 2**20, 2**30


def shown(num_bytes: float) -> str:
    """`23.5 GiB`, `64 MiB`."""
    for size, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if num_bytes >= size:
            number = num_bytes / size
            return f"{number:,.0f} {unit}" if number >= 100 or number == int(number) else f"{number:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"
