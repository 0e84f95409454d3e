"""A block of a student's logits against what a teacher says of them: divergence and gradient.

Shape letters: n rows, V the student's classes, C those compared, k kept classes, m draws. z: the student's logits,
p teacher, q student, τ temperature. Each function gives the divergences [n] in nats, their gradient [n, C] with respect
to z / τ of the first C classes, and the teacher's likeliest class [n], −1 where the student has no such class. Changes
nothing it is given.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from understudy.objectives.divergences.registry import Divergence
from understudy.objectives.divergences.uld import universal_distance
from understudy.objectives.targets import (
    AlignedPart,
    SampledTargets,
    SeveralParts,
    TargetsPart,
    TeacherLogits,
    TopKTargets,
)

__all__ = ["Comparison", "compare"]


class Comparison(NamedTuple):
    divergence: Tensor
    gradient: Tensor
    teacher_choice: Tensor


def compare(
    logits: Tensor, targets: TargetsPart, divergence: Divergence, temperature: float, shared: int | None
) -> Comparison:
    """`logits` [n, V] fp32 or fp64. Of both vocabularies only the first `shared` classes are compared, and no more than
    either has; both distributions are renormalised over them."""
    if isinstance(targets, SeveralParts):
        return _with_several(logits, targets, divergence, temperature)
    if isinstance(targets, AlignedPart):
        return _with_aligned(logits, targets, temperature)
    classes = logits.shape[1] if shared is None else min(shared, logits.shape[1])
    if isinstance(targets, TeacherLogits):
        classes = min(classes, targets.logits.shape[1])
        teacher = targets.logits[:, :classes].to(logits.dtype)
        return _with_all(logits[:, :classes], teacher, divergence, temperature)
    if isinstance(targets, TopKTargets):
        return _with_largest(logits[:, :classes], targets, divergence, temperature)
    return _with_draws(logits[:, :classes], targets, temperature)


def _with_several(logits: Tensor, targets: SeveralParts, divergence: Divergence, temperature: float) -> Comparison:
    """The mean over teachers by their shares; the likeliest class is that of the one with the largest."""
    value, gradient = logits.new_zeros(len(logits)), torch.zeros_like(logits)
    chosen = max(range(len(targets.members)), key=lambda i: targets.members[i][0])
    for i, (share, shared, told) in enumerate(targets.members):
        each = compare(logits, told, divergence, temperature, shared)
        value.add_(each.divergence, alpha=share)
        gradient[:, : each.gradient.shape[1]].add_(each.gradient, alpha=share)
        if i == chosen:
            choice = each.teacher_choice
    return Comparison(value, gradient, choice)


def _with_all(student: Tensor, teacher: Tensor, divergence: Divergence, temperature: float) -> Comparison:
    teacher_log = torch.log_softmax(_divided(teacher, temperature), dim=1)
    student_log = torch.log_softmax(_divided(student, temperature), dim=1)
    value, derivative = divergence(teacher_log, student_log)
    return Comparison(value, _through_softmax(derivative, student_log.exp_()), teacher.argmax(dim=1))


def _with_aligned(student: Tensor, targets: AlignedPart, temperature: float) -> Comparison:
    """Universal distance of the rows that have a counterpart; nothing of the others. Where the two go on with different
    tokens, such as one with a part of the other's, which token has which probability is compared nowhere: the student
    would learn to say the teacher's."""
    vocabulary, same, rows = targets.whole.vocabulary, targets.same(), targets.rows().to(student.device)
    said = student[:, : vocabulary.student_classes]
    student_log = torch.log_softmax(_divided(said.index_select(0, rows), temperature), dim=1)
    told = targets.logits()[:, : vocabulary.teacher_classes].to(student.dtype)
    likeliest = told.argmax(dim=1)
    told = torch.log_softmax(_divided(told, temperature), dim=1)
    result = Comparison(
        student.new_zeros(len(student)), torch.zeros_like(said), torch.full_like(student[:, 0], -1, dtype=torch.int64)
    )
    for alike in (True, False):
        among = (same == alike).nonzero().squeeze(1).to(student.device)
        if not len(among):
            continue
        classes = vocabulary if alike else vocabulary.apart()
        teacher_part, student_part = (
            each if len(among) == len(each) else each.index_select(0, among) for each in (told, student_log)
        )
        value, derivative = universal_distance(teacher_part, student_part, classes)
        at = rows.index_select(0, among)
        result.divergence.index_copy_(0, at, value)
        result.gradient.index_copy_(0, at, _through_softmax(derivative, student_part.exp_()))
        result.teacher_choice.index_copy_(0, at, classes.student_of_teacher[likeliest[among]])
    return result


def _with_largest(student: Tensor, targets: TopKTargets, divergence: Divergence, temperature: float) -> Comparison:
    """On k + 1 classes: those kept, and all others as one whose mass the student shares out as it likes.

    The others' mass is a sum over them, not 1 − the kept: that difference is rounding error where it is small.
    """
    known = targets.ids < student.shape[1]
    ids = targets.ids.where(known, 0)
    kept_log = targets.log_probs.to(student.dtype).masked_fill(~known, -torch.inf)
    teacher_log = torch.log_softmax(torch.cat([kept_log, targets.tail.to(student.dtype).unsqueeze(1)], dim=1), dim=1)

    others = _divided(student - student.amax(dim=1, keepdim=True), temperature)
    kept = others.gather(1, ids).masked_fill_(~known, -torch.inf)
    # Added, not written: an unknown class stands in place 0, which may itself be kept.
    others.scatter_add_(1, ids, torch.zeros_like(kept).masked_fill_(known, -torch.inf))
    others_log = others.logsumexp(dim=1, keepdim=True)
    student_log = torch.log_softmax(torch.cat([kept, others_log], dim=1), dim=1)

    value, derivative = divergence(teacher_log, student_log)
    by_class = _through_softmax(derivative, student_log.exp_())
    # A class among the others gets its share of their gradient; the clamp is for none at all, whose shares are 0.
    shares = others.sub_(others_log.clamp_(min=torch.finfo(others.dtype).min)).exp_()
    gradient = shares.mul_(by_class[:, -1:]).scatter_add_(1, ids, by_class[:, :-1].masked_fill(~known, 0.0))
    return Comparison(value, gradient, targets.ids[:, 0])


def _with_draws(student: Tensor, targets: SampledTargets, temperature: float) -> Comparison:
    """Cross-entropy against the draws' frequencies, whose expectation is KL(p‖q) plus the teacher's entropy; its
    gradient's expectation is that of KL(p‖q). Draws outside the classes compared are left out, and rows of no other."""
    known = targets.ids < student.shape[1]
    ids = targets.ids.where(known, 0)
    weights = known.to(student.dtype)
    weights /= weights.sum(dim=1, keepdim=True).clamp_(min=1.0)
    student_log = torch.log_softmax(_divided(student, temperature), dim=1)
    value = -student_log.gather(1, ids).masked_fill_(~known, 0.0).mul_(weights).sum(dim=1)
    gradient = student_log.exp_().mul_(weights.sum(dim=1, keepdim=True)).scatter_add_(1, ids, weights.neg())
    return Comparison(value, gradient, _commonest(targets.ids))


def _through_softmax(derivative: Tensor, q: Tensor) -> Tensor:
    """From the derivative by free log-probabilities to that by logits: g − q·Σ g, in the place of g."""
    return derivative.sub_(q.mul_(derivative.sum(dim=1, keepdim=True)))


def _divided(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits / temperature


def _commonest(ids: Tensor) -> Tensor:
    """[n]: the class that comes most often in each row of `ids` [n, m], the least of several."""
    in_order = ids.sort(dim=1).values
    counts = torch.searchsorted(in_order, in_order, right=True) - torch.searchsorted(in_order, in_order)
    return in_order.gather(1, counts.argmax(dim=1, keepdim=True)).squeeze(1)
