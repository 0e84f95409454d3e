"""One rank of test_exact_peaks.py: trains with real tensors under several recipes, and counts their bytes."""

from __future__ import annotations

import gc
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from understudy.objectives.registry import make_objective
from understudy.optim.optimizers.registry import make_optimizer
from understudy.parallel.world import World, process_group
from understudy.plan.shape.model import model_shape
from understudy.recipe.environment import process_environment
from understudy.recipe.schema import Recipe
from understudy.simulation.live_tensors import LiveTensors
from understudy.simulation.simulate import flat_batch, live_step
from understudy.simulation.subject import SimulatedDevice, make_student
from understudy.strategies.registry import make_strategy

HOST = torch.device("cpu")


def peak(config: dict[str, Any], recipe: Recipe, micro_batches: int, world: World) -> int:
    """Of the second step, as `simulate` counts it."""
    model = make_student(recipe, model_shape(config), SimulatedDevice("documents"))
    tokens = recipe.training.micro_batch_tokens
    assert tokens != "auto", "the test fixes it"
    with LiveTensors() as live:
        strategy = make_strategy(recipe, HOST, world)
        strategy.build(lambda: model, partial(make_optimizer, recipe.optimizer, fused=True))
        with torch.no_grad():
            for parameter in model.parameters():
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                if parameter.requires_grad and local.numel():
                    nn.init.normal_(local, std=0.02)
        batch = flat_batch(tokens, recipe.data.max_length)
        step = partial(live_step, strategy, model, live, make_objective(recipe.objective, None))
        step([batch], max_grad_norm=1.0)
        before = len(live.moments)
        step([batch] * micro_batches, max_grad_norm=1.0)
        return max(moment.peak_bytes for moment in live.moments[before:])


def main() -> None:
    out, arguments = Path(sys.argv[1]), json.loads(sys.argv[2])
    environment = process_environment()
    assert environment is not None, "the test sets RANK and WORLD_SIZE"
    peaks = {}
    with process_group(environment, HOST, "gloo") as world:
        for name, (config, recipe, micro_batches) in arguments["cases"].items():
            peaks[name] = peak(config, Recipe.model_validate(recipe), micro_batches, world)
            gc.collect()
    out.write_text(json.dumps(peaks))


if __name__ == "__main__":
    main()
