"""The loss head against plain fp64 logits, in value, gradient and memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from understudy.contracts import TokenLossResult
from understudy.models.head import LossHead
from understudy.models.logits import Identity, LogitTransform, Scale, SoftCap
from understudy.objectives.causal_lm import CrossEntropy

pytestmark = pytest.mark.unit

HIDDEN, VOCABULARY = 12, 37
TRANSFORMS: list[tuple[LogitTransform, Any]] = [
    (Identity(), lambda raw: raw),
    (Scale(0.3), lambda raw: 0.3 * raw),
    (SoftCap(2.0), lambda raw: 2.0 * torch.tanh(raw / 2.0)),
]


def make_head(*, bias: bool = False, rows: int = 3, transform: LogitTransform | None = None) -> LossHead:
    """A head that takes `rows` rows a chunk."""
    torch.manual_seed(0)
    linear = nn.Linear(HIDDEN, VOCABULARY, bias=bias)
    nn.init.normal_(linear.weight)
    head = LossHead.replacing(linear)
    head.chunk_bytes = 4 * VOCABULARY * rows
    head.transform = transform or Identity()
    return head


def make_rows(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(count, HIDDEN, generator=generator)
    return hidden.requires_grad_(), torch.randint(VOCABULARY, (count,), generator=generator)


@pytest.mark.parametrize(("transform", "formula"), TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_loss_and_gradients_equal_fp64(transform: LogitTransform, formula: Any, bias: bool, count: int) -> None:
    head = make_head(bias=bias, transform=transform)
    hidden, labels = make_rows(count)
    exact = [t.detach().double().requires_grad_() for t in (hidden, *head.parameters())]
    logits = formula(F.linear(*exact))
    expected = F.cross_entropy(logits, labels, reduction="sum")
    (expected / 5).backward()

    loss, metrics = head(hidden, CrossEntropy(labels))
    (loss / 5).backward()

    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip((hidden, *head.parameters()), exact):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)
    assert metrics["correct"] == (logits.argmax(1) == labels).sum()


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 1000])
def test_chunks_change_nothing(rows: int) -> None:
    hidden, labels = make_rows(7)
    whole, chunked = make_head(rows=7), make_head(rows=rows)
    for head in (whole, chunked):
        head(hidden, CrossEntropy(labels))[0].backward()
    torch.testing.assert_close(chunked.weight.grad, whole.weight.grad, rtol=1e-5, atol=1e-6)


def test_a_tied_weight_gets_both_gradients() -> None:
    head = make_head()
    embedding = nn.Embedding(VOCABULARY, HIDDEN)
    embedding.weight = head.weight
    tokens, labels = torch.tensor([3, 4, 4]), torch.tensor([4, 4, 9])
    head(embedding(tokens), CrossEntropy(labels))[0].backward()
    exact = head.weight.detach().double().requires_grad_()
    F.cross_entropy(exact[tokens] @ exact.t(), labels, reduction="sum").backward()
    torch.testing.assert_close(head.weight.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_a_frozen_weight_gets_no_gradient_and_hidden_states_do() -> None:
    head = make_head()
    head.weight.requires_grad_(False)
    hidden, labels = make_rows(5)
    head(hidden, CrossEntropy(labels))[0].backward()
    assert head.weight.grad is None
    exact = hidden.detach().double().requires_grad_()
    F.cross_entropy(exact @ head.weight.double().t(), labels, reduction="sum").backward()
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_without_a_supervised_position_loss_and_gradients_are_exactly_zero(bias: bool) -> None:
    head = make_head(bias=bias)
    hidden, labels = make_rows(4)
    loss, metrics = head(hidden[:0], CrossEntropy(labels[:0]))
    loss.backward()
    assert loss == 0
    assert metrics["correct"] == 0
    assert not metrics["calibration"].any()
    for tensor in (hidden, *head.parameters()):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_labels_far_below_the_largest_logit_have_a_finite_loss() -> None:
    head = make_head(transform=Scale(1000.0))
    hidden, labels = make_rows(5)
    loss, _ = head(hidden, CrossEntropy(labels))
    exact = F.cross_entropy(1000 * (hidden.double() @ head.weight.double().t()), labels, reduction="sum")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)


def test_bf16_sums_the_weight_gradient_over_chunks_in_fp32() -> None:
    """Many chunks that each add little: summed in bf16 they would vanish beside the total."""
    head = make_head(rows=1).bfloat16()
    count = 2000
    hidden = torch.ones(count, HIDDEN, dtype=torch.bfloat16)
    labels = torch.zeros(count, dtype=torch.int64)
    head(hidden, CrossEntropy(labels))[0].backward()
    exact = head.weight.detach().double().requires_grad_()
    F.cross_entropy(hidden.double() @ exact.t(), labels, reduction="sum").backward()
    assert head.weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(head.weight.grad.double(), exact.grad, rtol=2e-2, atol=1.0)


def test_autocast_computes_products_in_its_dtype_and_the_loss_in_fp32() -> None:
    head = make_head()
    hidden, labels = make_rows(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = head(hidden, CrossEntropy(labels))
    loss.backward()
    rounded = F.linear(hidden.bfloat16(), head.weight.bfloat16()).float()
    torch.testing.assert_close(loss, F.cross_entropy(rounded, labels, reduction="sum"), rtol=1e-6, atol=1e-6)
    assert head.weight.grad.dtype == hidden.grad.dtype == torch.float32


def test_called_plainly_it_is_a_linear_layer() -> None:
    head = make_head(bias=True, transform=SoftCap(2.0))
    hidden, _ = make_rows(4)
    assert torch.equal(head(hidden), F.linear(hidden, head.weight, head.bias))
    torch.testing.assert_close(head.logits(hidden), 2 * torch.tanh(head(hidden) / 2))


def test_a_second_backward_pass_is_refused() -> None:
    head = make_head()
    hidden, labels = make_rows(4)
    loss, _ = head(hidden, CrossEntropy(labels))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


class _LiveBytes(TorchDispatchMode):
    """The largest tensor any operator gives, and the operators called."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operators.append(str(func))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.largest = max(self.largest, leaf.untyped_storage().nbytes())
        return result


@contextmanager
def recording() -> Iterator[_LiveBytes]:
    with _LiveBytes() as mode:
        yield mode


@pytest.mark.parametrize("count", [64, 512])
def test_no_tensor_grows_with_tokens_times_vocabulary(count: int) -> None:
    width, vocabulary, rows = 8, 1000, 16
    head = LossHead.replacing(nn.Linear(width, vocabulary, bias=False))
    head.chunk_bytes = 4 * vocabulary * rows
    hidden = torch.randn(count, width, requires_grad=True)
    with recording() as seen:
        head(hidden, CrossEntropy(torch.zeros(count, dtype=torch.int64)))[0].backward()
    assert seen.largest == 4 * max(rows * vocabulary, width * vocabulary)


def test_without_gradient_only_logits_are_computed() -> None:
    head = make_head()
    hidden, labels = make_rows(6)
    with torch.no_grad(), recording() as seen:
        loss, _ = head(hidden, CrossEntropy(labels))
    assert not loss.requires_grad
    products = [name for name in seen.operators if "mm" in name or "linear" in name]
    assert len(products) == 2, "one product for each of the two chunks"


def test_a_token_loss_is_told_which_rows_it_gets() -> None:
    seen: list[tuple[slice, tuple[int, ...], torch.dtype]] = []

    def token_loss(logits: Tensor, rows: slice) -> TokenLossResult:
        seen.append((rows, tuple(logits.shape), logits.dtype))
        return TokenLossResult(logits.sum(), torch.ones_like(logits), {"rows": torch.tensor(len(logits))})

    hidden, _ = make_rows(7)
    _, metrics = make_head(rows=3).bfloat16()(hidden.bfloat16(), token_loss)
    assert [rows for rows, _, _ in seen] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert [shape for _, shape, _ in seen] == [(3, VOCABULARY), (3, VOCABULARY), (1, VOCABULARY)]
    assert {dtype for _, _, dtype in seen} == {torch.float32}
    assert metrics["rows"] == 7
