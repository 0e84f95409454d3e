"""The analytic plan against the exact tier: `python -m benchmarks planner` compares a few hundred settings so."""

from __future__ import annotations

import pytest
from benchmarks.planner import compare_each, points

from understudy.recipe.presets import STRATEGY_PRESETS

pytestmark = pytest.mark.distributed


def test_planned_peaks_are_the_simulated_ones() -> None:
    """Each strategy once, all else drawn."""
    settings = list(points(len(STRATEGY_PRESETS), seed=7, processes=(2, 8), tokens=(1024, 4096)))
    found = list(compare_each(settings))
    assert [one.point.strategy for one in found] == list(STRATEGY_PRESETS)
    assert [one for one in found if one.ratio < 0.97] == []
    assert sum(abs(one.ratio - 1) <= 0.05 for one in found) >= 0.9 * len(found)
