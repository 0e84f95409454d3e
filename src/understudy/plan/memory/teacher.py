"""What a distillation's teachers take, each by its kind (`training.teaching`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from understudy.plan.matching import matched_width
from understudy.plan.memory.activations import Kernels, Work, trace_work
from understudy.plan.memory.setting import precision_of
from understudy.plan.network import Network, make_network
from understudy.plan.packed import packing_of
from understudy.plan.shape.attention import kernel_for
from understudy.plan.shape.layer import trace_layer
from understudy.plan.shape.model import ModelShape
from understudy.plan.shape.tape import Line, Treatment, peak
from understudy.recipe.adapters import Freeze
from understudy.recipe.objectives import Distillation, Objective
from understudy.recipe.teachers import (
    BaseTeacher,
    CachedTeacher,
    OneTeacher,
    ResidentTeacher,
    ServerTeacher,
    ShardedTeacher,
)

__all__ = ["TeacherCosts", "teacher_costs"]

_KEPT_CLASS_BYTES = 12
"""A class's number, int64, and its log-probability, fp32."""


@dataclass(frozen=True)
class TeacherCosts:
    """Of all teachers together, in one process."""

    device_bytes: int = 0
    other_bytes: int = 0
    """Of those that have a device for themselves, on that one."""
    host_bytes: int = 0
    kept: float = 0.0
    """Bytes a token of what it said, from before the student's pass to its loss."""
    forward: tuple[Line, ...] = ()
    """What its own pass holds, before the student's."""
    gathered: int = 0
    """Of a teacher that is shared out, what is put together as it computes."""
    classes: int = 0
    """Of those whose logits are made beside the student's."""
    works: tuple[Work, ...] = ()
    """Of passes on the device, a token."""
    head_flops: float = 0.0
    on_host_flops: float = 0.0
    """A token, of a teacher that the host's processor runs."""
    gathered_bytes: int = 0
    """Sent to each process in a pass."""

    @cached_property
    def flops(self) -> float:
        return sum(work.forward_flops for work in self.works) + self.head_flops


def teacher_costs(
    objective: Objective,
    shapes: Sequence[ModelShape | None],
    student: Network,
    precision: str,
    processes: int,
    api: str,
    capability: float,
    document: int,
) -> TeacherCosts:
    """`shapes` are the teachers', in the recipe's order; None where a teacher is no model of its own here."""
    if not isinstance(objective, Distillation):
        return TeacherCosts()
    parts = [
        _one(section, shape, student, precision, processes, api, capability, document)
        for section, shape in zip(objective.teachers, shapes, strict=True)
    ]
    matched = matched_width(student, objective, shapes) * precision_of(precision).compute
    return TeacherCosts(
        device_bytes=sum(part.device_bytes for part in parts),
        other_bytes=sum(part.other_bytes for part in parts),
        host_bytes=sum(part.host_bytes for part in parts),
        kept=sum(part.kept for part in parts) + matched,
        forward=tuple(line for part in parts for line in part.forward),
        gathered=max(part.gathered for part in parts),
        classes=max(part.classes for part in parts),
        works=tuple(work for part in parts for work in part.works),
        head_flops=sum(part.head_flops for part in parts),
        on_host_flops=sum(part.on_host_flops for part in parts),
        gathered_bytes=sum(part.gathered_bytes for part in parts),
    )


def _one(
    section: OneTeacher,
    shape: ModelShape | None,
    student: Network,
    precision: str,
    processes: int,
    api: str,
    capability: float,
    document: int,
) -> TeacherCosts:
    if isinstance(section, ServerTeacher):
        return TeacherCosts(kept=float(section.k * _KEPT_CLASS_BYTES))
    if isinstance(section, CachedTeacher) and section.targets != "hidden":
        return TeacherCosts(kept=float(section.kept * _KEPT_CLASS_BYTES))
    own = None if isinstance(section, BaseTeacher) else section.precision
    itemsize = precision_of(precision if own in (None, "auto") else str(own)).compute
    if isinstance(section, BaseTeacher):
        network = student
    else:
        assert shape is not None, "a model of its own"
        network = _frozen(section, shape)
    sizes = network.shape.sizes
    head = itemsize * sizes.vocabulary * sizes.hidden
    said = {"kept": float(sizes.hidden * itemsize), "classes": sizes.vocabulary}
    head_flops = 2.0 * sizes.vocabulary * sizes.hidden
    if isinstance(section, CachedTeacher):
        return TeacherCosts(device_bytes=head, head_flops=head_flops, **said)  # type: ignore[arg-type]
    kernels = Kernels(kernel_for(sizes, api, capability, itemsize, "auto"), document, api != "cpu")
    work, forward = trace_work(network, itemsize, kernels, "none"), _forward(network, itemsize, kernels)
    if isinstance(section, BaseTeacher):
        return TeacherCosts(forward=forward, works=(work,), head_flops=head_flops, **said)  # type: ignore[arg-type]
    whole = itemsize * network.frozen_numel + network.packed_bytes
    if isinstance(section, ShardedTeacher):
        outside = network.unit_bytes(None, itemsize, itemsize)
        layer = max(network.unit_bytes(group, itemsize, itemsize) for group in network.layers)
        part = -(-(whole - outside) // processes)
        return TeacherCosts(
            device_bytes=outside + part,
            forward=forward,
            gathered=2 * layer,
            works=(work,),
            head_flops=head_flops,
            gathered_bytes=whole - outside,
            **said,  # type: ignore[arg-type]
        )
    if section.device == "own":
        return TeacherCosts(
            device_bytes=whole,
            forward=forward,
            works=(work,),
            head_flops=head_flops,
            **said,  # type: ignore[arg-type]
        )
    host = whole if section.device == "host" else 0
    return TeacherCosts(
        device_bytes=head,
        other_bytes=whole if section.device == "other" else 0,
        host_bytes=host,
        head_flops=head_flops,
        on_host_flops=work.forward_flops if section.device == "host" else 0.0,
        **said,  # type: ignore[arg-type]
    )


def _frozen(section: ResidentTeacher | ShardedTeacher | CachedTeacher, shape: ModelShape) -> Network:
    quantization = section.quantization if isinstance(section, ResidentTeacher) else None
    packing = packing_of(quantization, shape.sizes.config)
    nothing = Freeze.model_construct(kind="freeze", last_layers=0, parameters=())
    return make_network(shape, nothing, packing)


def _forward(network: Network, itemsize: int, kernels: Kernels) -> tuple[Line, ...]:
    """The highest moment of a layer in a pass without gradients."""
    lines: list[Line] = []
    for group in network.layers:
        treatment = Treatment(
            itemsize,
            trained=lambda name: False,
            attention=kernels.attention,
            document=kernels.document,
            packed=group.packed,
            accelerated=kernels.accelerated,
        )
        traced = trace_layer(network.shape.sizes, group.number, treatment)
        lines += traced.tape.forward(traced.output)
    return tuple(sorted(lines, key=lambda line: peak([line], 4096))[-4:])
