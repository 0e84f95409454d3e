"""One rank of the checkpoint matrix: trains and saves, or resumes under another strategy and says what differs."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.distributed import scenario
from understudy.checkpoint.form import Form
from understudy.checkpoint.loading import open_maps, open_optimizer_state
from understudy.checkpoint.progress import Progress, read_progress
from understudy.checkpoint.saver import CheckpointSaver, SaveSettings
from understudy.checkpoint.store import CheckpointStore, verify_checkpoint
from understudy.contracts import LossScale, Objective, Strategy
from understudy.devices.device import find_device
from understudy.models.adapters.directory import SETTINGS, WEIGHTS
from understudy.models.names import is_beside_model
from understudy.models.weights import WeightReader
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


def build(case: dict[str, Any], checkpoint: Path | None, world: World) -> tuple[Strategy, Form, Objective]:
    recipe, model, device = Recipe.model_validate(case["recipe"]), Path(case["model"]), find_device()
    saved = None if checkpoint is None else checkpoint / "model"
    if case["adapter"] is None:
        adapted = adapted_model(recipe, saved or model, None)
    else:
        adapted = adapted_model(recipe, model, saved or Path(case["adapter"]))
    teachers = [TeacherPlace(Path(each.path), None, scenario.VOCABULARY) for each in teachers_of(recipe)]
    adapted, torch_device = with_maps(adapted, recipe, teachers, checkpoint), device.torch_device(world.local_rank)
    strategy = make_strategy(recipe, torch_device, world)
    strategy.build(
        lambda: adapted.model, lambda named: make_optimizer(recipe.optimizer, named, fused=device.fused_adamw)
    )
    strategy.load_state(adapted.read)
    teaching = make_teaching(recipe, teachers, adapted.model, strategy, torch_device, world)
    return strategy, adapted.form, make_objective(recipe.objective, teaching)


def teachers_of(recipe: Recipe) -> Any:
    return getattr(recipe.objective, "teachers", ())


def train(strategy: Strategy, objective: Objective, recipe: Recipe, steps: range, world: World) -> list[str]:
    """Losses and norms, to the bit."""
    seen = []
    for step in steps:
        count = scenario.num_supervised(scenario.global_batch(step))
        total = strategy.forward_backward(scenario.micro_batches(step, world.rank, world.size), objective, count)
        norm = strategy.optimizer_step(recipe.optimizer.learning_rate / (1 + step), recipe.training.max_grad_norm)
        seen += [float(total.loss / count).hex(), float(norm).hex()]
    return seen


def save_and_go_on(case: dict[str, Any], world: World) -> dict[str, Any]:
    recipe, store = Recipe.model_validate(case["recipe"]), CheckpointStore(Path(case["at"]))
    strategy, form, objective = build(case, None, world)
    before = train(strategy, objective, recipe, range(case["saved_step"]), world)
    settings = SaveSettings(
        store=store,
        keep=1,
        keep_best=False,
        background=case["background"],
        form=form,
        buffers={},
        write_companions=partial(write_companions, case),
        token="test",
        still_ours=lambda: True,
    )
    saver = CheckpointSaver(strategy, settings, world.rank, world.size)
    saver.save(Progress(case["saved_step"], 0.5, 7, {}, "", "", strategy.loss_scale, None, {}))
    after = train(strategy, objective, recipe, range(case["saved_step"], case["steps"]), world)
    saver.wait()
    return {"before": before, "after": after}


def write_companions(case: dict[str, Any], directory: Path) -> None:
    if case["adapter"] is None:
        shutil.copy(Path(case["model"]) / "config.json", directory)
    else:
        for name in SETTINGS:
            shutil.copy(Path(case["adapter"]) / name, directory)


def resume(case: dict[str, Any], world: World) -> dict[str, Any]:
    recipe, saved = Recipe.model_validate(case["recipe"]), Path(case["saved"])
    strategy, form, objective = build(case, saved, world)
    stored = open_optimizer_state(saved)
    strategy.load_optimizer_state(stored)
    if (scale := read_progress(saved).loss_scale) is not None:
        strategy.loss_scale = LossScale(*scale)
    differing = []
    weights = WeightReader(saved / "model", only=None if case["adapter"] is None else WEIGHTS)
    kept, maps = [name for name in strategy.layout() if form.keeps(name)], open_maps(saved)
    owner = {name: i % world.size for i, name in enumerate([*kept, *maps, *strategy.optimizer_layout()])}
    for name, tensor in strategy.state(owner.get):
        if name in maps:
            parts = [(name, tensor, maps[name][()])]
        else:
            parts = [(key, part, weights(key)[()]) for key, part in form.parts(name, tensor)]
        differing += [key for key, part, stored_part in parts if not same_bits(part, stored_part)]
    for name, tensor in strategy.optimizer_state(owner.__getitem__):
        parameter, _, key = name.rpartition(".")
        # 8-bit moments of what is small in one place and large in another are kept in another form.
        if key not in stored[parameter] or not same_bits(tensor, stored[parameter][key][()]):
            differing.append(name)
    layout = strategy.layout()
    all_of_model = [name for name in layout if not is_beside_model(name)]
    stored_weights = sum(len(form.specs(name, layout[name])) for name in kept)
    return {
        "differing": differing,
        "compared": stored_weights + len(layout) - len(all_of_model) + len(strategy.optimizer_layout()),
        "stored": len(weights.names()) + len(maps) + sum(map(len, stored.values())),
        "after": train(strategy, objective, recipe, range(case["saved_step"], case["steps"]), world),
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
