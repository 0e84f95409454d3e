"""Whether an adapter that exists is the one that a recipe speaks of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from understudy.errors import UserError
from understudy.models.adapters.directory import adapter_settings, is_adapter, open_adapter, read_base
from understudy.recipe.adapters import RESIDUAL, LoRA, PeftAdapter

__all__ = ["require_adapter", "require_same_adapter", "require_same_base"]

_PEFT_TYPES = {
    "lora": "LORA",
    "dora": "LORA",
    "ia3": "IA3",
    "vera": "VERA",
    "llama_adapter": "ADAPTION_PROMPT",
    "prompt_tuning": "PROMPT_TUNING",
}
_STORED = {
    "rank": ("r",),
    "alpha": ("lora_alpha",),
    "dropout": ("lora_dropout", "vera_dropout"),
    "rank_stabilized": ("use_rslora",),
    "targets": ("target_modules",),
    "layers": ("layers_to_transform",),
    "train": ("modules_to_save",),
    "tokens": ("num_virtual_tokens", "adapter_len"),
    "adapted_layers": ("adapter_layers",),
}
"""Fields that an existing adapter has settled, by their names in its configuration."""
_MEANING = ("peft_type", "use_dora", *(name for names in _STORED.values() for name in names if "dropout" not in name))
"""What decides which function an adapter's weights are."""


def require_adapter(directory: Path, adapter: PeftAdapter, as_new: Mapping[str, Any]) -> None:
    """Raises `UserError` unless `directory` holds an adapter of the kind that the recipe names, whose settings the
    recipe does not contradict. `as_new` is the configuration that a new one would have by this recipe."""
    if not is_adapter(directory):
        what = "is no adapter (no adapter_config.json in it)" if directory.is_dir() else "is no directory"
        raise UserError(f"{directory} {what}; name one that a run or peft saved.", key="adapter.path")
    settings = adapter_settings(directory)
    if (found := _kind(settings)) != (kind := adapter.kind):  # type: ignore[attr-defined]  # each of the union has one
        raise UserError(
            f"{directory} is an adapter of the kind {found}, not {kind}; correct `adapter.kind`.", key="adapter.kind"
        )
    if isinstance(adapter, LoRA) and adapter.init in RESIDUAL:
        raise UserError(f"the adapter in {directory} has begun already; remove `adapter.init`.", key="adapter.init")
    for field in sorted(adapter.model_fields_set & _STORED.keys()):
        for name in _STORED[field]:
            if name in settings and _plain(settings[name]) != _plain(as_new.get(name)):
                raise UserError(
                    f"`adapter.{field}` is settled by the adapter in {directory}, whose {name} is "
                    f"{_plain(settings[name])}; remove it, or train a new adapter without `adapter.path`.",
                    key=f"adapter.{field}",
                )
    open_adapter(directory)


def require_same_adapter(directory: Path, wanted: Path) -> None:
    """Raises `UserError` unless the weights in `directory` are of an adapter that means what that in `wanted` does."""
    stored, ours = adapter_settings(directory), adapter_settings(wanted)
    if _kind(stored) != _kind(ours):
        raise UserError(f"it holds an adapter of the kind {_kind(stored)}, and the recipe trains {_kind(ours)}.")
    for name in _MEANING:
        theirs, own = _plain(stored.get(name)), _plain(ours.get(name))
        if theirs != own:
            raise UserError(f"the {name} of its adapter is {theirs}, and the recipe's is {own}.")
    known, base = read_base(directory), read_base(wanted)
    ranks = [None if each is None else each.residual_rank for each in (known, base)]
    if ranks[0] != ranks[1]:
        raise UserError("its adapter began otherwise (`adapter.init`).")


def require_same_base(directory: Path, digest: str, key: str) -> None:
    """Raises `UserError` when the adapter in `directory` says that it was trained on another model than that with
    `digest`."""
    known = read_base(directory)
    if known is not None and known.digest != digest:
        raise UserError(
            f"{directory} is an adapter of another model: it was trained on {known.path}"
            + (f" (revision {known.revision})" if known.revision else "")
            + ", whose weights are not those of this one; name that model in model.path.",
            key=key,
        )


def _kind(settings: Mapping[str, Any]) -> str:
    if settings.get("use_dora"):
        return "dora"
    return next((kind for kind, name in _PEFT_TYPES.items() if name == settings["peft_type"]), settings["peft_type"])


def _plain(value: Any) -> Any:
    """As JSON has it: the order of names means nothing, and none are no names."""
    if isinstance(value, set | tuple | list):
        return sorted(value) or None
    return value
