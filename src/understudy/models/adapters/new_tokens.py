"""New tokens and what is frozen: a token whose embedding nobody trains is never learned."""

from __future__ import annotations

import re

from understudy.errors import UserError
from understudy.models.language_model import LanguageModel
from understudy.models.names import canonical_name
from understudy.recipe.adapters import Adapter, Freeze, LoRA

__all__ = ["require_trained_vocabulary"]


def require_trained_vocabulary(model: LanguageModel, adapter: Adapter | None) -> None:
    """Raises `UserError` unless `model`, as `adapter` leaves it, trains its embeddings and its head, which its new
    tokens need."""
    parts = {"embeddings": model.network.get_input_embeddings().weight, "head": model.head.weight}
    if all(weight.requires_grad for weight in parts.values()):
        return
    untied = parts["head"] is not parts["embeddings"]
    needed = ", ".join(parts if untied else ("embeddings",))
    what = "embeddings and head" if untied else "embeddings"
    key, advice = "adapter", f"take lora or dora with `train: [{needed}]`"
    if isinstance(adapter, Freeze):
        ids = {id(weight) for weight in parts.values() if not weight.requires_grad}
        names = [canonical_name(name) for name, weight in model.named_parameters() if id(weight) in ids]
        patterns = ", ".join(f"'{re.escape(name)}'" for name in names)
        key = "adapter" if adapter.parameters is None else "adapter.parameters"
        advice = f"add {patterns} to `adapter.parameters`"
    elif isinstance(adapter, LoRA):
        key, advice = "adapter.train" if adapter.train else "adapter", f"set `adapter.train: [{needed}]`"
        if adapter.path is not None:
            advice = f"train a new adapter with `train: [{needed}]`"
    raise UserError(
        f"`model.new_tokens` would never be learned, because this adapter leaves the model's {what} as they are; "
        f"{advice}, or leave the tokens out.",
        key=key,
    )
