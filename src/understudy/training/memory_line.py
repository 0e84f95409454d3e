"""What a run says at its end of the memory that it took."""

from __future__ import annotations

__all__ = ["memory_line"]


def memory_line(predicted_bytes: int | None, measured_bytes: int) -> str | None:
    """For the end of the log; None where nothing was predicted."""
    if predicted_bytes is None:
        return None
    planned, measured = (f"{size / 2**30:.2f} GiB" for size in (predicted_bytes, measured_bytes))
    share = measured_bytes / predicted_bytes
    return f"memory: planned {planned}, measured {measured} a process ({share:.0%})"
