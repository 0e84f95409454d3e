"""Dynamic loss scaling for fp16 (Micikevicius et al., 2018, §3.2), with DeepSpeed's defaults so that runs agree."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LossScale"]

INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL_STEPS = 1000
MIN_SCALE = 1.0


@dataclass
class LossScale:
    """The factor on the loss. Halves when a step overflows, doubles after `GROWTH_INTERVAL_STEPS` that did not.

    Every rank sees the same global norm, so every rank's scale stays the same without a collective.
    """

    value: float = INITIAL_SCALE
    steps_since_change: int = 0

    def update(self, *, overflowed: bool) -> None:
        if overflowed:
            self.value = max(self.value / 2, MIN_SCALE)
            self.steps_since_change = 0
            return
        self.steps_since_change += 1
        if self.steps_since_change == GROWTH_INTERVAL_STEPS:
            self.value *= 2
            self.steps_since_change = 0
