"""The network of a run: what of a model is trained, adapted and quantized, in layers that are alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from understudy.errors import UserError
from understudy.plan.adapting import Adaptation, adapt
from understudy.plan.packed import PackedBytes
from understudy.plan.shape.adapted import Around
from understudy.plan.shape.model import ModelShape
from understudy.plan.shape.tape import Module, Weight
from understudy.recipe.adapters import Adapter

__all__ = ["Held", "Layers", "Network", "make_network"]


@dataclass(frozen=True)
class Held:
    """One parameter as a run holds it."""

    shape: tuple[int, ...]
    role: str
    trained: bool
    packed_bytes: int | None = None
    """Of a quantized weight, which is frozen."""
    hidden_matrix: bool = False
    """A matrix inside a decoder layer, which Muon treats apart."""

    @property
    def numel(self) -> int:
        size = 1
        for length in self.shape:
            size *= length
        return size

    def bytes_in(self, trained: int, frozen: int) -> int:
        """With so many bytes an element of what is trained, and of what is not."""
        if self.packed_bytes is not None:
            return self.packed_bytes
        return self.numel * (trained if self.trained else frozen)


@dataclass(frozen=True)
class Layers:
    """Decoder layers that are alike, as many as `count`."""

    count: int
    number: int
    """The first of them."""
    held: tuple[Held, ...]
    trained: frozenset[str]
    """Names, inside the layer, of the model's own parameters that are trained."""
    around: tuple[tuple[str, Around], ...]
    packed: frozenset[str]
    input_grad: bool
    """Whether a gradient goes on to what is below."""
    prompts: int = 0
    """Learned vectors that the layers attend to."""

    @property
    def trains(self) -> bool:
        return any(one.trained for one in self.held)


@dataclass(frozen=True)
class Network:
    shape: ModelShape
    layers: tuple[Layers, ...]
    outside: tuple[Held, ...]
    """Embeddings, last norm, head, and what an adapter has outside the layers."""
    head_trained: bool
    embedding_trained: bool
    shared: int = 0
    """Elements that layers share, never trained, in the compute dtype on each device (VeRA's projections)."""
    prompt: int = 0
    """Learned vectors in front of each document."""

    def parameters(self) -> Iterator[tuple[Held, int]]:
        """Each with how often it is there."""
        for held in self.outside:
            yield held, 1
        for group in self.layers:
            for held in group.held:
                yield held, group.count

    @cached_property
    def trained(self) -> int:
        """Parameters."""
        return sum(held.numel * count for held, count in self.parameters() if held.trained)

    @cached_property
    def frozen_numel(self) -> int:
        """Those that are not trained and not quantized."""
        return sum(
            held.numel * count for held, count in self.parameters() if not held.trained and held.packed_bytes is None
        )

    @cached_property
    def packed_bytes(self) -> int:
        return sum((held.packed_bytes or 0) * count for held, count in self.parameters())

    def unit_bytes(self, group: Layers | None, trained: int, frozen: int) -> int:
        """Of a whole layer of `group`, or of what is outside the layers."""
        held = self.outside if group is None else group.held
        return sum(one.bytes_in(trained, frozen) for one in held)

    @property
    def head_numel(self) -> int:
        return self.shape.sizes.vocabulary * self.shape.sizes.hidden


@dataclass
class _LayerPlan:
    held: list[Held] = field(default_factory=list)
    trained: set[str] = field(default_factory=set)
    around: dict[str, Around] = field(default_factory=dict)
    packed: set[str] = field(default_factory=set)

    def key(self, window: int | None, input_grad: bool) -> tuple[object, ...]:
        return (
            tuple(self.held),
            frozenset(self.trained),
            tuple(sorted(self.around.items(), key=lambda item: item[0])),
            frozenset(self.packed),
            window,
            input_grad,
        )


def make_network(shape: ModelShape, adapter: Adapter | None, packing: PackedBytes | None) -> Network:
    """Raises `UserError` where the adapter names nothing of this model, or nothing of it can be quantized."""
    adaptation = adapt(shape, adapter)
    outside = [Held(w.shape, w.role, adaptation.trains(w.name)) for w in shape.outside]
    flows = adaptation.prompt > 0 or any(one.trained and one.role == "embedding" for one in outside)
    plans: dict[tuple[object, ...], list[int]] = {}
    made: dict[tuple[object, ...], tuple[_LayerPlan, bool]] = {}
    for number, modules in enumerate(shape.layer_modules):
        plan = _layer(shape, number, modules, adaptation, packing)
        key = plan.key(shape.sizes.windows[number], flows)
        plans.setdefault(key, []).append(number)
        made[key] = (plan, flows)
        flows = flows or any(one.trained for one in plan.held)
    if packing is not None and not any(plan.packed for plan, _ in made.values()):
        raise UserError(
            f"{shape.sizes.model_type} has no linear layers that can be quantized; remove quantization.",
            key="quantization",
        )
    groups = tuple(
        Layers(
            count=len(numbers),
            number=numbers[0],
            held=tuple(made[key][0].held),
            trained=frozenset(made[key][0].trained),
            around=tuple(made[key][0].around.items()),
            packed=frozenset(made[key][0].packed),
            input_grad=made[key][1],
            prompts=adaptation.prompts(numbers[0]),
        )
        for key, numbers in plans.items()
    )
    head = next((one for one in outside if one.role == "head"), outside[0])
    outside += [Held(extra, "adapter", True) for extra in adaptation.outside]
    return Network(
        shape, groups, tuple(outside), head.trained, outside[0].trained, adaptation.shared, adaptation.prompt
    )


def _layer(
    shape: ModelShape, number: int, modules: tuple[Module, ...], adaptation: Adaptation, packing: PackedBytes | None
) -> _LayerPlan:
    plan = _LayerPlan()
    prefix = shape.prefix(number)
    for module in modules:
        around = adaptation.around(number, prefix + module.path, module)
        if around is not None:
            plan.around[module.path] = around.kind
            plan.held += [Held(extra, "adapter", True, hidden_matrix=len(extra) == 2) for extra in around.shapes]
        for weight in module.weights:
            plan.held.append(_held(plan, prefix, module, weight, adaptation, packing))
    plan.held += [Held(extra, "adapter", True) for extra in adaptation.inside(number)]
    return plan


def _held(
    plan: _LayerPlan, prefix: str, module: Module, weight: Weight, adaptation: Adaptation, packing: PackedBytes | None
) -> Held:
    trained = adaptation.trains(prefix + weight.name)
    if trained:
        plan.trained.add(weight.name)
    quantized = packing is not None and module.kind == "linear" and weight.name.endswith(".weight") and not trained
    if quantized:
        assert packing is not None, "asked for"
        plan.packed.add(module.path)
        return Held(weight.shape, weight.role, False, packing(module.outputs, module.inputs))
    return Held(weight.shape, weight.role, trained, hidden_matrix=len(weight.shape) == 2)
