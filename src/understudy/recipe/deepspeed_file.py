"""A DeepSpeed JSON file beside a recipe: read as it is, refused where it contradicts the recipe. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from understudy.errors import UserError
from understudy.recipe.json_text import parse_json
from understudy.recipe.schema import DeepSpeed, Recipe
from understudy.recipe.source_map import SourceMap
from understudy.recipe.text_file import read_text

__all__ = [
    "EffectiveDeepSpeed",
    "contradictions",
    "deepspeed_source",
    "effective_deepspeed",
    "file_precision",
    "read_deepspeed_file",
]

_OPTIMIZERS = {
    "adam": ("adamw",),
    "adamw": ("adamw",),
    "fusedadam": ("adamw",),
    "adam8bit": ("adamw_8bit",),
    "lion": ("lion",),
    "fusedlion": ("lion",),
    "adafactor": ("adafactor",),
    "muon": ("muon",),
    "sgd": ("sgd",),
}
"""DeepSpeed's optimizer types, in lower case, and the recipe's kinds that mean the same."""

_OPTIMIZER_PARAMS = {"lr": "learning_rate", "betas": "betas", "eps": "eps", "weight_decay": "weight_decay"}
_OPTIMIZER_PARAMS |= {"momentum": "momentum"}

_SCHEDULERS = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}

_SECTIONS = (
    "zero_optimization",
    "zero_optimization.offload_optimizer",
    "zero_optimization.offload_param",
    "fp16",
    "bf16",
    "data_types",
    "optimizer",
    "optimizer.params",
    "scheduler",
    "scheduler.params",
)


_LEAST = {
    "reduce_bucket_size": 1,
    "allgather_bucket_size": 1,
    "sub_group_size": 1,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_param_persistence_threshold": 0,
    "offload_optimizer.buffer_count": 1,
    "offload_param.buffer_count": 1,
    "offload_param.buffer_size": 1,
}
"""Numbers of a file's `zero_optimization` that say how much is held at once, and the smallest that DeepSpeed takes."""


class EffectiveDeepSpeed(NamedTuple):
    """What a strategy comes to once its file and its fields are merged."""

    stage: int
    offload_optimizer: str
    """none, cpu or nvme."""
    offload_parameters: str
    """none, cpu or nvme."""


def read_deepspeed_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a DeepSpeed JSON file, nothing filled in. Raises `UserError` with file and line."""
    return _parse(path)[0]


def deepspeed_source(path: str | Path) -> SourceMap:
    """The lines of a DeepSpeed JSON file's keys."""
    return SourceMap(str(path), _parse(path)[1])


def _parse(path: str | Path) -> tuple[dict[str, Any], dict[str, int]]:
    config, lines = parse_json(read_text(Path(path), "DeepSpeed file"), str(path))
    if not isinstance(config, dict):
        raise UserError("a DeepSpeed file is a mapping of keys; begin with {.", file=path, line=1)
    for key, problem in _malformed(config):
        raise UserError(f"`{key}` {problem}.", file=path, line=lines.get(key, 1))
    return config, lines


def _malformed(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Key and problem of what cannot even be compared with a recipe; DeepSpeed itself judges the rest."""
    for key in _SECTIONS:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None and not isinstance(value, dict):
            yield key, f"must be a mapping of keys, not {json.dumps(value)[:40]}"
    zero = config.get("zero_optimization")
    if not isinstance(zero, dict):
        return
    stage = zero.get("stage", "auto")
    if stage != "auto" and (isinstance(stage, bool) or stage not in (0, 1, 2, 3)):
        yield "zero_optimization.stage", f"must be 0, 1, 2 or 3, not {json.dumps(stage)[:40]}"
    for name, least in _LEAST.items():
        parent, _, key = name.rpartition(".")
        held: Any = zero.get(parent) if parent else zero
        value = held.get(key, "auto") if isinstance(held, dict) else "auto"
        if not _is_count(value, least):
            yield (
                f"zero_optimization.{name}",
                f'must be a whole number, at least {least}, or "auto", not {json.dumps(value)[:40]}',
            )
    for name in ("offload_optimizer", "offload_param"):
        section = zero.get(name)
        device = section.get("device", "auto") if isinstance(section, dict) else "auto"
        if device not in ("auto", "none", "cpu", "nvme"):
            yield f"zero_optimization.{name}.device", f"must be none, cpu or nvme, not {json.dumps(device)[:40]}"


def _is_count(value: Any, least: int) -> bool:
    if value == "auto":
        return True
    # 5e8 is written for 500000000.
    return not isinstance(value, bool) and isinstance(value, int | float) and value >= least and value % 1 == 0


def effective_deepspeed(strategy: DeepSpeed) -> EffectiveDeepSpeed:
    """ZeRO stage and offload of a strategy: its own fields, else its file's, else stage 2 and none.

    Raises `UserError` when the file cannot be read.
    """
    config = read_deepspeed_file(strategy.config) if strategy.config else {}
    stage, optimizer, parameters = _of_file(config)
    default_stage = 0 if strategy.config else 2  # DeepSpeed itself takes 0 where its file names no stage.
    return EffectiveDeepSpeed(
        strategy.stage if strategy.stage is not None else default_stage if stage is None else stage,
        strategy.offload_optimizer or optimizer or "none",
        strategy.offload_parameters or parameters or "none",
    )


def _of_file(config: Mapping[str, Any]) -> tuple[int | None, str | None, str | None]:
    """Stage and offload devices that a file sets; None for what it leaves out or leaves to us with "auto"."""
    zero = config.get("zero_optimization") or {}
    stage = zero.get("stage")
    devices = [(zero.get(name) or {}).get("device") for name in ("offload_optimizer", "offload_param")]
    known = [str(device) if device not in (None, "auto") else None for device in devices]
    return (None if stage in (None, "auto") else int(stage)), known[0], known[1]


def file_precision(strategy: DeepSpeed, usual: str) -> str:
    """The precision that a recipe's `auto` comes to: what the strategy's file enables, else the machine's `usual` one.

    Raises `UserError` when the file cannot be read.
    """
    config = read_deepspeed_file(strategy.config) if strategy.config else {}
    enabled = {name: (config.get(name) or {}).get("enabled") for name in ("bf16", "fp16")}
    for name, value in enabled.items():
        if value is True:
            return name
    return "fp32" if enabled.get(usual) is False else usual


def contradictions(config: Mapping[str, Any], recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Key of the DeepSpeed file, and a sentence, for each value that is set and disagrees with the recipe."""
    yield from _batch_contradictions(config, recipe)
    yield from _precision_contradictions(config, recipe)
    yield from _zero_contradictions(config, recipe)
    yield from _optimizer_contradictions(config.get("optimizer") or {}, recipe)
    yield from _scheduler_contradictions(config.get("scheduler") or {}, recipe)


def _is_set(value: Any) -> bool:
    return value is not None and value != "auto"


def _same(given: Any, ours: Any) -> bool:
    """Equal as numbers, whatever their spelling: 1 and 1.0, [0.9, 0.95] and (0.9, 0.95)."""
    if isinstance(given, list) and isinstance(ours, tuple):
        return len(given) == len(ours) and all(map(_same, given, ours))
    return bool(given == ours)


def _disagrees(key: str, given: Any, ours_key: str, ours: Any) -> tuple[str, str]:
    return (
        key,
        f"`{key}` is {json.dumps(given)} here but `{ours_key}` is {json.dumps(ours)} in the recipe; "
        'make them equal or write "auto" here.',
    )


def _batch_contradictions(config: Mapping[str, Any], recipe: Recipe) -> Iterator[tuple[str, str]]:
    training = recipe.training
    batch = config.get("train_batch_size")
    if _is_set(batch) and not _same(batch, training.global_batch_size):
        yield _disagrees("train_batch_size", batch, "training.global_batch_size", training.global_batch_size)
    clipping = config.get("gradient_clipping")
    # DeepSpeed writes "no clipping" as 0.
    if _is_set(clipping) and not _same(clipping, training.max_grad_norm or 0):
        yield _disagrees("gradient_clipping", clipping, "training.max_grad_norm", training.max_grad_norm)
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if _is_set(config.get(key)):
            yield (
                key,
                f'`{key}` must be "auto" or left out: micro-batches are streams of at most '
                "`training.micro_batch_tokens` tokens, not a number of examples.",
            )


def _precision_contradictions(config: Mapping[str, Any], recipe: Recipe) -> Iterator[tuple[str, str]]:
    reduction = {
        "data_types.grad_accum_dtype": (config.get("data_types") or {}).get("grad_accum_dtype"),
        "communication_data_type": config.get("communication_data_type"),
    }
    for key, given in reduction.items():
        if _is_set(given) and given != "fp32":
            yield key, f"`{key}` must be fp32: gradients are summed in fp32 under every strategy; leave it out."
    precision = recipe.training.precision
    if precision == "auto":
        if all((config.get(key) or {}).get("enabled") is True for key in ("bf16", "fp16")):
            yield (
                "fp16.enabled",
                "`bf16` and `fp16` are both enabled, which contradict each other; disable one of them.",
            )
        return
    for key in ("bf16", "fp16"):
        enabled = (config.get(key) or {}).get("enabled")
        if _is_set(enabled) and bool(enabled) != (precision == key):
            yield _disagrees(f"{key}.enabled", enabled, "training.precision", precision)


def _zero_contradictions(config: Mapping[str, Any], recipe: Recipe) -> Iterator[tuple[str, str]]:
    strategy = recipe.strategy
    if not isinstance(strategy, DeepSpeed):
        return
    stage, optimizer, parameters = _of_file(config)
    pairs: tuple[tuple[str, int | str | None, str, int | str | None], ...] = (
        ("zero_optimization.stage", stage, "stage", strategy.stage),
        ("zero_optimization.offload_optimizer.device", optimizer, "offload_optimizer", strategy.offload_optimizer),
        ("zero_optimization.offload_param.device", parameters, "offload_parameters", strategy.offload_parameters),
    )
    for key, given, name, ours in pairs:
        if given is not None and ours is not None and given != ours:
            yield _disagrees(key, given, f"strategy.{name}", ours)


def _optimizer_contradictions(section: Mapping[str, Any], recipe: Recipe) -> Iterator[tuple[str, str]]:
    kind = recipe.optimizer.kind
    given = section.get("type")
    if _is_set(given) and kind not in _OPTIMIZERS.get(str(given).lower(), ()):
        yield _disagrees("optimizer.type", given, "optimizer.kind", kind)
        return
    for name, value in (section.get("params") or {}).items():
        key = f"optimizer.params.{name}"
        if not _is_set(value):
            continue
        if name not in _OPTIMIZER_PARAMS:
            yield key, f'`{key}` has no equal in a recipe; write "auto" or leave it out.'
        elif not _same(value, ours := getattr(recipe.optimizer, _OPTIMIZER_PARAMS[name])):
            yield _disagrees(key, value, f"optimizer.{_OPTIMIZER_PARAMS[name]}", ours)


def _scheduler_contradictions(section: Mapping[str, Any], recipe: Recipe) -> Iterator[tuple[str, str]]:
    kind = recipe.schedule.kind
    given = section.get("type")
    if _is_set(given) and _SCHEDULERS.get(str(given)) != kind:
        yield _disagrees("scheduler.type", given, "schedule.kind", kind)
        return
    comparable = {
        "warmup_max_lr": ("optimizer.learning_rate", recipe.optimizer.learning_rate),
        "warmup_min_lr": ("the learning rate at the first step", 0),
        "warmup_type": ("the shape of the warm-up", "linear"),
        "cos_min_ratio": ("schedule.min_ratio", recipe.schedule.min_ratio),
        "total_num_steps": ("training.max_steps", recipe.training.max_steps),
    }
    for name, value in (section.get("params") or {}).items():
        key = f"scheduler.params.{name}"
        if not _is_set(value):
            continue
        if name not in comparable:
            yield (
                key,
                f'`{key}` cannot be compared with the recipe; write "auto" here and set `schedule` in the recipe.',
            )
        elif not _same(value, comparable[name][1]):
            yield _disagrees(key, value, *comparable[name])
