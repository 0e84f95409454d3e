"""How a global batch is cut into micro-batches: only a matter of speed and memory, never of the result (P3)."""

from __future__ import annotations

import heapq
import math

import numpy as np
import numpy.typing as npt

__all__ = ["bin_examples", "consecutive_bins"]

Lengths = npt.NDArray[np.integer]


def bin_examples(lengths: Lengths, *, capacity: int, world_size: int, attention_cost: float) -> list[list[list[int]]]:
    """Deals examples of `lengths` [B] tokens to micro-batches of at most `capacity` tokens: `[k][world_size]` lists of
    positions in the batch, each in ascending order, some possibly empty.

    k is the smallest number for which the examples fit, as found by longest-processing-time first (Graham, 1969), then
    by best fit decreasing. The cost of an example is `length + attention_cost · length²`; the micro-batches of one row
    cost about the same, so that no rank waits long. Deterministic. Lengths above `capacity` get a bin of their own.
    """
    if len(lengths) == 0:
        return [[[] for _ in range(world_size)]]
    costs = lengths + attention_cost * np.square(lengths, dtype=np.float64)
    descending = np.argsort(-costs, kind="stable").tolist()
    sizes, prices = lengths.tolist(), costs.tolist()
    rows = max(1, math.ceil(sum(sizes) / (capacity * world_size)))
    while True:
        count = rows * world_size
        bins = _balanced(descending, sizes, prices, count, capacity) or _tight(descending, sizes, count, capacity)
        if bins is not None:
            return _deal(bins, prices, world_size)
        rows += 1


def _balanced(
    descending: list[int], sizes: list[int], prices: list[float], count: int, capacity: int
) -> list[list[int]] | None:
    """Each example to the cheapest bin that has room; None when one finds no room."""
    bins: list[list[int]] = [[] for _ in range(count)]
    free = [capacity] * count
    heap = [(0.0, number) for number in range(count)]
    for example in descending:
        full = []
        while heap and free[heap[0][1]] < sizes[example] and bins[heap[0][1]]:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, number = heap[0]
        bins[number].append(example)
        free[number] -= sizes[example]
        heapq.heapreplace(heap, (cost + prices[example], number))
        for entry in full:
            heapq.heappush(heap, entry)
    return bins


def _tight(descending: list[int], sizes: list[int], count: int, capacity: int) -> list[list[int]] | None:
    """Each example to the fullest bin that has room; None when one finds no room."""
    bins: list[list[int]] = [[] for _ in range(count)]
    free = [capacity] * count
    for example in descending:
        fitting = [number for number in range(count) if free[number] >= sizes[example] or not bins[number]]
        if not fitting:
            return None
        number = min(fitting, key=lambda candidate: (free[candidate], candidate))
        bins[number].append(example)
        free[number] -= sizes[example]
    return bins


def _deal(bins: list[list[int]], prices: list[float], world_size: int) -> list[list[list[int]]]:
    """Bins of like cost side by side; every other row runs backwards, so that no rank always gets the dearest."""
    by_cost = sorted(bins, key=lambda members: -sum(prices[example] for example in members))
    rows = [by_cost[start : start + world_size] for start in range(0, len(by_cost), world_size)]
    return [[sorted(members) for members in (row if number % 2 == 0 else row[::-1])] for number, row in enumerate(rows)]


def consecutive_bins(lengths: Lengths, *, capacity: int) -> list[list[int]]:
    """Cuts examples, kept in order, into runs of at most `capacity` tokens (a longer example runs alone)."""
    bins: list[list[int]] = []
    free = 0
    for example, size in enumerate(lengths.tolist()):
        if not bins or size > free:
            bins.append([])
            free = capacity
        bins[-1].append(example)
        free -= size
    return bins
