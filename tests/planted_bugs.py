"""Bugs that checkpoints could have, each a switch: while it is on, the product has the bug.

Nothing in the product knows of them. A bug stays until its context is left.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor

from understudy.checkpoint import manifest, saver, saving, store
from understudy.checkpoint.manifest import MANIFEST, FileEntry
from understudy.checkpoint.saver import CheckpointSaver
from understudy.checkpoint.shards import Shards
from understudy.checkpoint.store import CheckpointStore
from understudy.contracts import LazyTensor
from understudy.data.order import EpochOrder
from understudy.strategies.torch_native import TorchStrategy
from understudy.training import checkpoint_setup, loop
from understudy.training.hooks import TrainingState
from understudy.training.seeding import SeedHook, step_seed

__all__ = ["PLANTED_BUGS", "Check", "PlantedBug"]

Check = Literal["crash", "completeness", "failed writer", "resume", "resume in fp16"]
Stored = Mapping[str, Mapping[str, LazyTensor]]


@dataclass(frozen=True)
class PlantedBug:
    plant: Callable[[], AbstractContextManager[object]]
    caught_by: Check
    says: str
    """A regular expression: what the check's report must name."""


def _does_nothing(*arguments: object, **named: object) -> None:
    return None


@contextmanager
def _marker_before_manifest() -> Iterator[None]:
    listed: dict[Path, Mapping[str, FileEntry]] = {}

    def note(directory: Path, files: Mapping[str, FileEntry]) -> None:
        listed[directory] = dict(files)

    def write_both(directory: Path) -> None:
        with tempfile.TemporaryDirectory() as elsewhere:
            manifest.write_manifest(Path(elsewhere), listed[directory])
            manifest.write_marker(Path(elsewhere))
            shutil.copy(Path(elsewhere) / manifest.MARKER, directory)
            shutil.copy(Path(elsewhere) / MANIFEST, directory)

    with patch.object(saving, "write_manifest", note), patch.object(saving, "write_marker", write_both):
        yield


@contextmanager
def _renamed_before_marker() -> Iterator[None]:
    commit = CheckpointStore.commit

    def commit_and_mark(self: CheckpointStore, partial: Path, step: int) -> Path:
        final = commit(self, partial, step)
        manifest.write_marker(final)
        return final

    with (
        patch.object(saving, "write_marker", _does_nothing),
        patch.object(CheckpointStore, "commit", commit_and_mark),
    ):
        yield


@contextmanager
def _retention_before_commit(room_for: int) -> Iterator[None]:
    """Before a commit all but the newest `keep - room_for` are removed, and nothing after it."""
    retain, write = CheckpointStore.retain, CheckpointSaver._write

    def retain_and_write(self: CheckpointSaver, *arguments: Any) -> None:
        settings = self._settings
        retain(settings.store, settings.keep - room_for, best=settings.keep_best)
        write(self, *arguments)

    with (
        patch.object(CheckpointStore, "retain", _does_nothing),
        patch.object(CheckpointSaver, "_write", retain_and_write),
    ):
        yield


@contextmanager
def _saved_step_off_by_one() -> Iterator[None]:
    progress_of = checkpoint_setup._progress_of

    def one_less(*arguments: Any) -> Any:
        progress = progress_of(*arguments)
        return lambda state, loss: replace(progress(state, loss), step=state.step - 1)

    with patch.object(checkpoint_setup, "_progress_of", one_less):
        yield


@contextmanager
def _restored(changed: Callable[[TrainingState], TrainingState]) -> Iterator[None]:
    restore = checkpoint_setup.restore

    def restore_changed(job: Any, strategy: Any) -> TrainingState:
        state = restore(job, strategy)
        return state if job.resume is None else changed(state)

    with patch.object(checkpoint_setup, "restore", restore_changed):
        yield


@contextmanager
def _epoch_seed_lost() -> Iterator[None]:
    """Epochs are counted from the start of the process."""
    epoch_order = EpochOrder.epoch

    def epoch(self: EpochOrder, epoch: int) -> Any:
        return epoch_order(self, epoch - vars(self).setdefault("_first_asked", epoch))

    with patch.object(EpochOrder, "epoch", epoch):
        yield


@contextmanager
def _seeded_once() -> Iterator[None]:
    """Random draws go on from the start of the process, as if a generator's state were to be saved."""

    def start(self: SeedHook, state: TrainingState) -> None:
        self._seed_device(step_seed(self._seed, 0, self._rank))

    with patch.object(SeedHook, "start", start), patch.object(SeedHook, "before_step", _does_nothing):
        yield


@contextmanager
def _stored_changed(changed: Callable[[dict[str, dict[str, LazyTensor]]], None]) -> Iterator[None]:
    read = checkpoint_setup.open_optimizer_state

    def read_changed(checkpoint: Path) -> Stored:
        stored = {name: dict(kept) for name, kept in read(checkpoint).items()}
        changed(stored)
        return stored

    with patch.object(checkpoint_setup, "open_optimizer_state", read_changed):
        yield


def _swap_moments(stored: dict[str, dict[str, LazyTensor]]) -> None:
    kept = stored["transformer.wpe.weight"]
    kept["exp_avg"], kept["exp_avg_sq"] = kept["exp_avg_sq"], kept["exp_avg"]


def _swap_parameters(stored: dict[str, dict[str, LazyTensor]]) -> None:
    one, other = "transformer.h.0.ln_1.weight", "transformer.h.0.ln_2.weight"
    stored[one]["exp_avg"], stored[other]["exp_avg"] = stored[other]["exp_avg"], stored[one]["exp_avg"]


def _restart_counts(stored: dict[str, dict[str, LazyTensor]]) -> None:
    for kept in stored.values():
        kept["step"] = torch.zeros(())


@contextmanager
def _shard_missing() -> Iterator[None]:
    write = Shards.write

    def write_unless_second(self: Shards, directory: Path, rank: int, *tensors: Any) -> dict[str, FileEntry]:
        return {} if rank == 1 else write(self, directory, rank, *tensors)

    with patch.object(Shards, "write", write_unless_second):
        yield


@contextmanager
def _without_waiting() -> Iterator[None]:
    read = saving._parts

    def of_rank_0(partial: Path, world_size: int) -> dict[str, FileEntry]:
        return read(partial, 1)

    with patch.object(saving, "_parts", of_rank_0):
        yield


@contextmanager
def _learning_rate_restarted() -> Iterator[None]:
    train = loop.train

    def train_anew(state: TrainingState, *, schedule: Callable[[int], float], **named: Any) -> TrainingState:
        return train(state, schedule=lambda step: schedule(step - state.step), **named)

    with patch.object(loop, "train", train_anew):
        yield


@contextmanager
def _loss_scale_not_restored() -> Iterator[None]:
    read = checkpoint_setup.read_progress

    def without_scale(checkpoint: Path) -> Any:
        return replace(read(checkpoint), loss_scale=None)

    with patch.object(checkpoint_setup, "read_progress", without_scale):
        yield


@contextmanager
def _rounded_weights() -> Iterator[None]:
    state = TorchStrategy.state

    def rounded(self: TorchStrategy, owner: Callable[[str], int]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in state(self, owner):
            yield name, tensor.bfloat16().to(tensor.dtype)

    # What is written only: the check looks at a strategy's state itself.
    save = CheckpointSaver.save

    def save_rounded(self: CheckpointSaver, progress: Any) -> None:
        with patch.object(TorchStrategy, "state", rounded):
            save(self, progress)

    with patch.object(CheckpointSaver, "save", save_rounded):
        yield


@contextmanager
def _failure_swallowed() -> Iterator[None]:
    def write_quietly(self: CheckpointSaver, *arguments: Any) -> None:
        with suppress(Exception):
            self._write(*arguments)

    with patch.object(CheckpointSaver, "_write_noting_failure", write_quietly):
        yield


def _patched(module: object, name: str, value: object) -> Callable[[], AbstractContextManager[object]]:
    return lambda: patch.object(module, name, value)


def _both(*bugs: Callable[[], AbstractContextManager[object]]) -> Callable[[], AbstractContextManager[object]]:
    @contextmanager
    def plant() -> Iterator[None]:
        with ExitStack() as stack:
            for bug in bugs:
                stack.enter_context(bug())
            yield

    return plant


def _shared(tensors: Sequence[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    return list(tensors)


UNVERIFIED_MARKER = "has a marker and does not verify"
NOTHING_LEFT = "was committed, and nothing is there"

PLANTED_BUGS: Mapping[str, PlantedBug] = {
    "no fsync before the marker": PlantedBug(_patched(saving, "sync_tree", _does_nothing), "crash", UNVERIFIED_MARKER),
    "no fsync of the manifest's name before the marker": PlantedBug(
        _patched(saving, "sync_directory", _does_nothing), "crash", UNVERIFIED_MARKER + ".*manifest.json"
    ),
    "no fsync of a checkpoint's name": PlantedBug(
        _patched(store, "sync_directory", _does_nothing), "crash", NOTHING_LEFT
    ),
    "no fsync at all": PlantedBug(
        _both(
            _patched(saving, "sync_tree", _does_nothing),
            _patched(saving, "sync_directory", _does_nothing),
            _patched(store, "sync_directory", _does_nothing),
        ),
        "crash",
        "has its name and does not verify",
    ),
    "marker before the manifest": PlantedBug(
        _marker_before_manifest, "crash", "killed.*" + UNVERIFIED_MARKER + ".*manifest.json"
    ),
    "renamed before the marker": PlantedBug(
        _renamed_before_marker, "crash", "killed.*has its name and does not verify.*COMMITTED"
    ),
    "retention before commit": PlantedBug(lambda: _retention_before_commit(1), "crash", "killed.*" + NOTHING_LEFT),
    "retention before commit, without making room": PlantedBug(
        lambda: _retention_before_commit(0), "crash", "with keep=1, there are .*step-00000020.*step-00000010"
    ),
    "one rank's shard missing": PlantedBug(_shard_missing, "completeness", "lacks model-00002-of-00002.safetensors"),
    "committed without waiting for another rank": PlantedBug(
        _without_waiting, "completeness", "did not wait for the part of rank 1"
    ),
    "failure of the writer swallowed": PlantedBug(_failure_swallowed, "failed writer", "did not tell"),
    "off-by-one in the step saved": PlantedBug(_saved_step_off_by_one, "resume", "on going on, .* is not what it was"),
    "off-by-one in the step restored": PlantedBug(
        lambda: _restored(lambda state: replace(state, step=state.step + 1)),
        "resume",
        r"steps \[4\] were never trained",
    ),
    "tokens counted from the resume": PlantedBug(
        lambda: _restored(lambda state: replace(state, tokens=0)), "resume", "the state is .*tokens=0"
    ),
    "epoch seed lost": PlantedBug(_epoch_seed_lost, "resume", "in step 6 the examples"),
    "step seed lost": PlantedBug(_seeded_once, "resume", "in step 4 the loss"),
    "moment of one parameter swapped": PlantedBug(
        lambda: _stored_changed(_swap_moments), "resume", r"on going on, transformer\.wpe\.weight\.exp_avg is not"
    ),
    "moments of two parameters swapped": PlantedBug(
        lambda: _stored_changed(_swap_parameters), "resume", r"on going on, transformer\.h\.0\.ln_1\.weight\.exp_avg is"
    ),
    "optimizer's step count restarted": PlantedBug(
        lambda: _stored_changed(_restart_counts), "resume", r"on going on, .*\.step is not"
    ),
    "learning rate restarted": PlantedBug(_learning_rate_restarted, "resume", "in step 4 the learning rate"),
    "tensors written while the next step changes them": PlantedBug(
        _patched(saver, "_copied", _shared), "resume", "lost after step 8: on going on, .*exp_avg is not what it was"
    ),
    "weights saved in lower precision": PlantedBug(
        _rounded_weights, "resume", r"on going on, transformer\.wte\.weight is not"
    ),
    "loss scale not restored": PlantedBug(_loss_scale_not_restored, "resume in fp16", "the loss scale is"),
}
