"""The distillation loss of a chunk of the head's logits, gradient included (P4)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from understudy.contracts import TokenLossResult
from understudy.objectives.calibration import BINS, calibration_gaps
from understudy.objectives.comparison import compare
from understudy.objectives.divergences.registry import make_divergence
from understudy.objectives.divergences.settings import DivergenceSettings
from understudy.objectives.targets import AlignedTargets, SampledTargets, Targets, TargetsPart

__all__ = ["BLOCK_BYTES", "DistillationLoss"]

BLOCK_BYTES = 32 * 2**20
"""Memory of each tensor that is worked with beside the logits themselves, whatever the chunk."""


class DistillationLoss:
    """A `TokenLoss`: Σ (1 − w)·τ²·D(p, q at τ) + w·cross-entropy of `labels` at τ = 1, in nats summed over rows.

    `kind` names the divergence D, `labels` [N] int64 and `targets` belong to the supervised positions in order,
    `temperature` is τ and `cross_entropy_weight` w. `shared_classes` is the size of the tokenizer that both models
    share: D compares no class beyond it, nor any that only one model has, and gives those no gradient. Raises
    `UserError` for settings that the divergence cannot take, and `ValueError` where draws are to be compared by
    anything but forward KL, for which alone they are unbiased, or another vocabulary's logits by anything but `uld`.

    Metrics, summed over rows: `divergence` (D without τ²; over draws it has the teacher's entropy in it),
    `cross_entropy` (at τ = 1, whatever w), `correct` and `agreement` (the student's likeliest class is the label, the
    teacher's likeliest class), `calibration` (see `calibration_gaps`).

    Memory: the logits, whose place the gradient takes; dense targets' logits of the same chunk; and, as rows are worked
    on a block at a time, four or five tensors of `block_bytes`, two for top-k targets, seven for adaptive KL, eleven
    for uld; over another vocabulary a teacher's block is as much larger as that is, and only a block's logits exist.
    """

    def __init__(
        self,
        kind: str,
        labels: Tensor,
        targets: Targets,
        *,
        temperature: float = 1.0,
        cross_entropy_weight: float = 0.0,
        settings: DivergenceSettings | None = None,
        shared_classes: int | None = None,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        if isinstance(targets, SampledTargets) and kind != "forward_kl":
            raise ValueError(
                f"draws from a teacher estimate forward_kl only, not {kind}: keep its top-k classes instead"
            )
        if isinstance(targets, AlignedTargets) and kind != "uld":
            raise ValueError(f"over two vocabularies there is no {kind}, only uld")
        assert len(labels) == len(targets), "one label and one target a supervised position"
        self.divergence = make_divergence(kind, settings or DivergenceSettings())
        self.labels = labels
        self.targets = targets
        self.temperature = temperature
        self.cross_entropy_weight = cross_entropy_weight
        self.shared_classes = shared_classes
        self.block_bytes = block_bytes

    def __call__(self, logits: Tensor, rows: slice) -> TokenLossResult:
        labels, targets = self.labels[rows], self.targets.part(rows)
        sums = {name: logits.new_zeros(()) for name in ("divergence", "cross_entropy", "correct", "agreement")}
        sums["calibration"] = logits.new_zeros(BINS)
        for block in self._blocks(logits):
            for name, value in self._block(logits[block], labels[block], targets.part(block)).items():
                sums[name] += value
        loss = (1.0 - self.cross_entropy_weight) * self.temperature**2 * sums["divergence"]
        # Unweighted it may be infinite, for a label whose logit is −inf.
        if self.cross_entropy_weight:
            loss += self.cross_entropy_weight * sums["cross_entropy"]
        return TokenLossResult(loss, logits, sums)

    def _blocks(self, logits: Tensor) -> Iterator[slice]:
        count, size = len(logits), max(1, self.block_bytes // (logits.element_size() * logits.shape[1]))
        for start in range(0, count, size):
            yield slice(start, min(start + size, count))

    def _block(self, logits: Tensor, labels: Tensor, targets: TargetsPart) -> dict[str, Tensor]:
        """Sums over a block of rows; `logits` become their gradient."""
        weight, label = self.cross_entropy_weight, labels.unsqueeze(1)
        likeliest = logits.argmax(dim=1)
        divergences, gradient, teacher_choice = compare(
            logits, targets, self.divergence, self.temperature, self.shared_classes
        )
        student_log = torch.log_softmax(logits, dim=1)
        cross_entropy = -student_log.gather(1, label).sum()
        confidence = student_log.gather(1, likeliest.unsqueeze(1)).squeeze(1).exp()
        if weight:
            torch.exp(student_log, out=logits).mul_(weight)
            logits.scatter_add_(1, label, logits.new_full((1, 1), -weight).expand_as(label))
        else:
            logits.zero_()
        # τ² of the loss, 1/τ of the logits that were divided.
        logits[:, : gradient.shape[1]].add_(gradient, alpha=(1.0 - weight) * self.temperature)
        return {
            "divergence": divergences.sum(),
            "cross_entropy": cross_entropy,
            "correct": (likeliest == labels).sum(),
            "agreement": (likeliest == teacher_choice).sum(),
            "calibration": calibration_gaps(confidence, likeliest == labels),
        }
