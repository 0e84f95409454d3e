"""Canonical parameter names: what `transformers` and `peft` call a weight, whatever has wrapped the module since."""

from __future__ import annotations

import re

__all__ = ["canonical_name", "is_beside_model", "map_name"]

_WRAPPERS = re.compile(
    r"^(?:module\.)?network\.|^module\.(?=prompt_|distillation\.)|_orig_mod\.|_checkpoint_wrapped_module\."
)
_PARAMETRIZED = re.compile(r"parametrizations\.([^.]+)\.original$")
# A layer that an adapter was put around, by LoRA and its kin and by LLaMA-Adapter.
_ADAPTED = re.compile(r"\.base_layer(?=\.)|(?<=attn)\.model(?=\.)")
# In memory the adapter's own parameters carry its name, and a magnitude is a layer; in peft's files neither is so.
_ADAPTER = re.compile(r"\.(lora_\w+|ia3_l|vera_lambda_\w)\.default\b")
_MAGNITUDE = re.compile(r"(\.lora_magnitude_vector)\.weight$")
_MAP = re.compile(r"distillation\.projections\.\d+\.weight")


def canonical_name(name: str) -> str:
    """`module.network.lm_head.parametrizations.weight.original` becomes `lm_head.weight`."""
    plain = _PARAMETRIZED.sub(r"\1", _WRAPPERS.sub("", name))
    return _MAGNITUDE.sub(r"\1", _ADAPTER.sub(r".\1", _ADAPTED.sub("", plain)))


def map_name(layer: int) -> str:
    """Of the weight of the map from decoder layer `layer` of a student to its teacher's width (`LayerMaps`)."""
    return f"distillation.projections.{layer}.weight"


def is_beside_model(name: str) -> bool:
    """Whether the parameter with this canonical name is trained beside the model: checkpoints need it to go on, and no
    saved model has it."""
    return _MAP.fullmatch(name) is not None
