"""Attention over documents on a `Tape`: which kernel runs where, and what it keeps."""

from __future__ import annotations

from understudy.plan.shape.sizes import Sizes
from understudy.plan.shape.tape import Line, Storage, Tape, Value

__all__ = ["attend", "kernel_for"]

_FP32 = 4
_FUSION_STATISTICS = 64
"""Bytes a head and token: `npu_fusion_attention` keeps the largest score and the sum, fp32, eight times each."""
_LARGEST_HEAD = 256


def kernel_for(sizes: Sizes, api: str, capability: float, itemsize: int, asked: str) -> str:
    """What `models.attention` comes to on a device: varlen (PyTorch's), flash (the package's), fusion (Ascend's),
    documents (PyTorch's fused attention, a document at a time) or explicit (written out, quadratic in memory)."""
    dropout = sizes.dropout(sizes.family.attention_dropout) > 0.0
    capped = sizes.family.softcap and sizes.config.get("attn_logit_softcapping", 50.0) is not None
    half, small = itemsize == 2, sizes.head_dim <= _LARGEST_HEAD
    if asked == "eager":
        return "explicit"
    recent = api == "cuda" and capability >= 8.0
    if asked == "flash" and recent and half and small and not sizes.family.sinks:
        return "flash"
    if capped or sizes.family.sinks:
        return "explicit"
    if asked == "auto" and half:
        if recent and small and not dropout:
            return "varlen"
        if api == "npu" and sizes.head_dim % 16 == 0:
            return "fusion"
    # On a processor PyTorch has no fused attention with dropout.
    return "explicit" if dropout and api == "cpu" else "documents"


def attend(tape: Tape, sizes: Sizes, number: int, query: Value, key: Value, value: Value) -> Value:
    """The layer's attention; the result is [T, queries]."""
    kind = tape.treatment.attention
    seen = min(tape.treatment.document, sizes.windows[number] or tape.treatment.document)
    # A query sees half of a document's tokens on average, or nearly all of a window.
    mean = seen / 2 if seen == tape.treatment.document else seen
    flops = 4.0 * mean * sizes.query_width
    tape.flops += flops
    tape.attention_flops += flops
    if kind == "explicit":
        return _explicit(
            tape, sizes, seen if sizes.windows[number] is None else tape.treatment.document, query, key, value
        )
    if kind == "documents":
        return _by_documents(tape, sizes, query, key, value)
    return _fused(tape, sizes, kind, query, key, value)


def _copy(tape: Tape, value: Value, width: float | None = None) -> Value:
    """Contiguous, or with heads repeated. The gradient passes through where nothing is repeated."""
    elements = value.width / tape.itemsize if width is None else width
    out = tape.new(elements, grad=value.grad)
    if elements * tape.itemsize == value.width:
        tape.record((value,), (out,), shared_grad=True)
        tape.traffic += 2 * out.width
    else:
        tape.record((value,), (out,))
    return out


def _fused(tape: Tape, sizes: Sizes, kind: str, query: Value, key: Value, value: Value) -> Value:
    """Kernels of variable length: q, k and v as [T, H, D], the result, and a statistic of each head."""
    copies = [_copy(tape, one) for one in (query, key, value)]
    if kind == "varlen" and sizes.kv_heads < sizes.heads:
        copies[1:] = [_copy(tape, one, sizes.query_width) for one in copies[1:]]
    grad = any(one.grad for one in copies)
    out = tape.new(sizes.query_width, grad=grad)
    statistics = Storage(Line(0.0, float(sizes.heads * (_FUSION_STATISTICS if kind == "fusion" else _FP32))))
    # The backward kernels sum the queries' gradient in fp32.
    scratch = Line(0.0, float(sizes.query_width * _FP32))
    tape.record(copies, (out,), [*copies, out, statistics], scratch=scratch, costly=True)
    return out


def _by_documents(tape: Tape, sizes: Sizes, query: Value, key: Value, value: Value) -> Value:
    """A document at a time: its result is kept beside the whole, which documents' results are copied to."""
    grad = any(one.grad for one in (query, key, value))
    parts, out = tape.new(sizes.query_width, grad=grad), tape.new(sizes.query_width, grad=grad)
    statistics = Storage(Line(0.0, float(sizes.heads * _FP32)))
    pieces = Line(0.0, query.width + key.width + value.width)
    tape.record((query, key, value), (parts,), [query, key, value, parts, statistics], scratch=pieces, costly=True)
    tape.record((parts,), (out,), shared_grad=True)
    tape.traffic += 2 * out.width
    return out


def _explicit(tape: Tape, sizes: Sizes, seen: int, query: Value, key: Value, value: Value) -> Value:
    """Scores of a document, [heads, L, L], kept as probabilities in fp32 and in the compute dtype."""
    repeated = [_copy(tape, one, sizes.query_width) if sizes.kv_heads < sizes.heads else one for one in (key, value)]
    grad = any(one.grad for one in (query, *repeated))
    scores = float(sizes.heads * seen)
    kept = [Storage(Line(0.0, scores * _FP32)), Storage(Line(0.0, float(seen)))]  # probabilities, and a mask
    if tape.itemsize != _FP32:
        kept.append(Storage(Line(0.0, scores * tape.itemsize)))
    if sizes.family.softcap:
        kept.append(Storage(Line(0.0, scores * tape.itemsize)))
    if sizes.dropout(sizes.family.attention_dropout) > 0.0:
        kept.append(Storage(Line(0.0, scores * 2 * _FP32)))  # a mask, and what it leaves
    out = tape.new(sizes.query_width, grad=grad)
    # Of one document at a time: gradients of scores, in both dtypes.
    scratch = Line(scores * seen * (_FP32 + 2 * tape.itemsize), query.width)
    tape.record((query, *repeated), (out,), [query, *repeated, *kept], scratch=scratch, costly=True)
    tape.traffic += 10 * scores * tape.itemsize
    return out
