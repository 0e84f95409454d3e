"""DDP and ZeRO stage 0: every process has all weights, gradients and moments (`strategies.ddp`, `.torch_native`)."""

from __future__ import annotations

from dataclasses import replace

from understudy.plan.memory.optimizer import moment_bytes, step_scratch
from understudy.plan.memory.setting import FP32, Costs, Instant, Setting
from understudy.plan.network import Held
from understudy.recipe.schema import DDP

__all__ = ["replicated_costs"]

_BUCKET = 500_000_000
"""Elements that DeepSpeed's stage 0 sends at a time, out of a copy."""


def replicated_costs(setting: Setting) -> Costs:
    """Master weights, of which each use casts a copy; gradients in their dtype, which DDP keeps in buckets between
    steps, and a single process or stage 0 has from the first backward pass of a step on."""
    precision, trained = setting.precision, setting.network.trained
    weights, compute = precision.weights, precision.compute
    casts = weights != compute
    in_buckets = isinstance(setting.strategy, DDP) and setting.processes > 1
    everything = weights * trained
    # Gradients of the earlier micro-batches are no views of the buckets: autograd makes them anew after each step.
    there = everything * (in_buckets + setting.accumulates)
    head, embedding = setting.head_gradient, setting.embedding_gradient
    made = compute + weights if casts else compute
    # The gradient of a tied table waits for its other part, apart from the sums that are there.
    waits = weights * head if setting.network.shape.sizes.tied or not there else 0
    below = weights * (trained - setting.outside_numel + (0 if setting.network.shape.sizes.tied else head))
    stage_0 = not isinstance(setting.strategy, DDP) and setting.processes > 1
    sent = FP32 * min(trained, _BUCKET) if stage_0 else 0
    whole = Instant(1.0, gradients=max(there, everything))
    return Costs(
        weights=setting.replicated_weights,
        moments=moment_bytes(setting, _all, weights),
        loss=Instant(gathered=compute * setting.network.head_numel if casts and head else 0, gradients=there),
        head=Instant(gradients=there + compute * head),
        layers=(Instant(gradients=there + waits), Instant(1.0, gradients=max(there, below) + waits)),
        embedding=replace(whole, gradients=max(there + waits, everything) + made * embedding),
        step=replace(whole, communication=max(sent, step_scratch(setting, _all))),
        casts=casts,
        made=made,
    )


def _all(held: Held) -> int:
    return held.numel
