"""IA3 (Liu et al., 2022): learned factors on keys, values and feed-forward activations."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from transformers import PreTrainedModel

from understudy.errors import UserError
from understudy.models.adapters.peft_package import import_peft
from understudy.models.adapters.targets import find_targets
from understudy.recipe.adapters import IA3

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["make_config"]


def make_config(adapter: IA3, network: PreTrainedModel) -> PeftConfig:
    peft = import_peft()
    kind = network.config.model_type
    targets = adapter.targets or peft.utils.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(kind)
    if targets is None:
        raise UserError(
            f"peft has no choice of modules for IA3 on {kind}; name them with `adapter.targets`.", key="adapter.targets"
        )
    chosen = find_targets(network, targets, None)
    feedforward = peft.utils.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(kind, [])
    config = peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=chosen,
        # Factors go on what these take in, and on what the others give.
        feedforward_modules=[name for name in feedforward if isinstance(chosen, str) or name in chosen],
    )
    return cast("PeftConfig", config)
