"""Random draws as a function of seed, step and rank: no generator's state is ever saved (P1)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from understudy.training.hooks import Hook, TrainingState

__all__ = ["SeedHook", "step_seed"]


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed for what `rank` draws in `step`, such as dropout masks; unrelated for any two of them."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # generators take 63 bits everywhere


class SeedHook(Hook):
    """Seeds the device's generators before every step."""

    def __init__(self, seed_device: Callable[[int], None], seed: int, rank: int) -> None:
        self._seed_device = seed_device
        self._seed = seed
        self._rank = rank

    def before_step(self, state: TrainingState) -> None:
        self._seed_device(step_seed(self._seed, state.step, self._rank))
