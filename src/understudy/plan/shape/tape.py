"""What autograd keeps of one layer's forward pass, and what its backward pass then holds at once, symbolically.

A layer is described once, as calls on a `Tape` (see `layer`). From that follow its parameters, its arithmetic and its
memory, as functions of the number of tokens. PyTorch's rules are those of `derivatives.yaml` and of autograd's engine:
a product keeps its factors, a cast and a sum keep nothing, a gradient lives until the last of its uses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["Line", "Module", "Op", "Storage", "Tape", "Treatment", "Value", "Weight", "peak"]


class Line(NamedTuple):
    """Bytes as a function of the tokens T: `fixed` + `each` · T."""

    fixed: float
    each: float

    def at(self, tokens: int) -> int:
        return int(self.fixed + self.each * tokens)

    def __add__(self, other: object) -> Line:  # of lines, not of tuples
        assert isinstance(other, Line)
        return Line(self.fixed + other.fixed, self.each + other.each)

    def __sub__(self, other: Line) -> Line:
        return Line(self.fixed - other.fixed, self.each - other.each)

    def times(self, factor: float) -> Line:
        return Line(self.fixed * factor, self.each * factor)


def peak(lines: Iterable[Line], tokens: int) -> int:
    """The highest of the lines at T = `tokens`; 0 for none."""
    return max((line.at(tokens) for line in lines), default=0)


@dataclass(frozen=True)
class Weight:
    """A parameter as transformers names it inside its layer, such as `self_attn.q_proj.weight`."""

    name: str
    shape: tuple[int, ...]
    role: str
    """attention, mlp, experts, norm, embedding or head."""

    @property
    def numel(self) -> int:
        size = 1
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True)
class Module:
    """A linear layer, a norm, or a bare parameter. `inputs` and `outputs` are the widths of a linear layer."""

    path: str
    kind: str
    """linear, transposed (GPT-2's own class), norm, router, experts or parameter."""
    weights: tuple[Weight, ...]
    inputs: int = 0
    outputs: int = 0


@dataclass(eq=False)
class Storage:
    """Memory of a tensor: bytes a token, and bytes whatever the tokens (a weight that was cast)."""

    size: Line


@dataclass(eq=False)
class Value:
    """A tensor; views share their `storage`. `width` is its bytes a token, which its gradient has too."""

    storage: Storage
    width: float
    grad: bool


@dataclass
class Op:
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    saved: tuple[Storage, ...]
    weight: float
    """Bytes of the weight's gradient as it is made."""
    shared_grad: bool
    """The gradient of the output is that of each input, the same tensor (sums, views)."""
    scratch: Line
    """Held beside inputs and outputs while its backward runs."""
    costly: bool
    """Selective checkpointing keeps its outputs."""
    forward_scratch: Line = Line(0.0, 0.0)  # noqa: RUF009  # a tuple
    """Held beside inputs and outputs while its forward runs."""


@dataclass(frozen=True)
class Treatment:
    """How a strategy and an adapter treat a layer's weights."""

    itemsize: int
    """Bytes of the dtype that computes."""
    trained: Callable[[str], bool] = lambda name: True
    """By a parameter's name inside the layer."""
    made: int = 0
    """Bytes an element of a weight's gradient as it is made, casts on the way included; 0 for the `itemsize`."""
    casts: bool = False
    """Each use of a trained weight casts it anew, and its backward keeps that copy (DDP, ZeRO 0)."""
    accumulates: bool = False
    """Gradients of a layer's weights are whole until the layer is done (FSDP)."""
    adapters: Mapping[str, object] = field(default_factory=dict)
    """By a linear layer's path inside the layer: what is around it (`adapters.Around`)."""
    packed: frozenset[str] = frozenset()
    """Paths of linear layers whose weights are quantized."""
    prompts: int = 0
    """Learned vectors that the layer attends to beside its own (LLaMA-Adapter)."""
    attention: str = "varlen"
    """varlen, flash, fusion, documents or explicit; see `layer`."""
    document: int = 1
    """Tokens of the longest document, for attention that is written out."""
    accelerated: bool = True
    input_grad: bool = True
    """Whether the layer's input requires a gradient."""


class Tape:
    """Records what a layer does. With `treatment` None only its modules."""

    def __init__(self, treatment: Treatment | None = None) -> None:
        self.modules: list[Module] = []
        self.ops: list[Op] = []
        self.treatment = treatment or Treatment(2)
        self.flops = 0.0
        """Of the forward pass, a token."""
        self.weight_flops = 0.0
        """Of its matrix products with weights that are trained: as many again go into their gradients."""
        self.attention_flops = 0.0
        self.traffic = 0.0
        """Bytes read and written by the forward pass, a token."""

    @property
    def itemsize(self) -> int:
        return self.treatment.itemsize

    def gradient(self, numel: float) -> float:
        """Bytes of a weight's gradient as it is made."""
        return float(numel * (self.treatment.made or self.itemsize))

    def input(self, width: int) -> Value:
        size = float(width * self.itemsize)
        self._input = Storage(Line(0.0, size))
        return Value(self._input, size, self.treatment.input_grad)

    def new(self, width: float, *, grad: bool, itemsize: int | None = None) -> Value:
        size = float(width * (itemsize or self.itemsize))
        return Value(Storage(Line(0.0, size)), size, grad)

    def record(
        self,
        inputs: Sequence[Value],
        outputs: Sequence[Value],
        saved: Iterable[Value | Storage] = (),
        *,
        weight: float = 0.0,
        shared_grad: bool = False,
        scratch: Line = Line(0.0, 0.0),  # noqa: B008  # a tuple
        costly: bool = False,
        forward_scratch: Line = Line(0.0, 0.0),  # noqa: B008
    ) -> None:
        if not shared_grad:
            self.traffic += sum(value.width for value in (*inputs, *outputs))
        kept = tuple(item.storage if isinstance(item, Value) else item for item in saved)
        if not any(value.grad for value in outputs):
            kept = ()
        self.ops.append(Op(tuple(inputs), tuple(outputs), kept, weight, shared_grad, scratch, costly, forward_scratch))

    def elementwise(self, inputs: Sequence[Value], width: float, saved: Iterable[Value] = ()) -> Value:
        """A new tensor from `inputs`; `saved` are those of them that its backward reads."""
        out = self.new(width, grad=any(value.grad for value in inputs))
        self.record(inputs, (out,), saved)
        return out

    def add(self, *inputs: Value, scaled: bool = False) -> Value:
        """Their sum; `scaled` when the last one is multiplied by a number first."""
        out = Value(Storage(Line(0.0, inputs[0].width)), inputs[0].width, any(value.grad for value in inputs))
        product = Line(0.0, inputs[-1].width if scaled else 0.0)
        self.record(inputs, (out,), shared_grad=True, forward_scratch=product)
        self.traffic += 3 * out.width
        return out

    def views(self, whole: Value, widths: Sequence[float]) -> list[Value]:
        """Parts of `whole`, elements each, whose gradients are put together."""
        parts = [Value(whole.storage, float(width * self.itemsize), whole.grad) for width in widths]
        self.record((whole,), parts)
        self.traffic -= 2 * whole.width  # nothing is moved but gradients
        return parts

    # What follows is read off once a layer is recorded.

    def saved(self) -> Line:
        """What is kept from the forward pass to the backward pass."""
        return _total(self._saved())

    def keeps_input(self) -> bool:
        return self._input in self._saved()

    def kept_of_costly(self) -> Line:
        """Outputs that selective checkpointing keeps."""
        return _total(self._costly())

    def backward(self, output: Value, *, with_weights: bool = False) -> tuple[Line, ...]:
        """Bytes held at each operation of the backward pass, from all that is saved and the output's gradient on; only
        at those that make a weight's gradient `with_weights`. What the strategy does with finished weight gradients is
        not in it, but where it `accumulates`."""
        left: dict[Storage, int] = {}
        for op in self.ops:
            for storage in set(op.saved):
                left[storage] = left.get(storage, 0) + 1
        saved = _total(left)
        grads: dict[Value, Storage] = {output: Storage(Line(0.0, output.width))}
        held, lines = Line(0.0, 0.0), []
        for op in reversed(self.ops):
            reached = [value for value in op.outputs if value in grads]
            if reached:
                fresh = _fresh_gradients(op, grads)
                made = Line(op.weight, 0.0) + op.scratch + _total(fresh)
                if op.weight or not with_weights:
                    lines.append(saved + _total(grads.values()) + held + made)
                _hand_over(op, reached, grads, fresh)
                if self.treatment.accumulates:
                    held += Line(op.weight, 0.0)
            for storage in set(op.saved):
                left[storage] -= 1
                if not left[storage]:
                    saved -= storage.size
        return _highest(lines)

    def forward_saving(self, output: Value) -> tuple[Line, ...]:
        """Bytes held at each operation of a forward pass whose backward pass is to come, its input included."""
        return self.forward(output, keeping=self._saved())

    def forward_caching(self, output: Value) -> tuple[Line, ...]:
        """The same where selective checkpointing keeps what is costly, and nothing else."""
        return self.forward(output, keeping={self._input, *self._costly()})

    def again(self, output: Value) -> tuple[Line, ...]:
        """Of a layer under selective checkpointing, as it is computed again: what is costly waits until its turn."""
        return self.forward(output, keeping={self._input, *self._saved()}, waiting=self._costly())

    def forward(
        self, output: Value, *, keeping: Collection[Storage] = (), waiting: Collection[Storage] = ()
    ) -> tuple[Line, ...]:
        """Bytes held at each operation of a forward pass, its input included. Of what it makes all is let go at its
        last use but what is in `keeping`; what is in `waiting` is there before it is made."""
        before = dict.fromkeys(waiting)
        last = {id(value.storage): number for number, op in enumerate(self.ops) for value in op.inputs}
        last[id(output.storage)] = len(self.ops)
        kept = {id(storage) for storage in keeping}
        alive: dict[int, Line] = {}
        lines = []
        for number, op in enumerate(self.ops):
            for storage in (*(value.storage for value in (*op.inputs, *op.outputs)), *op.saved):
                if id(storage) in kept or storage not in op.saved or id(storage) in last:
                    alive[id(storage)] = storage.size
                before.pop(storage, None)
            lines.append(_sum((*alive.values(), *(storage.size for storage in before), op.forward_scratch)))
            alive = {key: size for key, size in alive.items() if last.get(key, -1) > number or key in kept}
        return _highest(lines)

    def _costly(self) -> set[Storage]:
        return {out.storage for op in self.ops if op.costly for out in op.outputs}

    def _saved(self) -> set[Storage]:
        return {storage for op in self.ops for storage in op.saved}


def _fresh_gradients(op: Op, grads: Mapping[Value, Storage]) -> list[Storage]:
    """What the operation's backward allocates: a gradient for each input that needs one, its own or, where it is that
    of the output, only where it is added to another."""
    fresh = []
    for value in dict.fromkeys(op.inputs):
        if value.grad and (not op.shared_grad or value in grads):
            fresh.append(Storage(Line(0.0, value.width)))
    return fresh


def _hand_over(op: Op, reached: Sequence[Value], grads: dict[Value, Storage], fresh: list[Storage]) -> None:
    given = [grads.pop(value) for value in reached]
    for value in dict.fromkeys(op.inputs):
        if not value.grad:
            continue
        # A sum of gradients takes the place of both.
        alone = op.shared_grad and value not in grads
        grads[value] = given[0] if alone else fresh.pop(0)


def _total(storages: Iterable[Storage]) -> Line:
    return _sum(storage.size for storage in set(storages))


def _sum(lines: Iterable[Line]) -> Line:
    fixed = each = 0.0
    for line in lines:
        fixed += line.fixed
        each += line.each
    return Line(fixed, each)


def _highest(lines: Sequence[Line]) -> tuple[Line, ...]:
    """Without those that lie below another for every number of tokens."""
    kept: list[Line] = []
    for line in sorted(set(lines), key=lambda line: (-line.each, -line.fixed)):
        if not kept or line.fixed > kept[-1].fixed:
            kept.append(line)
    return tuple(kept)
