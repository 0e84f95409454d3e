"""Universal logit distance (Boizard et al., 2024), for a teacher with another vocabulary: tokens that both have are
compared one by one, and of all others how their probabilities are spread, not which has which."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from understudy.objectives.divergences import total_variation
from understudy.objectives.divergences.settings import DivergenceSettings

__all__ = ["SharedVocabulary", "distance", "divergence", "universal_distance"]


@dataclass(frozen=True)
class SharedVocabulary:
    """Which classes of a student, Cs in number, and of a teacher, Ct, mean the same; M do. All tensors int64."""

    student: Tensor
    """[M]: the student's classes that the teacher has too,"""
    teacher: Tensor
    """[M]: and what they are there."""
    student_alone: Tensor
    """[Cs − M], ascending."""
    teacher_alone: Tensor
    """[Ct − M], ascending."""
    student_of_teacher: Tensor
    """[Ct]: the student's class of each of the teacher's; −1 where it has none."""

    @staticmethod
    def of(matched: Tensor, student_classes: int, teacher_classes: int) -> SharedVocabulary:
        """From `matched` [M, 2]: pairs of a student's and a teacher's class, of which none comes twice. Classes from
        `student_classes` and from `teacher_classes` on are padding, which is not compared."""
        student, teacher = matched.unbind(1)
        of_teacher = matched.new_full((teacher_classes,), -1)
        of_teacher[teacher] = student
        return SharedVocabulary(
            student, teacher, _others(student, student_classes), _others(teacher, teacher_classes), of_teacher
        )

    def apart(self) -> SharedVocabulary:
        """As if they had nothing in common."""
        none = self.student[:0].reshape(0, 2)
        return SharedVocabulary.of(none, self.student_classes, self.teacher_classes)

    @property
    def student_classes(self) -> int:
        """Cs."""
        return len(self.student) + len(self.student_alone)

    @property
    def teacher_classes(self) -> int:
        """Ct."""
        return len(self.student_of_teacher)

    def to(self, device: torch.device) -> SharedVocabulary:
        return SharedVocabulary(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def _others(classes: Tensor, count: int) -> Tensor:
    """[count − M]: all others below `count`."""
    missing = torch.ones(count, dtype=torch.bool, device=classes.device)
    missing[classes] = False
    return missing.nonzero().squeeze(1)


def universal_distance(teacher_log: Tensor, student_log: Tensor, vocabulary: SharedVocabulary) -> tuple[Tensor, Tensor]:
    """½ Σ |p − q| over classes that both have, and `distance` of what is left of both: between 0 and 1.

    Log-probabilities `teacher_log` [n, Ct] and `student_log` [n, Cs] to values [n] and their derivative [n, Cs] with
    respect to `student_log`, as `registry.Divergence` says."""
    value, by_shared = divergence(
        teacher_log.index_select(1, vocabulary.teacher),
        student_log.index_select(1, vocabulary.student),
        DivergenceSettings(),
    )
    p, q = teacher_log[:, vocabulary.teacher_alone].exp_(), student_log[:, vocabulary.student_alone].exp_()
    beyond, by_alone = distance(p, q)
    derivative = torch.empty_like(student_log)
    derivative.index_copy_(1, vocabulary.student, by_shared)
    derivative.index_copy_(1, vocabulary.student_alone, by_alone.mul_(q))
    return value.add_(beyond), derivative


def divergence(teacher_log: Tensor, student_log: Tensor, settings: DivergenceSettings) -> tuple[Tensor, Tensor]:
    """Over one vocabulary it is total variation. See `registry.Divergence`."""
    return total_variation.divergence(teacher_log, student_log, settings)


def distance(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """½ Σ_i |p_(i) − q_(i)| over probabilities in falling order, the shorter list padded with zeros: between 0 and 1.

    `teacher` [n, Vt] and `student` [n, Vs] are probabilities, fp32 or fp64. Gives [n] and the derivative [n, Vs] with
    respect to `student`, which each class gets by its place in the order. The paper's sum has no factor ½.
    """
    shared = min(teacher.shape[1], student.shape[1])
    p, order = teacher.topk(shared, dim=1)
    # What either has beyond the other's classes meets zeros. It is summed, not one minus the rest: it may be tiny.
    beyond = teacher.scatter(1, order, 0.0).sum(dim=1)
    q, order = student.topk(shared, dim=1)
    slope = student.scatter(1, order, 0.0)
    beyond.add_(slope.sum(dim=1))
    gap = q.sub_(p)
    value = gap.abs().sum(dim=1).add_(beyond).mul_(0.5)
    return value, slope.sign_().scatter_(1, order, gap.sign_()).mul_(0.5)
