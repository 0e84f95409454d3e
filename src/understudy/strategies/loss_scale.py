"""Dynamic loss scaling for fp16 (Micikevicius et al., 2018, §3.2), with DeepSpeed's defaults so that runs agree."""

from __future__ import annotations

from understudy.contracts import LossScale

__all__ = ["INITIAL_LOSS_SCALE", "next_loss_scale"]

INITIAL_LOSS_SCALE = LossScale(2.0**16, 0)
GROWTH_INTERVAL_STEPS = 1000
MIN_SCALE = 1.0


def next_loss_scale(scale: LossScale, *, overflowed: bool) -> LossScale:
    """Halves when a step overflows, doubles after `GROWTH_INTERVAL_STEPS` that did not.

    Every rank sees the same global norm, so every rank's scale stays the same without a collective.
    """
    if overflowed:
        return LossScale(max(scale.value / 2, MIN_SCALE), 0)
    if scale.steps_since_change + 1 == GROWTH_INTERVAL_STEPS:
        return LossScale(scale.value * 2, 0)
    return LossScale(scale.value, scale.steps_since_change + 1)
