"""Checkpoints of a running job: copied to host memory, written behind the training loop's back, never silently lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from shutil import disk_usage
from threading import Thread

import torch.distributed as dist
from torch import Tensor

from understudy.checkpoint.form import Form
from understudy.checkpoint.progress import Progress
from understudy.checkpoint.saving import CheckpointPlan, Tensors, commit_checkpoint, full_disk, write_part
from understudy.checkpoint.store import CheckpointStore
from understudy.contracts import Strategy
from understudy.errors import UserError

__all__ = ["CheckpointSaver", "SaveSettings"]


@dataclass(frozen=True)
class SaveSettings:
    """What every checkpoint of a run has in common."""

    store: CheckpointStore
    keep: int
    keep_best: bool
    background: bool
    form: Form
    """Of the weights."""
    buffers: Mapping[str, Tensor]
    """Persistent buffers of the model."""
    write_companions: Callable[[Path], None]
    """Writes configuration and tokenizer into a model directory."""
    token: str
    """Of this attempt at the run."""
    still_ours: Callable[[], bool]
    """Whether the run directory is still this run's."""
    mark: Callable[[], None] = lambda: None
    """Called for each tensor that is written."""


class CheckpointSaver:
    """Saves the state of `strategy`. `save` and `wait` are collectives; one save is under way at a time.

    In the background, `save` returns once this rank's share is copied to host memory, its share only, and a thread
    writes it; else `save` streams to the disk, one tensor in memory at a time.
    """

    def __init__(self, strategy: Strategy, settings: SaveSettings, rank: int, world_size: int) -> None:
        self._strategy = strategy
        self._settings = settings
        self._rank = rank
        self._world_size = world_size
        self._thread: Thread | None = None
        self._failure: Exception | None = None
        self._committed: list[Path] = []

    def save(self, progress: Progress) -> None:
        """Begins the checkpoint of `progress`, after the one before is committed. Raises what that failed with."""
        self.wait()
        plan = CheckpointPlan.of(self._strategy, self._settings.form, self._world_size)
        store = self._settings.store
        partial = store.partial(progress.step, self._settings.token)
        if self._rank == 0:
            store.begin(partial)
            self._require_space(plan.needed_bytes)
        dist.barrier()
        if not partial.is_dir():
            raise UserError(
                "is on another disk than rank 0's of that name: hosts write one checkpoint together; choose an "
                "output_dir that all of them share.",
                file=store.directory,
            )
        weights: Tensors = self._strategy.state(plan.model.owner)
        optimizer_state: Tensors = chain(
            self._strategy.optimizer_state(plan.optimizer.owners.__getitem__),
            self._strategy.state(plan.optimizer.owner),  # of what trains beside the model
        )
        if not self._settings.background:
            self._write(plan, partial, progress, weights, optimizer_state)
            dist.barrier()
            return
        weights, optimizer_state = _copied(weights), _copied(optimizer_state)
        self._thread = Thread(
            target=self._write_noting_failure,
            args=(plan, partial, progress, weights, optimizer_state),
            name=f"checkpoint-{progress.step}",
            daemon=True,  # a process that fails does not wait for it
        )
        self._thread.start()

    def check(self) -> list[Path]:
        """Raises what the writer failed with, if it did. Returns the checkpoints committed since the last call; on rank
        0 only, which commits."""
        if self._failure is not None:
            raise self._failure
        committed, self._committed = self._committed, []
        return committed

    def wait(self) -> None:
        """Until the checkpoint under way is committed, on all ranks. Raises what this rank's writer failed with."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._failure is not None:
                raise self._failure
            dist.barrier()

    def _require_space(self, needed_bytes: int) -> None:
        directory = self._settings.store.directory
        if disk_usage(directory).free < needed_bytes:
            raise full_disk(directory, needed_bytes)

    def _write_noting_failure(
        self, plan: CheckpointPlan, partial: Path, progress: Progress, weights: Tensors, optimizer_state: Tensors
    ) -> None:
        try:
            self._write(plan, partial, progress, weights, optimizer_state)
        # Nothing is hidden: the loop raises it at the end of its step.
        except Exception as error:  # noqa: BLE001
            self._failure = error

    def _write(
        self, plan: CheckpointPlan, partial: Path, progress: Progress, weights: Tensors, optimizer_state: Tensors
    ) -> None:
        settings = self._settings
        weights, optimizer_state = _marked(weights, settings.mark), _marked(optimizer_state, settings.mark)
        write_part(plan, partial, self._rank, weights, optimizer_state, settings.buffers)
        if self._rank == 0:
            committed = commit_checkpoint(
                plan,
                settings.store,
                partial,
                self._world_size,
                progress,
                settings.buffers,
                settings.write_companions,
                settings.still_ours,
            )
            self._committed.append(committed)
            settings.store.retain(settings.keep, best=settings.keep_best)


def _copied(tensors: Tensors) -> Tensors:
    return [(name, tensor.to("cpu", copy=True)) for name, tensor in tensors]


def _marked(tensors: Tensors, mark: Callable[[], None]) -> Tensors:
    for named in tensors:
        yield named
        mark()
