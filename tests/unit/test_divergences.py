"""Each divergence and its derivative against plain formulas in fp64, at their limits and at classes without mass."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.divergence_formulas import KINDS, formula
from understudy.errors import UserError
from understudy.objectives.divergences import uld
from understudy.objectives.divergences.adaptive_kl import FEW
from understudy.objectives.divergences.log_ratio import ABSENT
from understudy.objectives.divergences.registry import make_divergence
from understudy.objectives.divergences.settings import DivergenceSettings

pytestmark = pytest.mark.unit

DEFAULTS = DivergenceSettings()


def distributions(
    rows: int = 6, classes: int = 11, scale: float = 2.0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows * classes)
    drawn = torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    return [torch.log_softmax((scale * logits).to(dtype), dim=1) for logits in drawn]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.01, 2.0, 30.0])
@pytest.mark.parametrize("numbers", [DEFAULTS, DivergenceSettings(alpha=0.7, beta=0.2)])
def test_value_and_derivative_equal_autograd(kind: str, scale: float, numbers: DivergenceSettings) -> None:
    teacher, student = distributions(scale=scale)
    student.requires_grad_()
    expected = formula(kind, numbers.alpha, numbers.beta)(teacher, student)
    expected.sum().backward()

    value, derivative = make_divergence(kind, numbers)(teacher, student.detach())

    assert value.dtype == derivative.dtype == torch.float64
    torch.testing.assert_close(value, expected.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(derivative, student.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_stay_as_they_are(kind: str) -> None:
    teacher, student = distributions()
    before = teacher.clone(), student.clone()
    make_divergence(kind, DEFAULTS)(teacher, student)
    assert torch.equal(teacher, before[0])
    assert torch.equal(student, before[1])


@pytest.mark.parametrize("kind", KINDS)
def test_equal_distributions_are_no_distance_apart(kind: str) -> None:
    both, _ = distributions(classes=5000, scale=0.1, dtype=torch.float32)
    value, derivative = make_divergence(kind, DEFAULTS)(both, both.clone())
    through_softmax = derivative - both.exp() * derivative.sum(1, keepdim=True)
    assert value.abs().max() < 1e-7
    assert through_softmax.abs().max() < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_masked_on_both_sides_adds_exact_zeros(kind: str) -> None:
    teacher, student = distributions()
    column = torch.full((len(teacher), 1), -torch.inf, dtype=teacher.dtype)
    value, derivative = make_divergence(kind, DEFAULTS)(teacher, student)
    masked_value, masked_derivative = make_divergence(kind, DEFAULTS)(
        torch.cat([teacher, column], 1), torch.cat([student, column], 1)
    )
    torch.testing.assert_close(masked_value, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(masked_derivative[:, :-1], derivative, rtol=1e-12, atol=1e-12)
    assert torch.equal(masked_derivative[:, -1], torch.zeros_like(value))


HALF = math.log(0.5)
ONE_SIDED = {
    # Teacher (½, ½, 0), student (½, 0, ½): where the limit is finite it is taken, else the ratio counts as 2^24.
    "forward_kl": 0.5 * ABSENT,
    "reverse_kl": 0.5 * ABSENT,
    "jsd": 0.5 * math.log(2),
    "skew_forward_kl": -0.5 * math.log(0.1),
    "skew_reverse_kl": -0.5 * math.log(0.1),
    "total_variation": 0.5,
    "adaptive_kl": 0.5 * ABSENT,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_one_side_lacks_has_a_finite_cost(kind: str) -> None:
    teacher = torch.tensor([[HALF, HALF, -torch.inf]], dtype=torch.float64)
    student = torch.tensor([[HALF, -torch.inf, HALF]], dtype=torch.float64)
    value, derivative = make_divergence(kind, DEFAULTS)(teacher, student)
    assert value.item() == pytest.approx(ONE_SIDED[kind], abs=1e-6)
    assert derivative.isfinite().all()


@pytest.mark.parametrize(("beta", "kind"), [(1e-6, "forward_kl"), (1 - 1e-6, "reverse_kl")])
def test_scaled_jsd_tends_to_the_kls(beta: float, kind: str) -> None:
    teacher, student = distributions(scale=1.0)
    value, derivative = make_divergence("jsd", DivergenceSettings(beta=beta))(teacher, student)
    limit_value, limit_derivative = make_divergence(kind, DEFAULTS)(teacher, student)
    scale = min(beta, 1 - beta)
    torch.testing.assert_close(value / scale, limit_value, rtol=1e-4, atol=1e-6)
    # Only through the softmax do the two agree: as free variables they differ by a multiple of q.
    q = student.exp()
    ours, theirs = (d - q * d.sum(1, keepdim=True) for d in (derivative / scale, limit_derivative))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_without_skew_the_skewed_divergences_are_the_kls(direction: str, scale: float) -> None:
    teacher, student = distributions(scale=scale, dtype=torch.float32)
    skewed = make_divergence(f"skew_{direction}_kl", DivergenceSettings(alpha=0.0))(teacher, student)
    plain = make_divergence(f"{direction}_kl", DEFAULTS)(teacher, student)
    torch.testing.assert_close(skewed, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("beta", "alternative"), [(0.0, "forward_kl"), (1.0, "reverse_kl"), (-0.5, "0.5"), (2.0, "0.5")]
)
def test_jsd_refuses_the_ends_and_says_what_is_meant(beta: float, alternative: str) -> None:
    with pytest.raises(UserError, match=alternative):
        make_divergence("jsd", DivergenceSettings(beta=beta))


@pytest.mark.parametrize("kind", ["skew_forward_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("alpha", [-0.1, 1.0, 3.0])
def test_skew_outside_its_range_is_refused(kind: str, alpha: float) -> None:
    with pytest.raises(UserError, match="0 <= alpha < 1"):
        make_divergence(kind, DivergenceSettings(alpha=alpha))


def test_total_variation_of_disjoint_distributions_is_one() -> None:
    far = torch.log_softmax(torch.tensor([[80.0, -80.0], [-80.0, 80.0]]), dim=1)
    value, _ = make_divergence("total_variation", DEFAULTS)(far, far.flip(0))
    assert value.tolist() == [1.0, 1.0]


def test_adaptive_kl_is_forward_where_only_the_head_differs_and_reverse_where_only_the_tail_does() -> None:
    teacher = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    in_head = torch.tensor([[0.5, 0.2, 0.2, 0.1]], dtype=torch.float64).log()
    in_tail = torch.tensor([[0.4, 0.3, 0.1, 0.2]], dtype=torch.float64).log()
    adaptive = make_divergence("adaptive_kl", DEFAULTS)
    torch.testing.assert_close(adaptive(teacher, in_head), make_divergence("forward_kl", DEFAULTS)(teacher, in_head))
    torch.testing.assert_close(adaptive(teacher, in_tail), make_divergence("reverse_kl", DEFAULTS)(teacher, in_tail))


def test_the_head_of_adaptive_kl_is_found_however_sure_the_teacher_is() -> None:
    classes, scales = 3 * FEW, torch.tensor([[0.1], [0.3], [1.0], [3.0], [30.0]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    teacher, student = (
        torch.log_softmax(scale * torch.randn(len(scales), classes, generator=generator, dtype=torch.float64), dim=1)
        for scale in (scales, 1.0)
    )
    value, _ = make_divergence("adaptive_kl", DEFAULTS)(teacher, student)
    torch.testing.assert_close(value, formula("adaptive_kl")(teacher, student))


logit_rows = st.lists(st.floats(-80, 80, width=32), min_size=7, max_size=7)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=50)
@given(teacher=logit_rows, student=logit_rows, share=st.floats(0.01, 0.99))
def test_values_are_finite_and_not_negative(
    kind: str, teacher: list[float], student: list[float], share: float
) -> None:
    logs = (torch.log_softmax(torch.tensor([row]), dim=1) for row in (teacher, student))
    value, derivative = make_divergence(kind, DivergenceSettings(alpha=share, beta=share))(*logs)
    assert value.item() >= -1e-6
    assert value.isfinite().all()
    assert derivative.isfinite().all()
    if kind == "total_variation":
        assert value.item() <= 1 + 1e-6


@pytest.mark.parametrize(("teacher_classes", "student_classes"), [(9, 9), (13, 7), (7, 13)])
def test_universal_distance_and_its_derivative_equal_autograd(teacher_classes: int, student_classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(5, teacher_classes, generator=generator, dtype=torch.float64).softmax(1)
    student = torch.randn(5, student_classes, generator=generator, dtype=torch.float64).softmax(1).requires_grad_()
    width = max(teacher_classes, student_classes)
    padded = [torch.cat([x, x.new_zeros(5, width - x.shape[1])], 1) for x in (teacher, student)]
    expected = 0.5 * (padded[0].sort(1).values - padded[1].sort(1).values).abs().sum(1)
    expected.sum().backward()

    value, derivative = uld.distance(teacher, student.detach())

    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(derivative, student.grad)


def test_universal_distance_does_not_see_which_class_is_which() -> None:
    teacher = torch.tensor([[0.7, 0.2, 0.1]])
    value, derivative = uld.distance(teacher, torch.tensor([[0.1, 0.7, 0.0, 0.2]]))
    assert value.item() == 0
    assert torch.equal(derivative, torch.zeros(1, 4))
