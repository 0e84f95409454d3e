"""FSDP2: each process has a part of every weight, gradient and moment; a layer is whole while it computes
(`strategies.fsdp`, `torch.distributed.fsdp.fully_shard` as of 2.13).

Its moments: a layer's forward or backward holds the layer, and the buffer out of which it or its successor was put
together. Behind a layer's backward its gradients are copied into an fp32 buffer, which stays until the next layer's
are sent. What is outside the layers is one more unit, whole from the head's backward pass to the end.
"""

from __future__ import annotations

import math

from understudy.plan.memory.optimizer import moment_bytes, step_scratch
from understudy.plan.memory.setting import FP32, Costs, Instant, Setting
from understudy.plan.network import Held
from understudy.recipe.schema import FSDP

__all__ = ["fsdp_costs"]


def fsdp_costs(setting: Setting) -> Costs:
    strategy = setting.strategy
    assert isinstance(strategy, FSDP), "chosen by its kind"
    shards = {"no_shard": 1, "hybrid_shard": setting.processes // setting.replicas}.get(
        strategy.sharding, setting.processes
    )
    compute, weights = setting.precision.compute, setting.precision.weights
    network, layer, root = setting.network, setting.layer_bytes, setting.root_bytes

    def local(held: Held) -> int:
        return _rows(held, shards)

    frozen = sum(_frozen(held, shards, compute) * count for held, count in network.parameters() if not held.trained)
    mine = sum(local(held) * count for held, count in network.parameters() if held.trained)
    kept, moments = weights * mine + frozen + compute * network.shared, moment_bytes(setting, local, weights)
    gradients = weights * mine
    there = gradients if setting.accumulates else 0
    stay_whole = strategy.sharding in ("no_shard", "shard_grad_op")
    layers_whole = _all_layers(setting) if stay_whole else 0
    # A single process copies its part, and needs no buffer to gather in.
    buffer = layer if shards > 1 else 0
    root_buffer = root if shards > 1 else 0
    head, embedding = compute * setting.head_gradient, compute * setting.embedding_gradient
    layer_sent, root_sent = FP32 * setting.layer_trained, FP32 * setting.outside_numel
    # Of several micro-batches the last sum is added to the ones before; of one alone it becomes the gradient.
    share = 1 + 1 / shards if setting.accumulates else 1
    last = weights * (setting.outside_numel + setting.layer_trained) // shards
    before = gradients if setting.accumulates else max(0, gradients - last)
    if strategy.offload:
        held, gradients, there, before = compute * network.shared, 0, 0, 0
    else:
        held = kept
    count = network.shape.sizes.layers
    whole = layers_whole or layer
    tied = network.shape.sizes.tied
    return Costs(
        weights=held,
        moments=0 if strategy.offload else moments,
        # A buffer is let go when the next one is waited for, the root's behind the first layer's.
        entry=Instant(gathered=root + root_buffer + layer + buffer, gradients=there),
        forward=Instant(gathered=root + (layers_whole or layer + buffer), gradients=there),
        # The last layer's buffer is let go behind the loss.
        loss=Instant(gathered=root + (layers_whole or buffer), gradients=there),
        head=Instant(gathered=root + (layers_whole or root_buffer), gradients=there + head),
        layers=(
            Instant(gathered=root + whole + (0 if layers_whole else buffer), gradients=there + head),
            Instant(
                1 / count,
                gathered=root + whole + (0 if layers_whole else buffer),
                gradients=there + head,
                communication=layer_sent,
            ),
            Instant(1.0, gathered=root + layer, gradients=before + head, communication=layer_sent),
        ),
        embedding=Instant(
            1.0,
            gathered=0 if root_sent else root,
            gradients=gradients + (head if tied else head + embedding),
            communication=max(math.ceil(root_sent * share), layer_sent),
        ),
        step=Instant(1.0, gradients=gradients, communication=0 if strategy.offload else step_scratch(setting, local)),
        host=kept + moments + weights * mine if strategy.offload else 0,
        accumulates_layer=True,
        made=compute,
    )


def _rows(held: Held, shards: int) -> int:
    """Elements of one part: parameters are cut along their first dimension, all parts as large as the largest."""
    first = held.shape[0] if held.shape else 1
    return -(-first // shards) * (held.numel // max(1, first))


def _frozen(held: Held, shards: int, itemsize: int) -> int:
    return -(-held.packed_bytes // shards) if held.packed_bytes is not None else _rows(held, shards) * itemsize


def _all_layers(setting: Setting) -> int:
    compute = setting.precision.compute
    return sum(setting.network.unit_bytes(group, compute, compute) * group.count for group in setting.network.layers)
