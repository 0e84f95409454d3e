"""Learning-rate schedules against their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.optim.schedules import make_schedule
from understudy.recipe.schema import Schedule

pytestmark = pytest.mark.unit

KINDS = ["cosine", "linear", "constant", "polynomial", "wsd", "step"]
DECAYING = ["cosine", "linear", "polynomial", "wsd"]
PEAK = 3.0e-4


def rates(total_steps: int, steps_per_epoch: int = 10, **fields: Any) -> list[float]:
    schedule = make_schedule(Schedule(**fields), peak=PEAK, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    return [schedule(step) for step in range(total_steps)]


@pytest.mark.parametrize("kind", KINDS)
def test_warmup_is_linear_and_its_first_step_already_learns(kind: str) -> None:
    values = rates(100, 1000, kind=kind, warmup_ratio=0.1)
    assert values[:10] == pytest.approx([PEAK * (step + 1) / 10 for step in range(10)], rel=1e-12)
    assert values[9] == PEAK == max(values)


@pytest.mark.parametrize("kind", KINDS)
def test_without_warmup_the_first_step_has_the_peak(kind: str) -> None:
    assert rates(100, kind=kind, warmup_ratio=0.0)[0] == PEAK


@pytest.mark.parametrize("kind", DECAYING)
@pytest.mark.parametrize("min_ratio", [0.0, 0.1, 1.0])
def test_the_last_step_has_exactly_the_minimum_and_later_ones_too(kind: str, min_ratio: float) -> None:
    schedule = make_schedule(Schedule(kind=kind, min_ratio=min_ratio), peak=PEAK, total_steps=77, steps_per_epoch=10)
    assert schedule(76) == schedule(77) == schedule(10_000) == PEAK * min_ratio


def test_cosine_follows_half_a_cosine_between_peak_and_minimum() -> None:
    values = rates(101, kind="cosine", warmup_ratio=0.0, min_ratio=0.2)
    expected = [PEAK * (0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * step / 100))) for step in range(101)]
    assert values == pytest.approx(expected, rel=1e-12)


def test_polynomial_of_power_one_is_linear_and_of_power_two_its_square() -> None:
    linear = rates(50, kind="linear", min_ratio=0.0)
    assert rates(50, kind="polynomial", power=1.0, min_ratio=0.0) == linear
    squares = rates(50, kind="polynomial", power=2.0, min_ratio=0.0)
    assert squares[2:] == pytest.approx([value**2 / PEAK for value in linear[2:]], rel=1e-12)


def test_warmup_stable_decay_holds_the_peak_and_falls_linearly_over_the_last_share() -> None:
    values = rates(100, kind="wsd", warmup_ratio=0.1, decay_ratio=0.2, min_ratio=0.0)
    assert values[9:80] == [PEAK] * 71
    assert values[80:] == pytest.approx([PEAK * (19 - step) / 20 for step in range(20)], abs=1e-18)


def test_step_decay_multiplies_by_gamma_after_each_span_of_epochs() -> None:
    values = rates(60, 10, kind="step", warmup_ratio=0.0, gamma=0.5, step_epochs=2, min_ratio=0.3)
    assert values == [PEAK] * 20 + [PEAK * 0.5] * 20 + [PEAK * 0.3] * 20


def test_constant_stays_at_the_peak_after_the_warmup() -> None:
    assert rates(40, kind="constant", warmup_ratio=0.05)[1:] == [PEAK] * 39


@given(
    kind=st.sampled_from(KINDS),
    total_steps=st.integers(1, 50),
    steps_per_epoch=st.integers(1, 60),
    warmup_ratio=st.floats(0.0, 1.0),
    decay_ratio=st.floats(0.0, 1.0),
    min_ratio=st.floats(0.0, 1.0),
)
def test_any_run_rises_to_the_peak_then_never_rises_again_nor_falls_below_the_minimum(
    kind: str, total_steps: int, steps_per_epoch: int, warmup_ratio: float, decay_ratio: float, min_ratio: float
) -> None:
    values = rates(
        total_steps,
        steps_per_epoch,
        kind=kind,
        warmup_ratio=warmup_ratio,
        decay_ratio=decay_ratio,
        min_ratio=min_ratio,
    )
    warmup = math.ceil(warmup_ratio * total_steps)
    top = max(warmup - 1, 0)
    assert all(value > 0 for value in values[:warmup])
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)
    assert min(values[top:]) >= PEAK * min_ratio * (1 - 1e-12)
    assert max(values) <= PEAK
