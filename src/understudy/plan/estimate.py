"""Memory and time of a recipe under one strategy, one kind of checkpointing and one size of micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from understudy.plan.hardware.hardware import Hardware
from understudy.plan.matching import with_maps
from understudy.plan.memory.activations import Activations, Checkpointing, Kernels, Work, trace_activations, trace_work
from understudy.plan.memory.costs import costs_of
from understudy.plan.memory.device import DevicePeak, device_peak
from understudy.plan.memory.head import Head, head_of
from understudy.plan.memory.host import host_bytes
from understudy.plan.memory.setting import Costs, Precision, Setting, precision_of
from understudy.plan.memory.teacher import TeacherCosts, teacher_costs
from understudy.plan.network import Network, make_network
from understudy.plan.packed import packing_of
from understudy.plan.shape.attention import kernel_for
from understudy.plan.shape.model import ModelShape
from understudy.plan.speed import StepTime, step_time
from understudy.recipe.deepspeed_file import file_precision, read_deepspeed_file
from understudy.recipe.schema import DDP, FSDP, DeepSpeed, Recipe

__all__ = ["Estimate", "Estimator", "usual_precision"]

_COMMUNICATOR_BYTES = {"cuda": 350 * 2**20, "npu": 400 * 2**20, "cpu": 0}
"""What a process holds of one communicator outside its allocator: NCCL's channels take 0.3 to 0.5 GB on hosts of eight,
HCCL has two buffers of 200 MB (HCCL_BUFFSIZE)."""

_ENGINE_BYTES = 70 * 2**20
"""DeepSpeed's code and its modules' state in a process of a processor; measured, with version 0.19."""


def usual_precision(recipe: Recipe, hardware: Hardware) -> str:
    """What `precision: auto` comes to on a device: bf16 where it has units for that, fp16 on older ones."""
    asked = recipe.training.precision
    if asked != "auto":
        return asked
    device = hardware.accelerator
    usual = "fp32" if not hardware.accelerated else "bf16" if device.bf16 else "fp16"
    return file_precision(recipe.strategy, usual) if isinstance(recipe.strategy, DeepSpeed) else usual


@dataclass(frozen=True)
class Estimate:
    peak: DevicePeak
    host_bytes: int
    """On one host."""
    offloaded_bytes: int
    """Of one process's tensors, in host memory."""
    disk_bytes: int
    """On one host's disk."""
    tokens: int
    micro_batches: int
    """In a step, in the process with most."""
    time: StepTime
    tokens_per_second: float
    """A device."""


class Estimator:
    """Of one recipe on one machine; what does not depend on the strategy is worked out once. Raises `UserError` where
    adapter, quantization or teachers do not fit the model."""

    def __init__(
        self, recipe: Recipe, hardware: Hardware, shape: ModelShape, teachers: Sequence[ModelShape | None]
    ) -> None:
        self.recipe, self.hardware, self.shape = recipe, hardware, shape
        device = hardware.accelerator
        self.precision: Precision = precision_of(usual_precision(recipe, hardware))
        packing = packing_of(recipe.quantization, shape.sizes.config)
        student = make_network(shape, recipe.adapter, packing)
        self.network: Network = with_maps(student, recipe.objective, teachers)
        longest = recipe.data.max_length + self.network.prompt
        asked = recipe.model.attention
        kernel = kernel_for(shape.sizes, device.api, device.capability, self.precision.compute, asked)
        self.kernels = Kernels(kernel, longest, hardware.accelerated)
        self.teacher: TeacherCosts = teacher_costs(
            recipe.objective,
            teachers,
            self.network,
            self.precision.name,
            hardware.devices,
            device.api,
            device.capability,
            longest,
        )
        self.head: Head = head_of(self.network, self.precision.compute, recipe.objective, self.teacher.classes)
        self._activations: dict[tuple[Any, ...], Activations] = {}
        self._work: dict[str, Work] = {}
        self._costs: dict[tuple[str, bool], Costs] = {}

    @cached_property
    def share(self) -> int:
        """Tokens of a step in the process with most, where examples are as long as they may be."""
        examples = -(-self.recipe.training.global_batch_size // self.hardware.devices)
        return examples * self.recipe.data.max_length

    @cached_property
    def context_bytes(self) -> int:
        """What a process holds outside its allocator."""
        device = self.hardware.accelerator
        several = self.hardware.devices > 1
        return device.context_bytes + (_COMMUNICATOR_BYTES[device.api] if several else 0)

    def at(
        self,
        strategy: DDP | FSDP | DeepSpeed,
        checkpointing: Checkpointing,
        tokens: int,
        micro_batches: int | None = None,
    ) -> Estimate:
        """With micro-batches of at most `tokens`, of which a step has so many; as many as its longest possible examples
        need when None."""
        used = tokens if micro_batches else min(tokens, self.share)
        micro_batches = micro_batches or max(1, -(-self.share // tokens))
        setting = self._setting(strategy, accumulates=micro_batches > 1)
        costs = self._costs_of(setting)
        activations = self._activations_of(costs, checkpointing)
        engine = _ENGINE_BYTES if isinstance(strategy, DeepSpeed) and not self.hardware.accelerated else 0
        context = self.context_bytes + engine
        peak = device_peak(costs, activations, self.head, self.teacher, used, context_bytes=context)
        host = host_bytes(
            setting,
            costs,
            self.teacher,
            self.hardware,
            peak.total_bytes,
            background=self.recipe.checkpoint.background and self.recipe.checkpoint.every is not None,
        )
        time = step_time(
            setting, self.hardware, self._work_of(checkpointing), self.head, self.teacher, used, micro_batches
        )
        per_device = self.recipe.training.global_batch_size * self.recipe.data.max_length / self.hardware.devices
        # Of the last micro-batch only a part may be filled.
        filled = self.share / (used * micro_batches)
        return Estimate(
            peak,
            host,
            costs.host + self.teacher.host_bytes,
            costs.disk * self.hardware.devices_per_node,
            tokens,
            micro_batches,
            time,
            per_device / (time.total * min(1.0, filled)),
        )

    def _setting(self, strategy: DDP | FSDP | DeepSpeed, *, accumulates: bool) -> Setting:
        zero: dict[str, Any] = {}
        if isinstance(strategy, DeepSpeed) and strategy.config:
            zero = dict(read_deepspeed_file(strategy.config).get("zero_optimization") or {})
        return Setting(
            network=self.network,
            precision=self.precision,
            optimizer=self.recipe.optimizer,
            strategy=strategy,
            processes=self.hardware.devices,
            replicas=self.recipe.parallel.replicate,
            zero=zero,
            gloo=not self.hardware.accelerated,
            accumulates=accumulates,
        )

    def _costs_of(self, setting: Setting) -> Costs:
        key = (setting.strategy.model_dump_json(), setting.accumulates)
        if key not in self._costs:
            self._costs[key] = costs_of(setting)
        return self._costs[key]

    def _activations_of(self, costs: Costs, checkpointing: Checkpointing) -> Activations:
        key = (checkpointing, costs.casts, costs.made, costs.accumulates_layer)
        if key not in self._activations:
            self._activations[key] = trace_activations(
                self.network,
                self.precision.compute,
                self.kernels,
                checkpointing,
                casts=costs.casts,
                made=costs.made,
                accumulates_layer=costs.accumulates_layer,
            )
        return self._activations[key]

    def _work_of(self, checkpointing: Checkpointing) -> Work:
        if checkpointing not in self._work:
            self._work[checkpointing] = trace_work(self.network, self.precision.compute, self.kernels, checkpointing)
        return self._work[checkpointing]
