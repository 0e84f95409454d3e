"""A run put together: the place where model, data, strategy, objective and hooks meet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from understudy.contracts import Objective, Strategy
from understudy.data.batching import TrainingData
from understudy.data.cache import TokenCache
from understudy.devices.device import Device
from understudy.launch.pulses import SAVING, TRAINING
from understudy.launch.run_directory import RunDirectory
from understudy.models.isolation import check_isolation
from understudy.models.tokenizer import load_tokenizer
from understudy.objectives.registry import make_objective
from understudy.optim.optimizers.registry import make_optimizer
from understudy.optim.schedules import make_schedule
from understudy.parallel.world import World
from understudy.recipe.schema import Recipe
from understudy.strategies.precision import precision_of
from understudy.strategies.registry import make_strategy
from understudy.training.adapting import Adapted
from understudy.training.asking import AskedData, Asking, make_asking
from understudy.training.checkpoint_setup import make_checkpoint_hook, restore, run_model
from understudy.training.companions import Companions, make_companions
from understudy.training.console import Console
from understudy.training.divergence import DivergenceGuard, allowed_non_finite_steps
from understudy.training.evaluation import EvaluationHook, Evaluator
from understudy.training.failure import NotedData, StepNote
from understudy.training.final_model import Trained, save_final_model
from understudy.training.headway import Headway, MarkedObjective
from understudy.training.hooks import Hook, HookList, interval_steps
from understudy.training.job import Job
from understudy.training.loop import train
from understudy.training.memory_line import memory_line
from understudy.training.metrics import MetricsHook
from understudy.training.on_policy import with_own_answers
from understudy.training.seeding import SeedHook
from understudy.training.sinks.registry import RunFacts, Sink, make_sinks
from understudy.training.stopping import StopHook, StopRequest
from understudy.training.teaching import make_teaching

__all__ = ["train_and_save", "training_data"]


def train_and_save(
    job: Job,
    device: Device,
    torch_device: torch.device,
    world: World,
    console: Console,
    note: StepNote,
    headway: Headway,
    stop: StopRequest,
) -> Trained:
    """From the weights that `job` begins with to the final model, which is written but not proved. Every process of
    `world` must call it; `note`, `headway` and `stop` are told, or asked, as it gets on."""
    recipe, directory = job.recipe, RunDirectory(job.run_directory)
    torch.use_deterministic_algorithms(recipe.training.deterministic)
    adapted = run_model(job)
    model, form = adapted.model, adapted.form
    # Copies: strategies move and replace the module's own. An adapter is saved without its base's.
    kept = model.persistent_buffers() if form.keeps_buffers else {}
    buffers = {name: buffer.clone() for name, buffer in kept.items()}
    strategy = _loaded_strategy(job, adapted, device, torch_device, world)
    if (held := strategy.held_bytes()).frozen:
        console.say(f"each process holds {held.frozen:,} bytes of frozen weights, and {held.trained:,} of trained ones")
    state = restore(job, strategy)
    tokenizer = load_tokenizer(
        job.tokenizer_directory, recipe.data.chat_template, trust_remote_code=recipe.model.trust_remote_code
    )
    cache = TokenCache.open(job.train)
    companions = make_companions(job.model_directory, recipe.model, tokenizer, cache, job.adapter_directory)
    data = training_data(recipe, cache, model.config.get_text_config().hidden_size, world.rank, world.size)
    teaching = make_teaching(recipe, job.teachers, model, strategy, torch_device, world, console.say)
    if teaching is not None and teaching.held_bytes:
        held = strategy.held_bytes()
        console.say(
            f"each process holds {teaching.held_bytes:,} bytes of the teacher's weights beside "
            f"{held.frozen + held.trained:,} of the student's"
        )
    asking = make_asking(teaching, stop)
    precision, architecture = precision_of(recipe.training.precision), type(model.network).__name__
    with _sinks(recipe, RunFacts(directory, console, data.total_steps, state.step), world) as sinks:
        objective = MarkedObjective(make_objective(recipe.objective, teaching), headway)
        evaluation = _evaluation(
            job, strategy, objective, companions, world, data.total_steps, sinks, asking, note, headway
        )
        hooks = _hooks(
            recipe, device, world, note, headway, sinks, data.total_steps, evaluation, job.memory_predicted_bytes
        )
        if job.checkpoints:
            hook = make_checkpoint_hook(
                job,
                strategy,
                world,
                form=form,
                buffers=buffers,
                write_companions=partial(companions.write, architecture=architecture, dtype=precision.weights),
                data_digest=cache.digest,
                total_steps=data.total_steps,
                evaluation=evaluation,
                stop=stop,
                say=console.say,
                mark=headway.mark,
            )
            hooks.append(hook)
        else:
            hooks.append(StopHook(stop))
        device.reset_memory_peak()
        steps = with_own_answers(
            recipe,
            data,
            cache,
            strategy,
            stops=companions.stops,
            document_limit=model.document_limit,
            world=world,
            stop=stop,
            mark=headway.mark,
        )
        headway.begin(TRAINING)
        train(
            state,
            total_steps=data.total_steps,
            data=NotedData(steps if asking is None else AskedData(steps, asking, data.total_steps), note),
            strategy=strategy,
            objective=objective,
            schedule=make_schedule(
                recipe.schedule,
                peak=recipe.optimizer.learning_rate,
                total_steps=data.total_steps,
                steps_per_epoch=data.steps_per_epoch,
            ),
            max_grad_norm=recipe.training.max_grad_norm,
            hooks=HookList(hooks),
        )
        headway.begin(SAVING)
    if line := memory_line(job.memory_predicted_bytes, device.memory_peak_bytes()):
        console.say(line)
    return save_final_model(
        job,
        strategy,
        world,
        cache,
        form=form,
        buffers=buffers,
        write_companions=partial(companions.write, architecture=architecture, dtype=precision.compute),
        tokenizer=tokenizer,
    )


def _loaded_strategy(job: Job, adapted: Adapted, device: Device, torch_device: torch.device, world: World) -> Strategy:
    recipe, model = job.recipe, adapted.model
    if recipe.training.activation_checkpointing in ("full", "selective"):
        model.enable_activation_checkpointing(recipe.training.activation_checkpointing)
    if recipe.training.compile:
        model.compile_layers()
    strategy = make_strategy(recipe, torch_device, world)
    with job.sources.placing("strategy"):
        strategy.build(lambda: model, lambda named: make_optimizer(recipe.optimizer, named, fused=device.fused_adamw))
    strategy.load_state(adapted.read)
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
    job: Job,
    strategy: Strategy,
    objective: Objective,
    companions: Companions,
    world: World,
    total_steps: int,
    sinks: Sequence[Sink],
    asking: Asking | None,
    note: StepNote,
    headway: Headway,
) -> EvaluationHook | None:
    if job.evaluation is None:
        return None
    recipe = job.recipe
    assert recipe.training.micro_batch_tokens != "auto", "the recipe must be resolved first"
    evaluator = Evaluator(
        cache=TokenCache.open(job.evaluation),
        strategy=strategy,
        objective=objective,
        tokenizer=companions.tokenizer,
        stops=companions.stops,
        world=world,
        micro_batch_tokens=recipe.training.micro_batch_tokens,
        max_length=recipe.data.max_length,
        max_batches=recipe.evaluation.max_batches,
        samples=recipe.evaluation.samples,
        asking=asking,
        given=note.given,
        mark=headway.mark,
    )
    return EvaluationHook(evaluator, interval_steps(recipe.evaluation.every, total_steps), sinks)


def _hooks(
    recipe: Recipe,
    device: Device,
    world: World,
    note: StepNote,
    headway: Headway,
    sinks: Sequence[Sink],
    total_steps: int,
    evaluation: EvaluationHook | None,
    memory_predicted_bytes: int | None,
) -> list[Hook]:
    """Metrics come before the guard, so that the step that ends a run is logged."""
    every = recipe.logging.every
    return [
        note,
        headway,
        SeedHook(device.seed, recipe.training.seed, world.rank),
        MetricsHook(
            sinks,
            every=every,
            total_steps=total_steps,
            memory_peak_bytes=device.memory_peak_bytes,
            memory_predicted_bytes=memory_predicted_bytes,
        ),
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
