"""Starts a run again that ran out of memory: where it goes on from, with what, and when to give up."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from understudy.checkpoint.store import CheckpointStore
from understudy.errors import OutOfMemoryError
from understudy.launch.cause import Cause, Shortage, ShortOfMemoryError, shortage_of
from understudy.launch.run_claim import Claim
from understudy.launch.run_directory import RunDirectory
from understudy.plan.machine import Machine
from understudy.recipe.dump import dump_recipe
from understudy.recipe.schema import Recipe
from understudy.training.job import Job, read_job, write_job
from understudy.training.opening import strategy_name
from understudy.training.out_of_memory import (
    learned_from,
    readable,
    sizes_in_words,
    smaller,
    with_sizes_of,
    would_fit,
    write_lesson,
)
from understudy.training.prediction import with_prediction
from understudy.training.resume import newest_of

__all__ = ["Restarts", "leave_lesson"]


class Restarts:
    """The restarts of a run whose processes are started here."""

    def __init__(
        self,
        job: Job,
        resumed_step: int,
        *,
        original: Recipe,
        asked: Recipe,
        machine: Machine,
        claim: Claim,
        say: Callable[[str], None],
    ) -> None:
        """`original` is the recipe as the user wrote it, `asked` what `auto` came to in it, `job` what was started of
        it, from `resumed_step` on."""
        self._job = job
        self._begun_from = (job.resume, resumed_step)
        self._original = original
        self._asked = asked
        self._machine = machine
        self._claim = claim
        self._say = say
        self.count = 0

    def prepare(self, error: ShortOfMemoryError) -> None:
        """Readies the run directory for another start after `error`, and says so. Raises `OutOfMemoryError`, with what
        would fit, when it has been started again often enough or nothing smaller is left."""
        shortage, most = error.shortage, self._job.recipe.training.out_of_memory_retries
        next_try = _next_try(self._job, shortage, self._original)
        if next_try is None or self.count == most:
            raise OutOfMemoryError(_given_up(self._job, shortage, self._machine, self.count)) from error
        self.count += 1
        directory = self._claim.directory
        store = CheckpointStore(directory.checkpoints)
        store.clean()
        resume, step = self._begun_from
        found = newest_of(store, self._job.sources, self._say)
        if found is not None and found.progress.step >= step:
            resume, step = found.checkpoint, found.progress.step
        write_lesson(directory.memory, learned_from(self._asked, self._machine, self._job.recipe, next_try))
        self._say(
            f"out of memory: {shortage}; going on from {f'step {step:,}' if step else 'the start'} with "
            f"{sizes_in_words(next_try)}, in place of {sizes_in_words(self._job.recipe)} "
            f"(restart {self.count} of {most})"
        )
        self._job = with_prediction(replace(self._job, recipe=next_try, resume=resume), self._machine)
        self._claim.start_again(dump_recipe(readable(next_try)), step)
        store.set_aside_after(step)
        write_job(directory.job, self._job)


def leave_lesson(directory: RunDirectory, cause: Cause, *, original: Recipe, asked: Recipe, machine: Machine) -> str:
    """For a process that another launcher started and that ran out of memory: leaves in the run directory what was
    learned, for the next start to go on with. Returns a sentence for the user."""
    job = read_job(directory.job)
    # Read back, a recipe no longer tells what was written in it from what was left out.
    job = replace(job, recipe=with_sizes_of(asked, job.recipe))
    shortage = shortage_of(cause, directory.log(cause.rank), {cause.rank: cause})
    assert shortage is not None, "it is called for those only"
    next_try = _next_try(job, shortage, original) if job.recipe.training.out_of_memory_retries else None
    if next_try is None:
        return _given_up(job, shortage, machine, 0)
    with suppress(OSError):  # a full disk; the next start then begins with what ran out
        write_lesson(directory.memory, learned_from(asked, machine, job.recipe, next_try))
    return (
        f"out of memory: {shortage} (traceback in {shortage.log}); run again, and it goes on from the last checkpoint "
        f"with {sizes_in_words(next_try)}, in place of {sizes_in_words(job.recipe)}."
    )


def _next_try(job: Job, shortage: Shortage, original: Recipe) -> Recipe | None:
    return smaller(job, shortage, may_checkpoint=original.training.activation_checkpointing == "auto")


def _given_up(job: Job, shortage: Shortage, machine: Machine, restarts: int) -> str:
    after = f" after {restarts} {'restart' if restarts == 1 else 'restarts'}" if restarts else ""
    return (
        f"out of memory{after}: {shortage} with strategy {strategy_name(job.recipe.strategy)} and "
        f"{sizes_in_words(job.recipe)} (its output is in {shortage.log}). {would_fit(job, machine)}"
    )
