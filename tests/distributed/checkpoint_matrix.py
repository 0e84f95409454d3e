"""Saves under some strategies and world sizes, resumes under others, and compares."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.distributed import scenario
from tests.distributed.processes import run_processes

WORKER = Path(__file__).with_name("checkpoint_worker.py")
SAVED_STEP, STEPS = 3, 6
LOSS_TOLERANCE = 1e-5
SECONDS_A_CASE = 15.0
STRATEGIES = ("ddp", "fsdp", "zero1", "zero2", "zero3", "zero3-offload")


class Place(NamedTuple):
    """Where a run runs. One process is ddp at 1, which wraps nothing."""

    world_size: int
    strategy: Any

    def __str__(self) -> str:
        return f"{self.strategy}@{self.world_size}"


def recipe(model: Path, strategy: Any, optimizer: dict[str, Any], precision: str) -> dict[str, Any]:
    return {
        "name": "checkpoints",
        "output_dir": "unused",
        "model": {"path": str(model)},
        "data": {"train": [{"path": "unused"}]},
        "strategy": strategy,
        "optimizer": optimizer,
        "training": {"precision": precision, "max_grad_norm": 0.5, "activation_checkpointing": "none"},
    }


class Matrix:
    """Checkpoints by the place that wrote them, and what each place saw when it resumed from each."""

    def __init__(self, root: Path, *, optimizer: dict[str, Any], precision: str = "fp32", tied: bool = True) -> None:
        self.root = root
        self.optimizer = optimizer
        self.precision = precision
        self.model = root / "model"
        scenario.write_model(self.model, tied=tied)
        self.saves: dict[Place, dict[str, Any]] = {}

    def save(self, places: Sequence[Place]) -> None:
        for world_size, group in groupby(sorted(places), lambda place: place.world_size):
            cases = {
                str(place): {
                    **self._case(place),
                    "at": str(self.root / str(place)),
                    # Both ways of saving, over the whole of the matrix.
                    "background": place.strategy != "zero2",
                }
                for place in group
            }
            self.saves.update(self._run(f"save-{world_size}", world_size, cases))

    def resume(self, places: Sequence[Place]) -> list[str]:
        """Resumes under each place from each save. Returns what is wrong, a line each."""
        wrong, count = [], 0
        for world_size, group in groupby(sorted(places), lambda place: place.world_size):
            pairs = {f"{save} → {place}": (save, place) for place in group for save in self.saves}
            cases = {
                name: {**self._case(place), "saved": str(self.root / str(save) / f"step-{SAVED_STEP:08}")}
                for name, (save, place) in pairs.items()
            }
            ranks = self._launch(f"resume-{world_size}", world_size, cases)
            for name, (save, place) in pairs.items():
                count += 1
                for rank, seen in enumerate(ranks):
                    wrong += [f"{name}, rank {rank}: {problem}" for problem in self._problems(save, place, seen[name])]
        assert count == len(places) * len(self.saves)
        return wrong

    def _problems(self, save: Place, place: Place, seen: dict[str, Any]) -> list[str]:
        problems = [f"{name} is not bitwise what was saved" for name in seen["differing"]]
        if seen["compared"] != seen["stored"]:
            problems.append(f"{seen['compared']} tensors loaded of {seen['stored']} stored")
        reference = self.saves[save]["after"]
        if save == place and seen["after"] != reference:
            problems.append(f"{seen['after']} instead of {reference} without a stop")
        values, expected = (list(map(float.fromhex, numbers)) for numbers in (seen["after"], reference))
        if values[::2] != pytest.approx(expected[::2], rel=LOSS_TOLERANCE):
            problems.append(f"losses {values[::2]} instead of {expected[::2]}")
        return problems

    def _case(self, place: Place) -> dict[str, Any]:
        return {
            "recipe": recipe(self.model, place.strategy, self.optimizer, self.precision),
            "model": str(self.model),
            "saved_step": SAVED_STEP,
            "steps": STEPS,
        }

    def _run(self, name: str, world_size: int, cases: dict[str, Any]) -> dict[Place, dict[str, Any]]:
        seen = self._launch(name, world_size, cases)[0]
        return {Place(world_size, key.partition("@")[0]): seen[key] for key in cases}

    def _launch(self, name: str, world_size: int, cases: dict[str, Any]) -> list[dict[str, Any]]:
        return run_processes(WORKER, world_size, self.root / name, {"cases": cases}, SECONDS_A_CASE * len(cases) + 60)
