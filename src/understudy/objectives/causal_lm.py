"""Next-token cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from understudy.contracts import IGNORED, Batch, LossSum, TokenLossResult
from understudy.objectives.calibration import calibration_gaps

__all__ = ["CausalLMObjective", "CrossEntropy"]


class CausalLMObjective:
    """Σ −log p(label) over supervised tokens, in nats; metric `correct` counts those whose label is the likeliest, and
    `calibration` is of how sure that was."""

    def prepare(self, batch: Batch) -> Batch:
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        result: LossSum = model(batch, CrossEntropy(batch.labels[batch.labels != IGNORED]))
        return result


class CrossEntropy:
    """Cross-entropy of one chunk of rows and its gradient softmax − onehot, which takes the logits' memory.

    `labels` [N] int64 belong to the supervised positions in order.
    """

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels

    def __call__(self, logits: Tensor, rows: slice) -> TokenLossResult:
        labels = self.labels[rows].unsqueeze(1)
        label_logits = logits.gather(1, labels)
        largest, likeliest = logits.max(dim=1, keepdim=True)
        # Each element is read before it is written, so the probabilities may take the logits' place.
        probabilities = torch.softmax(logits, dim=1, out=logits)
        # p(likeliest) is at least 1/V, so unlike log p(label) this cannot underflow.
        confidence = probabilities.gather(1, likeliest)
        log_normalizer = largest - confidence.log()
        loss = (log_normalizer - label_logits).sum()
        probabilities.scatter_add_(1, labels, probabilities.new_full((1, 1), -1.0).expand_as(labels))
        correct = likeliest == labels
        metrics = {"correct": correct.sum(), "calibration": calibration_gaps(confidence.squeeze(1), correct.squeeze(1))}
        return TokenLossResult(loss, probabilities, metrics)
