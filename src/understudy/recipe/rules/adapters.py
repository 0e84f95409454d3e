"""Rules about adapters and quantized bases. Imports no torch."""

from __future__ import annotations

from understudy.recipe.adapters import RESIDUAL, Freeze, LoRA
from understudy.recipe.rules.rule import Violations, rule
from understudy.recipe.schema import Recipe


@rule
def quantized_weights_are_frozen(recipe: Recipe) -> Violations:
    if recipe.quantization is not None and (recipe.adapter is None or isinstance(recipe.adapter, Freeze)):
        yield (
            "quantization",
            "`quantization` is for weights that are not trained; add `adapter: lora`, or another that peft makes, or "
            "remove it.",
        )


@rule
def eight_bits_have_no_type(recipe: Recipe) -> Violations:
    if recipe.quantization is not None and recipe.quantization.bits == 8:
        for name in ("type", "double"):
            if getattr(recipe.quantization, name) is not None:
                yield f"quantization.{name}", f"`quantization.{name}` means nothing to 8 bits; remove it."


@rule
def a_residual_is_of_whole_weights(recipe: Recipe) -> Violations:
    if recipe.quantization is not None and isinstance(recipe.adapter, LoRA) and recipe.adapter.init in RESIDUAL:
        yield (
            "adapter.init",
            f"{recipe.adapter.init} takes a part out of each weight, and the adapter would then not fit the quantized "
            "base that everybody else makes; take `init: default`, or no `quantization`.",
        )


@rule
def lora_plus_is_of_lora(recipe: Recipe) -> Violations:
    if recipe.optimizer.lora_plus_ratio != 1.0 and not isinstance(recipe.adapter, LoRA):
        yield (
            "optimizer.lora_plus_ratio",
            "`optimizer.lora_plus_ratio` is about LoRA's B matrices, and there are none; add `adapter: lora` or remove "
            "it.",
        )
