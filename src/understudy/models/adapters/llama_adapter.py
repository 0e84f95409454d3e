"""LLaMA-Adapter (Zhang et al., 2023): prompts that the upper layers attend to through a gate that begins at zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from transformers import PreTrainedModel

from understudy.errors import UserError
from understudy.models.adapters.peft_package import import_peft
from understudy.recipe.adapters import LlamaAdapter

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["make_config"]


def make_config(adapter: LlamaAdapter, network: PreTrainedModel) -> PeftConfig:
    peft = import_peft()
    from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG

    kind, total = network.config.model_type, network.config.get_text_config().num_hidden_layers
    # Of the architectures that peft knows, the one whose attention has this form.
    if kind not in ("llama", "mistral") or kind not in TRANSFORMERS_MODEL_CONFIG:
        raise UserError(
            f"LLaMA-Adapter works on llama and mistral models, and this is {kind}; take another adapter, such as lora.",
            key="adapter.kind",
        )
    layers = max(1, total - 2) if adapter.adapted_layers is None else adapter.adapted_layers
    if layers > total:
        raise UserError(
            f"`adapter.adapted_layers` is {layers}, and the model has {total} layers.", key="adapter.adapted_layers"
        )
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=adapter.tokens, adapter_layers=layers)
    return cast("PeftConfig", config)
