"""Embeddings and head that grow with the tokenizer: a model directory laid over another, made before processes start.

It links to the weights of the other and holds, beside a configuration with the larger vocabulary, the rows that follow
the stored ones (`weights.NEW_ROWS`). A new row is the mean of the stored rows (Hewitt, 2021, "Initializing new word
embeddings for pretrained language models"): a new token's logit is then the mean of all logits, so by Jensen's
inequality each of k new tokens has at most a probability of 1/(V + k). That holds for a head with a bias only when the
new bias is the mean too.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from understudy.contracts import LazyTensor
from understudy.devices.device import Device
from understudy.errors import UserError
from understudy.models.build import make_language_model, open_weights
from understudy.models.language_model import LanguageModel
from understudy.models.made_once import made_once
from understudy.models.source import read_config_file
from understudy.models.tokenizer import load_tokenizer, vocabulary_of
from understudy.models.weights import NEW_ROWS, StoredTensor
from understudy.recipe import schema

__all__ = ["Growth", "grow_vocabulary", "mean_row", "read_growth"]

_LINKED = ("*.safetensors", "model.safetensors.index.json", "generation_config.json", "*.py")
_CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True)
class Growth:
    """What a directory with a grown vocabulary is laid over."""

    directory: Path
    """With the model as it was, its own vocabulary and all."""
    vocabulary: int
    """Rows that embeddings and head have grown to."""


def grow_vocabulary(directory: Path, model: schema.Model, tokenizer: Path, device: Device, *, cache: Path) -> Path:
    """The directory of the model in `directory` with a row for every token of the one in `tokenizer`: `directory`
    itself where it has them, such as in rows that pad the vocabulary.

    The grown one lies in `cache` under a digest of all that decides its contents; one process builds it, others wait,
    and it appears whole. Raises `UserError` for a model whose embeddings are not a plain table with a linear head.
    """
    needed = vocabulary_of(load_tokenizer(tokenizer, trust_remote_code=model.trust_remote_code))
    built = make_language_model(directory, model, device)
    if needed <= built.config.get_text_config().vocab_size:
        return directory
    _require_plain_embeddings(built)
    described = [_stamps(directory), read_config_file(directory), model.config, needed]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()
    grown = cache / "grown" / digest[:32]
    return made_once(grown, lambda building: _build(directory, built, model, device, needed, building))


def read_growth(directory: Path) -> Growth | None:
    """What the model in `directory` grew from; None where it did not grow."""
    file = directory / NEW_ROWS
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as rows:
        metadata = rows.metadata()
    return Growth(Path(metadata["directory"]), int(metadata["vocabulary"]))


def mean_row(stored: LazyTensor) -> Tensor:
    """The mean of the rows of `stored`, in its dtype; summed in fp64, a few megabytes in memory at a time."""
    length, *rest = stored.shape
    step = max(1, _CHUNK_ELEMENTS // max(1, math.prod(rest)))
    total = torch.zeros(rest, dtype=torch.float64)
    for start in range(0, length, step):
        total += stored[start : min(start + step, length)].double().sum(dim=0)
    return (total / length).to(stored.dtype)


def _build(
    directory: Path, built: LanguageModel, model: schema.Model, device: Device, needed: int, building: Path
) -> None:
    for pattern in _LINKED:
        for file in directory.glob(pattern):
            (building / file.name).symlink_to(file.resolve())
    config = _with_vocabulary(read_config_file(directory), needed)
    (building / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    names = _grown_names(built, make_language_model(building, model, device), needed)
    read = open_weights(directory, built)
    rows = {}
    for name in names:
        stored = read(name)
        assert isinstance(stored, StoredTensor), "embeddings and head are never packed"
        rows[stored.key] = mean_row(stored)
    file = building / NEW_ROWS
    file.parent.mkdir()
    save_file(rows, file, {"format": "pt", "vocabulary": str(needed), "directory": str(directory.resolve())})


def _with_vocabulary(config: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """Models of several modalities say it of their language part."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        return {**config, "vocab_size": vocabulary}
    outer = {"vocab_size": vocabulary} if "vocab_size" in config else {}
    return {**config, **outer, "text_config": {**text, "vocab_size": vocabulary}}


def _stamps(directory: Path) -> list[list[Any]]:
    """What tells files apart without reading them. Their place counts: the grown directory links to it."""
    files = sorted(file.resolve() for pattern in _LINKED for file in directory.glob(pattern))
    return [[str(file), (status := file.stat()).st_size, status.st_mtime_ns, status.st_ino] for file in files]


def _require_plain_embeddings(built: LanguageModel) -> None:
    embeddings, vocabulary = built.network.get_input_embeddings(), built.config.get_text_config().vocab_size
    is_table = isinstance(embeddings, nn.Embedding) and len(embeddings.weight) == vocabulary
    if not is_table or len(built.head.weight) != vocabulary:
        raise _cannot_grow(built, "they are not one table with a row for each token, and a linear head")


def _grown_names(built: LanguageModel, grown: LanguageModel, needed: int) -> list[str]:
    """The parameters with a row for each token: embeddings, an untied head and its bias. Raises `UserError` unless it
    is these that differ between the two."""
    table, head = grown.network.get_input_embeddings(), grown.head
    expected = {id(table.weight), id(head.weight), *(() if head.bias is None else (id(head.bias),))}
    names = [name for name, parameter in grown.network.named_parameters() if id(parameter) in expected]
    before, after = (
        {name: tuple(parameter.shape) for name, parameter in model.network.named_parameters()}
        for model in (built, grown)
    )
    differing = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    if differing != set(names) or any(after[name][0] != needed for name in names):
        other = sorted(differing.symmetric_difference(names)) or names
        raise _cannot_grow(built, f"{other[0]} does not follow the vocabulary as they do")
    return names


def _cannot_grow(built: LanguageModel, reason: str) -> UserError:
    return UserError(
        f"the embeddings of {built.config.model_type} cannot grow for `model.new_tokens`: {reason}; use tokens that "
        "the tokenizer has, or another model.",
        key="model.new_tokens",
    )
