"""Which weights are whole at what time of a step under ZeRO-3: DeepSpeed's prefetching, followed module by module.

As DeepSpeed 0.19 does it (`runtime.zero.partitioned_param_coordinator`) from the second step on, when it knows the
order. Each module that is entered fetches ahead, up to a bucket at a time, until as many elements are whole as may
live; what has been passed over on the way, whole already, is kept for that later use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Fetched", "follow"]

_CALLS = 2
"""Modules that are entered for each one with large weights: norms, activations and containers fetch ahead too."""


@dataclass(frozen=True)
class Fetched:
    """Elements of large weights that are whole or on their way."""

    turn: int
    """In the forward pass of the last layer."""
    head: int
    """In the head."""
    backward: tuple[int, ...]
    """In the backward pass of each large weight of the layers, the last one first."""

    def rises(self, done: float = 0.0) -> list[tuple[float, int]]:
        """Shares of the layers' backward pass, from `done` on, at which more is whole than at any since, and how much:
        between them activations fall and this does not rise."""
        found: list[tuple[float, int]] = []
        first = int(done * len(self.backward))
        for number, elements in enumerate(self.backward[first:], first):
            if not found or elements > found[-1][1]:
                found.append((number / len(self.backward), elements))
        return found or [(done, self.head)]


def follow(
    frozen: Sequence[int],
    layers: Sequence[int],
    head: int,
    embedding: int | None,
    *,
    returns: bool = True,
    live: int,
    ahead: int,
    reuse: int,
) -> Fetched:
    """Of a step: `frozen` and `layers` are the elements of the decoder layers' large weights in order, first those that
    no gradient reaches; `head` is the output layer's, `embedding` that of a table of its own; the backward pass
    `returns` to it where something before the layers is trained. `live`, `ahead` and
    `reuse` are DeepSpeed's `stage3_max_live_parameters`, `stage3_prefetch_bucket_size`, `stage3_max_reuse_distance`."""
    sizes = [head if embedding is None else embedding, *frozen, *layers]
    last = 0 if embedding is None else len(sizes)
    if embedding is not None:
        sizes.append(head)
    forward = [*range(len(frozen) + len(layers) + 1), last]
    order = forward + forward[:0:-1][: 1 + len(layers)] + ([0] if returns and not frozen else [])
    whole: set[int] = set()
    needed: dict[int, int] = {}
    pointer, there, seen = 0, 0, list[int]()
    for step, number in enumerate(order):
        if number not in whole:
            whole.add(number)
            there += sizes[number]
        pointer = max(pointer, step + 1)
        for _ in range(_CALLS):
            fetched, room = 0, min(ahead, live - there)
            while pointer < len(order) and fetched < room:
                coming = order[pointer]
                needed[coming] = pointer
                if coming not in whole:
                    whole.add(coming)
                    fetched += sizes[coming]
                    there += sizes[coming]
                pointer += 1
        seen.append(there)
        if needed.get(number, -1) <= step and not _soon(order, sizes, step, reuse):
            whole.discard(number)
            there -= sizes[number]
    middle = len(forward)
    return Fetched(seen[middle - 2], seen[middle - 1], tuple(seen[middle + 1 : middle + 1 + len(layers)]))


def _soon(order: Sequence[int], sizes: Sequence[int], step: int, reuse: int) -> bool:
    """Whether what was used at `step` is used again within `reuse` elements."""
    passed = 0
    for later in range(step + 1, len(order)):
        if passed >= reuse:
            return False
        if order[later] == order[step]:
            return True
        passed += sizes[order[later]]
    return False
