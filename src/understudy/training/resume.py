"""Whether and from where a run goes on: the checkpoint, and whether the recipe still is what it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from understudy.checkpoint.manifest import DamagedCheckpointError
from understudy.checkpoint.places import examine
from understudy.checkpoint.progress import Progress
from understudy.checkpoint.store import CheckpointStore, first_verified
from understudy.errors import RecipeError
from understudy.recipe.objectives import Distillation
from understudy.recipe.schema import Recipe
from understudy.recipe.source_map import SourceMap

__all__ = ["Resumption", "choose_checkpoint", "determinants", "digest_of", "newest_of", "require_place"]

DETERMINING = ("model", "objective", "adapter", "quantization", "optimizer", "schedule", "training", "data.train")
"""What of a recipe determines the course of training; strategy, processes, logging and the like do not."""
NOT_DETERMINING = (
    "adapter.path",  # what it gave is in the checkpoint
    "model.attention",
    "objective.on_policy.endpoint",
    "objective.on_policy.model",
    "objective.on_policy.retries",
    "objective.on_policy.timeout",
    "model.tokenizer",  # the digest of the prepared data tells
    "model.trust_remote_code",
    "training.activation_checkpointing",
    "training.compile",
    "training.deterministic",
    "training.memory_limit",
    "training.micro_batch_tokens",
    "training.out_of_memory_retries",
)
OF_TEACHER = ("device", "endpoints", "model", "retries", "timeout")
"""Fields of a teacher that say where it is and how it is reached, not what it says."""
OF_TRAINING_DATA = "weight"
"""The one field of a data source that the digest of the prepared data does not cover."""


@dataclass(frozen=True)
class Resumption:
    """From where to go on."""

    checkpoint: Path
    progress: Progress


def determinants(recipe: Recipe) -> dict[str, Any]:
    """By dotted key, what must stay the same for a resumed run to be the run it resumes."""
    flat = _flattened(recipe.model_dump(mode="json"))
    if flat["model.path"] is not None:
        # Its weights are the checkpoint's by now; another name means another model, another place does not.
        flat["model.path"] = PurePath(flat["model.path"]).name
    for key in [key for key in flat if key.startswith("objective.teacher.") and key.endswith(".path")]:
        flat[key] = PurePath(flat[key]).name
    # Sections that may be absent, so that to add one is a change too.
    flat |= {} if recipe.adapter else {"adapter.kind": None}
    flat |= {} if recipe.quantization else {"quantization.bits": None}
    if isinstance(recipe.objective, Distillation) and recipe.objective.hidden_states is None:
        flat["objective.hidden_states.loss"] = None
    return {key: value for key, value in flat.items() if _determines(key)}


def digest_of(values: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values, hexadecimal."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def choose_checkpoint(
    recipe: Recipe,
    sources: SourceMap,
    store: CheckpointStore,
    *,
    data_digest: str,
    total_steps: int,
    begun_from: str | None,
    going_on: bool,
    say: Callable[[str], None],
) -> Resumption | None:
    """The checkpoint that `checkpoint.resume` means; None to begin at the start.

    `store` is the run directory's, which counts when the run is `going_on` there; `begun_from` is the
    `checkpoint.resume` by which the run there began, so that the same command goes on with what it began. Checkpoints
    that do not verify are named through `say`. Raises `UserError` when all are damaged, and when the recipe is no
    longer the one that wrote it; a path allows another recipe, and says so.
    """
    resume = recipe.checkpoint.resume
    if resume == "never" or (resume == "auto" and not going_on):
        return None
    # By the same command as before, the run goes on from where that has come, once it has come further.
    moved_on = going_on and resume == begun_from and store.committed() and not _is_newest_of(Path(resume), store)
    if resume == "auto" or moved_on:
        found = newest_of(store, sources, say)
        if found is not None:
            _refuse_another_recipe(recipe, sources, found, data_digest)
    else:
        found = _named(Path(resume), sources, say)
        if going_on:
            _refuse_another_course(found, store, sources)
        if "imported_from" in found.progress.written_by:
            say(
                f"{found.checkpoint} was imported: training goes on with the examples of step "
                f"{found.progress.step + 1:,}, by this recipe"
            )
        elif changes := _changes(recipe, found.progress, data_digest):
            say(f"the recipe is not the one that wrote {found.checkpoint}: " + "; ".join(changes.values()))
        _refuse_what_cannot_go_on(recipe, sources, found)
    if found is not None and found.progress.step > total_steps:
        raise sources.error(
            "training",
            f"{found.checkpoint} is at step {found.progress.step}, past the {total_steps} steps of this run; raise "
            "training.epochs or training.max_steps.",
        )
    return found


def newest_of(store: CheckpointStore, sources: SourceMap, say: Callable[[str], None]) -> Resumption | None:
    """The newest checkpoint of a run that verifies; None where there is none. Raises `UserError` when all are bad."""
    try:
        found = store.newest(say)
    except DamagedCheckpointError as error:
        raise sources.error(
            "output_dir",
            f"no checkpoint of {store.directory} can be used, the last one because {error} Begin again with "
            "--overwrite, or name another checkpoint with checkpoint.resume=PATH.",
        ) from error
    return None if found is None else Resumption(*found)


def require_place(recipe: Recipe, sources: SourceMap) -> None:
    """Refuses at once a `checkpoint.resume` that names nothing to go on from."""
    if recipe.checkpoint.resume not in ("auto", "never"):
        _candidates(Path(recipe.checkpoint.resume), sources)


def _named(path: Path, sources: SourceMap, say: Callable[[str], None]) -> Resumption:
    """`path` is a checkpoint, or a run or its `checkpoints`, of which the newest that verifies is taken."""
    try:
        found = first_verified(_candidates(path, sources), say)
    except DamagedCheckpointError as error:
        raise sources.error("checkpoint.resume", f"{path} cannot be used: {error}") from error
    assert found is not None, "there is at least one candidate"
    return Resumption(*found)


def _candidates(path: Path, sources: SourceMap) -> tuple[Path, ...]:
    """Newest first."""
    with sources.placing("checkpoint.resume"):
        found = examine(path).checkpoints
    if not found:
        raise sources.error(
            "checkpoint.resume",
            f"{path} has no checkpoint in it, only a model; name a checkpoint or a run, or begin a new run from these "
            "weights with model.path.",
        )
    return found


def _is_newest_of(path: Path, store: CheckpointStore) -> bool:
    """Whether `path` names the newest checkpoint of `store`, by itself or as that of its run."""
    places = (store.committed()[0], store.directory, store.directory.parent)
    return path.resolve() in [place.resolve() for place in places]


def _refuse_another_course(found: Resumption, store: CheckpointStore, sources: SourceMap) -> None:
    """Beside checkpoints of a course that is left, the next `auto` would take one of them."""
    committed = store.committed()
    if committed and committed[0].resolve() != found.checkpoint.resolve():
        raise sources.error(
            "checkpoint.resume",
            f"{store.directory} also holds {committed[0].name}, and two courses do not fit in one run; choose a new "
            f"output_dir to go on from {found.checkpoint}.",
        )


def _refuse_another_recipe(recipe: Recipe, sources: SourceMap, found: Resumption, data_digest: str) -> None:
    changes = _changes(recipe, found.progress, data_digest)
    if changes:
        all_the_same = f", or go on all the same with checkpoint.resume={found.checkpoint}"
        if any(key.startswith("adapter.") and key != "adapter.dropout" for key in changes):
            all_the_same = ""  # other weights than the checkpoint has
        advice = (
            f"{found.checkpoint} would not go on as it began: set that back, or begin again with --overwrite"
            f"{all_the_same}."
        )
        raise RecipeError(
            [
                *(sources.violation(key, f"{change}.") for key, change in changes.items()),
                sources.violation("checkpoint", advice),
            ]
        )


def _changes(recipe: Recipe, progress: Progress, data_digest: str) -> dict[str, str]:
    """What differs from the recipe that wrote a checkpoint, in words, by key."""
    now = determinants(recipe)
    changes = {
        key: f"{key} was {_shown(progress.recipe[key])} and is {_shown(now[key])}"
        # A release that knows more keys, or fewer, says nothing about those.
        for key in sorted(now.keys() & progress.recipe.keys())
        if now[key] != progress.recipe[key]
    }
    if data_digest != progress.data_digest:
        changes["data.train"] = "the training data, its tokenizer or its template is not what it was"
    return changes


def _refuse_what_cannot_go_on(recipe: Recipe, sources: SourceMap, found: Resumption) -> None:
    """Another recipe may be asked for, but moments mean something to the optimizer that made them only."""
    written = found.progress.recipe
    if written and (kind := written["optimizer.kind"]) != recipe.optimizer.kind:
        raise sources.error(
            "optimizer",
            f"{found.checkpoint} has the moments of {kind}, which {recipe.optimizer.kind} cannot go on with; take "
            f"{kind}, or begin a new run with model.path={found.checkpoint / 'model'}.",
        )
    pure = "pure_bf16"
    if written and (written["training.precision"] == pure) != (recipe.training.precision == pure):
        raise sources.error(
            "training.precision",
            f"{found.checkpoint} was written in {written['training.precision']}, whose weights and moments have "
            f"another dtype than those of {recipe.training.precision}; take the same precision.",
        )


def _determines(key: str) -> bool:
    if key.startswith("data.train."):
        return key.endswith(f".{OF_TRAINING_DATA}")
    if key.startswith("objective.teacher.") and key.rpartition(".")[2] in OF_TEACHER:
        return False
    return key.startswith(tuple(f"{part}." for part in DETERMINING)) and not key.startswith(NOT_DETERMINING)


def _flattened(values: Any, key: str = "") -> dict[str, Any]:
    """Leaves by dotted key. A mapping whose keys are the user's own is a leaf."""
    if isinstance(values, dict) and key != "model.config":
        items = [(str(name), value) for name, value in values.items()]
    elif isinstance(values, list) and values and isinstance(values[0], dict):
        items = [(str(index), value) for index, value in enumerate(values)]
    else:
        return {key: values}
    return {
        name: leaf
        for part, value in items
        for name, leaf in _flattened(value, f"{key}.{part}" if key else part).items()
    }


def _shown(value: Any) -> str:
    return "not set" if value is None else json.dumps(value)
