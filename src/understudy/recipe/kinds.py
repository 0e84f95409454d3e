"""Which fields each kind of a section reads, so that one set in vain is refused. Imports no torch."""

from __future__ import annotations

from understudy.recipe.objectives import Distillation
from understudy.recipe.schema import Optimizer, Schedule

__all__ = ["OPTIMIZER_FIELDS", "SCHEDULE_FIELDS", "unread_fields"]

_ALWAYS = frozenset({"kind", "learning_rate", "weight_decay", "lora_plus_ratio"})

OPTIMIZER_FIELDS: dict[str, frozenset[str]] = {
    "adamw": _ALWAYS | {"betas", "eps"},
    "adamw_bf16": _ALWAYS | {"betas", "eps"},
    "adamw_8bit": _ALWAYS | {"betas", "eps"},
    "adafactor": _ALWAYS,
    "lion": _ALWAYS | {"betas"},
    "muon": _ALWAYS | {"betas", "eps"},
    "sgd": _ALWAYS | {"momentum"},
}

SCHEDULE_FIELDS: dict[str, frozenset[str]] = {
    "cosine": frozenset({"kind", "warmup_ratio", "min_ratio"}),
    "linear": frozenset({"kind", "warmup_ratio", "min_ratio"}),
    "constant": frozenset({"kind", "warmup_ratio"}),
    "polynomial": frozenset({"kind", "warmup_ratio", "min_ratio", "power"}),
    "wsd": frozenset({"kind", "warmup_ratio", "min_ratio", "decay_ratio"}),
    "step": frozenset({"kind", "warmup_ratio", "min_ratio", "gamma", "step_epochs"}),
}


DIVERGENCE_FIELDS: dict[str, frozenset[str]] = {
    "jsd": frozenset({"beta"}),
    "skew_forward_kl": frozenset({"alpha"}),
    "skew_reverse_kl": frozenset({"alpha"}),
}
"""Those that only some divergences read."""


def unread_fields(section: Optimizer | Schedule | Distillation) -> list[str]:
    """Fields of the section that its kind, or its divergence, does not read."""
    if isinstance(section, Distillation):
        read = DIVERGENCE_FIELDS.get(section.divergence, frozenset())
        return sorted(frozenset().union(*DIVERGENCE_FIELDS.values()) - read)
    read = (OPTIMIZER_FIELDS if isinstance(section, Optimizer) else SCHEDULE_FIELDS)[section.kind]
    return [name for name in type(section).model_fields if name not in read]
