"""Which example is trained on when: a pure function of the seed and the epoch (P1).

Uses an integer hash of its own, not a library's random stream, which may change between versions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["EpochOrder", "hash64"]

_MASK = (1 << 64) - 1


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's output function (Steele, Lea & Flood, 2014): a bijection of 64-bit integers."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed


def hash64(values: npt.NDArray[np.integer], *keys: int) -> npt.NDArray[np.uint64]:
    """[n] uint64: an integer hash of each of `values` [n] under `keys`; the same on every machine and version."""
    state = np.zeros(1, np.uint64)
    for key in keys:
        state = _mix(state ^ np.uint64(key & _MASK))
    return _mix(_mix(values.astype(np.uint64)) ^ state)


class EpochOrder:
    """The examples of each epoch, in order. `source` [E] names each example's source, `weights` a weight a source.

    A weight w gives floor(w) copies of each example in every epoch; the fraction adds a subset that moves on from one
    epoch to the next until every example had its turn. Every epoch holds equally many.
    """

    def __init__(self, source: npt.NDArray[np.integer], weights: Sequence[float] | None, *, seed: int) -> None:
        self._seed = seed
        self._whole: list[npt.NDArray[np.int64]] = []
        self._fractions: list[tuple[npt.NDArray[np.int64], int]] = []
        if weights is None:
            self._whole.append(np.arange(len(source), dtype=np.int64))
        else:
            for number, weight in enumerate(weights):
                self._add(np.flatnonzero(source == number).astype(np.int64), weight)
        self.length = sum(map(len, self._whole)) + sum(count for _, count in self._fractions)
        self._latest: tuple[int, npt.NDArray[np.int64]] | None = None

    def _add(self, members: npt.NDArray[np.int64], weight: float) -> None:
        copies = int(weight)
        self._whole.extend([members] * copies)
        count = round(len(members) * (weight - copies))
        if len(members) and not copies:
            count = max(count, 1)
        if count:
            self._fractions.append((members[np.argsort(hash64(members, self._seed, 1), kind="stable")], count))

    def epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        """[length] example ids of epoch `epoch` (from 0), in the order they are trained on."""
        if self._latest is not None and self._latest[0] == epoch:
            return self._latest[1]
        turns = [members[(epoch * count + np.arange(count)) % len(members)] for members, count in self._fractions]
        entries = np.concatenate([*self._whole, *turns]) if self._whole or turns else np.zeros(0, np.int64)
        keys = hash64(np.arange(len(entries)), self._seed, 2, epoch)
        order = entries[np.argsort(keys, kind="stable")]
        self._latest = (epoch, order)
        return order
