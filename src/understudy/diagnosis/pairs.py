"""Every pair of processes, in rounds in which each process is in one pair at most. Imports no torch."""

from __future__ import annotations

__all__ = ["pair_rounds"]


def pair_rounds(size: int) -> list[list[tuple[int, int]]]:
    """Each pair of 0 … `size` − 1 once, by the circle method of round-robin tournaments; odd sizes leave one out a
    round."""
    seats: list[int | None] = [*range(size), *([None] if size % 2 else [])]
    rounds = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        facing = zip(seats[:half], reversed(seats[half:]))
        rounds.append([(min(a, b), max(a, b)) for a, b in facing if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds
