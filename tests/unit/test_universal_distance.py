"""Distilling from another vocabulary against a plain formula and autograd in fp64, alone and inside the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.divergence_formulas import universal_distance
from tests.unit.test_distillation_loss import PeakBytes, make_labels, make_logits, mixed
from understudy.models.head import LossHead
from understudy.objectives.distillation_loss import DistillationLoss
from understudy.objectives.divergences.uld import SharedVocabulary
from understudy.objectives.targets import (
    AlignedTargets,
    DenseTargets,
    SeveralTargets,
    TeacherLogits,
    WeightedTargets,
)

pytestmark = pytest.mark.unit

ROWS, STUDENT, TEACHER = 6, 13, 17
"""Classes of the models; those of the tokenizers are one and two fewer."""
MATCHED = {"some": [(0, 3), (2, 0), (5, 14), (11, 1)], "none": [], "all of one": [(i, (5 * i) % 15) for i in range(12)]}


def vocabulary(matched: list[tuple[int, int]], student: int = STUDENT - 1, teacher: int = TEACHER - 2) -> Any:
    return SharedVocabulary.of(torch.tensor(matched, dtype=torch.int64).reshape(-1, 2), student, teacher)


def aligned(
    teacher: Tensor,
    rows: list[int],
    shared: SharedVocabulary,
    count: int = ROWS,
    different: Sequence[int] = (),
) -> AlignedTargets:
    """At the rows in `different` the two go on with different tokens."""
    told = DenseTargets(lambda wanted: teacher[wanted], len(teacher))
    same = torch.tensor([row not in different for row in rows], dtype=torch.bool)
    return AlignedTargets(torch.tensor(rows, dtype=torch.int64), same, told, shared, count)


def reference(
    teacher: Tensor,
    logits: Tensor,
    rows: list[int],
    matched: list[tuple[int, int]],
    temperature: float,
    different: Sequence[int] = (),
) -> Tensor:
    """[n] of which only `rows` are not zero."""
    values = [logits.new_zeros(())] * len(logits)
    for row, told in zip(rows, teacher):
        p = (told[: TEACHER - 2] / temperature).softmax(0)
        q = (logits[row, : STUDENT - 1] / temperature).softmax(0)
        values[row] = universal_distance(p, q, [] if row in different else matched)
    return torch.stack(values)


@pytest.mark.parametrize("matched", MATCHED)
@pytest.mark.parametrize(
    ("rows", "different"), [([], []), ([0, 2, 3], [2]), ([5], []), ([5], [5]), (list(range(ROWS)), [0, 4])]
)
@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 0.0), (2.0, 0.3)])
def test_value_and_gradient_equal_autograd(
    matched: str, rows: list[int], different: list[int], temperature: float, weight: float
) -> None:
    """Alone, in chunks and in blocks; classes beyond the tokenizers take no part."""
    teacher, student, labels = make_logits(TEACHER, rows=len(rows), seed=1), make_logits(seed=2), make_labels()
    exact = student.clone().requires_grad_()
    apart = reference(teacher, exact, rows, MATCHED[matched], temperature, different)
    expected = mixed(apart, exact, labels, temperature, weight)
    expected.backward()
    targets = aligned(teacher, rows, vocabulary(MATCHED[matched]), different=different)
    for chunk, block_rows in ((ROWS, 100), (4, 1), (1, 1)):
        loss = DistillationLoss(
            "uld",
            labels,
            targets,
            temperature=temperature,
            cross_entropy_weight=weight,
            block_bytes=8 * STUDENT * block_rows,
        )
        slices = [slice(start, min(start + chunk, ROWS)) for start in range(0, ROWS, chunk)]
        parts = [loss(student[each].clone(), each) for each in slices]
        torch.testing.assert_close(sum(part.loss for part in parts), expected.detach(), rtol=1e-10, atol=1e-12)
        gradient = torch.cat([part.grad_logits for part in parts])
        torch.testing.assert_close(gradient, exact.grad, rtol=1e-10, atol=1e-12)
        assert weight or not gradient[:, STUDENT - 1 :].any()
        assert weight or not gradient[[row for row in range(ROWS) if row not in rows]].any()


def test_the_same_vocabulary_is_total_variation_to_the_bit() -> None:
    teacher, student, labels = (
        make_logits(seed=1, dtype=torch.float32),
        make_logits(seed=2, dtype=torch.float32),
        make_labels(),
    )
    same = vocabulary([(i, i) for i in range(STUDENT)], STUDENT, STUDENT)
    everything = slice(0, ROWS)
    ours = DistillationLoss("uld", labels, aligned(teacher, list(range(ROWS)), same), temperature=2.0)
    for kind in ("total_variation", "uld"):
        theirs = DistillationLoss(kind, labels, TeacherLogits(teacher), temperature=2.0)
        one, other = ours(student.clone(), everything), theirs(student.clone(), everything)
        assert torch.equal(one.loss, other.loss)
        assert torch.equal(one.grad_logits, other.grad_logits)
        assert one.metrics.keys() == other.metrics.keys()
        assert all(torch.equal(value, other.metrics[name]) for name, value in one.metrics.items())


def test_agreement_counts_what_can_agree() -> None:
    """The student says 1, 1, 1, 2 and 1. Of the first nothing is known, the teacher's likeliest of the fourth has no
    counterpart, and at the last it goes on with another token."""
    student = F.one_hot(torch.tensor([1, 1, 1, 2, 1]), 3).float()
    teacher = F.one_hot(torch.tensor([3, 0, 2, 3]), 4).float()
    targets = aligned(teacher, [1, 2, 3, 4], vocabulary([(1, 3), (0, 0)], 3, 4), count=5, different=[4])
    metrics = DistillationLoss("uld", torch.zeros(5, dtype=torch.int64), targets)(student, slice(0, 5)).metrics
    assert metrics["agreement"] == 1


@pytest.mark.parametrize("matched", MATCHED)
def test_in_the_head_gradients_of_hidden_states_and_weight_equal_autograd(matched: str) -> None:
    """A chunk is two rows; a second teacher reads as the student does and has a third of the divergence."""
    torch.manual_seed(0)
    linear = nn.Linear(8, STUDENT, bias=False)
    nn.init.normal_(linear.weight)
    head = LossHead.replacing(linear)
    head.chunk_bytes = 4 * STUDENT * 2
    hidden, labels, rows = torch.randn(ROWS, 8, requires_grad=True), make_labels(), [0, 3, 4]
    teacher_hidden, teacher_weight, other = torch.randn(3, 10), torch.randn(TEACHER, 10), torch.randn(ROWS, STUDENT)

    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, head.weight)]
    logits = F.linear(*exact)
    teacher = F.linear(teacher_hidden.double(), teacher_weight.double())
    apart = 2 / 3 * reference(teacher, logits, rows, MATCHED[matched], 2.0, [3])
    apart = apart + 1 / 3 * 0.5 * ((other.double() / 2).softmax(1) - (logits / 2).softmax(1)).abs().sum(1)
    mixed(apart, logits, labels, 2.0, 0.3).backward()

    told = DenseTargets.from_hidden(teacher_hidden, teacher_weight)
    same = torch.tensor([True, False, True])
    first = AlignedTargets(torch.tensor(rows), same, told, vocabulary(MATCHED[matched]), ROWS)
    targets = SeveralTargets((WeightedTargets(2 / 3, None, first), WeightedTargets(1 / 3, None, TeacherLogits(other))))
    loss, metrics = head(hidden, DistillationLoss("uld", labels, targets, temperature=2.0, cross_entropy_weight=0.3))
    loss.backward()
    for ours, theirs in zip((hidden, head.weight), exact):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["divergence"].double(), apart.sum().detach(), rtol=1e-5, atol=1e-5)


def test_logits_of_the_other_vocabulary_exist_a_block_at_a_time() -> None:
    rows, classes = 64, 500
    hidden, weight = torch.randn(rows, 4), torch.randn(2 * classes, 4)
    student, block_bytes = torch.randn(rows, classes), 4 * classes * 16
    shared = vocabulary([(i, 2 * i) for i in range(classes // 2)], classes, 2 * classes)
    told = DenseTargets.from_hidden(hidden, weight)
    targets = AlignedTargets(torch.arange(rows), torch.arange(rows) % 2 == 0, told, shared, rows)
    labels = torch.zeros(rows, dtype=torch.int64)
    loss = DistillationLoss("uld", labels, targets, temperature=2.0, cross_entropy_weight=0.3, block_bytes=block_bytes)
    with PeakBytes() as seen:
        loss(student, slice(0, rows))
    assert seen.peak <= 11.5 * block_bytes, "the teacher's blocks are twice as large"


def test_another_vocabulary_is_compared_by_nothing_else() -> None:
    targets = aligned(make_logits(TEACHER, rows=1), [0], vocabulary([]))
    with pytest.raises(ValueError, match="only uld"):
        DistillationLoss("forward_kl", make_labels(), targets)
