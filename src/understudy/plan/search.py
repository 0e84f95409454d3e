"""The fastest way to run a recipe that fits: every strategy with every kind of checkpointing, and for each the largest
micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from understudy.errors import UserError
from understudy.plan.advice import lever, nearest_of, reason_against, why_chosen, why_nothing
from understudy.plan.estimate import Estimate, Estimator
from understudy.plan.hardware.hardware import Hardware
from understudy.plan.memory.activations import Checkpointing
from understudy.plan.memory.buckets import Buckets
from understudy.plan.memory.setting import strategy_of
from understudy.plan.outcome import Plan, Row
from understudy.plan.shape.model import ModelShape
from understudy.recipe.presets import STRATEGY_PRESETS
from understudy.recipe.rules.rule import RULES
from understudy.recipe.schema import DeepSpeed, Recipe, Strategy

__all__ = ["best"]

_STEP = 256
"""Micro-batches are planned in multiples of so many tokens."""
_AS_GOOD = 0.98
"""A strategy as fast as this share of the fastest may be taken before it."""
_PREFERRED = ("ddp", "fsdp", "zero2", "zero3", "zero1", "zero0")
"""Of those that are as good: what needs no other package first, and of ZeRO's stages those that leave most room."""
_TOKENS_ON_PROCESSOR = 2048
"""More at once are no faster there: one core took 512 to 8,192 tokens at rates within 4 %, and only memory is lost."""
_KINDS: tuple[Checkpointing, ...] = ("none", "selective", "full")


def best(
    recipe: Recipe,
    hardware: Hardware,
    shape: ModelShape,
    *,
    teachers: Sequence[ModelShape | None] = (),
    limit_bytes: int | None = None,
    lacking: Callable[[Strategy, str], str | None] | None = None,
    levers: bool = True,
) -> Plan:
    """A plan for `recipe` on `hardware`: the fastest of what fits is chosen.

    What the recipe fixes (strategy, `micro_batch_tokens`, checkpointing, precision) is kept. `shape` is the model's,
    `teachers` those of a distillation's teachers in the recipe's order, None for what is no model of its own.
    `limit_bytes` is what a process may take of its device's memory, all that programs can have when left out. `lacking`
    says of a strategy and a precision what the machine lacks for it; nothing where it is left out. With `levers` a plan
    in which nothing fits says what would. Raises `UserError` where recipe and model do not go together.
    """
    estimator = Estimator(recipe, hardware, shape, teachers)
    limit = limit_bytes or hardware.accelerator.usable_bytes
    precision = estimator.precision.name
    asked = () if recipe.strategy == "auto" else _bucketed(recipe.strategy)
    # What belongs to the recipe's own strategy alone does not speak against the others.
    single = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"replicate": 1})})
    rows = tuple(
        _row(
            name,
            variants := _bucketed(strategy),
            estimator,
            limit,
            lacking(strategy, precision) if lacking else None,
            recipe if set(variants) & set(asked) else single,
        )
        for name, strategy in _strategies(recipe)
    )
    allowed = [row for row in rows if not asked or row.strategy in asked]
    fitting = [row for row in allowed if row.fits]
    chosen = _choose(fitting)
    nearest = None
    if chosen is not None:
        sentence = why_chosen(chosen, rows, hardware, fixed=recipe.strategy != "auto")
    else:
        nearest = nearest_of(allowed, limit, hardware)
        sentence = why_nothing(allowed, nearest)
    advice = None
    if chosen is None and levers:
        advice = lever(
            recipe,
            hardware,
            nearest,
            lambda changed, other, room: best(
                changed,
                other,
                shape,
                teachers=teachers,
                limit_bytes=room or limit_bytes,
                lacking=lacking,
                levers=False,
            ),
        )
    return Plan(hardware, limit, shape, estimator.network.trained, precision, rows, chosen, sentence, advice, nearest)


def _strategies(recipe: Recipe) -> Iterator[tuple[str, Strategy]]:
    """Every preset, and the recipe's own strategy where that is none of them."""
    own = recipe.strategy
    presets = {name: strategy_of(settings) for name, settings in STRATEGY_PRESETS.items()}
    if own != "auto":
        presets = {name: own if _with_buckets(own, "auto") == preset else preset for name, preset in presets.items()}
    yield from presets.items()
    if own != "auto" and own not in presets.values():
        chosen = own.model_dump(exclude={"kind"}, exclude_defaults=True)
        yield " ".join([own.kind, *(f"{name}={value}" for name, value in chosen.items())]), own


def _with_buckets(strategy: Strategy, buckets: Buckets) -> Strategy:
    return strategy.model_copy(update={"buckets": buckets}) if isinstance(strategy, DeepSpeed) else strategy


def _bucketed(strategy: Strategy) -> tuple[Strategy, ...]:
    """With buckets as the recipe has them, else with large ones, or small ones where there is no room for those."""
    if not isinstance(strategy, DeepSpeed) or strategy.buckets != "auto":
        return (strategy,)
    return _with_buckets(strategy, "large"), _with_buckets(strategy, "small")


def _choose(fitting: Sequence[Row]) -> Row | None:
    if not fitting:
        return None
    fastest = max(row.tokens_per_second_per_device for row in fitting)
    good = [row for row in fitting if row.tokens_per_second_per_device >= _AS_GOOD * fastest]
    order = {name: place for place, name in enumerate(_PREFERRED)}
    return min(good, key=lambda row: (order.get(row.name, len(order)), -row.tokens_per_second_per_device))


def _row(
    name: str, variants: Sequence[Strategy], estimator: Estimator, limit: int, lacks: str | None, recipe: Recipe
) -> Row:
    """Of one strategy at its best; of `variants`, of which the first is the one to prefer. It must keep the rules of
    `recipe`."""
    asked = recipe.training.activation_checkpointing
    kinds = _KINDS if asked == "auto" else (asked,)
    refusals = {kind: lacks or _refusal(recipe, variants[0], kind, estimator.precision.name) for kind in kinds}
    possible = [kind for kind in kinds if refusals[kind] is None]
    best_of: list[tuple[Estimate, Checkpointing, Strategy]] = []
    for strategy in variants:
        found = [(one, kind, strategy) for kind in possible if (one := _largest(estimator, strategy, kind, limit))]
        best_of += [max(found, key=lambda one: one[0].tokens_per_second)] if found else []
    if best_of:
        fastest = max(estimate.tokens_per_second for estimate, _, _ in best_of)
        estimate, kind, strategy = next(one for one in best_of if one[0].tokens_per_second >= _AS_GOOD * fastest)
        return _made(name, strategy, kind, estimate, None)
    tried = [
        (_smallest(estimator, strategy, kind), kind, strategy) for kind in possible or kinds for strategy in variants
    ]
    estimate, kind, strategy = min(tried, key=lambda one: one[0].peak.total_bytes)
    refused = None if possible else next(iter(refusals.values()))
    reason = refused or reason_against(
        estimate.peak.total_bytes, _teachers_own(estimator), limit, estimate.host_bytes, estimator.hardware
    )
    return _made(name, strategy, kind, estimate, reason, refused=refused is not None)


def _made(
    name: str,
    strategy: Strategy,
    kind: Checkpointing,
    estimate: Estimate,
    reason: str | None,
    *,
    refused: bool = False,
) -> Row:
    time = estimate.time
    return Row(
        name=name,
        strategy=strategy,
        fits=reason is None,
        reason=reason,
        refused=refused,
        device_peak_bytes=estimate.peak.total_bytes,
        tensor_peak_bytes=estimate.peak.tensor_bytes,
        host_peak_bytes=estimate.host_bytes,
        disk_bytes=estimate.disk_bytes,
        micro_batch_tokens=estimate.tokens,
        micro_batches=estimate.micro_batches,
        activation_checkpointing=kind,
        tokens_per_second_per_device=estimate.tokens_per_second,
        step_seconds=time.total,
        bound=time.bound,
        seconds={
            "compute": time.compute,
            "memory bandwidth": time.memory,
            "interconnect": time.interconnect,
            "host link": time.host,
        },
        peak_moment=estimate.peak.moment,
        breakdown=estimate.peak.breakdown,
    )


def _refusal(recipe: Recipe, strategy: Strategy, kind: Checkpointing, precision: str) -> str | None:
    """Why the recipe's rules do not allow the strategy, the first of the reasons."""
    training = recipe.training.model_copy(update={"activation_checkpointing": kind, "precision": precision})
    candidate = recipe.model_copy(update={"strategy": strategy, "training": training})
    try:
        return next((message for rule in RULES for _, message in rule(candidate)), None)
    except UserError as error:  # a DeepSpeed file that cannot be read
        return error.message


def _largest(estimator: Estimator, strategy: Strategy, kind: Checkpointing, limit: int) -> Estimate | None:
    """With the most tokens that fit, at most what a step has for a process, and on a processor at most what makes it
    faster; None where not even one example does."""

    def fitting(tokens: int) -> Estimate | None:
        estimate = estimator.at(strategy, kind, tokens)
        return estimate if _fits(estimate, limit, estimator) else None

    fixed, shortest = estimator.recipe.training.micro_batch_tokens, estimator.recipe.data.max_length
    if fixed != "auto":
        return fitting(fixed)
    # One that holds all of a step needs no gradients beside it, and so may fit where a smaller one does not.
    most = estimator.share if estimator.hardware.accelerated else min(estimator.share, _TOKENS_ON_PROCESSOR)
    whole = fitting(max(shortest, most))
    if whole is not None:
        return whole
    found = fitting(shortest)
    if found is None:
        return None
    low, high = shortest // _STEP + 1, max(shortest, most) // _STEP
    while low <= high:
        middle = (low + high) // 2
        estimate = fitting(middle * _STEP)
        if estimate is None:
            high = middle - 1
        else:
            found, low = estimate, middle + 1
    return found


def _smallest(estimator: Estimator, strategy: Strategy, kind: Checkpointing) -> Estimate:
    fixed = estimator.recipe.training.micro_batch_tokens
    return estimator.at(strategy, kind, estimator.recipe.data.max_length if fixed == "auto" else fixed)


def _fits(estimate: Estimate, limit: int, estimator: Estimator) -> bool:
    room = estimator.hardware.host_bytes
    on_devices = max(estimate.peak.total_bytes, _teachers_own(estimator))
    return on_devices <= limit and (not room or estimate.host_bytes <= room)


def _teachers_own(estimator: Estimator) -> int:
    """On a device that teachers have for themselves; 0 where there is none."""
    teachers = estimator.teacher.other_bytes
    return teachers + estimator.context_bytes if teachers else 0
