"""The DeepSpeed engine's configuration: the user's file as it is, "auto" filled in, the recipe's choices added."""

from __future__ import annotations

import copy
from typing import Any

from understudy.plan.memory.buckets import zero_sizes
from understudy.recipe.deepspeed_file import effective_deepspeed, read_deepspeed_file
from understudy.recipe.schema import DeepSpeed, Recipe
from understudy.strategies.precision import Precision

__all__ = ["engine_config"]

ACCUMULATION = 2
"""Any number above 1: with 1, DeepSpeed 0.14.4 leaves out its accumulation buffers for offloaded gradients."""


def engine_config(
    recipe: Recipe, precision: Precision, *, world_size: int, hidden_size: int, num_trained: int
) -> dict[str, Any]:
    """A complete DeepSpeed configuration without "auto".

    Micro-batches are flat token streams whose number changes from step to step; the strategy marks the last one itself
    and scales the loss itself, so the engine's batch sizes only have to tell it that it accumulates. Stage 0 runs the
    engine in fp32 over cast weights (see `precision.compute_in`) and clips outside of it, since its own bf16 mode would
    accumulate gradients in bf16.
    """
    settings = recipe.strategy
    assert isinstance(settings, DeepSpeed)
    stage, offload_optimizer, offload_parameters = effective_deepspeed(settings)
    config: dict[str, Any] = copy.deepcopy(read_deepspeed_file(settings.config)) if settings.config else {}
    for section in ("optimizer", "scheduler"):
        config.pop(section, None)  # equal to the recipe's, or a rule would have refused the file
    config.update(
        train_batch_size=ACCUMULATION * world_size,
        train_micro_batch_size_per_gpu=1,
        gradient_accumulation_steps=ACCUMULATION,
        gradient_clipping=(recipe.training.max_grad_norm or 0.0) if stage > 0 else 0.0,
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
    )
    config.setdefault("steps_per_print", 2**31)
    _set_precision(config, recipe.training.precision if stage > 0 else "fp32")
    zero = config.setdefault("zero_optimization", {})
    zero["stage"] = stage
    sizes = zero_sizes(zero, settings.buckets, hidden=hidden_size, trained=num_trained)
    zero.update({key: size for key, size in sizes.items() if stage == 3 or not key.startswith("stage3_")})
    for key, target in (("offload_optimizer", offload_optimizer), ("offload_param", offload_parameters)):
        if target == "none":
            zero.pop(key, None)
        else:
            zero.setdefault(key, {}).setdefault("device", target)
            if target == "nvme":
                zero[key].setdefault("nvme_path", settings.nvme_path)
    return {key: _without_auto(value) for key, value in config.items() if value != "auto"}


def _set_precision(config: dict[str, Any], precision: str) -> None:
    for name in ("bf16", "fp16"):
        section = config.setdefault(name, {})
        section["enabled"] = precision == name
    if precision in ("bf16", "fp16"):
        # fp32 accumulation and reduction, as every strategy does (design §6).
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
        config.setdefault("communication_data_type", "fp32")
    # A step whose gradient is not finite must leave the weights alone; fp16 does so by itself.
    config["bf16"].setdefault("check_grad_overflow", True)


def _without_auto(value: Any) -> Any:
    """Drops what is still "auto": DeepSpeed's own default then holds."""
    if isinstance(value, dict):
        return {key: _without_auto(item) for key, item in value.items() if item != "auto"}
    return value
