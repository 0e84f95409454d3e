"""One process that asks a teacher for its cache. `python -m understudy.training.teacher_cache_worker DIR`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from understudy.contracts import IGNORED, Batch
from understudy.data.binning import consecutive_bins
from understudy.devices.device import find_device
from understudy.models.language_model import LanguageModel
from understudy.objectives.teachers.cache_contents import Contents, Rows, Samples, TopK
from understudy.objectives.teachers.cache_format import example_key, read_description
from understudy.objectives.teachers.cache_writer import CacheWriter
from understudy.objectives.teachers.caching import Kept, keep
from understudy.objectives.teachers.teacher import supervised_positions
from understudy.recipe.objectives import Distillation
from understudy.recipe.schema import Recipe
from understudy.recipe.teachers import CachedTeacher
from understudy.strategies.teaching import hold
from understudy.training.cache_difference import SAMPLED_EXAMPLES, measure_difference, open_student
from understudy.training.job import Job, read_job
from understudy.training.teacher_cache import Example, Examples
from understudy.training.teacher_cache_build import Asked, examples_of
from understudy.training.teacher_model import open_teacher, teacher_dtype
from understudy.training.teacher_processes import Pace, TeacherProcess, teacher_process

__all__ = ["main"]


def main() -> None:
    """Entry point of the processes that `build_teacher_caches` starts."""
    with teacher_process() as process:
        device = find_device().torch_device(process.environment.local_rank)
        _build(read_job(process.directory.job), device, process)


def _build(job: Job, device: torch.device, process: TeacherProcess) -> None:
    """Writes this process's shards. A request to stop is obeyed at once, but never inside of a write."""
    recipe, (place,), objective = job.recipe, job.teachers, job.recipe.objective
    assert place.cache is not None, "it has a cache"
    assert place.directory is not None, "of a model"
    assert isinstance(objective, Distillation), "only distillation has a teacher"
    assert isinstance(objective.teacher, CachedTeacher), "only this one is cached"
    asked, rank, world_size = Asked(), process.environment.rank, process.environment.world_size
    with process.requests.interruptible():
        dtype = teacher_dtype(recipe, objective.teacher)
        teacher = open_teacher(place.directory, dtype)
        description = read_description(place.cache)
        examples = examples_of(job)
        writer = CacheWriter(place.cache, description, rank, world_size, examples.keys())
        pending, measures = list(writer.pending()), rank == 0 and isinstance(description.contents, TopK)
        if pending or measures:
            hold(teacher.model, teacher.read, device, dtype)
            teacher.model.eval()
    pace = Pace(process, "shard", len(pending))
    for shard in pending:
        with process.requests.interruptible():
            members = [examples[i] for i in writer.examples(shard).tolist()]
            kept = [_asked(teacher.model, description.contents, batch, device) for batch in _batched(members, recipe)]
            rows = _joined([each.rows for each in kept])
        writer.write(shard, rows)
        left_out = asked.left_out + sum(each.left_out for each in kept)
        asked = replace(asked, tokens=asked.tokens + len(rows[0]), left_out=left_out)
        pace.advance(1, len(rows[0]))
    if measures and isinstance(description.contents, TopK):
        with process.requests.interruptible():
            student, batches = open_student(job, device), _sampled(examples, device)
            difference = measure_difference(objective, student, teacher.model, description.contents, batches)
            asked = replace(asked, difference=difference)
    asked.write(process.directory, rank)


def _sampled(examples: Examples, device: torch.device) -> list[Batch]:
    """Examples from all over the set, each alone."""
    indices = np.unique(np.linspace(0, len(examples) - 1, SAMPLED_EXAMPLES).astype(np.int64)).tolist()
    members = [(torch.from_numpy(tokens.astype(np.int64)), mask) for tokens, mask in map(examples.__getitem__, indices)]
    documents = [(tokens, _labels(tokens, mask)) for tokens, mask in members if mask.any()]
    return [Batch.of([document]).to(device) for document in documents]


def _labels(tokens: Tensor, mask: npt.NDArray[np.bool_]) -> Tensor:
    return torch.where(torch.from_numpy(mask), tokens.roll(-1), IGNORED)


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
        hidden = model(flat, hidden_at=supervised_positions(flat)).last
        return keep(contents, hidden, model.head, seeds)


def _seed(seed: int, tokens: Tensor, mask: Tensor) -> int:
    return seed ^ int.from_bytes(example_key(tokens, mask)[:7], "little")


def _joined(parts: list[Rows]) -> Rows:
    """Rows end to end."""
    kind = type(parts[0])
    return kind(*(torch.cat(tensors) for tensors in zip(*parts)))


if __name__ == "__main__":
    main()
