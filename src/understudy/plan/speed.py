"""How long a step takes, and what it waits for: arithmetic, memory, links between devices, or the host's memory.

Kernels of one device run one after another, so arithmetic and traffic add up. Collectives overlap with them where the
strategy sends while it computes; what it sends at the end of a step does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from understudy.plan.hardware.hardware import Hardware
from understudy.plan.memory.activations import Work
from understudy.plan.memory.head import Head
from understudy.plan.memory.setting import FP32, Setting
from understudy.plan.memory.teacher import TeacherCosts
from understudy.recipe.deepspeed_file import effective_deepspeed
from understudy.recipe.schema import DDP, FSDP, DeepSpeed

__all__ = ["Bound", "StepTime", "step_time"]

Bound = Literal["compute", "memory bandwidth", "interconnect", "host link"]
_TRAFFIC_REACHED = 0.75
"""Share of the memory's bandwidth that elementwise kernels reach: 70 to 80 % on every generation since Volta."""
_TRAFFIC_COPIES = 1.3
"""Bytes that casts, masks and copies move beside operands and results."""
_LAUNCH_SECONDS = 6e-6
"""A kernel's launch where the device waits for it; micro-batches so small are what it matters to."""
_KERNELS_A_LAYER = 60
_FSDP_LAYER_SECONDS = 1e-3
"""That Python takes for a layer which FSDP2 puts together and takes apart, forward and backward; the order of what two
processes of a processor lose to ddp on models so small that nothing else counts. So are the next two."""
_ZERO_GRADIENT_SECONDS = 50e-6
"""For a parameter's gradient that goes into a bucket."""
_ZERO_MODULE_SECONDS = 150e-6
"""For a module which ZeRO-3 puts together and takes apart."""
_PARAMETERS_A_LAYER, _MODULES_A_LAYER = 9, 8
_HOST_ADAM_BYTES = 28
"""That one element of a host-side step moves: master weight, gradient and moments read, three of them written."""
_HOST_BANDWIDTH = 1.0e11
"""Bytes a second of one server's memory that such a step gets: half of what eight channels of DDR4 have."""


@dataclass(frozen=True)
class StepTime:
    compute: float
    memory: float
    interconnect: float
    """Seconds of collectives, those that overlap included."""
    host: float
    total: float
    """Seconds of a step, less than the sum where things overlap."""

    @property
    def bound(self) -> Bound:
        """What takes longest."""
        parts: dict[Bound, float] = {
            "compute": self.compute,
            "memory bandwidth": self.memory,
            "interconnect": self.interconnect,
            "host link": self.host,
        }
        return max(parts, key=lambda name: parts[name])


def step_time(
    setting: Setting, hardware: Hardware, work: Work, head: Head, teacher: TeacherCosts, tokens: int, micro_batches: int
) -> StepTime:
    """Of a step of `micro_batches` of `tokens` in each process."""
    device = hardware.accelerator
    rate = _rate(setting, hardware) * device.matmul
    bandwidth = device.memory_bandwidth * _TRAFFIC_REACHED
    all_tokens = tokens * micro_batches
    head_flops = 2.0 * head.vocabulary * head.hidden * (1 + head.passes_on + head.trained)
    compute = all_tokens * (work.flops + head_flops + teacher.flops) / rate
    compute += all_tokens * teacher.on_host_flops / 1.0e12
    traffic = all_tokens * (work.traffic * _TRAFFIC_COPIES + 6.0 * FP32 * head.vocabulary)
    traffic += all_tokens * sum(one.forward_traffic for one in teacher.works) * _TRAFFIC_COPIES
    memory = (traffic + _step_traffic(setting, micro_batches)) / bandwidth
    launches = micro_batches * setting.network.shape.sizes.layers * _KERNELS_A_LAYER * 3 * _LAUNCH_SECONDS
    hooks = micro_batches * setting.network.shape.sizes.layers * _hooks_of_a_layer(setting)
    # A device computes while the host prepares what comes next.
    busy = max(compute + memory, launches + hooks) if hardware.accelerated else compute + memory + hooks
    overlapped, exposed = _collectives(setting, hardware, micro_batches, teacher)
    moved, stepped = _host(setting, hardware, micro_batches)
    total = max(busy, overlapped, moved) + exposed + stepped
    return StepTime(compute, memory, overlapped + exposed, moved + stepped, total)


def _hooks_of_a_layer(setting: Setting) -> float:
    """Seconds of a micro-batch."""
    strategy = setting.strategy
    if isinstance(strategy, FSDP):
        return _FSDP_LAYER_SECONDS
    if isinstance(strategy, DeepSpeed):
        stage = effective_deepspeed(strategy).stage
        gradients = _PARAMETERS_A_LAYER * _ZERO_GRADIENT_SECONDS
        return gradients + (_MODULES_A_LAYER * _ZERO_MODULE_SECONDS if stage == 3 else 0.0)
    return 0.0


def _rate(setting: Setting, hardware: Hardware) -> float:
    device = hardware.accelerator
    wanted = {"bf16": device.bf16, "pure_bf16": device.bf16, "fp16": device.fp16, "fp32": device.fp32}
    # What has no bf16 units computes in fp32.
    return wanted[setting.precision.name] or device.fp32


def _shards(setting: Setting) -> int:
    strategy = setting.strategy
    if isinstance(strategy, FSDP):
        return {"no_shard": 1, "hybrid_shard": setting.processes // setting.replicas}.get(
            strategy.sharding, setting.processes
        )
    if isinstance(strategy, DeepSpeed) and effective_deepspeed(strategy).stage >= 1:
        return setting.processes
    return 1


def _step_traffic(setting: Setting, micro_batches: int) -> float:
    """Bytes of the optimizer's step (weights, gradients and moments read and written), of casts of the weights, and of
    gradients that are added up."""
    trained, shards = setting.network.trained, _shards(setting)
    offloaded = _offloads(setting)
    step = 0.0 if offloaded else 28.0 * trained / shards
    casts = 6.0 * trained * micro_batches if isinstance(setting.strategy, DDP) or shards == 1 else 0.0
    return step + casts + 12.0 * trained * micro_batches / (1 if shards == 1 else 2)


def _offloads(setting: Setting) -> bool:
    strategy = setting.strategy
    if isinstance(strategy, FSDP):
        return strategy.offload
    return isinstance(strategy, DeepSpeed) and effective_deepspeed(strategy).offload_optimizer != "none"


def _collectives(
    setting: Setting, hardware: Hardware, micro_batches: int, teacher: TeacherCosts
) -> tuple[float, float]:
    """Seconds of what overlaps with computing, and of what does not."""
    processes = setting.processes
    if processes == 1:
        return 0.0, 0.0
    device, strategy, trained = hardware.accelerator, setting.strategy, setting.network.trained
    # A ring over hosts is as fast as its slowest link.
    link = hardware.network if hardware.nodes > 1 and hardware.network.reached < device.link.reached else device.link
    bandwidth, share = link.reached, (processes - 1) / processes
    compute = setting.precision.compute
    layers = setting.network.shape.sizes.layers
    whole = setting.held_bytes(compute)
    taught = micro_batches * teacher.gathered_bytes * share / bandwidth
    if isinstance(strategy, FSDP) and strategy.sharding not in ("no_shard",):
        passes = 1 if strategy.sharding == "shard_grad_op" else 2
        sent = passes * whole + FP32 * trained
        return taught + micro_batches * (sent * share / bandwidth + 3 * layers * link.latency), 0.0
    if isinstance(strategy, DeepSpeed):
        stage = effective_deepspeed(strategy).stage
        if stage == 3:
            modules = 8 * layers
            sent = 2 * whole + FP32 * trained
            return taught + micro_batches * (sent * share / bandwidth + 2 * modules * link.latency), 0.0
        if stage == 2:
            # Sums over processes in fp32, on the stream that computes; at the end everybody gets the new weights.
            reduced = micro_batches * 2 * FP32 * trained * share / bandwidth
            return taught, reduced + compute * trained * share / bandwidth
        gathered = compute * trained if stage == 1 else 0
        return taught, (2 * FP32 * trained + gathered) * share / bandwidth
    # DDP sends a step's gradients once, while the last micro-batch goes backward.
    seconds = 2 * FP32 * trained * share / bandwidth + layers * link.latency
    hidden = seconds * min(1.0, 0.8 / micro_batches) if micro_batches > 1 else seconds * 0.8
    return taught + hidden, seconds - hidden


def _host(setting: Setting, hardware: Hardware, micro_batches: int) -> tuple[float, float]:
    """Seconds on the link to the host while a micro-batch computes, and of the step that the host takes."""
    if not _offloads(setting):
        return 0.0, 0.0
    device, strategy, trained = hardware.accelerator, setting.strategy, setting.network.trained
    part = trained / _shards(setting)
    link = device.host_link.reached if hardware.accelerated else device.memory_bandwidth * _TRAFFIC_REACHED
    compute = setting.precision.compute
    whole = setting.held_bytes(compute)
    if hardware.accelerated:
        stepped = part * _HOST_ADAM_BYTES * hardware.devices_per_node / _HOST_BANDWIDTH
    else:  # it is the process's own memory
        stepped = part * _HOST_ADAM_BYTES / link
    if isinstance(strategy, FSDP):
        moved = micro_batches * (2 * whole / _shards(setting) + 2 * FP32 * part) / link
        return moved, stepped
    stage, _, parameters = effective_deepspeed(strategy) if isinstance(strategy, DeepSpeed) else (0, "none", "none")
    moved = 0.0
    if stage == 3:
        moved = micro_batches * (2 * FP32 * part) / link
        moved += micro_batches * 2 * whole / _shards(setting) / link if parameters != "none" else 0.0
    return moved, stepped + (FP32 + compute) * part / link
