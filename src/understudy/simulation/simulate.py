"""Runs a recipe's model under its strategy with tensors that have no memory, and counts what they would take."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import nn

from understudy.contracts import IGNORED, Batch, Objective, Strategy
from understudy.models.language_model import LanguageModel
from understudy.models.quantization.codecs.bitsandbytes_4bit import dynamic_map
from understudy.objectives.registry import make_objective
from understudy.optim.optimizers.registry import make_optimizer
from understudy.plan.shape.model import ModelShape
from understudy.recipe.schema import Recipe
from understudy.simulation.group import GlooCopies, answer_reducer, simulated_group
from understudy.simulation.hollow_operators import hollow_operators
from understudy.simulation.hollow_tensors import HollowTensors, hollow_parameters
from understudy.simulation.live_tensors import Alive, LiveTensors, Moment
from understudy.simulation.subject import HOST, SimulatedDevice, make_student, make_teachers, make_teaching
from understudy.strategies.base import ModuleStrategy
from understudy.strategies.registry import make_strategy

__all__ = ["Simulation", "flat_batch", "live_step", "simulate"]


@dataclass(frozen=True)
class Simulation:
    """Of rank 0, which has the largest part of what is shared out."""

    peak_bytes: int
    """Of all tensors; those that a strategy keeps in host memory too."""
    peak_moment: str
    timeline: tuple[Moment, ...]
    """Of the second step: the first one makes the optimizer's state."""
    alive: tuple[Alive, ...]
    """At the peak, the largest first."""
    seconds: float


def simulate(
    recipe: Recipe,
    shape: ModelShape,
    *,
    processes: int,
    micro_batches: int,
    kernel: str,
    gloo: bool = False,
    teachers: Sequence[ModelShape | None] = (),
) -> Simulation:
    """Two steps of `recipe`, resolved, on `processes` processes: of one micro-batch, or of two where a step has more.

    A micro-batch has `training.micro_batch_tokens` tokens in examples of at most `data.max_length`, all supervised.
    `kernel` is the attention of the real device as the plan has it, and `gloo` says whether its collectives are gloo's;
    `shape` and `teachers` are as in
    `plan.search.best`. No process group may exist. Raises `UserError` where recipe and model do not go together.
    """
    began = time.monotonic()
    tokens, longest = recipe.training.micro_batch_tokens, recipe.data.max_length
    assert tokens != "auto", "the recipe must be resolved first"
    device = SimulatedDevice(kernel)
    with (
        simulated_group(processes) as world,
        _placed_already(),
        _without_traces(),
        hollow_operators(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of packages, about arguments and tensors that are not what they seem
        model = make_student(recipe, shape, device)
        teaching_models = make_teachers(recipe, teachers, device)
        batch = flat_batch(tokens, longest)
        with HollowTensors() as hollow, LiveTensors() as live, GlooCopies() if gloo else nullcontext():
            live.mark("build")
            for made in (model, *filter(None, teaching_models)):
                hollow_parameters(made, hollow.fake)
            strategy = make_strategy(recipe, HOST, world)
            strategy.build(
                lambda: model, lambda named: make_optimizer(recipe.optimizer, named, fused=device.fused_adamw)
            )
            answer_reducer(cast(ModuleStrategy, strategy).module)
            teaching = make_teaching(recipe, teaching_models, model, strategy, world)
            objective = make_objective(recipe.objective, teaching)
            step = partial(live_step, strategy, model, live, objective)
            step([batch], max_grad_norm=recipe.training.max_grad_norm)
            before = len(live.moments)
            step([batch] * min(2, micro_batches), max_grad_norm=recipe.training.max_grad_norm)
            timeline = tuple(live.moments[before:])
        highest = max(timeline, key=lambda moment: moment.peak_bytes)
        alive = tuple(live.alive_at(highest.peak_time))
    return Simulation(highest.peak_bytes, highest.name, timeline, alive, time.monotonic() - began)


def live_step(
    strategy: Strategy,
    model: LanguageModel,
    live: LiveTensors,
    objective: Objective,
    micro_batches: Sequence[Batch],
    *,
    max_grad_norm: float | None,
) -> None:
    """One step of a built `strategy` over `model`, with marks in `live`: step, each layer forward and backward, head,
    optimizer, end."""
    units: dict[nn.Module, str] = {layer: f"layer {i}" for i, layer in enumerate(model.decoder_layers())}
    units[model.head] = "head"
    live.mark("start")
    with live.watching(model, units):
        strategy.forward_backward(micro_batches, objective, sum(int(b.labels.ne(IGNORED).sum()) for b in micro_batches))
    live.mark("optimizer")
    strategy.optimizer_step(1e-5, max_grad_norm)
    live.mark("end")


def flat_batch(tokens: int, longest: int) -> Batch:
    """`tokens` tokens in documents of `longest`, the last one shorter."""
    documents = []
    for start in range(0, tokens, longest):
        document = torch.ones(min(longest, tokens - start), dtype=torch.int64)
        documents.append((document, document))
    return Batch.of(documents)


@contextmanager
def _placed_already() -> Iterator[None]:
    """Inside, `Module.to` changes nothing: strategies make parameters where and as they are to be, and fake ones cannot
    be exchanged in place."""
    move = nn.Module.to
    setattr(nn.Module, "to", lambda module, *where, **how: module)  # noqa: B010
    try:
        yield
    finally:
        setattr(nn.Module, "to", move)  # noqa: B010


@contextmanager
def _without_traces() -> Iterator[None]:
    """A table of values that is kept for the whole process is made of zeros inside, and forgotten afterwards."""
    try:
        yield
    finally:
        dynamic_map.cache_clear()
