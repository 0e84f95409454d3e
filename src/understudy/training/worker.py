"""One process of a run, put together: the place where every part meets. `python -m understudy.training.worker DIR`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from understudy.checkpoint.export import save_model
from understudy.contracts import Strategy
from understudy.data.batching import TrainingData
from understudy.data.cache import TokenCache
from understudy.devices.device import Device, find_device
from understudy.launch.cause import Cause, write_cause
from understudy.launch.parent import die_with_parent
from understudy.launch.run_directory import RunDirectory
from understudy.models.build import make_language_model, open_weights
from understudy.models.isolation import check_isolation
from understudy.models.language_model import LanguageModel
from understudy.models.tokenizer import load_tokenizer
from understudy.objectives.registry import make_objective
from understudy.optim.optimizers.registry import make_optimizer
from understudy.optim.schedules import make_schedule
from understudy.parallel.world import World, process_group
from understudy.recipe.environment import (
    ProcessEnvironment,
    console_descriptor,
    launcher_process,
    process_environment,
)
from understudy.recipe.schema import Recipe
from understudy.strategies.precision import precision_of
from understudy.strategies.registry import make_strategy
from understudy.training.companions import Companions, make_companions
from understudy.training.console import Console, open_console, silent_console
from understudy.training.divergence import DivergenceGuard, allowed_non_finite_steps
from understudy.training.evaluation import EvaluationHook, Evaluator, interval_steps
from understudy.training.failure import StepNote, ending_on_failure
from understudy.training.hooks import Hook, HookList, TrainingState
from understudy.training.job import Job, read_job
from understudy.training.loop import train
from understudy.training.metrics import MetricsHook
from understudy.training.proof import prove_model, trained_logits
from understudy.training.seeding import SeedHook
from understudy.training.sinks.registry import Row, RunFacts, Sink, make_sinks

__all__ = ["main", "run_worker", "training_data"]

PROOF_DOCUMENTS = 2
PROOF_TOKENS = 48


@dataclass(frozen=True)
class Trained:
    """What is left of training once the process group is gone."""

    evaluation: Row
    """The last evaluation row; empty without evaluation data."""
    documents: Sequence[Tensor]
    logits: Tensor
    """The trained model's, at every token of `documents`."""
    tokenizer: Any


def main() -> None:
    """Entry point of the processes that our own launcher starts."""
    if (launcher := launcher_process()) is not None:
        die_with_parent(launcher)
    job = read_job(RunDirectory(Path(sys.argv[1])).job)
    environment = process_environment()
    assert environment is not None, "a launcher sets RANK and WORLD_SIZE"
    descriptor = console_descriptor()
    console = silent_console() if descriptor is None else open_console(descriptor)
    cause_file = RunDirectory(job.run_directory).cause(environment.rank)
    run_worker(job, environment, console, report=partial(write_cause, cause_file))


def run_worker(
    job: Job,
    environment: ProcessEnvironment,
    console: Console,
    *,
    report: Callable[[Cause], None],
    entered: Callable[[], None] = lambda: None,
) -> None:
    """Trains, evaluates, saves and proves, as one of `environment.world_size` processes.

    `entered` is called once all processes have met, and has returned on all before any goes on. On a failure the
    process ends with the failure's exit status; `report` is given its cause first.
    """
    directory = RunDirectory(job.run_directory)
    note = StepNote()
    with ending_on_failure(environment.rank, note, report):
        device = find_device()
        torch_device = device.torch_device(environment.local_rank)
        with (
            process_group(environment, torch_device, device.backend) as world,
            ending_on_failure(environment.rank, note, report),
        ):
            entered()
            dist.barrier()
            trained = _train_and_save(job, device, torch_device, world, console, note)
        if environment.rank == 0:
            _prove(job, directory, trained, console)


def _train_and_save(
    job: Job, device: Device, torch_device: torch.device, world: World, console: Console, note: StepNote
) -> Trained:
    recipe, directory = job.recipe, RunDirectory(job.run_directory)
    torch.use_deterministic_algorithms(recipe.training.deterministic)
    model = make_language_model(job.model_directory, recipe.model, device)
    # Copies: strategies move and replace the module's own.
    buffers = {name: buffer.clone() for name, buffer in model.persistent_buffers().items()}
    strategy = _loaded_strategy(job, model, device, torch_device, world)
    tokenizer = load_tokenizer(
        job.tokenizer_directory, recipe.data.chat_template, trust_remote_code=recipe.model.trust_remote_code
    )
    cache = TokenCache.open(job.train)
    companions = make_companions(job.model_directory, recipe.model, tokenizer, cache)
    data = training_data(recipe, cache, model.config.get_text_config().hidden_size, world.rank, world.size)
    facts = RunFacts(directory, console, data.total_steps)
    with _sinks(recipe, facts, world) as sinks:
        evaluation = _evaluation(job, strategy, companions, world, data.total_steps, sinks)
        device.reset_memory_peak()
        train(
            TrainingState(),
            total_steps=data.total_steps,
            data=data,
            strategy=strategy,
            objective=make_objective(recipe.objective),
            schedule=make_schedule(
                recipe.schedule,
                peak=recipe.optimizer.learning_rate,
                total_steps=data.total_steps,
                steps_per_epoch=data.steps_per_epoch,
            ),
            max_grad_norm=recipe.training.max_grad_norm,
            hooks=HookList(_hooks(recipe, device, world, note, sinks, data.total_steps, evaluation)),
        )
    documents = _proof_documents(cache)
    logits = trained_logits(strategy, documents)
    _save(job, strategy, model, companions, world, buffers)
    return Trained(evaluation.last if evaluation else {}, documents, logits, tokenizer)


def _loaded_strategy(
    job: Job, model: LanguageModel, device: Device, torch_device: torch.device, world: World
) -> Strategy:
    recipe = job.recipe
    weights = open_weights(job.model_directory, model)
    if recipe.training.activation_checkpointing in ("full", "selective"):
        model.enable_activation_checkpointing(recipe.training.activation_checkpointing)
    if recipe.training.compile:
        model.compile_layers()
    strategy = make_strategy(recipe, torch_device, world)
    with job.sources.placing("strategy"):
        strategy.build(lambda: model, lambda named: make_optimizer(recipe.optimizer, named, fused=device.fused_adamw))
    strategy.load_state(weights)
    compute = precision_of(recipe.training.precision).compute
    with job.sources.placing("model.path" if recipe.model.path else "model"):
        check_isolation(strategy.logits, model.config.get_text_config().vocab_size, torch_device, compute)
    return strategy


def training_data(recipe: Recipe, cache: TokenCache, hidden_width: int, rank: int, world_size: int) -> TrainingData:
    """The training set of a resolved recipe as steps."""
    assert recipe.training.micro_batch_tokens != "auto", "the recipe must be resolved first"
    return TrainingData(
        cache,
        seed=recipe.training.seed,
        global_batch_size=recipe.training.global_batch_size,
        micro_batch_tokens=recipe.training.micro_batch_tokens,
        epochs=recipe.training.epochs,
        max_steps=recipe.training.max_steps,
        rank=rank,
        world_size=world_size,
        weights=[source.weight for source in recipe.data.train],
        attention_cost=1 / (12 * hidden_width),
    )


def _evaluation(
    job: Job, strategy: Strategy, companions: Companions, world: World, total_steps: int, sinks: Sequence[Sink]
) -> EvaluationHook | None:
    if job.evaluation is None:
        return None
    recipe = job.recipe
    assert recipe.training.micro_batch_tokens != "auto", "the recipe must be resolved first"
    evaluator = Evaluator(
        cache=TokenCache.open(job.evaluation),
        strategy=strategy,
        objective=make_objective(recipe.objective),
        tokenizer=companions.tokenizer,
        stops=companions.stops,
        world=world,
        micro_batch_tokens=recipe.training.micro_batch_tokens,
        max_length=recipe.data.max_length,
        max_batches=recipe.evaluation.max_batches,
        samples=recipe.evaluation.samples,
    )
    return EvaluationHook(evaluator, interval_steps(recipe.evaluation.every, total_steps), sinks)


def _hooks(
    recipe: Recipe,
    device: Device,
    world: World,
    note: StepNote,
    sinks: Sequence[Sink],
    total_steps: int,
    evaluation: EvaluationHook | None,
) -> list[Hook]:
    """Metrics come before the guard, so that the step that ends a run is logged."""
    every = recipe.logging.every
    return [
        note,
        SeedHook(device.seed, recipe.training.seed, world.rank),
        MetricsHook(sinks, every=every, total_steps=total_steps, memory_peak_bytes=device.memory_peak_bytes),
        DivergenceGuard(allowed_non_finite_steps(recipe.training.precision), every),
        *([evaluation] if evaluation else []),
    ]


@contextmanager
def _sinks(recipe: Recipe, facts: RunFacts, world: World) -> Iterator[list[Sink]]:
    sinks = make_sinks(recipe.logging.sinks, facts) if world.rank == 0 else []
    try:
        yield sinks
    finally:
        for sink in sinks:
            sink.close()


def _proof_documents(cache: TokenCache) -> list[Tensor]:
    count = min(PROOF_DOCUMENTS, len(cache.lengths))
    return [torch.from_numpy(cache.tokens(i)[:PROOF_TOKENS].astype("int64")) for i in range(count)]


def _save(
    job: Job,
    strategy: Strategy,
    model: LanguageModel,
    companions: Companions,
    world: World,
    buffers: Mapping[str, Tensor],
) -> None:
    dtype = precision_of(job.recipe.training.precision).compute
    save_model(
        strategy,
        RunDirectory(job.run_directory).unproven_model,
        rank=world.rank,
        world_size=world.size,
        dtype=dtype,
        buffers=buffers,
        write_companions=partial(companions.write, architecture=type(model.network).__name__, dtype=dtype),
    )


def _prove(job: Job, directory: RunDirectory, trained: Trained, console: Console) -> None:
    """Nobody waits for this in a collective. The model gets its name once it is proved."""
    proof = prove_model(
        directory.unproven_model,
        documents=trained.documents,
        expected=trained.logits,
        dtype=precision_of(job.recipe.training.precision).compute,
        tokenizer=trained.tokenizer,
        trust_remote_code=job.recipe.model.trust_remote_code,
    )
    directory.unproven_model.rename(directory.model)
    console.say(
        f"model: {directory.model}\n"
        f"reloaded with transformers: logits differ from the trained model's by at most {proof.difference:.1e} of the "
        f"largest, over {proof.tokens} tokens ({proof.tolerance:.0e} allowed)"
    )


if __name__ == "__main__":
    main()
