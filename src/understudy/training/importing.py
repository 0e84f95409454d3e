"""A DeepSpeed checkpoint, once, as one of ours: weights and moments by name, to be gone on with under any strategy."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from shutil import disk_usage

import torch
from torch import Tensor

from understudy import __version__
from understudy.checkpoint.deepspeed_directory import (
    MOMENTS,
    DeepSpeedCheckpoint,
    match_names,
    open_deepspeed_checkpoint,
)
from understudy.checkpoint.form import OPTIMIZER_STATE, WHOLE_MODEL
from understudy.checkpoint.plain_model import copy_companions
from understudy.checkpoint.progress import Progress
from understudy.checkpoint.saving import CheckpointPlan, commit_checkpoint, full_disk, write_part
from understudy.checkpoint.shards import Shards
from understudy.checkpoint.store import CheckpointStore, verify_checkpoint
from understudy.contracts import TensorSpec
from understudy.devices.device import find_device
from understudy.errors import UserError
from understudy.models.build import make_language_model, shared_names
from understudy.models.tokenizer import load_tokenizer, prepared_tokenizer
from understudy.recipe.environment import cache_directory
from understudy.recipe.schema import Recipe
from understudy.recipe.source_map import SourceMap
from understudy.training.prepare import data_preparer, grown_model, materialized_model

__all__ = ["import_deepspeed_checkpoint"]


def import_deepspeed_checkpoint(
    directory: Path, recipe: Recipe, sources: SourceMap, out: Path, report: Callable[[str], None]
) -> Path:
    """Writes what DeepSpeed's engine saved in `directory` as a checkpoint of `recipe`'s model, in `out`, which must not
    exist; returns the checkpoint. One tensor is in memory at a time, beside one rank's file in DeepSpeed's own tool.

    The checkpoint is verified at the end. Raises `UserError` when `directory` is no checkpoint that DeepSpeed's tool
    reads, does not fit the model, or the disk has no room. DeepSpeed's files are pickles: its tool runs what is in
    them.
    """
    if out.exists():
        raise UserError("exists, and nothing is overwritten; name a directory that does not exist.", file=out)
    with sources.placing("model.path" if recipe.model.path else "model"):
        tokenizer = prepared_tokenizer(recipe.model, cache_directory())
        data = data_preparer(recipe, sources, tokenizer, report)
        model_directory = grown_model(recipe, materialized_model(recipe, tokenizer, data, report), tokenizer)
        network = make_language_model(model_directory, recipe.model, find_device()).network
    names = [name for name, _ in network.named_parameters()]
    out.parent.mkdir(parents=True, exist_ok=True)
    report(f"converting {directory} with DeepSpeed's own tool, which takes a while and as much disk again")
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        # A checkpoint appears whole: it is moved out of here at the end.
        opened = open_deepspeed_checkpoint(directory, Path(scratch))
        aliases = {first: others for first, *others in shared_names(network)}
        theirs = match_names(names, opened.names(), aliases, file=opened.tag)
        _check_shapes(opened, theirs, {name: tuple(p.shape) for name, p in network.named_parameters()})
        store = CheckpointStore(Path(scratch) / "imported")
        written = _write(store, opened, theirs, partial(_write_companions, recipe, model_directory, tokenizer))
        verify_checkpoint(written)
        store.directory.rename(out)
    return out / written.name


def _write_companions(recipe: Recipe, model_directory: Path, tokenizer: Path, out: Path) -> None:
    copy_companions(model_directory, out, torch.float32)
    load_tokenizer(
        tokenizer, recipe.data.chat_template, trust_remote_code=recipe.model.trust_remote_code
    ).save_pretrained(out)


def _check_shapes(opened: DeepSpeedCheckpoint, theirs: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if (found := opened.shape(theirs[name])) != shape:
            raise UserError(
                f"holds {theirs[name]} as {list(found)}, which is {list(shape)} in this model; name the model that it "
                "was trained from.",
                file=opened.tag,
            )


def _write(
    store: CheckpointStore,
    opened: DeepSpeedCheckpoint,
    theirs: dict[str, str],
    write_companions: Callable[[Path], None],
) -> Path:
    plan = _plan(opened, theirs)
    at = store.partial(opened.step, "import")
    store.begin(at)
    if disk_usage(store.directory).free < plan.needed_bytes:
        raise full_disk(store.directory, plan.needed_bytes)
    weights = ((name, opened.weight(their)) for name, their in theirs.items())
    write_part(plan, at, 0, weights, _moments(opened, theirs), {})
    progress = Progress(
        step=opened.step,
        epoch=0.0,
        tokens=0,
        recipe={"optimizer.kind": "adamw", "training.precision": "fp32"},
        recipe_digest="",
        data_digest="",
        loss_scale=None,
        eval_loss=None,
        written_by={"understudy": __version__, "imported_from": str(opened.tag)},
    )
    return commit_checkpoint(plan, store, at, 1, progress, {}, write_companions, lambda: True)


def _plan(opened: DeepSpeedCheckpoint, theirs: dict[str, str]) -> CheckpointPlan:
    model, optimizer = {}, {}
    for name, their in theirs.items():
        model[name] = TensorSpec(opened.shape(their), torch.float32)
        if opened.is_trained(their):
            optimizer.update({f"{name}.{key}": model[name] for key in MOMENTS})
            optimizer[f"{name}.step"] = TensorSpec((), torch.float32)
    return CheckpointPlan(
        Shards(WHOLE_MODEL, model, dict.fromkeys(model, 0)),
        Shards(OPTIMIZER_STATE, optimizer, dict.fromkeys(optimizer, 0)),
    )


def _moments(opened: DeepSpeedCheckpoint, theirs: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    for name, their in theirs.items():
        if opened.is_trained(their):
            moments = opened.moments(their)
            for key in MOMENTS:
                yield f"{name}.{key}", moments[key]
            # Where DeepSpeed's tool does not tell, no update was skipped that anybody knows of.
            yield f"{name}.step", moments.get("step", torch.tensor(float(opened.step)))
