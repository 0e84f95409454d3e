"""What a teacher says about the supervised positions of one micro-batch: all its logits, the largest few, or draws.

Shape letters: N supervised positions, n of them, A of them that a teacher with another tokenizer reads alike, Vt the
teacher's classes, Ht its hidden width, k kept, m drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from understudy.models.head import LossHead
from understudy.models.logits import Identity, LogitTransform
from understudy.objectives.divergences.uld import SharedVocabulary

__all__ = [
    "AlignedPart",
    "AlignedTargets",
    "DenseTargets",
    "SampledTargets",
    "SeveralParts",
    "SeveralTargets",
    "Targets",
    "TargetsPart",
    "TeacherLogits",
    "TopKTargets",
    "WeightedTargets",
]


class Targets(Protocol):
    """On the student's device, in the order of the supervised positions."""

    def __len__(self) -> int:
        """N."""
        ...

    def part(self, rows: slice) -> TargetsPart:
        """What it says about those positions; `rows` has both ends, and may be empty. Runs without gradient."""
        ...


@dataclass(frozen=True)
class TeacherLogits:
    """Logits of every class, in memory."""

    logits: Tensor
    """[N, Vt] fp32, not divided by a temperature."""

    def __len__(self) -> int:
        return len(self.logits)

    def part(self, rows: slice) -> TeacherLogits:
        return TeacherLogits(self.logits[rows])


@dataclass(frozen=True)
class DenseTargets:
    """Logits of every class, made a chunk at a time, so that only a chunk's exist."""

    logits: Callable[[slice], Tensor]
    """[n, Vt] fp32 of the positions asked for, not divided by a temperature."""
    count: int
    """N."""

    @classmethod
    def from_hidden(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None = None, transform: LogitTransform | None = None
    ) -> DenseTargets:
        """From the teacher's final hidden states [N, Ht], its head's weight [Vt, Ht] and bias [Vt], all of one dtype,
        in which the product runs, and what its architecture makes of raw logits (by default nothing)."""
        to_logits = transform or Identity()

        def logits(rows: slice) -> Tensor:
            # A caller's autocast would cast the weight anew in each chunk.
            with torch.autocast(hidden.device.type, enabled=False):
                raw = F.linear(hidden[rows], weight, bias)
            return to_logits(raw if raw.dtype == torch.float64 else raw.float(), derivative=False)[0]

        return cls(logits, len(hidden))

    @classmethod
    def through(cls, hidden: Tensor, head: LossHead) -> DenseTargets:
        """From `hidden` [N, Ht] and the head that makes logits of it. Its weight is looked at when they are asked for:
        whoever shards it need have it whole only then."""

        def logits(rows: slice) -> Tensor:
            bias = None if head.bias is None else head.bias.detach()
            return cls.from_hidden(hidden, head.weight.detach(), bias, head.transform).logits(rows)

        return cls(logits, len(hidden))

    def __len__(self) -> int:
        return self.count

    def part(self, rows: slice) -> TeacherLogits:
        return TeacherLogits(self.logits(rows))


@dataclass(frozen=True)
class AlignedTargets:
    """Logits over another vocabulary, of those positions that its tokenizer reads alike; nothing of the others."""

    rows: Tensor
    """[A] int64, ascending, on the CPU: which of the supervised positions those are."""
    same: Tensor
    """[A] bool, on the CPU: where both go on with the same token, so that it means something which has which."""
    told: DenseTargets
    """About them, A in number."""
    vocabulary: SharedVocabulary
    count: int
    """N."""

    def __len__(self) -> int:
        return self.count

    def part(self, rows: slice) -> AlignedPart:
        return AlignedPart(self, slice(0, self.count)).part(rows)


@dataclass(frozen=True)
class AlignedPart:
    """Some of those positions. Logits are made when they are asked for: a larger vocabulary's take more memory than the
    chunk that was asked about."""

    whole: AlignedTargets
    positions: slice
    """Of the supervised positions, these."""

    def part(self, rows: slice) -> AlignedPart:
        first = self.positions.start
        return AlignedPart(self.whole, slice(first + rows.start, first + rows.stop))

    def rows(self) -> Tensor:
        """[a] int64, on the CPU: which of these positions are read alike, from 0."""
        rows: Tensor = self.whole.rows[self._found()] - self.positions.start
        return rows

    def same(self) -> Tensor:
        """[a] bool, on the CPU: at which of those both go on with the same token."""
        return self.whole.same[self._found()]

    def logits(self) -> Tensor:
        """[a, Vt] fp32, not divided by a temperature."""
        return self.whole.told.logits(self._found())

    def _found(self) -> slice:
        ends = torch.tensor([self.positions.start, self.positions.stop])
        start, stop = torch.searchsorted(self.whole.rows, ends).tolist()
        return slice(start, stop)


@dataclass(frozen=True)
class TopKTargets:
    """The likeliest classes' log-probabilities, and all others' as one. The temperature is in them already.

    They need not sum to one exactly: stored values are rounded, and the loss renormalises.
    """

    ids: Tensor
    """[N, k] int64, different in a row, the likeliest first."""
    log_probs: Tensor
    """[N, k] fp32."""
    tail: Tensor
    """[N] fp32: log of the remaining mass, −inf where none is."""

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, rows: slice) -> TopKTargets:
        return TopKTargets(self.ids[rows], self.log_probs[rows], self.tail[rows])


@dataclass(frozen=True)
class SampledTargets:
    """Classes drawn from the teacher with replacement, at the temperature of the loss. A class may come more than once
    and counts as often (Anshumann et al., 2025, "Sparse Logit Sampling")."""

    ids: Tensor
    """[N, m] int64."""

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, rows: slice) -> SampledTargets:
        return SampledTargets(self.ids[rows])


@dataclass(frozen=True)
class WeightedTargets:
    """What one of several teachers says."""

    share: float
    """Of the divergence."""
    shared_classes: int | None
    """See `compare`."""
    targets: Targets


@dataclass(frozen=True)
class SeveralTargets:
    """What several teachers say about the same positions; their shares add up to 1."""

    members: tuple[WeightedTargets, ...]

    def __len__(self) -> int:
        return len(self.members[0].targets)

    def part(self, rows: slice) -> SeveralParts:
        return SeveralParts(tuple((each.share, each.shared_classes, each.targets.part(rows)) for each in self.members))


@dataclass(frozen=True)
class SeveralParts:
    members: tuple[tuple[float, int | None, TargetsPart], ...]
    """Share, shared classes, and what is said about the rows."""

    def part(self, rows: slice) -> SeveralParts:
        return SeveralParts(tuple((share, shared, told.part(rows)) for share, shared, told in self.members))


TargetsPart = TeacherLogits | AlignedPart | TopKTargets | SampledTargets | SeveralParts
"""What the loss can compare with a student; each kind needs a comparison of its own."""
