"""Writing one checkpoint, by all ranks at once: what each rank writes, and the commit."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage

from torch import Tensor

from understudy.checkpoint.durable import sync_directory, sync_tree, write_durably
from understudy.checkpoint.form import OPTIMIZER_STATE, Form
from understudy.checkpoint.manifest import FileEntry, describe_file, write_manifest, write_marker
from understudy.checkpoint.progress import STATE, Progress
from understudy.checkpoint.shards import Shards
from understudy.checkpoint.store import CheckpointStore
from understudy.contracts import Strategy
from understudy.errors import UnderstudyError, UserError, is_full_disk
from understudy.models.names import is_beside_model

__all__ = ["CheckpointPlan", "Tensors", "commit_checkpoint", "full_disk", "write_part"]

POLL_SECONDS = 0.02
SMALL_FILES_BYTES = 64 * 2**20
"""Room for what stands beside the tensors: tokenizer, configuration, lists."""
LONGEST_WAIT_SECONDS = 1800.0
"""For another rank's part: as long as a collective may take. A rank that died is noticed long before by its peers."""

Tensors = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class CheckpointPlan:
    """What goes where; the same on every rank."""

    model: Shards
    """Master weights, in their own dtype."""
    optimizer: Shards
    """Optimizer state, and the weights that train beside the model."""

    @staticmethod
    def of(strategy: Strategy, form: Form, world_size: int) -> CheckpointPlan:
        """Known without asking other ranks: layouts are the same on each."""
        weights = strategy.layout()
        beside = {name: spec for name, spec in weights.items() if is_beside_model(name)}
        return CheckpointPlan(
            Shards.of(form, weights, world_size),
            Shards.of(OPTIMIZER_STATE, {**strategy.optimizer_layout(), **beside}, world_size),
        )

    @property
    def num_bytes(self) -> int:
        return self.model.num_bytes + self.optimizer.num_bytes

    @property
    def needed_bytes(self) -> int:
        """What must be free on the disk."""
        return self.num_bytes + SMALL_FILES_BYTES


def write_part(
    plan: CheckpointPlan,
    partial: Path,
    rank: int,
    weights: Tensors,
    optimizer_state: Tensors,
    buffers: Mapping[str, Tensor],
) -> None:
    """Writes and syncs what `rank` owns, then its list of files, by which `commit_checkpoint` knows that it is done.

    `buffers` are the model's persistent buffers, rank 0's to write. Consuming the tensors may be a collective; the rest
    is not. On a full disk, the files begun are removed and the error names the path and the bytes needed.
    """
    mine = [(partial / "model", plan.model, weights, buffers if rank == 0 else {})]
    if plan.optimizer.layout:
        mine.append((partial / "optimizer", plan.optimizer, optimizer_state, {}))
    files: dict[str, FileEntry] = {}

    def remove_written() -> None:
        for name in files:
            (partial / name).unlink(missing_ok=True)

    with _full_disk_explained(plan, partial.parent, remove_written):
        for directory, shards, tensors, extra in mine:
            for name, entry in shards.write(directory, rank, tensors, extra).items():
                files[f"{directory.name}/{name}"] = entry
        part = _part(partial, rank)
        write_durably(part.with_suffix(".writing"), json.dumps(files).encode())
        part.with_suffix(".writing").rename(part)


def commit_checkpoint(
    plan: CheckpointPlan,
    store: CheckpointStore,
    partial: Path,
    world_size: int,
    progress: Progress,
    buffers: Mapping[str, Tensor],
    write_companions: Callable[[Path], None],
    still_ours: Callable[[], bool],
) -> Path:
    """Waits for every rank's part, adds the small files, and commits. One process calls it, after its own part.

    Everything is on the disk before the manifest, the manifest before the marker, and the marker before the checkpoint
    gets its name. `still_ours` is asked last, for another run may have taken the directory over meanwhile. On a full
    disk all that was written is removed and the error names the path and the bytes needed.
    """
    files = _parts(partial, world_size)
    with _full_disk_explained(plan, store.directory, lambda: store.discard(partial)):
        (partial / "parts").rmdir()
        write_companions(partial / "model")
        plan.model.write_index(partial / "model", buffers)
        write_durably(partial / STATE, progress.to_json())
        sync_tree(partial)
        for path in sorted(partial.rglob("*")):
            if path.is_file() and (name := path.relative_to(partial).as_posix()) not in files:
                files[name] = describe_file(path)
        write_manifest(partial, files)
        sync_directory(partial)
        write_marker(partial)
        sync_directory(partial)
        if not still_ours():
            raise UnderstudyError(f"{store.directory.parent} was taken over by another run; this one must not go on.")
        return store.commit(partial, progress.step)


def _parts(partial: Path, world_size: int) -> dict[str, FileEntry]:
    """Every rank's list of files, taken away as it is read."""
    files: dict[str, FileEntry] = {}
    deadline = time.monotonic() + LONGEST_WAIT_SECONDS
    for rank in range(world_size):
        part = _part(partial, rank)
        while not part.exists():
            if time.monotonic() > deadline:
                raise UnderstudyError(f"rank {rank} did not write its part of {partial.name}")
            time.sleep(POLL_SECONDS)
        files |= {name: FileEntry(*entry) for name, entry in json.loads(part.read_bytes()).items()}
        part.unlink()
    return files


def _part(partial: Path, rank: int) -> Path:
    return partial / "parts" / f"rank-{rank:05}.json"


@contextmanager
def _full_disk_explained(plan: CheckpointPlan, directory: Path, make_room: Callable[[], None]) -> Iterator[None]:
    """Makes a sentence of a full disk, and room: the processes' logs, which tell of it, are on the same disk."""
    try:
        yield
    except Exception as error:  # not of the system's own type where tokenizers, written in Rust, writes
        if not is_full_disk(error):
            raise
        free_bytes = disk_usage(directory).free
        make_room()
        raise full_disk(directory, plan.needed_bytes, free_bytes) from error


def full_disk(directory: Path, needed_bytes: int, free_bytes: int | None = None) -> UserError:
    """The error for a checkpoint that `directory` has no room for; `free_bytes` is asked of the disk if left out."""
    free = disk_usage(directory).free if free_bytes is None else free_bytes
    return UserError(
        f"the disk is full: a checkpoint needs {needed_bytes:,} bytes and {free:,} are free; "
        "free some space, lower checkpoint.keep, or choose an output_dir on another disk. Checkpoints committed "
        "before are intact.",
        file=directory,
    )
