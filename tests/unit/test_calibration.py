"""Expected calibration error against its definition, and that parts of it may be added up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from understudy.contracts import LossSum
from understudy.objectives.calibration import BINS, calibration_error, calibration_gaps
from understudy.objectives.causal_lm import CrossEntropy
from understudy.objectives.distillation_loss import DistillationLoss
from understudy.objectives.targets import TeacherLogits
from understudy.training.metrics import evaluation_metrics

pytestmark = pytest.mark.unit


def defined(confidence: Tensor, correct: Tensor) -> float:
    """Σ over bins of (share of tokens in the bin) · |accuracy − mean confidence| there."""
    error = 0.0
    for i in range(BINS):
        inside = (confidence >= i / BINS) & ((confidence < (i + 1) / BINS) | (i == BINS - 1))
        if inside.any():
            gap = correct[inside].double().mean() - confidence[inside].double().mean()
            error += float(inside.double().mean() * gap.abs())
    return error


def test_it_is_what_the_paper_defines() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = torch.cat([torch.rand(500, generator=generator), torch.tensor([0.0, 1.0])])
    correct = torch.rand(502, generator=generator) < 0.7 * confidence
    parts = [slice(0, 100), slice(100, 100), slice(100, 502)]
    gaps = sum((calibration_gaps(confidence[part], correct[part]) for part in parts), torch.zeros(BINS))
    assert calibration_error(gaps, 502) == pytest.approx(defined(confidence, correct), abs=1e-6)


def test_a_coin_that_is_sure_of_itself_is_off_by_a_half() -> None:
    correct = torch.tensor([True, False] * 10)
    assert calibration_error(calibration_gaps(torch.ones(20), correct), 20) == pytest.approx(0.5)
    assert calibration_error(calibration_gaps(torch.full((20,), 0.5), correct), 20) == 0.0


def test_both_objectives_count_it() -> None:
    logits = 3 * torch.randn(64, 11, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(11, (64,), generator=torch.Generator().manual_seed(2))
    confidence, likeliest = logits.softmax(1).max(1)
    expected = defined(confidence, likeliest == labels)
    teacher = TeacherLogits(logits.roll(1, 0))
    for loss in (CrossEntropy(labels), DistillationLoss("forward_kl", labels, teacher, temperature=2.0)):
        result = loss(logits.clone(), slice(0, 64))
        row = evaluation_metrics(LossSum(result.loss, torch.tensor(64), result.metrics))
        assert row["eval_calibration_error"] == pytest.approx(expected, abs=1e-6)
