"""The same steps under several strategies, and how far apart they end: the conformance suite in the user's hands."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from understudy.devices.detect import detect_machine
from understudy.launch.local import launch_local
from understudy.launch.run_directory import RunDirectory
from understudy.models.weights import WeightReader
from understudy.plan.machine import Machine
from understudy.recipe.load import load_recipe
from understudy.recipe.rules import check_processes
from understudy.recipe.schema import Evaluation, Logging, Recipe
from understudy.recipe.source_map import SourceMap
from understudy.strategies.registry import prepare_strategy
from understudy.training.choosing import choose
from understudy.training.job import Job, write_job
from understudy.training.prepare import prepare_job

__all__ = ["TOLERANCES", "Difference", "Tolerance", "compare_strategies"]

REFERENCE = "ddp"


@dataclass(frozen=True)
class Tolerance:
    """Largest differences that rounding explains, relative to one process."""

    loss: float
    norm: float
    weights: float


TOLERANCES = {
    "fp32": Tolerance(loss=1e-5, norm=1e-4, weights=1e-2),
    "bf16": Tolerance(loss=5e-3, norm=5e-2, weights=0.1),
    "fp16": Tolerance(loss=1e-3, norm=1e-2, weights=0.1),
    "pure_bf16": Tolerance(loss=1e-2, norm=5e-2, weights=0.2),
}
"""By `training.precision`. A weight difference is a share of the way that training moved the weights: Adam turns a
gradient's sign into a step, so rounding near zero moves single weights by whole steps, and Muon computes in bf16."""


@dataclass(frozen=True)
class Difference:
    """How far one strategy's run is from the one-process run, each the largest over the steps or weights."""

    strategy: str
    processes: int
    loss: float
    """Relative."""
    norm: float
    """Of the gradient; relative."""
    weights: float
    """‖w − w₁‖ / ‖w₁ − w₀‖: w₁ is the one-process run's, w₀ the weights before training."""
    largest_weight: float
    """max |w − w₁|."""

    def within(self, tolerance: Tolerance) -> bool:
        return self.loss <= tolerance.loss and self.norm <= tolerance.norm and self.weights <= tolerance.weights


@dataclass(frozen=True)
class _Run:
    losses: list[float]
    norms: list[float]
    model: Path


def compare_strategies(
    recipe: Path,
    overrides: Sequence[str],
    strategies: Sequence[str],
    processes: int,
    steps: int,
    report: Callable[[str], None],
) -> Iterator[tuple[Difference, Tolerance]]:
    """Trains `steps` steps of `recipe` in one process, then under each strategy in `processes`; yields how far apart
    they are. Everything runs as `train` does, in temporary directories. Raises `UserError` when a strategy cannot run
    the recipe, before any has run."""
    machine = detect_machine()
    # The number of steps is ours to say, in place of any that the user's overrides give.
    lengths = ("training.max_steps=", "training.epochs=")
    fixed = (*(each for each in overrides if not each.startswith(lengths)), f"training.max_steps={steps}")
    cases = [(REFERENCE, 1), *((strategy, processes) for strategy in strategies)]
    resolved = [_resolved(recipe, fixed, strategy, size, machine) for strategy, size in cases]
    reference_recipe, sources = resolved[0]
    job = prepare_job(reference_recipe, sources, report).job
    if dropout := _dropout(job):
        report(f"{', '.join(dropout)} draw at random on each process: set them to 0 to compare")
    for case, case_sources in resolved[1:]:
        with case_sources.placing("strategy"):
            prepare_strategy(case, report)
    tolerance = TOLERANCES[reference_recipe.training.precision]
    with tempfile.TemporaryDirectory(prefix="understudy-parity-") as scratch:
        reference = _run(job, reference_recipe, Path(scratch) / "reference", machine)
        for index, (strategy, size) in enumerate(cases[1:], start=1):
            report(f"{strategy}: {steps} steps in {size} processes")
            run = _run(job, resolved[index][0], Path(scratch) / str(index), machine)
            yield _difference(strategy, size, run, reference, job.adapter_directory or job.model_directory), tolerance


def _dropout(job: Job) -> list[str]:
    """What drops activations at random: then no two strategies can agree."""
    config = json.loads((job.model_directory / "config.json").read_text(encoding="utf-8"))
    adapter = ["adapter.dropout"] if getattr(job.recipe.adapter, "dropout", 0.0) else []
    return adapter + [
        f"model.config.{name}"
        for name, value in config.items()
        if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, float) and value > 0
    ]


def _resolved(
    path: Path, overrides: Sequence[str], strategy: str, processes: int, machine: Machine
) -> tuple[Recipe, SourceMap]:
    recipe, sources = load_recipe(path, (*overrides, f"strategy={strategy}", f"cluster.processes={processes}"))
    check_processes(recipe, processes, sources)
    quiet = {"evaluation": Evaluation(), "logging": Logging(every=1, sinks=("jsonl",))}
    return choose(recipe.model_copy(update=quiet), sources, machine, processes).recipe, sources


def _run(job: Job, recipe: Recipe, path: Path, machine: Machine) -> _Run:
    directory = RunDirectory(path)
    directory.logs.mkdir(parents=True)
    write_job(directory.job, replace(job, recipe=recipe, run_directory=path, evaluation=None, checkpoints=False))
    arguments = (sys.executable, "-m", "understudy.training.worker", str(path))
    assert isinstance(recipe.cluster.processes, int)
    processes = recipe.cluster.processes
    launch_local(arguments, processes, directory, machine.cores, accelerated=machine.accelerated, console=False)
    rows = [json.loads(line) for line in directory.metrics.read_text(encoding="utf-8").splitlines()]
    return _Run([row["loss"] for row in rows], [row["grad_norm"] for row in rows], directory.model)


def _difference(strategy: str, processes: int, run: _Run, reference: _Run, initial: Path) -> Difference:
    distance, way, largest = _weight_differences(run.model, reference.model, initial)
    return Difference(
        strategy=strategy,
        processes=processes,
        loss=_largest_relative(run.losses, reference.losses),
        norm=_largest_relative(run.norms, reference.norms),
        weights=distance / way if way else distance,
        largest_weight=largest,
    )


def _largest_relative(values: Sequence[float], expected: Sequence[float]) -> float:
    assert len(values) == len(expected), "both runs log every step"
    return max(abs(a - b) / abs(b) for a, b in zip(values, expected))


def _weight_differences(model: Path, reference: Path, initial: Path) -> tuple[float, float, float]:
    """‖w − w₁‖, ‖w₁ − w₀‖ and max |w − w₁| over all weights, one tensor at a time."""
    ours, theirs, before = WeightReader(model), WeightReader(reference), WeightReader(initial)
    distance = way = largest = 0.0
    for name in theirs.names():
        one: Tensor = theirs(name)[:].double()
        apart = ours(name)[:].double() - one
        distance += float(apart.square().sum())
        way += float((one - before(name)[:].double()).square().sum())
        largest = max(largest, float(apart.abs().max()))
    return distance**0.5, way**0.5, largest
