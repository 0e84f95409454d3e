"""Prompt tuning (Lester et al., 2021): learned vectors in front of each document."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from transformers import PreTrainedModel

from understudy.models.adapters.peft_package import import_peft
from understudy.recipe.adapters import PromptTuning

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["make_config"]


def make_config(adapter: PromptTuning, network: PreTrainedModel) -> PeftConfig:
    text = network.config.get_text_config()
    config = import_peft().PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=adapter.tokens,
        token_dim=network.get_input_embeddings().embedding_dim,
        num_transformer_submodules=1,
        num_attention_heads=text.num_attention_heads,
        num_layers=text.num_hidden_layers,
    )
    return cast("PeftConfig", config)
