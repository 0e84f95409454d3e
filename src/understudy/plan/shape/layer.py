"""One decoder layer, as transformers computes it, on a `Tape`.

What each operation keeps for its backward pass is noted where it is not its inputs. Widths are elements a token.
"""

from __future__ import annotations

from understudy.plan.shape.adapted import apply_around
from understudy.plan.shape.attention import attend
from understudy.plan.shape.sizes import Sizes
from understudy.plan.shape.tape import Line, Module, Op, Storage, Tape, Treatment, Value, Weight

__all__ = ["Traced", "norm", "trace_layer"]

_FP32 = 4
_CHOICE = 40
"""Bytes of a token's pick of an expert: indices of the token, of the pick and of its weight, int64, and the weight."""


class Traced:
    """A layer that was recorded, with its output."""

    def __init__(self, tape: Tape, output: Value) -> None:
        self.tape, self.output = tape, output

    @property
    def modules(self) -> list[Module]:
        return self.tape.modules

    @property
    def ops(self) -> list[Op]:
        return self.tape.ops


def trace_layer(sizes: Sizes, number: int, treatment: Treatment | None = None) -> Traced:
    """Layer `number` of a model of these `sizes`."""
    layer = _Layer(Tape(treatment), sizes, number)
    return Traced(layer.tape, layer.run())


class _Layer:
    def __init__(self, tape: Tape, sizes: Sizes, number: int) -> None:
        self.tape, self.sizes, self.family, self.number = tape, sizes, sizes.family, number

    def run(self) -> Value:
        family, tape = self.family, self.tape
        state = tape.input(self.sizes.hidden)
        if family.parallel:
            read = self._norm(state, family.before_attention)
            attended = self._attention(read)
            # One norm for both parts, or one for each.
            read = self._norm(state, family.before_mlp) if family.before_mlp else read
            return tape.add(state, attended, self._mlp(read))
        attended = self._attention(self._norm(state, family.before_attention))
        state = tape.add(state, self._norm(attended, family.after_attention))
        fed = self._mlp(self._norm(state, family.before_mlp))
        return tape.add(state, self._norm(fed, family.after_mlp))

    def _norm(self, value: Value, name: str | None) -> Value:
        return value if name is None else norm(self.tape, self.sizes, value, name, (self.sizes.hidden,))

    def _attention(self, read: Value) -> Value:
        family, sizes = self.family, self.sizes
        widths = (sizes.query_width, sizes.kv_width, sizes.kv_width)
        if len(family.queries) == 1:
            whole = self._linear(read, f"{family.attention}.{family.queries[0]}", sum(widths), family.query_bias)
            query, key, value = self.tape.views(whole, widths)
        else:
            query, key, value = (
                self._linear(read, f"{family.attention}.{name}", width, family.query_bias)
                for name, width in zip(family.queries, widths)
            )
        if family.head_norm is not None and family.head_norm_flag.of(sizes.config):
            query = self._head_norm(query, family.head_norm_names[0], sizes.heads)
            key = self._head_norm(key, family.head_norm_names[1], sizes.kv_heads)
        if family.rotary:
            query, key = (self._rotated(one) for one in (query, key))
        if family.sinks:
            weight = Weight(f"{family.attention}.sinks", (sizes.heads,), "attention")
            self.tape.modules.append(Module(f"{family.attention}.sinks", "parameter", (weight,)))
        attended = attend(self.tape, sizes, self.number, query, key, value)
        out = self._linear(attended, f"{family.attention}.{family.output}", sizes.hidden, family.output_bias)
        if prompts := self.tape.treatment.prompts:
            out = self.tape.add(out, self._prompted(read, prompts))
        return self._dropped(out)

    def _prompted(self, read: Value, prompts: int) -> Value:
        """What attention to so many learned vectors adds, through a gate. Queries are computed once more."""
        sizes, tape = self.sizes, self.tape
        scores = float(sizes.heads * prompts)
        query, raw = tape.new(sizes.query_width, grad=read.grad), tape.new(scores, grad=True)
        tape.record((read,), (query,), costly=True)
        tape.record((query,), (raw,), (query,), costly=True)
        softmax = tape.new(scores, grad=True, itemsize=_FP32)
        rounded, gated = tape.new(scores, grad=True), tape.new(scores, grad=True)
        mixed, out = tape.new(sizes.query_width, grad=True), tape.new(sizes.hidden, grad=True)
        tape.record((raw,), (mixed,), (softmax, rounded, gated), scratch=Line(0.0, 2 * softmax.width), costly=True)
        tape.record((mixed,), (out,), costly=True)
        self._count_product(sizes.hidden * (sizes.query_width + sizes.hidden), False, read.grad)
        return out

    def _head_norm(self, value: Value, name: str, heads: int) -> Value:
        sizes, family = self.sizes, self.family
        shape: tuple[int, ...] = (sizes.head_dim,) if family.head_norm == "head" else (heads * sizes.head_dim,)
        if family.head_norm_per_head:
            shape = (heads, sizes.head_dim)
        rows = heads if family.head_norm == "head" else 1
        return norm(self.tape, sizes, value, f"{family.attention}.{name}", shape, rows=rows)

    def _rotated(self, value: Value) -> Value:
        # x · cos + rotate_half(x) · sin: cosines are shared by all layers, and neither product keeps x.
        out = Value(Storage(Line(0.0, value.width)), value.width, value.grad)
        self.tape.record((value,), (out,), scratch=Line(0.0, value.width))
        self.tape.traffic += 5 * value.width
        return out

    def _mlp(self, read: Value) -> Value:
        family, sizes = self.family, self.sizes
        if family.mlp == "experts" and self.number not in sizes.dense_layers:
            return self._dropped(self._experts(read))
        inner = sizes.dense_inner if family.mlp == "experts" else sizes.inner
        return self._dropped(self._feed_forward(read, family.mlp_path, inner))

    def _feed_forward(self, read: Value, path: str, inner: int) -> Value:
        family, tape = self.family, self.tape
        names = [f"{path}.{name}" if path else name for name in family.mlp_names]
        if family.mlp in ("gated", "experts"):
            gate = self._linear(read, names[0], inner, family.mlp_bias)
            up = self._linear(read, names[1], inner, family.mlp_bias)
        elif family.mlp == "fused":
            gate, up = tape.views(self._linear(read, names[0], 2 * inner, family.mlp_bias), (inner, inner))
        else:
            up = self._linear(read, names[0], inner, family.mlp_bias)
            return self._linear(self._activated(up, inner, path), names[-1], self.sizes.hidden, family.mlp_bias)
        active = self._activated(gate, inner, path)
        product = tape.elementwise((active, up), inner, (active, up))
        return self._linear(product, names[-1], self.sizes.hidden, family.mlp_bias)

    def _activated(self, value: Value, width: int, path: str) -> Value:
        kind, tape = self.sizes.activation, self.tape
        if kind == "relu":  # keeps its result
            out = tape.new(width, grad=value.grad)
            tape.record((value,), (out,), (out,))
            return out
        if kind == "relu2":  # so does its square
            return tape.elementwise((value,), width, (tape.new(width, grad=value.grad),))
        if kind in ("gelu_new", "gelu_fast", "quick_gelu"):  # written out in several products
            inside = [tape.new(width, grad=value.grad) for _ in range(1 if kind == "quick_gelu" else 3)]
            out = tape.new(width, grad=value.grad)
            tape.record((value,), (out,), (value, *inside), scratch=Line(0.0, 2 * value.width))
            tape.traffic += 2 * sum(one.width for one in inside)
            return out
        if kind == "xielu":  # where, expm1, squares: PyTorch's operations one by one
            names = (f"{path}.act_fn.alpha_p", f"{path}.act_fn.alpha_n")
            for name in names:
                tape.modules.append(Module(name, "parameter", (Weight(name, (1,), "mlp"),)))
            inside = [tape.new(width, grad=value.grad) for _ in range(4)]
            mask = tape.new(width, grad=value.grad, itemsize=1)
            out = tape.new(width, grad=value.grad)
            tape.record((value,), (out,), (value, mask, *inside), scratch=Line(0.0, 3 * value.width))
            tape.traffic += 20 * value.width
            return out
        return tape.elementwise((value,), width, (value,))

    def _experts(self, read: Value) -> Value:
        """A router, and for each token the experts that it picks. Of their inputs each expert gets a copy."""
        family, sizes, tape = self.family, self.sizes, self.tape
        hidden, inner, count, taken = sizes.hidden, sizes.inner, sizes.experts, sizes.experts_per_token
        path, treatment = family.mlp_path, tape.treatment
        weights = [Weight(f"{path}.{family.router}.weight", (count, hidden), "mlp")]
        if family.router_bias:
            weights.append(Weight(f"{path}.{family.router}.bias", (count,), "mlp"))
        tape.modules.append(Module(f"{path}.{family.router}", "router", tuple(weights)))
        up, down = (count, 2 * inner, hidden), (count, hidden, inner)
        if family.experts_transposed:
            up, down = (count, hidden, 2 * inner), (count, inner, hidden)
        experts = [
            Weight(f"{path}.experts.gate_up_proj", up, "experts"),
            Weight(f"{path}.experts.down_proj", down, "experts"),
        ]
        if family.experts_transposed:
            experts.append(Weight(f"{path}.experts.gate_up_proj_bias", (count, 2 * inner), "experts"))
            experts.append(Weight(f"{path}.experts.down_proj_bias", (count, hidden), "experts"))
        tape.modules.append(Module(f"{path}.experts", "experts", tuple(experts)))
        trained = treatment.trained(experts[0].name)
        grad = read.grad or trained
        widths = [2 * inner, inner, inner, hidden]  # both projections, activation, product, output
        if family.experts_transposed:
            widths += [inner] * 4  # clamps and a sigmoid
        if trained:
            widths.append(hidden)
        kept = [tape.new(taken * width, grad=grad) for width in widths]
        probabilities = tape.new(count, grad=grad, itemsize=_FP32)
        chosen = tape.new(taken, grad=grad, itemsize=_CHOICE)
        numel = sum(weight.numel for weight in experts)
        casts = [Storage(Line(float(numel * tape.itemsize), 0.0))] if treatment.casts and trained else []
        out = tape.new(hidden, grad=grad)
        # On accelerators all experts go backward at once, on a processor one after another.
        at_once = 1.0 if treatment.accelerated else 1.0 / count
        scratch = Line(0.0, at_once * taken * (hidden + 2 * inner) * tape.itemsize)
        made = tape.gradient(numel) if trained else 0.0
        tape.record((read,), (out,), [read, probabilities, chosen, *kept, *casts], weight=made, scratch=scratch)
        self._count_product(taken * 3 * hidden * inner + hidden * count, trained, read.grad)
        tape.traffic += 2 * sum(one.width for one in kept)
        if not family.shared_expert:
            return out
        shared = self._feed_forward(read, f"{path}.shared_expert", self._shared_inner())
        gate = self._linear(read, f"{path}.shared_expert_gate", 1, None)
        return tape.add(out, tape.elementwise((gate, shared), hidden, (gate, shared)))

    def _shared_inner(self) -> int:
        value = self.sizes.config.get("shared_expert_intermediate_size")
        return value if isinstance(value, int) else self.sizes.dense_inner

    def _linear(self, read: Value, path: str, outputs: int, bias: object) -> Value:
        """x Wᵀ + b. Keeps x where W is trained, and W where x requires a gradient: a copy where it was cast."""
        family, tape, treatment = self.family, self.tape, self.tape.treatment
        inputs = round(read.width / tape.itemsize)
        role = "attention" if path.startswith(family.attention) else "mlp"
        shape = (inputs, outputs) if family.transposed else (outputs, inputs)
        weights = [Weight(f"{path}.weight", shape, role)]
        if bias is not None and bias.of(self.sizes.config):  # type: ignore[attr-defined]  # a Flag
            weights.append(Weight(f"{path}.bias", (outputs,), role))
        tape.modules.append(
            Module(path, "transposed" if family.transposed else "linear", tuple(weights), inputs, outputs)
        )
        trained, packed = treatment.trained(weights[0].name), path in treatment.packed
        numel = sum(weight.numel for weight in weights)
        copied = float(numel * tape.itemsize)
        out = tape.new(outputs, grad=read.grad or trained)
        saved: list[Value | Storage] = [read] if trained else []
        if trained and treatment.casts and read.grad:
            saved.append(Storage(Line(copied, 0.0)))
        # A quantized weight is whole while it is used, in either direction.
        scratch = Line(copied, 0.0) if packed else Line(0.0, 0.0)
        tape.record(
            (read,), (out,), saved, weight=tape.gradient(numel) if trained else 0.0, scratch=scratch, costly=True
        )
        self._count_product(inputs * outputs, trained, read.grad)
        around = treatment.adapters.get(path)
        return out if around is None else apply_around(tape, around, read, out, inputs, outputs)

    def _count_product(self, multiplications: float, trained: bool, input_grad: bool) -> None:
        self.tape.flops += 2.0 * multiplications
        if trained:
            self.tape.weight_flops += 2.0 * multiplications

    def _dropped(self, value: Value) -> Value:
        rate = self.sizes.dropout(self.family.residual_dropout)
        return value if rate == 0.0 else dropout(self.tape, value)


def dropout(tape: Tape, value: Value) -> Value:
    """Keeps a mask: a byte an element on accelerators, one of the dtype on a processor."""
    itemsize = 1 if tape.treatment.accelerated else tape.itemsize
    mask = Storage(Line(0.0, value.width / tape.itemsize * itemsize))
    out = Value(Storage(Line(0.0, value.width)), value.width, value.grad)
    tape.record((value,), (out,), (mask,))
    return out


def norm(tape: Tape, sizes: Sizes, value: Value, path: str, shape: tuple[int, ...], *, rows: int = 1) -> Value:
    """The architecture's norm over `rows` parts of `value`. Those that transformers writes out keep fp32 copies."""
    kind, itemsize = sizes.family.norm, tape.itemsize
    weights = [] if kind == "layer_plain" else [Weight(f"{path}.weight", shape, "norm")]
    if kind == "layer":
        weights.append(Weight(f"{path}.bias", shape, "norm"))
    if weights:
        tape.modules.append(Module(path, "norm", tuple(weights)))
    trained = bool(weights) and tape.treatment.trained(weights[0].name)
    elements, grad = value.width / itemsize, value.grad or trained
    wide = value.storage if itemsize == _FP32 else Storage(Line(0.0, elements * _FP32))
    statistics = Storage(Line(0.0, float(rows * _FP32 * (2 if kind.startswith("layer") else 1))))
    out = tape.new(elements, grad=grad)
    made = tape.gradient(sum(weight.numel for weight in weights)) if trained else 0.0
    saved: list[Storage] = [value.storage, statistics]
    scratch = Line(0.0, elements * itemsize)
    if kind != "layer":
        # The fp32 copy of x, and x·r: cast where the weight comes after the cast, and kept only for its gradient.
        saved = [wide, statistics]
        product = itemsize if kind == "rms" else _FP32
        if trained:
            saved.append(Storage(Line(0.0, elements * product)))
        if kind == "layer_wide":
            saved += [Storage(Line(0.0, elements * _FP32)), Storage(Line(0.0, float(rows * _FP32)))]
        scratch = Line(0.0, 3 * elements * _FP32)
        tape.traffic += elements * _FP32 * 6
    tape.record((value,), (out,), saved, weight=made, scratch=scratch)
    return out
