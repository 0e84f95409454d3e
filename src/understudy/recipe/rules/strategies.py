"""Rules about strategies. Imports no torch."""

from __future__ import annotations

from understudy.recipe.deepspeed_file import effective_deepspeed, read_deepspeed_file
from understudy.recipe.rules.rule import Violations, rule
from understudy.recipe.schema import FSDP, DeepSpeed, Recipe


@rule
def hybrid_shard_and_replicate_go_together(recipe: Recipe) -> Violations:
    hybrid = isinstance(recipe.strategy, FSDP) and recipe.strategy.sharding == "hybrid_shard"
    if hybrid and recipe.parallel.replicate == 1:
        yield (
            "strategy.sharding",
            "hybrid_shard needs `parallel.replicate` above 1, the number of groups it copies over.",
        )
    if not hybrid and recipe.parallel.replicate > 1:
        yield (
            "parallel.replicate",
            "`parallel.replicate` above 1 needs `strategy: {kind: fsdp, sharding: hybrid_shard}`; set both or neither.",
        )


@rule
def deepspeed_keeps_fp32_weights(recipe: Recipe) -> Violations:
    if isinstance(recipe.strategy, DeepSpeed) and recipe.training.precision == "pure_bf16":
        yield (
            "training.precision",
            "deepspeed keeps fp32 master weights, so pure_bf16 cannot hold; take bf16, or the ddp or fsdp strategy.",
        )


@rule
def partitioned_parameters_have_no_rows(recipe: Recipe) -> Violations:
    if isinstance(recipe.strategy, DeepSpeed) and recipe.optimizer.kind in ("muon", "adafactor"):
        stage = effective_deepspeed(recipe.strategy).stage
        if stage >= 1:
            yield (
                "optimizer.kind",
                f"{recipe.optimizer.kind} needs whole matrices but ZeRO stage {stage} partitions them flat; "
                "take another optimizer, `strategy: zero0`, ddp or fsdp.",
            )


@rule
def offloaded_optimizer_state_needs_adamw(recipe: Recipe) -> Violations:
    if not isinstance(recipe.strategy, DeepSpeed) or recipe.optimizer.kind == "adamw":
        return
    device = effective_deepspeed(recipe.strategy).offload_optimizer
    if device != "none":
        yield (
            "optimizer.kind",
            f"deepspeed steps offloaded state ({device}) with DeepSpeedCPUAdam, which cannot do "
            f"{recipe.optimizer.kind}; take adamw or no `strategy.offload_optimizer`.",
        )


@rule
def optimizer_offload_needs_partitions(recipe: Recipe) -> Violations:
    if isinstance(recipe.strategy, DeepSpeed):
        stage, offload, _ = effective_deepspeed(recipe.strategy)
        if offload != "none" and stage == 0:
            yield "strategy", "ZeRO stage 0 partitions no optimizer state to offload; take stage 1, 2 or 3."


@rule
def parameter_offload_needs_stage_3(recipe: Recipe) -> Violations:
    if isinstance(recipe.strategy, DeepSpeed):
        stage, _, offload = effective_deepspeed(recipe.strategy)
        if offload != "none" and stage != 3:
            yield (
                "strategy.offload_parameters" if recipe.strategy.offload_parameters else "strategy",
                f"only ZeRO stage 3 offloads parameters, and the stage is {stage}; take `stage: 3`.",
            )


@rule
def nvme_offload_has_a_path(recipe: Recipe) -> Violations:
    strategy = recipe.strategy
    if not isinstance(strategy, DeepSpeed) or strategy.nvme_path:
        return
    _, optimizer, parameters = effective_deepspeed(strategy)
    config = read_deepspeed_file(strategy.config) if strategy.config else {}
    zero = config.get("zero_optimization") or {}
    for name, device in (("offload_optimizer", optimizer), ("offload_param", parameters)):
        if device == "nvme" and not (zero.get(name) or {}).get("nvme_path"):
            yield "strategy", f"`{name}` to nvme needs `strategy.nvme_path`, a directory on that disk."


@rule
def selective_checkpointing_cannot_repeat_stage_3(recipe: Recipe) -> Violations:
    strategy, kind = recipe.strategy, recipe.training.activation_checkpointing
    if kind == "selective" and isinstance(strategy, DeepSpeed) and effective_deepspeed(strategy).stage == 3:
        yield (
            "training.activation_checkpointing",
            "ZeRO stage 3 gathers parameters inside the layers that `selective` would partly recompute; "
            "take `full` or `none`, or take fsdp, which shards as much.",
        )


@rule
def compile_cannot_see_through_stage_3(recipe: Recipe) -> Violations:
    strategy = recipe.strategy
    if recipe.training.compile and isinstance(strategy, DeepSpeed) and effective_deepspeed(strategy).stage == 3:
        yield (
            "training.compile",
            "ZeRO stage 3 gathers parameters in hooks that `training.compile` cannot trace; "
            "turn it off, or take fsdp, which shards as much.",
        )
