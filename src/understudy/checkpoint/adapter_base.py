"""The model that an adapter belongs to, found by what the adapter says or where the user says it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from understudy.checkpoint.places import find_model
from understudy.errors import UserError
from understudy.models.adapters.directory import BASE, BaseReference, adapter_settings, is_adapter, read_base
from understudy.models.identity import model_digest
from understudy.models.quantization.materialize import materialize_quantized
from understudy.models.source import fetched_directory, model_directory
from understudy.recipe.environment import cache_directory
from understudy.recipe.schema import Model, Quantization

__all__ = ["AdapterBase", "BaseNotFoundError", "find_base"]


class BaseNotFoundError(UserError):
    """An adapter's base is not where the adapter says it is."""


@dataclass(frozen=True)
class AdapterBase:
    """A base on this machine, the one that its adapter was trained on as far as that can be known."""

    original: Path
    """Its model directory."""
    directory: Path
    """What the adapter runs on: the same, or a quantized copy."""
    reference: BaseReference | None
    """What training wrote of it; None for an adapter from elsewhere."""


def find_base(adapter: Path, named: str | None, report: Callable[[str], None]) -> AdapterBase:
    """The base of the adapter in the directory `adapter`: the model or run `named`, else what the adapter refers to.

    Where training recorded a digest, the base has it; where it quantized the base, that is done again, once on a
    machine. Reads all weights of the base the first time. `report` is told of what takes time. Raises
    `BaseNotFoundError` when the base that the adapter refers to is not there or has other weights by now, `UserError`
    when the `named` one is no model or not the one.
    """
    reference = read_base(adapter)
    original = _referred(adapter, reference) if named is None else _named(adapter, named, report)
    if reference is None:
        return AdapterBase(original, original, None)
    if model_digest(original, cache_directory()) != reference.digest:
        if named is not None:
            raise UserError(
                f"{named} is not the model that the adapter in {adapter} was trained on, which was then "
                f"{_place(reference)}: its weights are others; name that model as the base."
            )
        raise BaseNotFoundError(
            f"{adapter} is an adapter of {_place(reference)}, whose weights were others than they are there now; name "
            "the model that it was trained on with --base."
        )
    return AdapterBase(original, _quantized(adapter, original, reference, report), reference)


def _referred(adapter: Path, reference: BaseReference | None) -> Path:
    if reference is None:
        settings = adapter_settings(adapter)
        path, revision = settings.get("base_model_name_or_path"), settings.get("revision")
        if not isinstance(path, str) or not path:
            raise BaseNotFoundError(
                f"{adapter} is an adapter that names no model that it belongs to; name it with --base."
            )
    else:
        path, revision = reference.path, reference.revision
    if Path(path).is_dir() or not isinstance(revision, str):
        revision = None
    try:
        return model_directory(Model(path=path, revision=revision))
    except UserError as error:
        raise BaseNotFoundError(
            f"{adapter} is an adapter of {path}, which cannot be taken from there ({_cause(error)}); name "
            "that model, wherever it is now, with --base."
        ) from error


def _named(adapter: Path, named: str, report: Callable[[str], None]) -> Path:
    path = Path(named).expanduser()
    try:
        directory = find_model(path, report).directory if path.is_dir() else fetched_directory(named)
        if is_adapter(directory):
            raise UserError(f"{named} is an adapter itself.")
        return model_directory(Model(path=str(directory)))
    except UserError as error:
        raise UserError(
            f"the base of {adapter} cannot be taken from {named}: {_cause(error)}; name a whole model."
        ) from error


def _quantized(adapter: Path, original: Path, reference: BaseReference, report: Callable[[str], None]) -> Path:
    if reference.quantization is None:
        return original
    try:
        quantization = Quantization.model_validate(dict(reference.quantization))
    except (ValidationError, TypeError, ValueError) as error:
        raise UserError(
            "does not say how the base was quantized; get the adapter again.", file=adapter / BASE
        ) from error
    return materialize_quantized(
        original, quantization, identity=reference.digest, cache=cache_directory(), report=report
    )


def _cause(error: UserError) -> str:
    """What is wrong, without what to do, which is another thing here."""
    return str(error).partition("; ")[0].rstrip(".")


def _place(reference: BaseReference) -> str:
    return reference.path + (f" (revision {reference.revision})" if reference.revision else "")
