"""What comes before a run's processes, whoever starts them: what `auto` comes to, what must be there, what is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from understudy.launch.run_claim import Claim, require_space
from understudy.plan.machine import Machine
from understudy.recipe.dump import dump_recipe
from understudy.recipe.environment import cache_directory
from understudy.recipe.rules import check_processes
from understudy.recipe.schema import Recipe
from understudy.recipe.source_map import SourceMap
from understudy.training.choosing import Chosen, choose, find_earlier

if TYPE_CHECKING:
    from understudy.training.prepare import Prepared

__all__ = ["begin_run", "choose_for_run", "prepare_run"]

SMALL_FILES_BYTES = 64 * 2**20
"""What a run writes beside the final model's weights: tokenizer, metrics, logs."""


def choose_for_run(
    recipe: Recipe, sources: SourceMap, machine: Machine, processes: int, *, nodes: int = 1, overwrite: bool
) -> Chosen:
    """What the recipe comes to in `processes` processes on `nodes` hosts like this one. Raises `UserError` when it
    cannot be split over so many, and as `choose`."""
    check_processes(recipe, processes, sources)
    earlier = find_earlier(recipe, overwrite=overwrite)
    return choose(recipe, sources, machine, processes, nodes=nodes, earlier=earlier)


def prepare_run(
    recipe: Recipe, sources: SourceMap, machine: Machine, claim: Claim, say: Callable[[str], None]
) -> Prepared:
    """Prepares the job and finds the checkpoint to go on from; writes nothing to the run directory."""
    directory = claim.directory
    _refuse_to_replace_what_is_named(recipe, sources, claim)
    _require_inputs(recipe, sources)

    from understudy.checkpoint.store import CheckpointStore
    from understudy.training.checkpointing import most_checkpoints
    from understudy.training.out_of_memory import as_learned, read_lesson, sizes_in_words
    from understudy.training.prediction import with_prediction
    from understudy.training.prepare import prepare_job, require_fit
    from understudy.training.resume import choose_checkpoint

    prepared = prepare_job(recipe, sources, say)
    found = choose_checkpoint(
        recipe,
        sources,
        CheckpointStore(directory.checkpoints),
        data_digest=prepared.data_digest,
        total_steps=prepared.steps,
        begun_from=directory.recorded_resume if claim.may_go_on else None,
        going_on=claim.may_go_on,
        say=say,
    )
    if found is not None:
        require_fit(prepared.job, found.checkpoint)
    # Where a run goes on, its checkpoints are on the disk, and leave it as others come.
    checkpoints = 1 if claim.may_go_on else most_checkpoints(recipe.checkpoint, prepared.steps)
    needed = prepared.model_bytes + checkpoints * prepared.checkpoint_bytes + SMALL_FILES_BYTES
    require_space(directory.path, needed, "the run", sources)
    learned = as_learned(recipe, machine, read_lesson(directory.memory) if claim.may_go_on else None)
    if learned != recipe:
        say(f"memory: this run ran out of it before; it goes on with {sizes_in_words(learned)}")
    resume = None if found is None else found.checkpoint
    job = with_prediction(replace(prepared.job, recipe=learned, resume=resume, token=claim.token), machine)
    return replace(prepared, job=job, resumed_step=0 if found is None else found.progress.step)


def begin_run(prepared: Prepared, chosen: Chosen, claim: Claim, say: Callable[[str], None]) -> None:
    """Begins the run, or goes on with it, and says what is going to happen."""
    from understudy.checkpoint.store import CheckpointStore
    from understudy.training.job import write_job
    from understudy.training.opening import opening_lines
    from understudy.training.out_of_memory import readable

    recipe, step = dump_recipe(readable(prepared.job.recipe)), prepared.resumed_step
    try:
        if claim.may_go_on:
            directory = claim.go_on(recipe, step)
            store = CheckpointStore(directory.checkpoints)
            store.clean()
            store.set_aside_after(step)
        else:
            directory = claim.begin(recipe)
        write_job(directory.job, prepared.job)
    except OSError:
        claim.withdraw()
        raise
    say("\n".join([opening_lines(prepared), *chosen.lines]))


def _refuse_to_replace_what_is_named(recipe: Recipe, sources: SourceMap, claim: Claim) -> None:
    named, run = Path(recipe.checkpoint.resume).resolve(), claim.directory.path.resolve()
    if not claim.may_go_on and named.is_relative_to(run) and named.exists():
        raise sources.error(
            "checkpoint.resume",
            f"{recipe.checkpoint.resume} is in the run that --overwrite is to replace; leave out one of the two.",
        )


def _require_inputs(recipe: Recipe, sources: SourceMap) -> None:
    """Refuses at once what is not there: to import torch and build the model takes seconds."""
    from understudy.data.prepare import find_sources
    from understudy.models.source import model_directory, tokenizer_directory
    from understudy.training.resume import require_place

    require_place(recipe, sources)
    if recipe.model.path is not None:
        with sources.placing("model.path"):
            model_directory(recipe.model)
    with sources.placing("model.tokenizer" if recipe.model.tokenizer else "model.path"):
        tokenizer_directory(recipe.model)
    find_sources(recipe, sources, cache_directory())
