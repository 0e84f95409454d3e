"""Checkpoints of one run, put together: what is restored before it, and the hook that saves while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from understudy import __version__
from understudy.checkpoint.form import Form
from understudy.checkpoint.loading import open_optimizer_state
from understudy.checkpoint.places import MODEL
from understudy.checkpoint.progress import Progress, read_progress
from understudy.checkpoint.saver import CheckpointSaver, SaveSettings
from understudy.checkpoint.store import CheckpointStore
from understudy.contracts import LossScale, Strategy
from understudy.launch.run_directory import RunDirectory
from understudy.launch.run_lock import still_owned
from understudy.parallel.world import World
from understudy.training.adapting import Adapted, adapted_model
from understudy.training.checkpointing import CheckpointHook
from understudy.training.evaluation import EvaluationHook
from understudy.training.hidden_states import with_maps
from understudy.training.hooks import TrainingState, interval_steps
from understudy.training.job import Job
from understudy.training.resume import determinants, digest_of
from understudy.training.stopping import StopRequest

__all__ = ["make_checkpoint_hook", "restore", "run_model"]


def run_model(job: Job) -> Adapted:
    """The model of the run, with its first weights: the model's own, or those of the checkpoint that it goes on from.
    An adapter's base stays the model's own. What trains beside it is there too."""
    resumed = None if job.resume is None else job.resume / MODEL
    if job.adapter_directory is None:
        adapted = adapted_model(job.recipe, job.model_directory, None, weights=resumed)
    else:
        adapted = adapted_model(job.recipe, job.model_directory, resumed or job.adapter_directory)
    return with_maps(adapted, job.recipe, job.teachers, job.resume)


def restore(job: Job, strategy: Strategy) -> TrainingState:
    """Gives a strategy that has its weights its optimizer state too. Returns how far the run is. A collective."""
    if job.resume is None:
        return TrainingState()
    with job.sources.placing("checkpoint.resume"):
        strategy.load_optimizer_state(open_optimizer_state(job.resume))
    progress = read_progress(job.resume)
    if progress.loss_scale is not None and strategy.loss_scale is not None:
        strategy.loss_scale = LossScale(*progress.loss_scale)
    return TrainingState(progress.step, progress.epoch, progress.tokens)


def make_checkpoint_hook(
    job: Job,
    strategy: Strategy,
    world: World,
    *,
    form: Form,
    buffers: Mapping[str, Tensor],
    write_companions: Callable[[Path], None],
    data_digest: str,
    total_steps: int,
    evaluation: EvaluationHook | None,
    stop: StopRequest,
    say: Callable[[str], None],
    mark: Callable[[], None],
) -> CheckpointHook:
    """`form` is of the weights, `buffers` are the model's persistent buffers; `write_companions` writes configuration
    and tokenizer; `mark` is called for each tensor, from any thread."""
    settings = job.recipe.checkpoint
    store = CheckpointStore(RunDirectory(job.run_directory).checkpoints)
    saver = CheckpointSaver(
        strategy,
        SaveSettings(
            store=store,
            keep=settings.keep,
            keep_best=settings.keep_best,
            background=settings.background,
            form=form,
            buffers=buffers,
            write_companions=write_companions,
            token=job.token,
            still_ours=partial(still_owned, job.run_directory, job.token),
            mark=mark,
        ),
        world.rank,
        world.size,
    )
    return CheckpointHook(
        saver,
        every=interval_steps(settings.every, total_steps),
        total_steps=total_steps,
        progress=_progress_of(job, strategy, world, data_digest),
        stop=stop,
        evaluation=evaluation,
        evaluate_first=settings.keep_best,
        location=store.path,
        say=say,
    )


def _progress_of(
    job: Job, strategy: Strategy, world: World, data_digest: str
) -> Callable[[TrainingState, float | None], Progress]:
    recipe = determinants(job.recipe)
    written_by = {
        "understudy": __version__,
        "strategy": job.recipe.model_dump(mode="json")["strategy"],
        "processes": world.size,
    }

    def progress(state: TrainingState, eval_loss: float | None) -> Progress:
        return Progress(
            step=state.step,
            epoch=state.epoch,
            tokens=state.tokens,
            recipe=recipe,
            recipe_digest=digest_of(recipe),
            data_digest=data_digest,
            loss_scale=strategy.loss_scale,
            eval_loss=eval_loss,
            written_by=written_by,
        )

    return progress
