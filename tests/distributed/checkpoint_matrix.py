"""Saves under some strategies and world sizes, resumes under others, and compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from tests.distributed import scenario
from tests.distributed.processes import run_processes

WORKER = Path(__file__).with_name("checkpoint_worker.py")
SAVED_STEP, STEPS = 2, 4
LOSS_TOLERANCE, LOW_PRECISION_TOLERANCE = 1e-5, 2e-2
SECONDS_A_CASE = 15.0
STRATEGIES = ("ddp", "fsdp", "zero1", "zero2", "zero3", "zero3-offload")


class Optimizer(NamedTuple):
    settings: dict[str, Any]
    precision: str = "fp32"
    exact_elsewhere: bool = True
    """Whether its state is bitwise what was saved under another strategy or world size too."""


OPTIMIZERS = {
    "adamw": Optimizer({"kind": "adamw", "learning_rate": 1e-2, "weight_decay": 0.1}),
    # Blocks of 256 that a strategy cuts elsewhere are quantised anew.
    "adamw_8bit": Optimizer({"kind": "adamw_8bit", "learning_rate": 1e-2}, exact_elsewhere=False),
    "adamw_bf16": Optimizer({"kind": "adamw_bf16", "learning_rate": 1e-2}, "pure_bf16"),
    "adafactor": Optimizer({"kind": "adafactor", "learning_rate": 1e-2}),
    "lion": Optimizer({"kind": "lion", "learning_rate": 1e-3}),
    "muon": Optimizer({"kind": "muon", "learning_rate": 1e-3}),
    "sgd": Optimizer({"kind": "sgd", "learning_rate": 1e-2, "momentum": 0.9}),
}


class Place(NamedTuple):
    """Where a run runs. One process is ddp at 1, which wraps nothing."""

    world_size: int
    strategy: str
    optimizer: str = "adamw"
    precision: str | None = None
    """The optimizer's own where none is named."""

    @property
    def tolerance(self) -> float:
        """Of losses after resuming from another place, relative."""
        precision = self.precision or OPTIMIZERS[self.optimizer].precision
        return LOSS_TOLERANCE if precision == "fp32" else LOW_PRECISION_TOLERANCE

    def __str__(self) -> str:
        return f"{self.strategy}@{self.world_size} {self.optimizer} {self.precision or ''}".strip()


class Adapted(NamedTuple):
    """What is trained instead of a whole model."""

    base: Path
    settings: dict[str, Any]
    """The recipe's adapter."""
    directory: Path | None
    """Its first values."""


def recipe(model: Path, place: Place) -> dict[str, Any]:
    optimizer = OPTIMIZERS[place.optimizer]
    return {
        "name": "checkpoints",
        "output_dir": "unused",
        "model": {"path": str(model)},
        "data": {"train": [{"path": "unused"}]},
        "strategy": place.strategy,
        "optimizer": optimizer.settings,
        "training": {
            "precision": place.precision or optimizer.precision,
            "max_grad_norm": 0.5,
            "activation_checkpointing": "none",
        },
    }


def _order(place: Place) -> tuple[int, str]:
    return place.world_size, str(place)


class Matrix:
    """Checkpoints by the place that wrote them, and what each place saw when it resumed from each."""

    def __init__(
        self,
        root: Path,
        *,
        tied: bool = True,
        sizes: Mapping[str, int] = MappingProxyType({}),
        adapted: Adapted | None = None,
        taught: bool = False,
    ) -> None:
        """`taught`: a wider teacher's hidden states are learned too, by maps that train beside the model."""
        self.root = root
        self.adapted = adapted
        self.teacher = root / "teacher" if taught else None
        if self.teacher is not None:
            scenario.write_model(self.teacher, tied=False, hidden_size=48, intermediate_size=80, seed=5)
        self.model = root / "model" if adapted is None else adapted.base
        if adapted is None:
            scenario.write_model(self.model, tied=tied, **sizes)
        self.saves: dict[Place, dict[str, Any]] = {}

    def save(self, places: Sequence[Place]) -> None:
        for world_size, members in groupby(sorted(places, key=_order), lambda place: place.world_size):
            group = list(members)
            cases = {
                str(place): {
                    **self._case(place),
                    "at": str(self.root / str(place)),
                    # Both ways of saving, over the whole of the matrix.
                    "background": place.strategy != "zero2",
                }
                for place in group
            }
            self.saves.update(self._run(group, f"save-{world_size}", world_size, cases))

    def resume(self, places: Sequence[Place]) -> list[str]:
        """Resumes under each place from each save. Returns what is wrong, a line each."""
        wrong, count = [], 0
        for world_size, group in groupby(sorted(places, key=_order), lambda place: place.world_size):
            pairs = {
                f"{save} → {place}": (save, place) for place in group for save in self.saves if save[2:] == place[2:]
            }
            cases = {
                name: {**self._case(place), "saved": str(self.root / str(save) / f"step-{SAVED_STEP:08}")}
                for name, (save, place) in pairs.items()
            }
            ranks = self._launch(f"resume-{world_size}", world_size, cases)
            for name, (save, place) in pairs.items():
                count += 1
                for rank, seen in enumerate(ranks):
                    wrong += [f"{name}, rank {rank}: {problem}" for problem in self._problems(save, place, seen[name])]
        assert count == sum(save[2:] == place[2:] for save in self.saves for place in places)
        return wrong

    def _problems(self, save: Place, place: Place, seen: dict[str, Any]) -> list[str]:
        exact = OPTIMIZERS[place.optimizer].exact_elsewhere or save == place
        problems = [f"{name} is not bitwise what was saved" for name in seen["differing"] if exact]
        if exact and seen["compared"] != seen["stored"]:
            problems.append(f"{seen['compared']} tensors loaded of {seen['stored']} stored")
        reference = self.saves[save]["after"]
        if save == place and seen["after"] != reference:
            problems.append(f"{seen['after']} instead of {reference} without a stop")
        values, expected = (list(map(float.fromhex, numbers)) for numbers in (seen["after"], reference))
        if exact and values[::2] != pytest.approx(expected[::2], rel=place.tolerance):
            problems.append(f"losses {values[::2]} instead of {expected[::2]}")
        return problems

    def _case(self, place: Place) -> dict[str, Any]:
        adapted, parts = self.adapted, recipe(self.model, place)
        if self.teacher is not None:
            teacher = {"kind": "resident", "path": str(self.teacher)}
            parts["objective"] = {"kind": "distillation", "teacher": teacher, "hidden_states": {"loss": "cosine"}}
        return {
            "recipe": parts | ({} if adapted is None else {"adapter": adapted.settings}),
            "model": str(self.model),
            "adapter": None if adapted is None or adapted.directory is None else str(adapted.directory),
            "saved_step": SAVED_STEP,
            "steps": STEPS,
        }

    def _run(self, places: Sequence[Place], name: str, world_size: int, cases: dict[str, Any]) -> dict[Place, Any]:
        seen = self._launch(name, world_size, cases)[0]
        return {place: seen[str(place)] for place in places}

    def _launch(self, name: str, world_size: int, cases: dict[str, Any]) -> list[dict[str, Any]]:
        return run_processes(WORKER, world_size, self.root / name, {"cases": cases}, SECONDS_A_CASE * len(cases) + 60)
