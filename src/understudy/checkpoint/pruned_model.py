"""A smaller model cut from a larger one, as a model directory like any other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from understudy.checkpoint.companion_files import copy_files, other_files
from understudy.checkpoint.form import WHOLE_MODEL
from understudy.checkpoint.places import CONFIG
from understudy.checkpoint.weight_files import SHARD_BYTES, in_files, write_files
from understudy.contracts import TensorSpec
from understudy.models.build import open_weights
from understudy.models.made_once import made_once
from understudy.models.pruning.structure import Kept, Structure

__all__ = ["materialize_pruned"]

FORMAT_VERSION = 1
"""Part of every name: raise it whenever the same would be written otherwise."""


def materialize_pruned(
    structure: Structure,
    kept: Kept,
    *,
    identity: str,
    cache: Path,
    report: Callable[[str], None],
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """A model directory with what is `kept` of `structure`, in the stored dtypes, layers numbered anew and tied weights
    tied; tokenizer and generation defaults are copied.

    It lies in `cache` under a digest of `identity`, which tells one model's contents from another's, and of what is
    kept; one process builds it, others wait, and it appears whole. `report` gets a line before work begins. One tensor
    is in memory at a time. Raises `UserError` where the sizes that are kept make no model of this architecture.
    """
    described = [FORMAT_VERSION, identity, asdict(kept)]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def build(directory: Path) -> None:
        report(f"cutting a smaller model from {structure.directory}, once on this machine …")
        _write(structure, kept, directory, shard_bytes)

    return made_once(cache / "pruned" / digest[:32], build)


def _write(structure: Structure, kept: Kept, directory: Path, shard_bytes: int) -> None:
    network = structure.network_of(kept)
    read = open_weights(structure.directory, structure.model)
    buffers = structure.model.persistent_buffers()
    parameters = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    every_name = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    sources = {
        name: structure.source(name, kept)
        for name in network.state_dict()
        if name in parameters or name not in every_name
    }
    layout = {
        name: TensorSpec(parameters[name], read(source).dtype)
        if name in parameters
        else TensorSpec(tuple(buffers[source].shape), buffers[source].dtype)
        for name, source in sources.items()
    }

    def tensor(name: str) -> Tensor:
        source = sources[name]
        return structure.cut(source, read(source)[:], kept) if name in parameters else buffers[source]

    write_files(in_files(WHOLE_MODEL, layout, shard_bytes), directory, tensor)
    others = other_files(structure.directory, WHOLE_MODEL.stem, lambda line: None)
    copy_files(structure.directory, (file for file in others if file.name != CONFIG), directory)
    config = structure.config_of(kept)
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
