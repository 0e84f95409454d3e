"""The gradient contract (P2) with a teacher: every strategy learns as whole logits in fp64 in one process would.

Gradients are compared after one step of SGD, whose weights differ as they do; Adam makes a step of a gradient's sign.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed import scenario
from tests.distributed.adapter_bases import ADAPTERS, Bases
from tests.distributed.conformance import (
    ADAMW,
    LOSS_TOLERANCE,
    NORM_TOLERANCE,
    WORKER,
    assert_same_trajectory,
    assert_same_weights,
    case,
)
from tests.distributed.processes import run_processes
from tests.tiny_data import cache_of
from understudy.contracts import IGNORED
from understudy.objectives.teachers.aligned_documents import AlignedDocument, AlignmentCounts, write_aligned_documents
from understudy.objectives.teachers.cache_format import example_key
from understudy.training.job import TeacherPlace

pytestmark = pytest.mark.distributed

FOREIGN_VOCABULARY = 80
STRATEGIES = ("ddp", "fsdp", "fsdp-offload", "zero0", "zero1", "zero2", "zero2-offload", "zero3", "zero3-offload")
CHUNK_ROWS = {"resident": 3, "sharded": None, "base": 5, "foreign": 4}
"""Supervised positions that the head takes at once; a rank has up to about forty."""
SGD = {"kind": "sgd", "learning_rate": 1.0}
KINDS = {
    "resident": ("forward_kl", 1.0, 0.0),
    "sharded": ("reverse_kl", 2.0, 0.3),
    "base": ("jsd", 1.5, 0.5),
    "foreign": ("uld", 2.0, 0.3),
}
"""Of teachers: divergence, temperature and weight of the cross-entropy. The foreign one, which is sharded, has another
vocabulary and reads other documents."""
HIDDEN = {
    "resident": (scenario.Matched("mse", 0.5, ((0, 2), (1, 0), (1, 2))), None),
    "sharded": (scenario.Matched("cosine", 3.0, ((0, 1), (1, 2))), "uniform"),
    "base": (scenario.Matched("mse", 2.0, ((0, 0), (1, 1))), "uniform"),
}
"""Of teachers: which hidden states are held to theirs, and what the recipe says in place of pairs. Maps take those of
the student to the width of the resident and the sharded one, which have three layers; the base has its own."""


class Models:
    def __init__(self, root: Path) -> None:
        self.bases = Bases(root)
        self.teacher = root / "teacher"
        scenario.write_model(self.teacher, tied=False, hidden_size=48, intermediate_size=80, layers=3, seed=5)
        self.foreign = root / "foreign"
        scenario.write_model(self.foreign, tied=False, vocabulary=FOREIGN_VOCABULARY, seed=6)
        self.reading, self.foreign_place = foreign_reading(root, self.foreign)

    def case(self, kind: str, strategy: str, optimizer: dict[str, Any], steps: int) -> dict[str, Any]:
        divergence, temperature, weight = KINDS[kind]
        section = {"kind": kind} if kind == "base" else {"kind": kind, "path": str(self.teacher)}
        if kind == "foreign":
            section = {"kind": "sharded", "path": str(self.foreign)}
        objective: dict[str, Any] = {
            "kind": "distillation",
            "teacher": section,
            "divergence": divergence,
            "temperature": temperature,
            "cross_entropy_weight": weight,
        }
        if kind in HIDDEN:
            hidden, layers = HIDDEN[kind]
            objective["hidden_states"] = {
                "loss": hidden.loss,
                "weight": hidden.weight,
                "layers": layers or hidden.pairs,
            }
        parts: dict[str, Any] = {"objective": objective}
        adapter = None
        if kind == "base":
            adapter, parts["adapter"] = self.bases.adapter("dora", quantized=False), ADAPTERS["dora"]
        teachers = [self.foreign_place.to_json()] if kind == "foreign" else None
        return case(
            self.bases.whole,
            strategy,
            optimizer,
            steps,
            adapter=adapter,
            recipe=parts,
            teachers=teachers,
            chunk_rows=CHUNK_ROWS[kind],
            max_grad_norm=0.5,
        )

    @cache  # noqa: B019  # one a module
    def solution(self, kind: str, optimizer: str, steps: int) -> scenario.Solution:
        teacher = {"base": None, "foreign": self.foreign}.get(kind, self.teacher)
        reading, (hidden, _) = self.reading if kind == "foreign" else None, HIDDEN.get(kind, (None, None))
        distilled = scenario.Distilled(teacher, *KINDS[kind], reading, hidden)
        adapter = self.bases.adapter("dora", quantized=False) if kind == "base" else None
        return scenario.solve(
            self.bases.whole,
            steps=steps,
            learning_rate=1.0 if optimizer == "sgd" else 1e-2,
            max_norm=0.5,
            optimizer=optimizer,
            decay=0.0 if optimizer == "sgd" else 0.1,
            adapter=adapter,
            distilled=distilled,
        )


def foreign_reading(root: Path, model: Path) -> tuple[scenario.OtherReading, TeacherPlace]:
    """Other documents at random, shorter or longer ones, and about half of the positions aligned, a third of them where
    other tokens follow; of every fifth document none is. Some tokens mean the same."""
    draw = random.Random(0)
    matched = tuple(zip(draw.sample(range(scenario.VOCABULARY), 40), draw.sample(range(FOREIGN_VOCABULARY), 40)))
    read, stored, examples = {}, {}, []
    for number, (tokens, labels) in enumerate(each for step in range(4) for each in scenario.global_batch(step)):
        other = torch.tensor(draw.choices(range(FOREIGN_VOCABULARY), k=draw.randint(4, 20)))
        supervised = labels != IGNORED
        count = 0 if number % 5 == 0 else min(int(supervised.sum()) // 2 + 1, len(other) - 1)
        rows = tuple(sorted(draw.sample(range(int(supervised.sum())), count)))
        positions = tuple(sorted(draw.sample(range(len(other) - 1), count)))
        read[tuple(tokens.tolist())] = scenario.OtherDocument(other, rows, positions)
        stored[example_key(tokens, supervised)] = AlignedDocument(
            number, np.array(rows, np.int32), np.array(positions, np.int32), np.array(rows) % 3 > 0
        )
        examples.append((other.tolist(), [1] * len(other)))
    counts = AlignmentCounts(0, 0, 0, len(matched), scenario.VOCABULARY, FOREIGN_VOCABULARY)
    (root / "alignment").mkdir()
    write_aligned_documents(root / "alignment", stored, np.array(sorted(matched)), counts)
    cache = cache_of(root / "tokens", examples)
    place = TeacherPlace(model, None, 0, alignment=root / "alignment", examples=(cache.path,))
    return scenario.OtherReading(read, matched), place


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_learns_from_every_teacher_as_one_process_does(
    strategy: str, models: Models, tmp_path: Path
) -> None:
    cases = {kind: models.case(kind, strategy, ADAMW, 4) for kind in KINDS}
    if not strategy.endswith("offload"):  # which steps with AdamW alone
        cases |= {f"{kind}-sgd": models.case(kind, strategy, SGD, 1) for kind in KINDS}
    results = run_processes(WORKER, 2, tmp_path, {"cases": cases})
    assert all(result == results[0] for result in results), "every rank sees the same losses and norms"
    for name, seen in results[0].items():
        kind, _, sgd = name.partition("-")
        solution = models.solution(kind, "sgd" if sgd else "adamw", 1 if sgd else 4)
        assert_same_trajectory(seen, solution, LOSS_TOLERANCE, NORM_TOLERANCE)
        if sgd:
            assert_same_weights(tmp_path / f"{name}.safetensors", solution, 1e-6)
