"""The loss head against a linear layer and cross-entropy over all logits: time and memory of forward and backward.

`python -m benchmarks.head JSON` is one side, in a process of its own.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.process import fresh_peak, measure, peak_bytes
from benchmarks.table import GIBIBYTE, Row, print_table

__all__ = ["compare"]

VOCABULARIES = (49_152, 128_256)
TOKENS = 512
WIDTH = 576
REPETITIONS = 3


def compare() -> None:
    rows = []
    for vocabulary in VOCABULARIES:
        ours, plain = (measure("benchmarks.head", {"side": side, "vocabulary": vocabulary}) for side in SIDES)
        name = f"V = {vocabulary:,}"
        rows += [
            Row(
                f"{name}: time",
                f"{ours['seconds']:.2f} s",
                f"{plain['seconds']:.2f} s",
                ours["seconds"] / plain["seconds"],
            ),
            Row(
                f"{name}: memory beyond weights and inputs",
                f"{ours['bytes'] / GIBIBYTE:.2f} GiB",
                f"{plain['bytes'] / GIBIBYTE:.2f} GiB",
                ours["bytes"] / plain["bytes"],
            ),
        ]
    print_table(f"Loss head: {TOKENS:,} supervised tokens, hidden width {WIDTH}, fp32", "all logits", rows)


def _ours(linear: Any, hidden: Any, labels: Any) -> Callable[[], Any]:
    from understudy.models.head import LossHead
    from understudy.objectives.causal_lm import CrossEntropy

    head = LossHead.replacing(linear)
    return lambda: head(hidden, CrossEntropy(labels))[0]


def _plain(linear: Any, hidden: Any, labels: Any) -> Callable[[], Any]:
    from torch.nn.functional import cross_entropy

    return lambda: cross_entropy(linear(hidden), labels, reduction="sum")


SIDES = {"ours": _ours, "plain": _plain}


def _measure(side: str, vocabulary: int) -> dict[str, float]:
    import torch

    torch.manual_seed(0)
    linear = torch.nn.Linear(WIDTH, vocabulary, bias=False)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    labels = torch.randint(vocabulary, (TOKENS,))
    loss = SIDES[side](linear, hidden, labels)
    seconds = []
    fresh_peak()
    before = peak_bytes()
    for _ in range(1 + REPETITIONS):
        linear.weight.grad = hidden.grad = None
        began = time.perf_counter()
        loss().backward()
        seconds.append(time.perf_counter() - began)
    return {"seconds": statistics.median(seconds[1:]), "bytes": peak_bytes() - before}


if __name__ == "__main__":
    print(json.dumps(_measure(**json.loads(sys.argv[1]))))
