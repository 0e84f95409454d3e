"""One rank of the checkpoint matrix: trains and saves, or resumes under another strategy and says what differs."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from tests.distributed import scenario
from understudy.checkpoint.form import WHOLE_MODEL
from understudy.checkpoint.loading import open_optimizer_state
from understudy.checkpoint.progress import Progress, read_progress
from understudy.checkpoint.saver import CheckpointSaver, SaveSettings
from understudy.checkpoint.store import CheckpointStore, verify_checkpoint
from understudy.contracts import LossScale, Strategy
from understudy.devices.device import find_device
from understudy.models.build import make_language_model
from understudy.models.weights import WeightReader
from understudy.objectives.registry import make_objective
from understudy.optim.optimizers.registry import make_optimizer
from understudy.parallel.world import World, process_group
from understudy.recipe.environment import process_environment
from understudy.recipe.schema import Recipe
from understudy.strategies.registry import make_strategy


def build(recipe: Recipe, model: Path, weights: Path, world: World) -> Strategy:
    device = find_device()
    strategy = make_strategy(recipe, device.torch_device(world.local_rank), world)
    strategy.build(
        lambda: make_language_model(model, recipe.model, device),
        lambda named: make_optimizer(recipe.optimizer, named, fused=device.fused_adamw),
    )
    strategy.load_state(WeightReader(weights))
    return strategy


def train(strategy: Strategy, recipe: Recipe, steps: range, world: World) -> list[str]:
    """Losses and norms, to the bit."""
    objective, seen = make_objective(recipe.objective), []
    for step in steps:
        count = scenario.num_supervised(scenario.global_batch(step))
        total = strategy.forward_backward(scenario.micro_batches(step, world.rank, world.size), objective, count)
        norm = strategy.optimizer_step(recipe.optimizer.learning_rate / (1 + step), recipe.training.max_grad_norm)
        seen += [float(total.loss / count).hex(), float(norm).hex()]
    return seen


def save_and_go_on(case: dict[str, Any], world: World) -> dict[str, Any]:
    recipe, model, store = Recipe.model_validate(case["recipe"]), Path(case["model"]), CheckpointStore(Path(case["at"]))
    strategy = build(recipe, model, model, world)
    before = train(strategy, recipe, range(case["saved_step"]), world)
    settings = SaveSettings(
        store=store,
        keep=1,
        keep_best=False,
        background=case["background"],
        form=WHOLE_MODEL,
        buffers={},
        write_companions=lambda directory: shutil.copy(model / "config.json", directory),
        token="test",
        still_ours=lambda: True,
    )
    saver = CheckpointSaver(strategy, settings, world.rank, world.size)
    saver.save(Progress(case["saved_step"], 0.5, 7, {}, "", "", strategy.loss_scale, None, {}))
    after = train(strategy, recipe, range(case["saved_step"], case["steps"]), world)
    saver.wait()
    return {"before": before, "after": after}


def resume(case: dict[str, Any], world: World) -> dict[str, Any]:
    recipe, model, saved = Recipe.model_validate(case["recipe"]), Path(case["model"]), Path(case["saved"])
    strategy = build(recipe, model, saved / "model", world)
    stored = open_optimizer_state(saved)
    strategy.load_optimizer_state(stored)
    if (scale := read_progress(saved).loss_scale) is not None:
        strategy.loss_scale = LossScale(*scale)
    differing = []
    weights = WeightReader(saved / "model")
    owner = {name: i % world.size for i, name in enumerate([*strategy.layout(), *strategy.optimizer_layout()])}
    for name, tensor in strategy.state(owner.__getitem__):
        if not same_bits(tensor, weights(name)[()]):
            differing.append(name)
    for name, tensor in strategy.optimizer_state(owner.__getitem__):
        parameter, _, key = name.rpartition(".")
        # 8-bit moments of what is small in one place and large in another are kept in another form.
        if key not in stored[parameter] or not same_bits(tensor, stored[parameter][key][()]):
            differing.append(name)
    return {
        "differing": differing,
        "compared": len(owner),
        "stored": len(weights.names()) + sum(map(len, stored.values())),
        "after": train(strategy, recipe, range(case["saved_step"], case["steps"]), world),
    }


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool((as_bytes(a) == as_bytes(b)).all())


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def main() -> None:
    out, arguments = Path(sys.argv[1]), json.loads(sys.argv[2])
    environment = process_environment()
    assert environment is not None
    torch.use_deterministic_algorithms(True)
    device = find_device()
    results = {}
    with process_group(environment, device.torch_device(environment.local_rank), device.backend) as world:
        for name, case in arguments["cases"].items():
            results[name] = (resume if "saved" in case else save_and_go_on)(case, world)
            gc.collect()
            if "saved" in case and world.rank == 0:
                verify_checkpoint(Path(case["saved"]))
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
