"""What fields of a recipe must hold together: one small function a rule, all violations reported at once.

A rule yields `(key, message)` for each violation. Adding one means adding a function. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from understudy.errors import RecipeError, UserError, Violation
from understudy.recipe.adapters import RESIDUAL, Freeze, LoRA
from understudy.recipe.deepspeed_file import (
    contradictions,
    deepspeed_source,
    effective_deepspeed,
    read_deepspeed_file,
)
from understudy.recipe.kinds import unread_fields
from understudy.recipe.schema import FSDP, DeepSpeed, Recipe
from understudy.recipe.source_map import SourceMap

__all__ = ["RULES", "check", "check_processes"]

Violations = Iterator[tuple[str, str]]
Rule = Callable[[Recipe], Violations]

RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    RULES.append(function)
    return function


def check(recipe: Recipe, source: SourceMap, violations: Sequence[Violation] = ()) -> None:
    """Raises `RecipeError` with `violations` and those of every rule, if there are any."""
    found = list(violations)
    strategy = recipe.strategy
    if isinstance(strategy, DeepSpeed) and strategy.config is not None:
        try:
            config = read_deepspeed_file(strategy.config)
        except UserError as error:
            found.append(Violation("strategy.config", error.message, error.file, error.line))
            # The other rules still have their say, about what the recipe itself states.
            recipe = recipe.model_copy(update={"strategy": strategy.model_copy(update={"config": None})})
        else:
            lines = deepspeed_source(strategy.config)
            found.extend(lines.violation(key, message) for key, message in contradictions(config, recipe))
    found.extend(source.violation(key, message) for rule in RULES for key, message in rule(recipe))
    if found:
        raise RecipeError(found)


def check_processes(recipe: Recipe, processes: int, source: SourceMap) -> None:
    """Raises `RecipeError` when the run cannot be split over so many processes."""
    found = [source.violation(key, message) for key, message in _process_violations(recipe, processes)]
    if found:
        raise RecipeError(found)


def _process_violations(recipe: Recipe, processes: int) -> Violations:
    batch, replicate = recipe.training.global_batch_size, recipe.parallel.replicate
    if processes > batch:
        yield (
            "training.global_batch_size",
            f"{processes} processes are more than a batch of {batch} examples can feed; "
            f"raise `training.global_batch_size` to {processes} or start at most {batch} processes.",
        )
    if processes % replicate:
        yield (
            "parallel.replicate",
            f"{processes} processes cannot be split into {replicate} equal groups; "
            f"`parallel.replicate` must divide the number of processes.",
        )


# Run


@rule
def a_name_is_one_part_of_a_path(recipe: Recipe) -> Violations:
    if not recipe.name.strip(". ") or any(mark in recipe.name for mark in "/\\\0"):
        yield "name", f"`name` is {recipe.name!r}; it names the run's directory, so it must be a word without slashes."


@rule
def the_output_directory_has_a_name(recipe: Recipe) -> Violations:
    if not recipe.output_dir.strip() or "\0" in recipe.output_dir:
        yield "output_dir", "`output_dir` must name a directory; leave it out for runs/<name>."


@rule
def the_batch_feeds_every_process(recipe: Recipe) -> Violations:
    if recipe.cluster.processes != "auto":
        yield from _process_violations(recipe, recipe.cluster.processes)


# Model and data


@rule
def a_pretrained_model_has_a_path(recipe: Recipe) -> Violations:
    if recipe.model.init == "pretrained" and not recipe.model.path:
        yield (
            "model",
            "`model.path` is missing; name a Hub id or a directory, or build a new model with `init: random`.",
        )


@rule
def a_random_model_has_an_architecture(recipe: Recipe) -> Violations:
    if recipe.model.init == "random" and not recipe.model.path and not recipe.model.config.get("model_type"):
        yield (
            "model",
            "`init: random` needs `model.config.model_type` (such as llama) or a `model.path` to take it from.",
        )


@rule
def a_random_model_has_a_tokenizer(recipe: Recipe) -> Violations:
    if recipe.model.init == "random" and not recipe.model.path and not recipe.model.tokenizer:
        yield "model", "`model.tokenizer` is missing; without a `model.path` there is none to take it from."


@rule
def a_revision_is_of_something_on_the_hub(recipe: Recipe) -> Violations:
    if recipe.model.revision is not None and not recipe.model.path:
        yield "model.revision", "`model.revision` means nothing without a `model.path`; remove it."


@rule
def new_tokens_are_different_words(recipe: Recipe) -> Violations:
    tokens = recipe.model.new_tokens
    if any(not token.strip() for token in tokens):
        yield "model.new_tokens", "`model.new_tokens` names a token of white space only; remove it."
    if twice := [token for number, token in enumerate(tokens) if token in tokens[:number]]:
        yield "model.new_tokens", f"`model.new_tokens` names {twice[0]!r:.60} twice; remove one of them."


@rule
def every_source_has_a_path(recipe: Recipe) -> Violations:
    for part, sources in (("train", recipe.data.train), ("eval", recipe.data.eval or ())):
        for number, source in enumerate(sources):
            if not source.path.strip():
                yield f"data.{part}.{number}.path", "`path` is empty; name a file, a directory, a glob or a Hub id."


@rule
def a_micro_batch_holds_the_longest_example(recipe: Recipe) -> Violations:
    tokens, longest = recipe.training.micro_batch_tokens, recipe.data.max_length
    if tokens != "auto" and tokens < longest:
        yield (
            "training.micro_batch_tokens",
            f"`training.micro_batch_tokens` is {tokens}, less than one example of `data.max_length` {longest}; "
            f"raise it to {longest} or shorten `data.max_length`.",
        )


@rule
def evaluation_data_comes_from_one_place(recipe: Recipe) -> Violations:
    if recipe.data.eval is not None and recipe.data.eval_fraction > 0:
        yield "data.eval_fraction", "`data.eval` and `data.eval_fraction` contradict each other; remove one of them."


@rule
def evaluation_has_data(recipe: Recipe) -> Violations:
    if recipe.data.eval is not None or recipe.data.eval_fraction > 0:
        return
    for name in ("every", "samples", "max_batches"):
        if getattr(recipe.evaluation, name):
            yield (
                f"evaluation.{name}",
                f"`evaluation.{name}` is set but there is nothing to evaluate on; "
                "give `data.eval` or `data.eval_fraction`.",
            )


@rule
def the_best_checkpoint_is_told_by_evaluation(recipe: Recipe) -> Violations:
    if recipe.checkpoint.keep_best and recipe.data.eval is None and recipe.data.eval_fraction == 0:
        yield (
            "checkpoint.keep_best",
            "`checkpoint.keep_best` is set but there is nothing to evaluate on; "
            "give `data.eval` or `data.eval_fraction`.",
        )


@rule
def resuming_has_a_place(recipe: Recipe) -> Violations:
    if not recipe.checkpoint.resume.strip() or "\0" in recipe.checkpoint.resume:
        yield "checkpoint.resume", "`checkpoint.resume` must be auto, never, or the path of a checkpoint."


# Adapters


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


# Optimization


@rule
def a_run_has_one_length(recipe: Recipe) -> Violations:
    if recipe.training.max_steps is not None and "epochs" in recipe.training.model_fields_set:
        yield (
            "training.max_steps",
            "`training.max_steps` and `training.epochs` contradict each other; remove one of them.",
        )


@rule
def every_optimizer_field_is_read(recipe: Recipe) -> Violations:
    for name in unread_fields(recipe.optimizer):
        if name in recipe.optimizer.model_fields_set:
            yield f"optimizer.{name}", f"`optimizer.{name}` means nothing to {recipe.optimizer.kind}; remove it."


@rule
def every_schedule_field_is_read(recipe: Recipe) -> Violations:
    for name in unread_fields(recipe.schedule):
        if name in recipe.schedule.model_fields_set:
            yield (
                f"schedule.{name}",
                f"`schedule.{name}` means nothing to the {recipe.schedule.kind} schedule; remove it.",
            )


@rule
def adamw_bf16_keeps_bf16_weights(recipe: Recipe) -> Violations:
    if recipe.optimizer.kind == "adamw_bf16" and recipe.training.precision != "pure_bf16":
        yield (
            "optimizer.kind",
            f"adamw_bf16 keeps weights in bf16 but `training.precision` is {recipe.training.precision}; "
            "set it to pure_bf16 or take adamw.",
        )


@rule
def bf16_moments_follow_their_gradients(recipe: Recipe) -> Violations:
    # Near a beta of 1 - 2^-9, half a unit of bf16, an average that should fall rounds back to where it was.
    second = recipe.optimizer.betas[1]
    if recipe.optimizer.kind == "adamw_bf16" and second > 0.99:
        yield (
            "optimizer.betas",
            f"a bf16 second moment cannot follow gradients that shrink with a second beta of {second}; "
            "take at most 0.99, or adamw.",
        )


# Strategies


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
