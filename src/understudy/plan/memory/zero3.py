"""ZeRO stage 3: weights too are shared out, and put together module by module.

As DeepSpeed 0.19 implements it (`runtime.zero.stage3`); `fetching` says which weights are whole when. Small parameters
are whole at all times.
"""

from __future__ import annotations

from understudy.plan.memory.fetching import Fetched, follow
from understudy.plan.memory.optimizer import moment_bytes, step_scratch
from understudy.plan.memory.setting import FP32, Costs, Instant, Setting
from understudy.plan.memory.zero import filled_at
from understudy.plan.network import Held
from understudy.recipe.deepspeed_file import effective_deepspeed
from understudy.recipe.schema import DeepSpeed

__all__ = ["zero3_costs"]

_SUBGROUP = 1_000_000_000
"""DeepSpeed's own: elements of one optimizer step."""
_OPTIMIZER_BUFFERS, _PARAMETER_BUFFERS, _PARAMETER_BUFFER = 4, 5, 100_000_000
"""DeepSpeed's own: of state that is kept on a disk, how many are in memory; and elements of one of a parameter's."""


def zero3_costs(setting: Setting) -> Costs:
    assert isinstance(setting.strategy, DeepSpeed), "chosen by its kind"
    _, optimizer, parameters = effective_deepspeed(setting.strategy)
    network, compute, processes = setting.network, setting.precision.compute, setting.processes

    def local(held: Held) -> int:
        return -(-held.numel // processes)

    mine = sum(local(held) * count for held, count in network.parameters() if held.trained)
    computing = sum(_computing_part(held, processes, compute) * count for held, count in network.parameters())
    small = _small_bytes(setting)
    moments = moment_bytes(setting, local, FP32)
    bucket = FP32 * setting.sizes["reduce_bucket_size"]
    gradients = 0 if optimizer != "none" else FP32 * mine
    on_device = small + compute * network.shared
    on_device += 0 if parameters != "none" else computing
    on_device += 0 if optimizer != "none" else FP32 * mine
    # Master weights, moments and the gradients that the step reads, and the partition of gradients, never on a disk.
    stored, summed = (0, 0) if optimizer == "none" else (2 * FP32 * mine + moments, FP32 * mine)
    passing = _buffers(setting, "offload_optimizer", mine) if optimizer == "nvme" else 0
    passing += _buffers(setting, "offload_param", mine) if parameters == "nvme" else 0
    host = (computing if parameters == "cpu" else 0) + (stored if optimizer == "cpu" else 0) + summed + passing
    disk = (computing if parameters == "nvme" else 0) + (stored if optimizer == "nvme" else 0)
    fetched, table = _fetched(setting), compute * network.head_numel
    turn, loss = compute * fetched.turn, compute * fetched.head
    # Of what is fetched ahead in one piece a head of its own may be the larger part; a tied one is there already.
    largest = 0 if network.shape.sizes.tied else network.head_numel
    ahead = compute * min(max(setting.sizes["stage3_prefetch_bucket_size"], largest), _everything(setting))
    head, embedding = compute * setting.head_gradient, compute * setting.embedding_gradient
    # A bucket is copied as it is sent; the head and the embedding may be larger than it, and are sent alone.
    sent = min(bucket, FP32 * network.trained) * (2 if setting.gloo else 1)
    alone = FP32 * setting.head_gradient if FP32 * setting.head_gradient > bucket else 0
    filled = filled_at(setting, setting.sizes["reduce_bucket_size"])
    waits = head if network.shape.sizes.tied else 0
    layers = [
        Instant(done, gathered=compute * whole, gradients=gradients + waits, communication=bucket)
        for done, whole in fetched.rises()
    ]
    if filled < 1.0:  # else the only bucket is sent when all layers are done
        layers += [
            Instant(
                done, gathered=compute * whole, gradients=gradients + waits, communication=bucket + sent, sends=True
            )
            for done, whole in fetched.rises(filled)
        ]
    return Costs(
        weights=on_device,
        moments=0 if optimizer != "none" else moments,
        # What was fetched ahead in one piece is cut up, and the piece kept until all of it is used.
        turn=Instant(gathered=turn + ahead, gradients=gradients, communication=bucket),
        loss=Instant(gathered=loss, gradients=gradients, communication=bucket),
        head=Instant(gathered=loss, gradients=gradients + head, communication=bucket + alone),
        layers=tuple(layers),
        embedding=Instant(1.0, gathered=table, gradients=gradients + embedding, communication=bucket + waits),
        sending=Instant(1.0, gathered=table, gradients=gradients, communication=bucket + max(sent, alone)),
        step=Instant(
            1.0,
            gradients=gradients,
            communication=bucket
            + (0 if optimizer != "none" else FP32 * min(mine, _SUBGROUP) + step_scratch(setting, local)),
        ),
        host=host,
        disk=disk,
        made=compute,
    )


def _buffers(setting: Setting, section: str, mine: int) -> int:
    """Bytes in host memory through which what is on a disk passes: DeepSpeed's `buffer_count` and `buffer_size`."""
    given = setting.zero.get(section) or {}
    if section == "offload_param":
        size, count, itemsize = given.get("buffer_size", "auto"), _PARAMETER_BUFFERS, setting.precision.compute
        elements = _PARAMETER_BUFFER if size == "auto" else int(size)
    else:
        group = setting.zero.get("sub_group_size", "auto")
        elements = min(mine, _SUBGROUP if group == "auto" else int(group))
        count, itemsize = _OPTIMIZER_BUFFERS, FP32
    asked = given.get("buffer_count", "auto")
    return (count if asked == "auto" else int(asked)) * elements * itemsize


def _computing_part(held: Held, processes: int, itemsize: int) -> int:
    if held.packed_bytes is not None:
        return -(-held.packed_bytes // processes)
    return -(-held.numel // processes) * itemsize


def _threshold(setting: Setting) -> int:
    return setting.sizes["stage3_param_persistence_threshold"]


def _elements(setting: Setting, held: Held) -> int:
    """Of the tensor that is cut; a quantized weight's is bytes in the dtype that computes."""
    return held.numel if held.packed_bytes is None else held.packed_bytes // setting.precision.compute


def _small_bytes(setting: Setting) -> int:
    threshold, compute = _threshold(setting), setting.precision.compute
    return sum(
        _elements(setting, held) * count * compute
        for held, count in setting.network.parameters()
        if _elements(setting, held) <= threshold
    )


def _fetched(setting: Setting) -> Fetched:
    threshold, network = _threshold(setting), setting.network
    frozen, layers = list[int](), list[int]()
    for group in network.layers:
        reached = layers if group.input_grad or group.trains else frozen
        large = [elements for held in group.held if (elements := _elements(setting, held)) > threshold]
        reached += large * group.count
    tables = {held.role: _elements(setting, held) for held in network.outside}
    sizes = setting.sizes
    return follow(
        frozen,
        layers,
        tables.get("head", tables["embedding"]),
        tables["embedding"] if "head" in tables else None,
        returns=network.embedding_trained or network.prompt > 0,
        live=sizes["stage3_max_live_parameters"],
        ahead=sizes["stage3_prefetch_bucket_size"],
        reuse=sizes["stage3_max_reuse_distance"],
    )


def _everything(setting: Setting) -> int:
    return sum(_elements(setting, held) * count for held, count in setting.network.parameters())
