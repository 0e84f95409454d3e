"""One process that asks a teacher for its cache. `python -m understudy.training.teacher_cache_worker DIR`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from understudy.contracts import IGNORED, Batch
from understudy.data.binning import consecutive_bins
from understudy.devices.device import find_device
from understudy.launch.cause import write_cause
from understudy.launch.parent import die_with_parent
from understudy.launch.run_directory import RunDirectory
from understudy.models.language_model import LanguageModel
from understudy.objectives.teachers.cache_contents import Contents, Rows, Samples
from understudy.objectives.teachers.cache_format import example_key, read_description
from understudy.objectives.teachers.cache_writer import CacheWriter
from understudy.objectives.teachers.caching import Kept, keep
from understudy.objectives.teachers.teacher import supervised_positions
from understudy.parallel.world import World, process_group
from understudy.recipe.environment import console_descriptor, launcher_process, process_environment
from understudy.recipe.objectives import Distillation
from understudy.recipe.schema import Recipe
from understudy.recipe.teachers import CachedTeacher
from understudy.strategies.teaching import hold
from understudy.training.console import Console, open_console, silent_console
from understudy.training.failure import StepNote, ending_on_failure
from understudy.training.job import Job, read_job
from understudy.training.teacher_cache import Example, examples_of
from understudy.training.teacher_model import open_teacher, teacher_dtype

__all__ = ["main"]

SECONDS_BETWEEN_LINES = 10.0


def main() -> None:
    """Entry point of the processes that `build_teacher_cache` starts."""
    if (launcher := launcher_process()) is not None:
        die_with_parent(launcher)
    directory = RunDirectory(Path(sys.argv[1]))
    job, environment = read_job(directory.job), process_environment()
    assert environment is not None, "a launcher sets RANK and WORLD_SIZE"
    descriptor = console_descriptor()
    console = silent_console() if descriptor is None else open_console(descriptor)
    report = partial(write_cause, directory.cause(environment.rank))
    with ending_on_failure(environment.rank, StepNote(), report):
        device = find_device()
        torch_device = device.torch_device(environment.local_rank)
        with process_group(environment, torch_device, device.backend) as world:
            _build(job, torch_device, world, console)


def _build(job: Job, device: torch.device, world: World, console: Console) -> None:
    recipe, (place,), objective = job.recipe, job.teachers, job.recipe.objective
    assert place.cache is not None, "it has a cache"
    assert place.directory is not None, "of a model"
    assert isinstance(objective, Distillation), "only distillation has a teacher"
    assert isinstance(objective.teacher, CachedTeacher), "only this one is cached"
    assert recipe.training.micro_batch_tokens != "auto", "the recipe must be resolved first"
    dtype = teacher_dtype(recipe, objective.teacher)
    teacher = open_teacher(place.directory, dtype)
    description = read_description(place.cache)
    examples = examples_of(job)
    writer = CacheWriter(place.cache, description, world.rank, world.size, examples.keys())
    hold(teacher.model, teacher.read, device, dtype)
    teacher.model.eval()
    began, last, tokens, left_out = time.monotonic(), time.monotonic(), 0, 0.0
    pending = list(writer.pending())
    for done, shard in enumerate(pending, start=1):
        members = [examples[i] for i in writer.examples(shard).tolist()]
        kept = [_asked(teacher.model, description.contents, batch, device) for batch in _batched(members, recipe)]
        rows = _joined([each.rows for each in kept])
        writer.write(shard, rows)
        left_out += sum(each.left_out for each in kept)
        tokens += len(rows[0])
        if time.monotonic() - last > SECONDS_BETWEEN_LINES or done == len(pending):
            last = time.monotonic()
            rate = tokens * world.size / max(last - began, 1e-9)
            console.say(f"shard {done} of {len(pending)} a process, {rate:,.0f} tokens/s")
    totals = torch.tensor([tokens, left_out], dtype=torch.float64)
    dist.all_reduce(totals)  # and so all have written
    if world.rank == 0:
        size = writer.commit()
        asked_tokens, lost = totals.tolist()
        console.say(
            f"teacher cache: {place.cache}\n{size.examples:,} examples, {size.tokens:,} supervised tokens, "
            f"{size.bytes_per_token:.1f} bytes a token"
        )
        if asked_tokens and description.contents.kind == "top_k":
            console.say(
                f"what is left out: at most {lost / asked_tokens:.2e} nats a token of forward KL, for a student that "
                "takes all other tokens for equally likely"
            )
    dist.barrier()


def _batched(members: list[Example], recipe: Recipe) -> Iterator[list[Example]]:
    """The same batches whoever builds the shard, so that what comes of them is the same to the bit."""
    most = recipe.training.micro_batch_tokens
    assert most != "auto", "the recipe must be resolved first"
    for indices in consecutive_bins(np.array([len(tokens) for tokens, _ in members]), capacity=most):
        yield [members[i] for i in indices]


def _asked(model: LanguageModel, contents: Contents, batch: list[Example], device: torch.device) -> Kept:
    documents = [(torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(mask)) for tokens, mask in batch]
    flat = Batch.of([(tokens, torch.where(mask, 0, IGNORED)) for tokens, mask in documents]).to(device)
    seed = contents.seed if isinstance(contents, Samples) else 0
    seeds = [(int(mask.sum()), _seed(seed, tokens, mask)) for tokens, mask in documents]
    with torch.no_grad():
        hidden = model(flat, hidden_at=supervised_positions(flat))
        return keep(contents, hidden, model.head, seeds)


def _seed(seed: int, tokens: Tensor, mask: Tensor) -> int:
    return seed ^ int.from_bytes(example_key(tokens, mask)[:7], "little")


def _joined(parts: list[Rows]) -> Rows:
    """Rows end to end."""
    kind = type(parts[0])
    return kind(*(torch.cat(tensors) for tensors in zip(*parts)))


if __name__ == "__main__":
    main()
