"""One rank of the conformance suite: runs cases one after another and writes what it saw."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from tests.distributed import scenario
from understudy.contracts import Batch, LazyTensor, LossSum, Objective
from understudy.devices.device import find_device
from understudy.errors import DivergedError
from understudy.models.adapters.attachment import trained_names
from understudy.models.names import canonical_name
from understudy.objectives.registry import make_objective
from understudy.optim.optimizers.registry import make_optimizer
from understudy.parallel.world import World, process_group
from understudy.recipe.environment import process_environment
from understudy.recipe.schema import Recipe
from understudy.strategies.registry import make_strategy
from understudy.training.adapting import adapted_model
from understudy.training.hidden_states import with_maps
from understudy.training.job import TeacherPlace
from understudy.training.teaching import make_teaching


class Poisoned:
    """An objective whose gradient is not finite; with `value_only`, its loss alone, and on rank 0 alone."""

    def __init__(self, objective: Objective, rank: int, *, value_only: bool) -> None:
        self.objective = objective
        self.rank = rank
        self.value_only = value_only

    def prepare(self, batch: Batch) -> Batch:
        return self.objective.prepare(batch)

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        loss, num_tokens, metrics = self.objective.loss(model, batch)
        if self.value_only:
            return LossSum(loss + (float("inf") if self.rank == 0 else 0.0), num_tokens, metrics)
        return LossSum(loss * float("inf"), num_tokens, metrics)


class CountingReader:
    """Counts the elements that a strategy reads."""

    def __init__(self, reader: Callable[[str], LazyTensor]) -> None:
        self.reader = reader
        self.elements = 0

    def __call__(self, name: str) -> LazyTensor:
        return Counted(self, self.reader(name))


class Counted:
    def __init__(self, counter: CountingReader, stored: LazyTensor) -> None:
        self.counter, self.stored = counter, stored
        self.shape, self.dtype = stored.shape, stored.dtype

    def __getitem__(self, index: slice | tuple[slice, ...]) -> torch.Tensor:
        part = self.stored[index]
        self.counter.elements += part.numel()
        return part


def place_of(section: Any) -> TeacherPlace:
    return TeacherPlace(None if section.kind == "base" else Path(section.path), None, scenario.VOCABULARY)


def run_case(case: dict[str, Any], world: World, weights: Path) -> dict[str, Any]:
    recipe = Recipe.model_validate(case["recipe"])
    directory = Path(case["model"])
    device = find_device()
    strategy = make_strategy(recipe, device.torch_device(world.local_rank), world)
    adapted = adapted_model(recipe, directory, None if case["adapter"] is None else Path(case["adapter"]))
    teachers = [place_of(section) for section in getattr(recipe.objective, "teachers", ())]
    if case["teachers"] is not None:
        teachers = [TeacherPlace.of_json(place) for place in case["teachers"]]
    adapted = with_maps(adapted, recipe, teachers, None)
    if case["chunk_rows"] is not None:
        adapted.model.head.chunk_bytes = 4 * scenario.VOCABULARY * case["chunk_rows"]
    trained = trained_names(adapted.model)
    strategy.build(lambda: adapted.model, lambda named: make_optimizer(recipe.optimizer, named, fused=False))
    reader = CountingReader(adapted.read)
    strategy.load_state(reader)
    objective = make_objective(
        recipe.objective,
        make_teaching(recipe, teachers, adapted.model, strategy, device.torch_device(world.local_rank), world),
    )
    for step in range(case["poisoned_steps"]):
        batches = scenario.micro_batches(step, world.rank, world.size)
        try:
            poisoned = Poisoned(objective, world.rank, value_only=step % 2 == 1)
            strategy.forward_backward(batches, poisoned, 1)
        except DivergedError as error:
            return {"diverged": str(error)}
        norm = strategy.optimizer_step(recipe.optimizer.learning_rate, recipe.training.max_grad_norm)
        assert not torch.isfinite(norm), f"norm {norm} of a gradient that is not finite"
    losses, norms = [], []
    for step in range(case["steps"]):
        count = scenario.num_supervised(scenario.global_batch(step))
        total = strategy.forward_backward(scenario.micro_batches(step, world.rank, world.size), objective, count)
        assert int(total.num_tokens) == count
        losses.append(float(total.loss) / count)
        norms.append(float(strategy.optimizer_step(recipe.optimizer.learning_rate, recipe.training.max_grad_norm)))
    evaluation = strategy.evaluate(scenario.micro_batches(0, world.rank, world.size), objective)
    frozen = strategy.layout().keys() - trained
    with_state = {name.rpartition(".")[0] for name in strategy.optimizer_layout()}
    assert with_state <= trained, "a frozen parameter has no moments"
    assert all(p.grad is None for n, p in strategy.module.named_parameters() if canonical_name(n) in frozen)
    mine = dict(strategy.state(lambda name: 0 if name in trained else None))
    assert bool(mine) == (world.rank == 0), "only the owner yields tensors"
    if world.rank == 0:
        assert mine.keys() == trained
        assert all(spec.dtype == mine[name].dtype for name, spec in strategy.layout().items() if name in trained)
        save_file({name: tensor.contiguous() for name, tensor in mine.items()}, weights)
    if case["count_reads"]:
        return {"elements_read": reader.elements, "frozen_bytes": strategy.held_bytes().frozen}
    return {"losses": losses, "norms": norms, "evaluation": float(evaluation.loss) / int(evaluation.num_tokens)}


def main() -> None:
    out, arguments = Path(sys.argv[1]), json.loads(sys.argv[2])
    environment = process_environment()
    assert environment is not None
    device = find_device()
    results = {}
    with process_group(environment, device.torch_device(environment.local_rank), device.backend) as world:
        for name, case in arguments["cases"].items():
            results[name] = run_case(case, world, out.parent / f"{name}.safetensors")
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
