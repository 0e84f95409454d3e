"""What the formulas of memory are about: a network, a precision, and how many processes share it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from understudy.plan.memory.buckets import zero_sizes
from understudy.plan.network import Held, Network
from understudy.recipe.schema import DDP, FSDP, DeepSpeed, Optimizer

__all__ = ["FP32", "Costs", "Instant", "Precision", "Setting", "precision_of", "strategy_of"]

FP32 = 4


@dataclass(frozen=True)
class Precision:
    name: str
    weights: int
    """Bytes of an element of master weights, of what optimizers keep and of gradients that are added up."""
    compute: int
    """Of what computes, and of weights that are not trained."""


def precision_of(name: str) -> Precision:
    """`strategies.precision`, in bytes."""
    return {
        "fp32": Precision(name, 4, 4),
        "bf16": Precision(name, 4, 2),
        "fp16": Precision(name, 4, 2),
        "pure_bf16": Precision(name, 2, 2),
    }[name]


@dataclass(frozen=True)
class Setting:
    network: Network
    precision: Precision
    optimizer: Optimizer
    strategy: DDP | FSDP | DeepSpeed
    processes: int
    replicas: int = 1
    """Groups that hold a copy each (`parallel.replicate`)."""
    zero: dict[str, Any] = field(default_factory=dict)
    """A DeepSpeed file's `zero_optimization`."""
    gloo: bool = False
    """Collectives are gloo's, which sums a copy where parts are summed and dealt out."""
    accumulates: bool = True
    """A step has several micro-batches, so that gradients are there while the later ones run."""

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Of ZeRO's buckets, by DeepSpeed's names; elements."""
        buckets = self.strategy.buckets if isinstance(self.strategy, DeepSpeed) else "auto"
        return zero_sizes(self.zero, buckets, hidden=self.hidden, trained=self.network.trained)

    @property
    def hidden(self) -> int:
        return self.network.shape.sizes.hidden

    @cached_property
    def replicated_weights(self) -> int:
        """Bytes of all weights where each process has all: those that are trained at full precision."""
        return self.held_bytes(self.precision.weights)

    def held_bytes(self, trained: int) -> int:
        """Of all weights, with so many bytes an element of what is trained; of the rest as it computes."""
        network, compute = self.network, self.precision.compute
        return trained * network.trained + compute * (network.frozen_numel + network.shared) + network.packed_bytes

    @cached_property
    def outside_numel(self) -> int:
        """Trained elements outside the layers."""
        return sum(held.numel for held in self.network.outside if held.trained)

    @cached_property
    def largest_trained(self) -> Held | None:
        trained = [held for held, _ in self.network.parameters() if held.trained]
        return max(trained, key=lambda held: held.numel, default=None)

    @cached_property
    def layer_bytes(self) -> int:
        """Of the largest decoder layer as it computes."""
        compute = self.precision.compute
        return max(self.network.unit_bytes(group, compute, compute) for group in self.network.layers)

    @cached_property
    def layer_trained(self) -> int:
        """Trained elements of the layer with most."""
        return max(sum(held.numel for held in group.held if held.trained) for group in self.network.layers)

    @cached_property
    def root_bytes(self) -> int:
        """Of what is outside the layers, as it computes."""
        compute = self.precision.compute
        return self.network.unit_bytes(None, compute, compute)

    @property
    def head_gradient(self) -> int:
        """Elements of the head's weight gradient; 0 where it is frozen."""
        return self.network.head_numel if self.network.head_trained else 0

    @property
    def embedding_gradient(self) -> int:
        return self.network.head_numel if self.network.embedding_trained else 0


@dataclass(frozen=True)
class Instant:
    """What a strategy holds at one moment of a micro-batch beside weights, moments and activations; bytes."""

    layers_done: float = 0.0
    """Share of the layers whose backward pass is over."""
    gathered: int = 0
    """Weights put together of all processes' parts, or cast anew."""
    gradients: int = 0
    communication: int = 0
    sends: bool = False
    """A bucket is full, on a gradient that was just made."""


@dataclass(frozen=True)
class Costs:
    """What a strategy holds on one device, in bytes, and on the host for one process."""

    weights: int
    moments: int
    loss: Instant
    """As the head computes loss and gradient: all activations are there."""
    head: Instant
    """As the head's gradient is handed over."""
    layers: tuple[Instant, ...]
    """As layers go backward."""
    embedding: Instant
    """As the embedding's gradient is made, and what is left is sent."""
    step: Instant
    """As the optimizer steps."""
    entry: Instant | None = None
    """As the first layer begins, where more is there then than what computes."""
    forward: Instant | None = None
    """As the last layer goes forward, where more is there then than in the head."""
    turn: Instant | None = None
    """As the forward pass ends, before the head, where that is another moment."""
    sending: Instant | None = None
    """As what is left is sent, all layers done, where that is another moment."""
    host: int = 0
    disk: int = 0
    """Of one process, on a disk (NVMe offload)."""
    casts: bool = False
    """A trained weight is cast at each use, and the backward pass keeps the copy."""
    accumulates_layer: bool = False
    """Gradients of a layer are whole until it is done."""
    made: int = 0
    """Bytes an element of a weight's gradient as it is made."""


def strategy_of(settings: dict[str, Any]) -> DDP | FSDP | DeepSpeed:
    """A preset's mapping as the recipe has it."""
    kinds: dict[str, type[DDP] | type[FSDP] | type[DeepSpeed]] = {"ddp": DDP, "fsdp": FSDP, "deepspeed": DeepSpeed}
    return kinds[settings["kind"]].model_validate(settings)
