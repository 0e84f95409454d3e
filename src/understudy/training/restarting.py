"""Starts a run again that ran out of memory or lost a process: from where, with what, and when to give up."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from understudy.checkpoint.store import CheckpointStore
from understudy.errors import LostProcessError, OutOfMemoryError, UnderstudyError, UserError
from understudy.launch.cause import Cause, Shortage, ShortOfMemoryError, shortage_of
from understudy.launch.keeper_note import tell_of_restart
from understudy.launch.run_claim import Claim
from understudy.launch.run_directory import RunDirectory
from understudy.plan.machine import Machine
from understudy.recipe.dump import dump_recipe
from understudy.recipe.rules import check_processes
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
        self._shortages = 0
        self._losses = 0
        self.count = 0
        """Restarts so far, for whatever reason."""

    def prepare(self, error: UnderstudyError, processes: int, nodes: int) -> None:
        """Readies the run directory for another start after `error`, in `processes` processes on `nodes` hosts, and
        says so. Raises `error` when it is of a kind that would come again or came too often, `OutOfMemoryError`, with
        what would fit, when there was no memory and nothing smaller is left."""
        if isinstance(error, ShortOfMemoryError):
            self._with_less_memory(error)
        elif isinstance(error, LostProcessError):
            self._after_a_loss(error, processes, nodes)
        else:
            raise error

    def _with_less_memory(self, error: ShortOfMemoryError) -> None:
        shortage, most = error.shortage, self._job.recipe.training.out_of_memory_retries
        next_try = _next_try(self._job, shortage, self._original)
        if next_try is None or self._shortages == most:
            raise OutOfMemoryError(_given_up(self._job, shortage, self._machine, self._shortages)) from error
        self._shortages += 1
        write_lesson(self._claim.directory.memory, learned_from(self._asked, self._machine, self._job.recipe, next_try))
        change = f" with {sizes_in_words(next_try)}, in place of {sizes_in_words(self._job.recipe)}"
        self._go_on(next_try, f"out of memory: {shortage}", change, f"{self._shortages} of {most}")

    def _after_a_loss(self, error: LostProcessError, processes: int, nodes: int) -> None:
        recipe, most = self._job.recipe, self._job.recipe.cluster.max_restarts
        if self._losses == most:
            raise error
        try:
            check_processes(recipe, processes, self._job.sources)
        except UserError:  # so few processes cannot run it
            raise error from None
        self._losses += 1
        tell_of_restart()
        per_host = -(-processes // nodes)
        cluster = recipe.cluster.model_copy(update={"nodes": nodes, "processes": per_host})
        hosts = f" on {nodes} {'host' if nodes == 1 else 'hosts'}" if nodes != recipe.cluster.nodes else ""
        changed = recipe.model_copy(update={"cluster": cluster})
        self._go_on(changed, f"lost: {str(error).rstrip('.')}", hosts, f"{self._losses} of {most}")

    def _go_on(self, recipe: Recipe, why: str, change: str, which: str) -> None:
        """From the newest checkpoint, or where the run began."""
        self.count += 1
        directory = self._claim.directory
        store = CheckpointStore(directory.checkpoints)
        store.clean()
        resume, step = self._begun_from
        found = newest_of(store, self._job.sources, self._say)
        if found is not None and found.progress.step >= step:
            resume, step = found.checkpoint, found.progress.step
        self._say(f"{why}; going on from {f'step {step:,}' if step else 'the start'}{change} (restart {which})")
        self._job = with_prediction(replace(self._job, recipe=recipe, resume=resume), self._machine)
        self._claim.start_again(dump_recipe(readable(recipe)), step)
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
    last = f" Last collectives: {shortage.last_collectives}." if shortage.last_collectives else ""
    return (
        f"out of memory{after}: {shortage} with strategy {strategy_name(job.recipe.strategy)} and "
        f"{sizes_in_words(job.recipe)} (its output is in {shortage.log}). {would_fit(job, machine)}{last}"
    )
