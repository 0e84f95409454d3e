"""Whether a run that stops and goes on is the run that never stopped, to the bit.

Every part is the one that `understudy train` has, put together as its worker does, in one process: data of more than
one epoch, dropout, a learning rate that changes each step, and a disk so slow that training overtakes the writer.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Condition
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from tests.tiny_data import cache_of
from understudy.checkpoint.saver import CheckpointSaver
from understudy.checkpoint.store import CheckpointStore
from understudy.contracts import LossScale, Strategy
from understudy.data.cache import TokenCache
from understudy.devices.cpu import CPU
from understudy.errors import StoppedError
from understudy.launch.run_claim import claim_run_directory
from understudy.objectives.registry import make_objective
from understudy.optim.optimizers.registry import make_optimizer
from understudy.optim.schedules import make_schedule
from understudy.parallel.world import World
from understudy.recipe.dump import dump_recipe
from understudy.recipe.schema import Recipe
from understudy.recipe.source_map import SourceMap
from understudy.strategies.registry import make_strategy
from understudy.training import checkpoint_setup, loop
from understudy.training.hooks import Hook, HookList, StepResult, TrainingState
from understudy.training.job import Job
from understudy.training.resume import choose_checkpoint
from understudy.training.run import training_data
from understudy.training.seeding import SeedHook
from understudy.training.stopping import StopRequest

__all__ = ["STEPS_PER_EPOCH", "TOTAL_STEPS", "resume_problems"]

VOCABULARY = 32
EXAMPLES, GLOBAL_BATCH, EPOCHS = 18, 4, 2
STEPS_PER_EPOCH, TOTAL_STEPS = 5, 10
GATE_SECONDS = 20.0
"""A test that goes wrong ends then."""
WORLD = World(rank=0, size=1, local_rank=0, local_size=1)
SOURCES = SourceMap("recipe.yaml", {})


class _LostError(Exception):
    """Stands for a process that dies."""


@dataclass(frozen=True)
class _Snapshot:
    """All that a run is after a step."""

    state: TrainingState
    tensors: Mapping[str, Tensor]
    loss_scale: LossScale | None


@dataclass
class _Course:
    """What a run did, whatever it was interrupted by. A step done again takes the place of the first time."""

    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    snapshots: dict[int, _Snapshot] = field(default_factory=dict)
    went_on_from: list[_Snapshot] = field(default_factory=list)


def resume_problems(
    scratch: Path, *, stops: Sequence[int] = (3, STEPS_PER_EPOCH, 7), lost: int | None = 8, precision: str = "fp32"
) -> list[str]:
    """What differs from the run that never stopped: in runs that are asked to stop in a step of `stops`, and in one
    that dies after step `lost`, with a checkpoint each three steps. A line each. A process group of one must exist."""
    scene = _Scene(scratch, precision)
    reference = scene.train("uninterrupted")
    if sorted(reference.rows) != list(range(1, TOTAL_STEPS + 1)):
        return [f"the uninterrupted run trained steps {sorted(reference.rows)}"]
    problems = []
    for step in stops:
        problems += [f"stopped in step {step}: {problem}" for problem in scene.compare(reference, step, lost=False)]
    if lost is not None:
        problems += [f"lost after step {lost}: {problem}" for problem in scene.compare(reference, lost, lost=True)]
    return problems


class _Scene:
    """A small model, its data and a recipe."""

    def __init__(self, root: Path, precision: str) -> None:
        self.root = root
        self.model = root / "model"
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(self.model)
        generator = torch.Generator().manual_seed(1)
        lengths = torch.randint(3, 12, (EXAMPLES,), generator=generator).tolist()
        self.cache: TokenCache = cache_of(
            root / "cache",
            [(torch.randint(1, VOCABULARY, (n,), generator=generator).tolist(), [1] * n) for n in lengths],
        )
        self.recipe_values: dict[str, Any] = {
            "name": "exact",
            "model": {"path": str(self.model)},
            "data": {"train": [{"path": "unused", "weight": 1.0}, {"path": "unused-too", "weight": 1.0}]},
            "strategy": "ddp",
            "optimizer": {"learning_rate": 1e-2},
            "schedule": {"kind": "cosine", "warmup_ratio": 0.2},
            "training": {
                "epochs": EPOCHS,
                "global_batch_size": GLOBAL_BATCH,
                "micro_batch_tokens": 24,
                "precision": precision,
                "activation_checkpointing": "none",
            },
            "checkpoint": {"every": 3, "keep": 1},
        }

    def compare(self, reference: _Course, step: int, *, lost: bool) -> Iterator[str]:
        """Trains with an interruption and goes on."""
        course = _Course()
        name = f"{'lost' if lost else 'stopped'}-{step}"
        for attempt in range(2):
            self.train(name, course, interrupt_at=None if attempt else step, lost=lost)
        yield from _differences(reference, course)

    def train(
        self, name: str, course: _Course | None = None, *, interrupt_at: int | None = None, lost: bool = False
    ) -> _Course:
        """One attempt at the run called `name`, put together as `training.start` and `training.run` do."""
        course = course or _Course()
        recipe = Recipe.model_validate({**self.recipe_values, "output_dir": str(self.root / name)})
        stop = StopRequest()
        with claim_run_directory(self.root / name, SOURCES, overwrite=False, resume="auto") as claim:
            store = CheckpointStore(claim.directory.checkpoints)
            found = choose_checkpoint(
                recipe,
                SOURCES,
                store,
                data_digest=self.cache.digest,
                total_steps=TOTAL_STEPS,
                begun_from=None,
                going_on=claim.may_go_on,
                say=lambda line: None,
            )
            if claim.may_go_on:
                claim.go_on(dump_recipe(recipe), 0 if found is None else found.progress.step)
                store.clean()
            else:
                claim.begin(dump_recipe(recipe))
            job = Job(
                recipe=recipe,
                sources=SOURCES,
                run_directory=claim.directory.path,
                model_directory=self.model,
                adapter_directory=None,
                tokenizer_directory=self.model,
                teachers=(),
                train=self.root / "cache",
                evaluation=None,
                resume=None if found is None else found.checkpoint,
                token=claim.token,
            )
            with stop.noting_signals():
                self._train(job, course, stop, interrupt_at=interrupt_at, lost=lost)
        return course

    def _train(self, job: Job, course: _Course, stop: StopRequest, *, interrupt_at: int | None, lost: bool) -> None:
        recipe = job.recipe
        adapted = checkpoint_setup.run_model(job)
        strategy = make_strategy(recipe, torch.device("cpu"), WORLD)
        strategy.build(lambda: adapted.model, lambda named: make_optimizer(recipe.optimizer, named, fused=True))
        strategy.load_state(adapted.read)
        state = checkpoint_setup.restore(job, strategy)
        if job.resume is not None:
            course.went_on_from.append(_snapshot(strategy, state))
        data = training_data(recipe, self.cache, 16, WORLD.rank, WORLD.size)
        interruption = _Lose(interrupt_at) if lost else _AskToStop(interrupt_at)
        disk = _SlowDisk()
        checkpoints = checkpoint_setup.make_checkpoint_hook(
            job,
            strategy,
            WORLD,
            form=adapted.form,
            buffers={},
            write_companions=lambda directory: None,
            data_digest=self.cache.digest,
            total_steps=data.total_steps,
            evaluation=None,
            stop=stop,
            say=lambda line: None,
            mark=lambda: None,
        )
        seeds = SeedHook(CPU().seed, recipe.training.seed, WORLD.rank)
        ledger = _Ledger(course, strategy)
        with disk.slow():
            try:
                loop.train(
                    state,
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
                    hooks=HookList([interruption, seeds, ledger, disk, checkpoints]),
                )
            except StoppedError:
                assert interrupt_at is not None
            except _LostError:
                disk.finish()  # else the next attempt would race with this one's writer


class _Ledger(Hook):
    def __init__(self, course: _Course, strategy: Strategy) -> None:
        self._course = course
        self._strategy = strategy

    def after_step(self, result: StepResult) -> None:
        self._course.rows[result.state.step] = {
            "examples": result.batch.examples,
            "learning rate": result.learning_rate.hex(),
            "loss": float(result.loss.loss).hex(),
            "gradient norm": float(result.grad_norm).hex(),
        }
        self._course.snapshots[result.state.step] = _snapshot(self._strategy, result.state)


class _SlowDisk(Hook):
    """Holds what is written in the background until training is a step ahead, or waits for it."""

    def __init__(self) -> None:
        self._condition = Condition()
        self._step = 0
        self._waited_for = False
        self._saver: CheckpointSaver | None = None

    def start(self, state: TrainingState) -> None:
        self._step = state.step

    def after_step(self, result: StepResult) -> None:
        with self._condition:
            self._step = result.state.step
            self._condition.notify_all()

    def finish(self) -> None:
        """Until what is being written is."""
        with self._condition:
            self._waited_for = True
            self._condition.notify_all()
        if self._saver is not None and self._saver._thread is not None:
            self._saver._thread.join()

    @contextmanager
    def slow(self) -> Iterator[None]:
        write, wait = CheckpointSaver._write, CheckpointSaver.wait

        def slow_write(saver: CheckpointSaver, plan: Any, partial: Any, progress: Any, *tensors: Any) -> None:
            with self._condition:
                self._condition.wait_for(lambda: self._step > progress.step or self._waited_for, GATE_SECONDS)
            write(saver, plan, partial, progress, *tensors)

        def hurried_wait(saver: CheckpointSaver) -> None:
            with self._condition:
                self._saver = saver
                self._waited_for = True
                self._condition.notify_all()
            wait(saver)
            self._waited_for = False

        with patch.object(CheckpointSaver, "_write", slow_write), patch.object(CheckpointSaver, "wait", hurried_wait):
            yield


class _AskToStop(Hook):
    """Asks in the step `step`, so that it is the last one."""

    def __init__(self, step: int | None) -> None:
        self._step = step

    def before_step(self, state: TrainingState) -> None:
        if self._step is not None and state.step == self._step - 1:
            signal.raise_signal(signal.SIGTERM)


class _Lose(Hook):
    """Dies when the step after `step` begins."""

    def __init__(self, step: int | None) -> None:
        self._step = step

    def before_step(self, state: TrainingState) -> None:
        if state.step == self._step:
            raise _LostError


def _snapshot(strategy: Strategy, state: TrainingState) -> _Snapshot:
    tensors = [*strategy.state(lambda name: 0), *strategy.optimizer_state(lambda name: 0)]
    return _Snapshot(state, {name: tensor.clone() for name, tensor in tensors}, strategy.loss_scale)


def _differences(reference: _Course, course: _Course) -> Iterator[str]:
    if not course.went_on_from:
        yield "there was nothing to go on from"
        return
    restored = course.went_on_from[0]
    at = restored.state.step
    if at not in reference.snapshots:
        yield f"it went on from step {at}"
        return
    yield from (f"on going on, {problem}" for problem in _snapshot_differences(reference.snapshots[at], restored))
    if missing := sorted(reference.rows.keys() - course.rows.keys()):
        yield f"steps {missing} were never trained"
    for step in sorted(reference.rows.keys() & course.rows.keys()):
        for key, value in reference.rows[step].items():
            if course.rows[step][key] != value:
                yield f"in step {step} the {key} is {course.rows[step][key]} instead of {value}"
    if TOTAL_STEPS in course.snapshots:
        last = _snapshot_differences(reference.snapshots[TOTAL_STEPS], course.snapshots[TOTAL_STEPS])
        yield from (f"at the end, {problem}" for problem in last)


def _snapshot_differences(expected: _Snapshot, found: _Snapshot) -> Iterator[str]:
    if expected.state != found.state:
        yield f"the state is {found.state} instead of {expected.state}"
    if expected.loss_scale != found.loss_scale:
        yield f"the loss scale is {found.loss_scale} instead of {expected.loss_scale}"
    if names := sorted(expected.tensors.keys() ^ found.tensors.keys()):
        yield f"{', '.join(names)} are only on one side"
    for name in sorted(expected.tensors.keys() & found.tensors.keys()):
        if not torch.equal(_bytes(expected.tensors[name]), _bytes(found.tensors[name])):
            yield f"{name} is not what it was"


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
