"""Loading a saved model as anybody would, with plain transformers, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from understudy.errors import UserError
from understudy.models.adapters.library import import_peft
from understudy.models.architecture import UNBUILDABLE

__all__ = ["UNLOADABLE", "UnloadableModelError", "reload_adapter", "reload_model", "reload_tokenizer"]

UNLOADABLE = (StrictDataclassError, SafetensorError, OSError, ImportError, *UNBUILDABLE)
"""What these libraries raise for a damaged or foreign directory."""
_FAULTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


class UnloadableModelError(UserError):
    """A model directory does not load, or not as a whole."""


def reload_model(directory: Path, *, dtype: torch.dtype | Literal["auto"], trust_remote_code: bool) -> Any:
    """The transformers model in `directory`; `auto` takes the dtype that it is stored in.

    Raises `UnloadableModelError` when it does not load, and when weights are missing, left over or of another shape.
    """
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, output_loading_info=True, trust_remote_code=trust_remote_code
        )
    except UNLOADABLE as error:
        hint = ""
        if not trust_remote_code and any(directory.glob("*.py")):
            hint = " It comes with code of its own; look at that, and allow it with --trust-remote-code."
        raise UnloadableModelError(
            f"does not load with transformers: {_first_line(error)}{hint}", file=directory
        ) from error
    for fault in _FAULTS:
        if found := loading.get(fault):
            raise UnloadableModelError(f"has {fault}: {sorted(map(str, found))[:3]}.", file=directory)
    return model


def reload_adapter(model: Any, directory: Path) -> Any:
    """`model`, a transformers one, with the adapter in `directory` around it, as peft loads it.

    Raises `UnloadableModelError` when it does not load, or does not belong to the model.
    """
    peft = import_peft()
    try:
        return peft.PeftModel.from_pretrained(model, str(directory))
    except UNLOADABLE as error:
        raise UnloadableModelError(f"does not load with peft: {_first_line(error)}", file=directory) from error


def reload_tokenizer(directory: Path, *, trust_remote_code: bool) -> Any:
    """The transformers tokenizer in `directory`.

    Raises `UnloadableModelError` when there is none or it does not load.
    """
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise UnloadableModelError(
            "has no tokenizer (tokenizer.json); save the model's tokenizer beside it.", file=directory
        )
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except UNLOADABLE as error:
        raise UnloadableModelError(
            f"has a tokenizer that does not load: {_first_line(error)}", file=directory
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
