"""VeRA (Kopiczko et al., 2024): learned scales of random projections that all layers share."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from transformers import PreTrainedModel

from understudy.models.adapters.peft_package import import_peft
from understudy.models.adapters.targets import find_targets
from understudy.recipe.adapters import VeRA

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["make_config"]


def make_config(adapter: VeRA, network: PreTrainedModel) -> PeftConfig:
    peft = import_peft()
    config = peft.VeraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        vera_dropout=adapter.dropout,
        target_modules=find_targets(network, adapter.targets, adapter.layers),
        layers_to_transform=None if adapter.layers is None else list(adapter.layers),
        save_projection=False,  # drawn again from its seed wherever the adapter is loaded
    )
    return cast("PeftConfig", config)
