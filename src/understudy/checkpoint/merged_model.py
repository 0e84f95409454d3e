"""A plain model from an adapter and its base: the base's weights with the adapter added to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from understudy.checkpoint.adapter_base import AdapterBase, find_base
from understudy.checkpoint.companion_files import copy_files, other_files, set_dtype
from understudy.checkpoint.durable import sync_tree
from understudy.checkpoint.form import WHOLE_MODEL
from understudy.checkpoint.made_whole import made_whole, refuse_place
from understudy.checkpoint.manifest import FileEntry, describe_file
from understudy.checkpoint.places import CONFIG, ModelPlace, find_model
from understudy.checkpoint.reloading import (
    UnloadableModelError,
    has_tokenizer,
    reload_adapter,
    reload_dequantized,
    reload_model,
    reload_tokenizer,
)
from understudy.checkpoint.store import verify_checkpoint
from understudy.checkpoint.weight_files import SHARD_BYTES, as_stored, in_files, write_files
from understudy.contracts import TensorSpec
from understudy.errors import UnderstudyError, UserError
from understudy.models.adapters.directory import is_adapter, open_adapter, read_base
from understudy.models.adapters.merging import MergedWeights, require_mergeable
from understudy.models.quantization.scheme import scheme_of
from understudy.models.source import read_config_file
from understudy.recipe.schema import Model

__all__ = ["TOLERANCES", "Merged", "export_merged"]

TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference between two logits, as a share of the largest logit, by the dtype of the merged weights."""
TEXT = "The quick brown fox jumps over the lazy dog, and 12 more follow."
SMALL_BYTES = 2**24
"""Room for headers, the index, configuration and tokenizer."""
_OF_TOKENIZERS = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("*.model", "*.jinja", "*.tiktoken", "additional_chat_templates/*"),
)


@dataclass(frozen=True)
class Merged:
    place: ModelPlace
    """The adapter."""
    step: int | None
    """Of the checkpoint it is part of."""
    base: Path
    dequantized: str | None
    """What the base was quantized to, such as nf4."""
    dtype: str
    """Of the weights, as PyTorch calls it."""
    tensors: int
    num_bytes: int
    """All files together."""
    difference: float
    """Largest difference of two logits from those of base and adapter, as a share of the largest."""
    tolerance: float
    tokens: int
    """Positions compared."""


def export_merged(
    source: Path,
    out: Path,
    *,
    base: str | None,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
    report: Callable[[str], None],
    shard_bytes: int = SHARD_BYTES,
) -> Merged:
    """Writes the base of the adapter that `source` stands for (`find_model`), with the adapter added, to `out` as a
    plain model, and proves that it computes what base and adapter compute.

    Weights are computed in fp32, one in memory at a time, and stored in `dtype`, fp32 when None. Names and
    configuration are the base's, tokenizer and generation defaults the adapter's where it has some. `base` names the
    base where it is not where the adapter says. The proof takes as much memory as the base in fp32. `out` must not
    exist and appears whole.

    Raises `UserError` for a `source` that is no adapter, damaged, or of a kind that cannot be merged, without its base,
    for a quantized base without `dtype`, and as `export_model` does for `out`; `UnderstudyError` when the proof fails.
    """
    if out.exists() or out.is_symlink():
        raise UserError("exists, and nothing is overwritten; name a directory that does not exist.", file=out)
    place = find_model(source, report)
    refuse_place(source, place, out)
    adapter = place.directory
    if not is_adapter(adapter):
        raise UserError(f"{source} is a whole model, so there is nothing to merge; leave --merge out.")
    require_mergeable(adapter)
    open_adapter(adapter)
    step = None if place.checkpoint is None else verify_checkpoint(place.checkpoint).step
    reference = read_base(adapter)
    # Before what takes time.
    _require_dtype(adapter, dtype, is_quantized=reference is not None and reference.quantization is not None)
    found = find_base(adapter, base, report)
    refuse_place(found.original, ModelPlace(found.original, None), out)
    scheme = scheme_of(read_config_file(found.directory))
    _require_dtype(adapter, dtype, is_quantized=scheme is not None)
    stored = dtype or torch.float32
    tokenizer = adapter if has_tokenizer(adapter) else found.original
    model = Model(path=str(found.directory), trust_remote_code=trust_remote_code)
    weights = MergedWeights(found.directory, adapter, model)
    tokens = _tokens(tokenizer, weights.vocabulary, trust_remote_code)
    expected = _expected_logits(found, adapter, tokens, model)
    split = weights.split_names()
    tied = {name for _, *others in weights.tied for name in others} - set(split)
    layout = {name: TensorSpec(shape, stored) for name, shape in weights.shapes.items() if name not in tied}
    layout |= {name: TensorSpec(tuple(b.shape), b.dtype) for name, b in weights.buffers.items()}
    shards = in_files(WHOLE_MODEL, layout, shard_bytes)

    def tensor(name: str) -> Tensor:
        kept = weights.buffers.get(name)
        return as_stored(name, weights(name), stored, adapter) if kept is None else kept

    with made_whole(out, shards.num_bytes + SMALL_BYTES) as partial:
        entries = write_files(shards, partial, tensor)
        _write_companions(found, adapter, partial, stored, weights, untied=bool(split))
        sync_tree(partial)
        _read_back(partial, entries)
        difference = _difference(partial, adapter, tokens, expected, stored, trust_remote_code)
        num_bytes = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    return Merged(
        place=place,
        step=step,
        base=found.original,
        dequantized=None if scheme is None else scheme.name,
        dtype=str(stored).removeprefix("torch."),
        tensors=len(layout),
        num_bytes=num_bytes,
        difference=difference,
        tolerance=TOLERANCES[stored],
        tokens=tokens.shape[1],
    )


def _require_dtype(adapter: Path, dtype: torch.dtype | None, *, is_quantized: bool) -> None:
    if is_quantized and dtype is None:
        raise UserError(
            f"the base of {adapter} is quantized, and merging dequantizes it; say in which dtype to store the weights, "
            "such as --dtype bf16."
        )


def _tokens(directory: Path, vocabulary: int, trust_remote_code: bool) -> Tensor:
    """`TEXT` and tokens from all over the vocabulary, [1, T]: new ones are at its end, and a small tokenizer may know
    nothing of the text."""
    tokenizer = reload_tokenizer(directory, trust_remote_code=trust_remote_code)
    spread = torch.linspace(0, vocabulary - 1, 16).round().long().tolist()
    return torch.tensor([[*tokenizer(TEXT).input_ids[:16], *spread]])


def _expected_logits(base: AdapterBase, adapter: Path, tokens: Tensor, model: Model) -> Tensor:
    """[T, V] fp32: of the base, whole in memory and dequantized, with the adapter around it."""
    if scheme_of(read_config_file(base.directory)) is None:
        network = reload_model(base.directory, dtype=torch.float32, trust_remote_code=model.trust_remote_code)
    else:
        network = reload_dequantized(base.directory, model, torch.float32)
    with torch.no_grad():
        logits: Tensor = reload_adapter(network, adapter).eval()(input_ids=tokens).logits[0].float()
    return logits


def _difference(
    written: Path, adapter: Path, tokens: Tensor, expected: Tensor, dtype: torch.dtype, trust_remote_code: bool
) -> float:
    """Raises `UnderstudyError` where it is larger than allowed."""
    try:
        network = reload_model(written, dtype="auto", trust_remote_code=trust_remote_code)
        reload_tokenizer(written, trust_remote_code=trust_remote_code)
    except UnloadableModelError as error:
        raise UnderstudyError(f"{adapter} merged into its base is no model that loads: it {error.message}") from error
    with torch.no_grad():
        # In fp32, so that what rounding the weights has changed is all that is seen.
        logits = network.eval().float()(input_ids=tokens).logits[0]
    difference = float((logits - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCES[dtype]:  # NaN is no proof either
        hint = "" if dtype is torch.float32 else "; without --dtype the weights stay exact"
        raise UnderstudyError(
            f"{adapter} merged into its base computes other logits than base and adapter do, by {difference:.1e} of "
            f"the largest, more than {TOLERANCES[dtype]:.0e}; nothing was written{hint}."
        )
    return difference


def _read_back(written: Path, entries: Mapping[str, FileEntry]) -> None:
    for name, entry in entries.items():
        if describe_file(written / name) != entry:
            raise UnderstudyError(f"{name} was not stored in {written} as it was given: the disk may be failing.")


def _write_companions(
    base: AdapterBase, adapter: Path, out: Path, dtype: torch.dtype, weights: MergedWeights, *, untied: bool
) -> None:
    """The base's files, with the adapter's own tokenizer and generation defaults in place of the base's."""
    files = list(other_files(base.original, WHOLE_MODEL.stem, lambda line: None))
    if has_tokenizer(adapter):
        theirs = set(_tokenizer_files(base.original))
        files = [file for file in files if file not in theirs]
        copy_files(adapter, _tokenizer_files(adapter), out)
    copy_files(base.original, files, out)
    if (adapter / "generation_config.json").is_file():
        copy_files(adapter, [adapter / "generation_config.json"], out)
    config = read_config_file(base.original)
    config.pop("quantization_config", None)
    set_dtype(config, str(dtype).removeprefix("torch."))
    _set_vocabulary(config, weights)
    if untied:
        config["tie_word_embeddings"] = False
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _tokenizer_files(directory: Path) -> Iterator[Path]:
    for pattern in _OF_TOKENIZERS:
        yield from (file for file in directory.glob(pattern) if file.is_file())


def _set_vocabulary(config: dict[str, Any], weights: MergedWeights) -> None:
    """Where the adapter has grown it."""
    if not weights.has_grown:
        return
    for section in (config, *(value for key, value in config.items() if key == "text_config")):
        if isinstance(section.get("vocab_size"), int):
            section["vocab_size"] = weights.vocabulary
