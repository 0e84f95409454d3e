"""ZeRO stages 1 and 2: weights in every process, optimizer state shared out, at stage 2 gradients too.

As DeepSpeed 0.19 implements them: `runtime.bf16_optimizer` for stage 1 in bf16, `runtime.zero.stage_1_and_2` else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from understudy.plan.memory.optimizer import moment_bytes, step_scratch
from understudy.plan.memory.setting import FP32, Costs, Instant, Setting
from understudy.plan.network import Held
from understudy.recipe.deepspeed_file import effective_deepspeed
from understudy.recipe.schema import DeepSpeed

__all__ = ["filled_at", "zero_costs"]

_PUT_TOGETHER = 500_000_000
"""DeepSpeed's: of fewer elements than that, stage 1 in bf16 puts all gradients together to send them."""


def zero_costs(setting: Setting) -> Costs:
    assert isinstance(setting.strategy, DeepSpeed), "chosen by its kind"
    stage, offload, _ = effective_deepspeed(setting.strategy)
    return _stage_1(setting) if stage == 1 and offload == "none" else _stage_2(setting, stage, offload != "none")


def _stage_1(setting: Setting) -> Costs:
    """fp32 gradients of all weights, in bf16 beside those that the backward pass makes, which are never let go."""
    network, compute = setting.network, setting.precision.compute
    trained = network.trained
    part = -(-trained // setting.processes)
    wide, bf16 = FP32 * trained, setting.precision.name == "bf16"
    # Beside the sums, in bf16, those that the backward pass makes.
    gradients = wide + (compute * trained if bf16 else 0)
    there = gradients if setting.accumulates else wide if bf16 else 0
    bucket = 0 if bf16 else FP32 * min(setting.sizes["reduce_bucket_size"], trained)
    waits = 0 if bf16 else _waiting(setting)
    last = compute * (setting.layer_trained + (0 if setting.network.shape.sizes.tied else setting.embedding_gradient))
    return Costs(
        weights=setting.held_bytes(compute) + FP32 * part,
        moments=moment_bytes(setting, _part(setting), FP32),
        # What the last micro-batch sent is let go only when the next one sends.
        loss=Instant(gradients=there, communication=bucket if setting.accumulates else 0),
        head=Instant(gradients=there + compute * setting.head_gradient, communication=bucket),
        layers=(
            Instant(gradients=there + compute * setting.head_gradient, communication=bucket),
            # As the last one is at work, its gradients are still to be made.
            Instant(1.0, gradients=max(there, gradients - last), communication=bucket),
        ),
        embedding=Instant(
            1.0, gradients=max(there + waits, gradients) + compute * setting.embedding_gradient, communication=bucket
        ),
        # Gradients are sent where they are, but for those of a small model in bf16, which are put together first.
        sending=Instant(
            1.0, gradients=gradients, communication=2 * bucket + (wide if bf16 and trained <= _PUT_TOGETHER else 0)
        ),
        step=Instant(1.0, gradients=gradients, communication=step_scratch(setting, _part(setting))),
        made=compute,
    )


def _stage_2(setting: Setting, stage: int, offload: bool) -> Costs:
    """Gradients go into a bucket in the dtype that computes; a full one is copied, summed over processes in fp32, and
    each process adds its part to an fp32 partition. Offload moves that to the host at the end of a step; in fp32 after
    each bucket."""
    network, compute = setting.network, setting.precision.compute
    trained, processes = network.trained, setting.processes
    part = -(-trained // processes)
    bucket = min(setting.sizes["reduce_bucket_size"], trained)
    wide = compute == FP32
    gradients = FP32 * part
    if offload and wide:
        gradients = 0
    if stage == 1:
        gradients += FP32 * trained
    largest = setting.largest_trained
    scratch = compute * largest.numel if offload and largest else 0
    there = gradients if setting.accumulates else 0
    sent = compute * bucket + (0 if wide else FP32 * bucket)
    filled = filled_at(setting, bucket)
    head, embedding = compute * setting.head_gradient, compute * setting.embedding_gradient
    waits = _waiting(setting)
    layers = [Instant(gradients=there + waits, communication=compute * bucket)]
    if bucket < trained:  # else the only one is sent when all layers are done
        full = Instant(filled, gradients=there + waits, communication=compute * bucket + sent, sends=True)
        again = min(1.0, filled + bucket / max(1, trained - setting.outside_numel))
        layers += [full, replace(full, layers_done=again, gradients=gradients + waits)] if again < 1.0 else [full]
    # What is larger than a bucket is sent alone, from where it is.
    head_alone, embedding_alone = (
        FP32 * numel if numel > bucket and not wide else 0
        for numel in (setting.head_gradient, setting.embedding_gradient)
    )
    master, moments = FP32 * part, moment_bytes(setting, _part(setting), FP32)
    host = master + moments + FP32 * part + compute * part + scratch
    # In fp32 gradients of several micro-batches are added up there, all of each tensor of which a process has a part.
    host += FP32 * max(part, network.head_numel if setting.embedding_gradient else 0) if wide else 0
    return Costs(
        weights=setting.held_bytes(compute) + scratch + (0 if offload else master),
        moments=0 if offload else moments,
        loss=Instant(gradients=there),
        head=Instant(
            gradients=(gradients if head_alone else there) + head, communication=compute * bucket + head_alone
        ),
        layers=tuple(layers),
        embedding=Instant(
            1.0, gradients=gradients + embedding, communication=compute * bucket + max(waits, embedding_alone)
        ),
        sending=Instant(1.0, gradients=gradients, communication=compute * bucket + sent),
        step=Instant(
            1.0,
            gradients=gradients,
            communication=(FP32 * part if wide and not offload else 0) + step_scratch(setting, _part(setting)),
        ),
        host=host if offload else 0,
        made=compute,
    )


def filled_at(setting: Setting, bucket: int) -> float:
    """The share of the layers' backward pass after which a bucket of so many elements is full. A head's gradient comes
    first, but a tied one with the embedding's, and one that is larger than a bucket is sent alone."""
    head = 0 if setting.network.shape.sizes.tied or setting.head_gradient > bucket else setting.head_gradient
    return min(1.0, (bucket - head) / max(1, setting.network.trained - setting.outside_numel))


def _waiting(setting: Setting) -> int:
    """The head's gradient, which where the table is tied waits for its other part."""
    return setting.precision.compute * setting.head_gradient if setting.network.shape.sizes.tied else 0


def _part(setting: Setting) -> Callable[[Held], int]:
    def local(held: Held) -> int:
        return -(-held.numel // setting.processes)

    return local
