"""The distillation loss against plain formulas and autograd in fp64, alone and inside the vocabulary head."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.divergence_formulas import KINDS, formula
from understudy.models.head import LossHead
from understudy.models.logits import Scale, SoftCap
from understudy.objectives.calibration import BINS
from understudy.objectives.distillation_loss import DistillationLoss
from understudy.objectives.targets import (
    DenseTargets,
    SampledTargets,
    SeveralTargets,
    Targets,
    TeacherLogits,
    TopKTargets,
    WeightedTargets,
)

pytestmark = pytest.mark.unit

ROWS, CLASSES = 6, 13
EVERYTHING = slice(0, ROWS)


def make_logits(
    classes: int = CLASSES, *, rows: int = ROWS, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(dtype)


def make_labels(rows: int = ROWS, classes: int = CLASSES) -> Tensor:
    return torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(5))


def largest(teacher: Tensor, k: int, temperature: float = 1.0) -> TopKTargets:
    log_probs, ids = torch.log_softmax(teacher / temperature, dim=1).sort(dim=1, descending=True)
    return TopKTargets(ids[:, :k], log_probs[:, :k], log_probs[:, k:].logsumexp(1))


def grouped(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of the classes in `ids` [n, k] and, where there are others, of those together."""
    log_probs = torch.log_softmax(logits, dim=1)
    rows = []
    for row, kept in zip(log_probs, ids.tolist()):
        others = [c for c in range(len(row)) if c not in kept]
        rows.append(torch.cat([row[kept], row[others].logsumexp(0, keepdim=True)]) if others else row[kept])
    return torch.stack(rows)


def mixed(divergence: Tensor, logits: Tensor, labels: Tensor, temperature: float, weight: float) -> Tensor:
    cross_entropy = F.cross_entropy(logits, labels, reduction="sum")
    return (1 - weight) * temperature**2 * divergence.sum() + weight * cross_entropy


def assert_matches(
    loss: DistillationLoss,
    logits: Tensor,
    reference: Callable[[Tensor], Tensor],
    rtol: float = 1e-9,
    atol: float = 1e-11,
) -> None:
    """In value and gradient; the reference gets the logits in fp64."""
    exact = logits.double().clone().requires_grad_()
    expected = reference(exact)
    expected.backward()
    result = loss(logits.clone(), slice(0, len(logits)))
    assert result.loss.dtype == result.grad_logits.dtype == logits.dtype
    torch.testing.assert_close(result.loss.double(), expected.detach(), rtol=rtol, atol=atol)
    torch.testing.assert_close(result.grad_logits.double(), exact.grad, rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("k", [None, 1, 4, CLASSES])
def test_value_and_gradient_equal_autograd(kind: str, temperature: float, weight: float, k: int | None) -> None:
    teacher, student, labels = make_logits(seed=1), make_logits(seed=2), make_labels()

    def reference(logits: Tensor) -> Tensor:
        if k is None:
            pair = [torch.log_softmax(x / temperature, dim=1) for x in (teacher, logits)]
        else:
            ids = teacher.argsort(dim=1, descending=True)[:, :k]
            pair = [grouped(x / temperature, ids) for x in (teacher, logits)]
        return mixed(formula(kind)(*pair), logits, labels, temperature, weight)

    targets: Targets = TeacherLogits(teacher) if k is None else largest(teacher, k, temperature)
    loss = DistillationLoss(kind, labels, targets, temperature=temperature, cross_entropy_weight=weight)
    assert_matches(loss, student, reference)
    assert_matches(loss, student.float(), reference, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("teacher_classes", "shared"), [(17, None), (9, None), (17, 10), (CLASSES, 10)])
@pytest.mark.parametrize("k", [None, 4])
def test_classes_that_are_not_shared_are_cut_and_the_rest_renormalised(
    kind: str, teacher_classes: int, shared: int | None, k: int | None
) -> None:
    teacher, student, labels = make_logits(teacher_classes, seed=1), make_logits(seed=2), make_labels()
    # Top-k targets are of the teacher's own classes: only the tokenizer's size tells that one beyond it is padding.
    shared = min(shared or CLASSES, teacher_classes)
    teacher[:, shared:] -= 1.0

    def reference(logits: Tensor) -> Tensor:
        cut = teacher[:, :shared]
        if k is None:
            pair = [torch.log_softmax(x, dim=1) for x in (cut, logits[:, :shared])]
        else:
            ids = cut.argsort(dim=1, descending=True)[:, :k]
            pair = [grouped(x, ids) for x in (cut, logits[:, :shared])]
        return mixed(formula(kind)(*pair), logits, labels, 1.0, 0.3)

    targets = TeacherLogits(teacher) if k is None else largest(teacher[:, :shared], k)
    settings: dict[str, Any] = {"shared_classes": shared, "cross_entropy_weight": 0.3}
    assert_matches(DistillationLoss(kind, labels, targets, **settings), student, reference)

    settings["cross_entropy_weight"] = 0.0
    gradient = DistillationLoss(kind, labels, targets, **settings)(student.clone(), EVERYTHING).grad_logits
    assert torch.equal(gradient[:, shared:], torch.zeros(ROWS, CLASSES - shared, dtype=student.dtype))


def test_kept_classes_that_the_student_lacks_are_left_out() -> None:
    """As if the teacher had kept only the others: what it kept is renormalised, class 0 among it or not."""
    student, labels = make_logits(seed=2), make_labels()
    ids = torch.tensor([[3, CLASSES + 2, 0], [CLASSES, 0, 3], [5, 1, CLASSES]])
    log_probs = torch.tensor([[0.5, 0.2, 0.1], [0.4, 0.3, 0.2], [0.6, 0.2, 0.1]]).double().log()
    targets = TopKTargets(ids, log_probs, torch.tensor([0.2, 0.1, 0.1]).double().log())

    def reference(logits: Tensor) -> Tensor:
        total = logits.new_zeros(())
        for row in range(3):
            known = ids[row] < CLASSES
            mass = torch.cat([log_probs[row, known], targets.tail[row, None]])
            pair = mass.log_softmax(0)[None], grouped(logits[row, None], ids[row, known][None])
            total = total + formula("jsd")(*pair).sum()
        return total

    assert_matches(DistillationLoss("jsd", labels[:3], targets), student[:3], reference)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [None, 4, CLASSES])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(kind: str, k: int | None) -> None:
    logits = make_logits(dtype=torch.float32)
    targets: Targets = TeacherLogits(logits) if k is None else largest(logits, k)
    result = DistillationLoss(kind, make_labels(), targets, temperature=2.0 if k is None else 1.0)(
        logits.clone(), EVERYTHING
    )
    assert abs(result.loss.item()) < 2e-6
    # The slope of total variation jumps there, to either side as rounding has it.
    if k is None or kind != "total_variation":
        assert result.grad_logits.abs().max() < 1e-6
    assert result.metrics["agreement"] == ROWS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [None, 4, CLASSES])
@pytest.mark.parametrize("student_peak", ["elsewhere", "same"])
def test_extreme_logits_stay_exact_in_fp32(kind: str, k: int | None, student_peak: str) -> None:
    """Teachers of nearly one class, logits of ±80: masses down to e^-160 on either side."""
    teacher = torch.full((3, CLASSES), -80.0)
    teacher[[0, 1, 2], [0, 4, 8]] = 80.0
    teacher += 0.1 * torch.arange(CLASSES)
    student = teacher.clone() if student_peak == "same" else teacher.roll(1, 0)
    student += 0.3 * torch.arange(CLASSES).flip(0)

    def reference(logits: Tensor) -> Tensor:
        exact = teacher.double()
        if k is None:
            pair = [torch.log_softmax(x, dim=1) for x in (exact, logits)]
        else:
            ids = exact.argsort(dim=1, descending=True)[:, :k]
            pair = [grouped(x, ids) for x in (exact, logits)]
        return formula(kind)(*pair).sum()

    targets: Targets = TeacherLogits(teacher) if k is None else largest(teacher, k)
    assert_matches(DistillationLoss(kind, make_labels(3), targets), student, reference, rtol=1e-5, atol=1e-6)


def test_a_tiny_tail_keeps_its_relative_precision() -> None:
    """The student gives the others e^-40 together, which 1 − s cannot tell from nothing in fp32."""
    student = torch.tensor([[20.0, 20.0, -20.0, -21.0, -22.0]])
    targets = TopKTargets(torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.2]]).log(), torch.tensor([0.2]).log())
    exact = student.double().requires_grad_()
    pair = torch.tensor([[0.6, 0.2, 0.2]]).double().log(), grouped(exact, torch.tensor([[0, 1]]))
    formula("forward_kl")(*pair).sum().backward()
    result = DistillationLoss("forward_kl", torch.tensor([0]), targets)(student, slice(0, 1))
    torch.testing.assert_close(result.grad_logits.double(), exact.grad, rtol=1e-5, atol=0)


def test_a_tail_rounded_to_nothing_still_holds_the_student_to_what_was_kept() -> None:
    student, ids = torch.zeros(1, 5), torch.tensor([[0, 1]])
    targets = TopKTargets(ids, torch.tensor([[0.5, 0.5]]).log(), torch.tensor([-torch.inf]))
    for kind in KINDS:
        result = DistillationLoss(kind, torch.tensor([0]), targets)(student.clone(), slice(0, 1))
        assert result.loss.isfinite()
        assert (result.grad_logits[0, :2] < 0).all(), kind
        assert (result.grad_logits[0, 2:] > 0).all(), kind


def test_draws_give_cross_entropy_against_their_frequencies() -> None:
    student, labels = make_logits(seed=2), make_labels()
    ids = torch.randint(CLASSES + 2, (ROWS, 5), generator=torch.Generator().manual_seed(3))
    ids[0], ids[1] = CLASSES + 1, 4
    counts = F.one_hot(ids, CLASSES + 2).sum(1)[:, :CLASSES].double()
    frequencies = counts / counts.sum(1, keepdim=True).clamp_min(1)

    def reference(logits: Tensor) -> Tensor:
        return mixed(-(frequencies * torch.log_softmax(logits / 2, dim=1)).sum(1), logits, labels, 2.0, 0.3)

    loss = DistillationLoss("forward_kl", labels, SampledTargets(ids), temperature=2.0, cross_entropy_weight=0.3)
    assert_matches(loss, student, reference)


def test_draws_have_the_exact_gradient_in_expectation() -> None:
    """Every pair of draws, each as often as the teacher would draw it."""
    teacher, student = make_logits(4, rows=1, seed=1), make_logits(4, rows=1, seed=2)
    p = teacher.softmax(1)[0]
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    repeated, labels = student.expand(len(pairs), -1).clone(), torch.zeros(len(pairs), dtype=torch.int64)
    rows = slice(0, len(pairs))
    drawn = DistillationLoss("forward_kl", labels, SampledTargets(pairs))(repeated, rows).grad_logits
    exact = DistillationLoss("forward_kl", labels[:1], TeacherLogits(teacher))(student, slice(0, 1)).grad_logits
    expectation = (p[pairs].prod(1, keepdim=True) * drawn).sum(0, keepdim=True)
    torch.testing.assert_close(expectation, exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "forward_kl"])
def test_draws_are_refused_for_what_they_would_bias(kind: str) -> None:
    with pytest.raises(ValueError, match="forward_kl only"):
        DistillationLoss(kind, make_labels(), SampledTargets(torch.zeros(ROWS, 2, dtype=torch.int64)))


def test_metrics_are_sums_whatever_the_weights() -> None:
    student = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 1.0, 2.0]])
    teacher = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
    labels = torch.tensor([0, 1, 1])
    draws = SampledTargets(torch.tensor([[1, 0, 0], [2, 1, 2], [0, 1, 1]]))
    pair = [torch.log_softmax(x / 2, dim=1) for x in (teacher, student)]
    for weight in (0.0, 0.3, 1.0):
        loss = DistillationLoss(
            "reverse_kl", labels, TeacherLogits(teacher), temperature=2.0, cross_entropy_weight=weight
        )
        metrics = loss(student.clone(), slice(0, 3)).metrics
        assert {value.dtype for value in metrics.values()} == {torch.float32}
        torch.testing.assert_close(metrics["divergence"], formula("reverse_kl")(*pair).sum())
        torch.testing.assert_close(metrics["cross_entropy"], F.cross_entropy(student, labels, reduction="sum"))
        assert (metrics["correct"], metrics["agreement"]) == (2, 2)
    by_draws = DistillationLoss("forward_kl", labels, draws)(student.clone(), slice(0, 3)).metrics
    assert by_draws["agreement"] == 1, "commonest draws are 0, 2 and 1"


def test_a_label_of_no_mass_does_not_reach_an_unweighted_loss() -> None:
    student = torch.tensor([[0.0, 1.0, -torch.inf]])
    loss = DistillationLoss("forward_kl", torch.tensor([2]), TeacherLogits(student.clone()))
    result = loss(student, slice(0, 1))
    assert result.loss == 0
    assert torch.equal(result.grad_logits, torch.zeros(1, 3))


TARGETS: dict[str, Callable[[Tensor], Targets]] = {
    "dense": TeacherLogits,
    "top-k": lambda teacher: largest(teacher, 4),
    "draws": lambda teacher: SampledTargets(teacher.argsort(1)[:, :3]),
}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("chunk", [1, 2, 4, 100])
@pytest.mark.parametrize("block_rows", [0, 1, 2, 100])
def test_chunks_and_blocks_change_no_sum(targets: str, chunk: int, block_rows: int) -> None:
    teacher, student, labels = make_logits(seed=1), make_logits(seed=2), make_labels()
    settings: dict[str, Any] = {"temperature": 2.0, "cross_entropy_weight": 0.3}
    whole = DistillationLoss("forward_kl", labels, TARGETS[targets](teacher), **settings)(student.clone(), EVERYTHING)

    loss = DistillationLoss(
        "forward_kl", labels, TARGETS[targets](teacher), block_bytes=8 * CLASSES * block_rows, **settings
    )
    slices = [slice(start, min(start + chunk, ROWS)) for start in range(0, ROWS, chunk)]
    parts = [loss(student[rows].clone(), rows) for rows in slices]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    torch.testing.assert_close(torch.cat([part.grad_logits for part in parts]), whole.grad_logits)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(sum(part.metrics[name] for part in parts), value)


@pytest.mark.parametrize("targets", TARGETS)
def test_no_rows_give_zeros_and_every_metric(targets: str) -> None:
    loss = DistillationLoss("forward_kl", make_labels(0), TARGETS[targets](make_logits(rows=0)))
    result = loss(make_logits(rows=0, dtype=torch.float32), slice(0, 0))
    assert result.loss == 0
    assert result.grad_logits.shape == (0, CLASSES)
    assert torch.equal(result.metrics.pop("calibration"), torch.zeros(BINS))
    assert result.metrics == dict.fromkeys(("divergence", "cross_entropy", "correct", "agreement"), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_head_gradients_of_hidden_states_and_weight_equal_autograd(kind: str) -> None:
    """The teacher from hidden states and a head of its own, wider and with another transform; a chunk is two rows."""
    torch.manual_seed(0)
    linear = nn.Linear(8, CLASSES, bias=True)
    nn.init.normal_(linear.weight)
    head = LossHead.replacing(linear)
    head.chunk_bytes, head.transform = 4 * CLASSES * 2, SoftCap(3.0)
    hidden, labels = torch.randn(ROWS, 8, requires_grad=True), make_labels()
    teacher_hidden, teacher_weight, teacher_bias = torch.randn(ROWS, 10), torch.randn(17, 10), torch.randn(17)
    targets = DenseTargets.from_hidden(teacher_hidden, teacher_weight, teacher_bias, Scale(0.5))
    assert len(targets) == ROWS

    exact = [t.detach().double().requires_grad_() for t in (hidden, head.weight, head.bias)]
    logits = 3.0 * torch.tanh(F.linear(*exact) / 3.0)
    teacher = 0.5 * F.linear(teacher_hidden.double(), teacher_weight.double(), teacher_bias.double())
    pair = [torch.log_softmax(x[:, :CLASSES] / 2.0, dim=1) for x in (teacher, logits)]
    expected = mixed(formula(kind)(*pair), logits, labels, 2.0, 0.3)
    (expected / 5).backward()

    loss, metrics = head(hidden, DistillationLoss(kind, labels, targets, temperature=2.0, cross_entropy_weight=0.3))
    (loss / 5).backward()

    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip((hidden, head.weight, head.bias), exact):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        metrics["divergence"].double(), formula(kind)(*pair).sum().detach(), rtol=1e-5, atol=1e-5
    )


def test_hidden_states_in_bf16_give_fp32_logits() -> None:
    hidden, weight = torch.randn(4, 8).bfloat16(), torch.randn(CLASSES, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.float16):
        logits = DenseTargets.from_hidden(hidden, weight).part(slice(1, 3)).logits
    assert torch.equal(logits, F.linear(hidden[1:3], weight).float())


def zipf_logits(rows: int, classes: int, sharpness: float, noise: float) -> tuple[Tensor, Tensor]:
    """A teacher whose classes fall off as a power of their rank, and a student that is the same with noise."""
    generator = torch.Generator().manual_seed(0)
    rank = torch.arange(1, classes + 1, dtype=torch.float32)
    teacher = torch.stack([-sharpness * rank[torch.randperm(classes, generator=generator)].log() for _ in range(rows)])
    return teacher, teacher + noise * torch.randn(teacher.shape, generator=generator)


def angle(a: Tensor, b: Tensor) -> float:
    """Degrees between two gradients, by sine and cosine as the cosine alone cannot tell small angles."""
    a, b = a.double().flatten(), b.double().flatten()
    a, b = a / a.norm(), b / b.norm()
    return float(torch.rad2deg(2 * torch.atan2((a - b).norm(), (a + b).norm())))


def test_a_tail_bucket_points_nearer_the_full_gradient_than_truncation_or_renormalising() -> None:
    """Forward KL, top 64 of 32,768 classes; prints the angles in degrees."""
    rows, classes, k = 200, 32768, 64
    teacher, student = zipf_logits(rows, classes, sharpness=1.2, noise=1.0)
    labels, everything = torch.zeros(rows, dtype=torch.int64), slice(0, rows)

    def gradient(targets: Targets) -> Tensor:
        return DistillationLoss("forward_kl", labels, targets)(student.clone(), everything).grad_logits

    full, kept = gradient(TeacherLogits(teacher)), largest(teacher, k)
    p, q = kept.log_probs.exp(), student.softmax(1)
    truncated = (q * p.sum(1, keepdim=True)).scatter_add(1, kept.ids, -p)
    renormalised = torch.zeros_like(q).scatter(
        1, kept.ids, student.gather(1, kept.ids).softmax(1) - p / p.sum(1, keepdim=True)
    )
    ways = {"tail bucket": gradient(kept), "renormalised": renormalised, "truncated": truncated}
    for what, of in (("a token's", lambda g: g), ("summed over tokens", lambda g: g.sum(0))):
        angles = {name: angle(of(way), of(full)) for name, way in ways.items()}
        print(what, {name: round(value, 2) for name, value in angles.items()})  # noqa: T201
        assert angles["tail bucket"] < min(angles["renormalised"], angles["truncated"])


class PeakBytes(TorchDispatchMode):
    """The most memory that tensors made inside have at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [None, 4])
def test_beside_the_logits_memory_is_a_few_blocks_whatever_the_chunk(kind: str, k: int | None) -> None:
    rows, classes = 64, 1000
    teacher, student = (make_logits(classes, rows=rows, seed=seed, dtype=torch.float32) for seed in (1, 2))
    targets: Targets = TeacherLogits(teacher) if k is None else largest(teacher, k)
    block_bytes = 4 * classes * 8
    loss = DistillationLoss(
        kind,
        torch.zeros(rows, dtype=torch.int64),
        targets,
        temperature=2.0,
        cross_entropy_weight=0.3,
        block_bytes=block_bytes,
    )
    with PeakBytes() as seen:
        loss(student, slice(0, rows))
    assert seen.peak <= 7.1 * block_bytes


@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "reverse_kl"])
def test_several_teachers_share_the_divergence(kind: str) -> None:
    """One with all logits of a longer vocabulary, one with its largest few; each compared on the classes it shares."""
    first, second, student = make_logits(17, seed=1), make_logits(seed=3), make_logits(seed=2)
    labels, shares, shared = make_labels(), (0.7, 0.3), (11, CLASSES)
    several = SeveralTargets(
        (
            WeightedTargets(shares[0], shared[0], TeacherLogits(first)),
            WeightedTargets(shares[1], shared[1], largest(second, 4, 2.0)),
        )
    )
    assert len(several) == ROWS

    def reference(logits: Tensor) -> Tensor:
        pair = [torch.log_softmax(x[:, :11] / 2.0, dim=1) for x in (first, logits)]
        ids = second.argsort(dim=1, descending=True)[:, :4]
        kept = [grouped(x / 2.0, ids) for x in (second, logits)]
        both = shares[0] * formula(kind)(*pair) + shares[1] * formula(kind)(*kept)
        return mixed(both, logits, labels, 2.0, 0.3)

    settings: dict[str, Any] = {"temperature": 2.0, "cross_entropy_weight": 0.3}
    loss = DistillationLoss(kind, labels, several, **settings)
    assert_matches(loss, student, reference)
    by_blocks = DistillationLoss(kind, labels, several, block_bytes=8 * CLASSES * 2, **settings)
    assert_matches(by_blocks, student, reference)
    agreement = loss(student.clone(), EVERYTHING).metrics["agreement"]
    assert agreement == (student.argmax(1) == first[:, :11].argmax(1)).sum(), "with the one that counts most"


def test_one_teacher_in_two_parts_is_that_teacher() -> None:
    teacher, student, labels = make_logits(seed=1), make_logits(seed=2), make_labels()
    twice = SeveralTargets(tuple(WeightedTargets(share, None, TeacherLogits(teacher)) for share in (0.25, 0.75)))
    whole = DistillationLoss("forward_kl", labels, TeacherLogits(teacher))(student.clone(), EVERYTHING)
    parts = DistillationLoss("forward_kl", labels, twice)(student.clone(), EVERYTHING)
    torch.testing.assert_close(parts.loss, whole.loss)
    torch.testing.assert_close(parts.grad_logits, whole.grad_logits)
