"""The types that the parts agree on: a micro-batch, a sum of losses, an objective, a strategy.

Shape letters: T tokens of a flat micro-batch, D its documents, N its supervised positions, H hidden width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

__all__ = [
    "IGNORED",
    "Batch",
    "GlobalBatch",
    "HeldBytes",
    "HiddenStates",
    "LayerLoss",
    "LazyTensor",
    "LossScale",
    "LossSum",
    "Objective",
    "Strategy",
    "TensorSpec",
    "TokenLoss",
    "TokenLossResult",
]

IGNORED = -100
"""Label of a position that is not supervised, the value PyTorch's cross-entropy ignores."""


@dataclass(frozen=True)
class Batch:
    """One flat micro-batch on one rank: several documents end to end, never padded (P3)."""

    tokens: Tensor
    """[T] int64."""
    labels: Tensor
    """[T] int64, already shifted: labels[t] is the token after tokens[t]; IGNORED where unsupervised."""
    positions: Tensor
    """[T] int64, restarts at 0 in each document."""
    document_offsets: Tensor
    """[D+1] int32, first 0, last T. Always on the CPU: kernels' launch parameters are read from it without a sync."""
    targets: Any = None
    """What a teacher says about the supervised positions, in order; its objective knows its type. Until `prepare`, what
    one that is asked before the step said then, which that teacher knows."""

    def to(self, device: torch.device) -> Batch:
        """The same batch with `tokens`, `labels` and `positions` on `device`; offsets stay on the CPU."""
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
        )

    @staticmethod
    def of(documents: Sequence[tuple[Tensor, Tensor]]) -> Batch:
        """Joins documents, each `(tokens [L] int64, labels [L] int64)`. None at all gives an *empty* batch: one token
        with no label, so that a rank without work still enters every collective and its gradients are exact zeros."""
        if not documents:
            documents = [(torch.zeros(1, dtype=torch.int64), torch.full((1,), IGNORED))]
        lengths = torch.tensor([len(tokens) for tokens, _ in documents])
        return Batch(
            tokens=torch.cat([tokens for tokens, _ in documents]),
            labels=torch.cat([labels for _, labels in documents]),
            positions=torch.cat([torch.arange(int(length)) for length in lengths]),
            document_offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32),
        )


@dataclass(frozen=True)
class GlobalBatch:
    """What one optimizer step trains on: this rank's micro-batches, and counts over all ranks."""

    micro_batches: tuple[Batch, ...]
    """On the CPU; equal in number on every rank, some may be empty."""
    num_tokens: int
    """Supervised tokens of the global batch, the divisor of P2."""
    num_input_tokens: int
    """Real tokens of the global batch, supervised or not; what throughput counts."""
    examples: tuple[int, ...]
    """Ids of the global batch's examples, in order, the same at any world size."""
    epoch: float
    """Epochs completed once this step is done."""
    on_policy: bool = False
    """Whether the answers are the student's own."""


class LossSum(NamedTuple):
    """Sums over supervised tokens, never means."""

    loss: Tensor
    """Scalar fp32, nats summed."""
    num_tokens: Tensor
    """Scalar int64, supervised tokens summed over."""
    metrics: dict[str, Tensor]
    """Other sums over the same tokens, scalars such as `correct` or vectors."""


class TokenLossResult(NamedTuple):
    loss: Tensor
    """Scalar fp32: the sum over the rows."""
    grad_logits: Tensor
    """[N, V] fp32: its gradient; may be the memory of the logits given."""
    metrics: dict[str, Tensor]
    """Sums over the rows, scalars or vectors."""


class TokenLoss(Protocol):
    """A loss of logits, one chunk of supervised positions at a time, gradient included (P4)."""

    def __call__(self, logits: Tensor, rows: slice) -> TokenLossResult:
        """`logits` [n, V] fp32 belong to supervised positions `rows` (n of the batch's N). May overwrite `logits`."""
        ...


class LayerLoss(Protocol):
    """A loss of what decoder layers put out at the supervised positions, a chunk at a time, gradient included."""

    weight: float
    """Factor on it in the whole loss."""
    layers: Sequence[int]
    """The student's layer of each term; one may be in several."""

    def __call__(self, term: int, outputs: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """The sum over rows, a scalar, and its gradient [n, H] with respect to `outputs`: [n, H] fp32 at supervised
        positions `rows`, mapped to the width of what they are compared with. Leaves them as they are."""
        ...


class HiddenStates(NamedTuple):
    """At n positions, in the compute dtype."""

    last: Tensor
    """[n, H], what the head takes."""
    layers: tuple[Tensor, ...]
    """[n, H] each: what decoder layers that were asked for put out, in that order."""


class Objective(Protocol):
    def prepare(self, batch: Batch) -> Batch:
        """Adds what a teacher supplies. Runs without gradient, on the batch's device."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Runs `model(batch, token_loss)`, with a `layer_loss` where it has one, and returns sums; a strategy may have
        wrapped `model`."""
        ...


class TensorSpec(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype


class HeldBytes(NamedTuple):
    """Of weights in one process's memory, as they are kept for computing."""

    frozen: int
    trained: int


class LossScale(NamedTuple):
    """The factor on the loss, and the updates since it last changed."""

    value: float
    steps_since_change: int


class LazyTensor(Protocol):
    """A tensor on disk of which only the part asked for is read."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        """That part, on the CPU, in the stored dtype."""
        ...


class Strategy(Protocol):
    """How the data-parallel axis stores state. Every method is a collective: all ranks call it, in the same order.

    Names are canonical: the Hugging Face parameter names, peft's for an adapter's own, whatever wraps the module. A
    tied parameter has one name. One that requires no gradient is frozen: it gets no gradient and no optimizer state.
    """

    def build(
        self,
        make_model: Callable[[], nn.Module],
        make_optimizer: Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer],
    ) -> None:
        """Builds module and optimizer; `make_model` gives a `LanguageModel` whose parameters are on the meta device and
        whose buffers are real. Parameters hold nothing meaningful until `load_state`."""
        ...

    def load_state(self, read: Callable[[str], LazyTensor]) -> None:
        """Sets weights from `read(name)`; each rank reads only what it holds."""
        ...

    def load_optimizer_state(self, stored: Mapping[str, Mapping[str, LazyTensor]]) -> None:
        """Sets optimizer state from `stored[parameter][key]`, as `optimizer_state` gave it under any strategy; each
        rank reads only what it holds."""
        ...

    def layout(self) -> Mapping[str, TensorSpec]:
        """Name, full shape and dtype of each weight, in the order of `state`; the same on every rank."""
        ...

    def held_bytes(self) -> HeldBytes:
        """Of weights, on this rank, between steps."""
        ...

    def state(self, owner: Callable[[str], int | None]) -> Iterator[tuple[str, Tensor]]:
        """Full weights in `layout` order, one at a time, on any device; a rank yields only those it owns, and those
        that nobody owns are left where they are. What it yields may be the strategy's own memory, which the next step
        changes."""
        ...

    def optimizer_layout(self) -> Mapping[str, TensorSpec]:
        """As `layout`, of optimizer state: `<parameter>.<key>`, such as `model.norm.weight.exp_avg`. Moments have their
        parameter's shape, counts are scalars. Empty before the first update."""
        ...

    def optimizer_state(self, owner: Callable[[str], int]) -> Iterator[tuple[str, Tensor]]:
        """As `state`, of optimizer state, in `optimizer_layout` order."""
        ...

    loss_scale: LossScale | None
    """The dynamic loss scale of fp16, which a checkpoint must keep; None in other precisions."""

    def forward_backward(self, micro_batches: Sequence[Batch], objective: Objective, num_tokens: int) -> LossSum:
        """Accumulates ∂(Σ loss over the global batch) / ∂θ ÷ num_tokens (P2). Returns the sums over all ranks."""
        ...

    def optimizer_step(self, lr: float, max_norm: float | None) -> Tensor:
        """Clips, steps, clears gradients. Returns the global gradient norm before clipping, fp32; when it is not finite
        nothing is changed."""
        ...

    def evaluate(self, micro_batches: Sequence[Batch], objective: Objective) -> LossSum:
        """Sums over all ranks, without gradient, module in eval mode."""
        ...

    def hidden(self, batch: Batch, at: Tensor, layers: Sequence[int] = ()) -> HiddenStates:
        """As `logits`: hidden states at `at`, those of decoder layers `layers` too."""
        ...

    def logits(self, batch: Batch, at: Tensor) -> Tensor:
        """[len(at), V] fp32 logits at token indices `at` of `batch`, without gradient, module in eval mode. Every rank
        passes its own batch and gets its own logits."""
        ...

    def decode(self, texts: Any) -> Tensor:
        """As `logits`: those of the next token of each of `texts`, a `models.decoding.Decoding` of B, [B, V]."""
        ...
