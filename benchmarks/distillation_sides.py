"""One side of the distillation benchmark, in a process of its own: `python -m benchmarks.distillation_sides JSON`.

Each makes a divergence of the same tensors, summed over tokens, for autograd to take its gradient. Shape letters:
T tokens, H hidden width, V vocabulary, k kept classes.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.distillation import PEERS, Case, Measured
from benchmarks.process import fresh_peak, peak_bytes
from understudy.models.head import LossHead
from understudy.objectives.distillation_loss import DistillationLoss
from understudy.objectives.divergences.settings import DivergenceSettings
from understudy.objectives.targets import DenseTargets, Targets, TopKTargets
from understudy.objectives.teachers.cache_contents import TopK, TopKRows
from understudy.objectives.teachers.caching import keep

__all__ = ["SIDES", "Inputs", "measure_side"]

BETA = 0.5
HIDDEN_SCALE = 4.0
"""At which logits are spread as those of trained models are."""


@dataclass(frozen=True)
class Inputs:
    """What is there before a loss is computed."""

    hidden: Tensor
    """[T, H] of the student."""
    head: nn.Linear
    """[V, H] of the student."""
    teacher_hidden: Tensor
    """[T, H]"""
    teacher_head: nn.Linear
    """[V, H], without gradient."""
    kept: TopKTargets | None
    """[T, k] of the teacher, for a case that keeps k."""

    def forget_gradients(self) -> None:
        self.hidden.grad = self.head.weight.grad = None

    def gradients(self) -> tuple[Tensor, Tensor]:
        assert self.hidden.grad is not None, "the hidden states' is computed"
        assert self.head.weight.grad is not None, "and the head's"
        return self.hidden.grad, self.head.weight.grad


def make_inputs(case: Case) -> Inputs:
    """The same whichever side asks."""
    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.precision]
    hidden, teacher_hidden = (HIDDEN_SCALE * torch.randn(case.tokens, case.width) for _ in range(2))
    head, teacher_head = (nn.Linear(case.width, case.vocabulary, bias=False).to(dtype) for _ in range(2))
    kept = None
    if case.kept is not None:
        with torch.no_grad():
            contents = TopK(case.kept, 1.0, case.vocabulary)
            rows = keep(contents, teacher_hidden.to(dtype), LossHead.replacing(teacher_head), []).rows
        assert isinstance(rows, TopKRows), "as was asked"
        kept = TopKTargets(*rows)
    return Inputs(
        hidden.to(dtype).requires_grad_(), head, teacher_hidden.to(dtype), teacher_head.requires_grad_(False), kept
    )


def measure_side(side: str, case: Case, steps: int) -> Measured:
    """The median over all `steps` but the first, in time; the most over all, in memory."""
    inputs = make_inputs(case)
    compute = SIDES[side](case, inputs)
    seconds = []
    fresh_peak()
    before = peak_bytes()
    for _ in range(steps):
        inputs.forget_gradients()
        began = time.process_time()
        loss = compute()
        loss.backward()
        seconds.append(time.process_time() - began)
    gradients = inputs.gradients()
    extra = peak_bytes() - before - sum(gradient.nbytes for gradient in gradients)
    norms = (float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) for gradient in gradients)
    return Measured(statistics.median(seconds[1:]), extra, loss.item() / case.tokens, *norms)


def _ours(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
    head = LossHead.replacing(inputs.head)
    labels = torch.zeros(case.tokens, dtype=torch.int64)
    targets: Targets = inputs.kept or DenseTargets.from_hidden(inputs.teacher_hidden, inputs.teacher_head.weight)
    settings = DivergenceSettings(beta=BETA)

    def compute() -> Tensor:
        loss, _ = head(inputs.hidden, DistillationLoss(case.divergence, labels, targets, settings=settings))
        return loss

    return compute


def _naive(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
    def compute() -> Tensor:
        student_log = F.log_softmax(inputs.head(inputs.hidden).float(), dim=1)
        if inputs.kept is not None:
            return _kept_divergence(student_log, inputs.kept)
        teacher = inputs.teacher_head(inputs.teacher_hidden).float()
        if case.divergence == "forward_kl":
            return F.kl_div(student_log, F.softmax(teacher, dim=1), reduction="sum")
        teacher_log = F.log_softmax(teacher, dim=1)
        mixture = torch.logaddexp(teacher_log + math.log(BETA), student_log + math.log(1 - BETA))
        from_teacher, from_student = (
            F.kl_div(mixture, log_probs, reduction="sum", log_target=True) for log_probs in (teacher_log, student_log)
        )
        return BETA * from_teacher + (1 - BETA) * from_student

    return compute


def _kept_divergence(student_log: Tensor, kept: TopKTargets) -> Tensor:
    """Forward KL over the kept classes and all others as one."""
    others = student_log.scatter(1, kept.ids, -torch.inf).logsumexp(dim=1, keepdim=True)
    classes = torch.cat([student_log.gather(1, kept.ids), others], dim=1)
    teacher_log = torch.cat([kept.log_probs, kept.tail.unsqueeze(1)], dim=1)
    return F.kl_div(classes, teacher_log, reduction="sum", log_target=True)


def _trl(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
    # Behind everything else: whatever is installed already stays what is imported.
    sys.path.append(str(PEERS))
    from trl.experimental.gkd import GKDTrainer

    beta = {"forward_kl": 0.0, "jsd": BETA}[case.divergence]

    def compute() -> Tensor:
        student = inputs.head(inputs.hidden).float()
        teacher = inputs.teacher_head(inputs.teacher_hidden).float()
        # Without labels: to leave out those that are not supervised, it would copy the terms of all others once more.
        loss: Tensor = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, reduction="sum")
        return loss

    return compute


SIDES: dict[str, Callable[[Case, Inputs], Callable[[], Tensor]]] = {"ours": _ours, "naive": _naive, "trl": _trl}


def main() -> None:
    settings = json.loads(sys.argv[1])
    print(json.dumps(asdict(measure_side(settings["side"], Case(**settings["case"]), settings["steps"]))))


if __name__ == "__main__":
    main()
