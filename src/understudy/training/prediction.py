"""What each process of a run takes at most by the plan, in the terms in which it is measured."""

from __future__ import annotations

from dataclasses import replace

from understudy.checkpoint.places import MODEL
from understudy.data.cache import TokenCache
from understudy.errors import UserError
from understudy.plan.estimate import Estimator
from understudy.plan.machine import Machine
from understudy.recipe.deepspeed_file import effective_deepspeed
from understudy.recipe.objectives import Distillation
from understudy.recipe.schema import FSDP, DeepSpeed, Strategy
from understudy.training.job import Job
from understudy.training.planning import find_shapes, hardware_here
from understudy.training.run import training_data

__all__ = ["predicted_bytes", "with_prediction"]

_STEPS = 100
"""So many steps' micro-batches are looked at: their sizes vary little over a run, and a run may have very many."""


def with_prediction(job: Job, machine: Machine) -> Job:
    """`job` with what the plan says of it; `machine` is like any of its hosts."""
    return replace(job, memory_predicted_bytes=predicted_bytes(job, machine))


def predicted_bytes(job: Job, machine: Machine) -> int | None:
    """Of a process of the resolved `job`, with micro-batches as large as its data make them; None where the planner
    does not know the model.

    On a device it is what the allocator holds, which is what is measured there: without the context of driver and
    kernels. On a processor it is the whole process as it is resident: with interpreter and libraries, what is offloaded
    to the host's memory, and the weights' file, which stays mapped.
    """
    recipe, processes = job.recipe, job.recipe.cluster.world_size
    strategy, training = recipe.strategy, recipe.training
    assert strategy != "auto", "the recipe must be resolved first"
    assert training.activation_checkpointing != "auto", "the recipe must be resolved first"
    # For memory it is all the same on how many hosts they are.
    hardware = replace(hardware_here(recipe, machine, None), devices_per_node=processes)
    try:
        shapes = find_shapes(recipe, job.sources)
        longest, tokens, micro_batches = _largest(job, shapes.student.sizes.hidden, processes)
        data = recipe.data.model_copy(update={"max_length": longest})
        estimator = Estimator(recipe.model_copy(update={"data": data}), hardware, shapes.student, shapes.teachers)
        estimate = estimator.at(strategy, training.activation_checkpointing, tokens, micro_batches)
    except UserError:  # a run that is not planned is not refused for that
        return None
    if hardware.accelerated:
        return estimate.peak.total_bytes - estimate.peak.breakdown["context"]
    return estimate.host_bytes // hardware.devices_per_node + _mapped_bytes(job, strategy, processes)


def _mapped_bytes(job: Job, strategy: Strategy, processes: int) -> int:
    """Of the weights' file, what a process has read."""
    directory = job.model_directory if job.resume is None or job.adapter_directory else job.resume / MODEL
    stored = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    sharded = isinstance(strategy, FSDP) or (
        isinstance(strategy, DeepSpeed) and effective_deepspeed(strategy).stage == 3
    )
    return stored // processes if sharded else stored


def _largest(job: Job, hidden: int, processes: int) -> tuple[int, int, int]:
    """Tokens of the longest example and of the largest micro-batch of any rank, and how many of these a step has."""
    recipe, cache = job.recipe, TokenCache.open(job.train)
    if isinstance(recipe.objective, Distillation) and recipe.objective.on_policy_fraction:
        # Answers of the student may be as long as examples may be at all.
        share = -(-recipe.training.global_batch_size // processes) * recipe.data.max_length
        tokens = recipe.training.micro_batch_tokens
        assert tokens != "auto", "the recipe must be resolved first"
        return recipe.data.max_length, min(tokens, share), -(-share // tokens)
    data = training_data(recipe, cache, hidden, rank=0, world_size=processes)
    sizes = [data.largest(step) for step in range(min(_STEPS, data.total_steps))]
    return int(cache.lengths.max()), max(tokens for tokens, _ in sizes), max(count for _, count in sizes)
