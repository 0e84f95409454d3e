"""Proof that a built model keeps the documents of a batch apart, on the real model under any strategy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from understudy.contracts import Batch
from understudy.errors import UserError

__all__ = ["check_isolation"]

_LENGTHS = (5, 7)
_SAME_SHAPE = 1e-5
"""Tolerance, relative to the largest logit, where only tokens that must not matter differ. The arithmetic is then the
same to the bit; weights at random may leave a leak small, so this is no place for slack."""
_OTHER_SHAPE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 2e-2}
"""Tolerance where kernels see other shapes and round differently."""


def check_isolation(
    logits: Callable[[Batch, Tensor], Tensor], vocab_size: int, device: torch.device, compute_dtype: torch.dtype
) -> None:
    """Raises `UserError` unless a document's logits depend on its own earlier tokens alone.

    `logits` is a strategy's: a collective, so every rank calls this; `compute_dtype` is what the model computes in.
    Three things are tried on two short documents: another first one leaves the second as it was, another last token
    leaves all before it as it was, and the second alone, from position 0, is what it was behind the first.
    """
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(vocab_size, (length,), generator=generator) for length in _LENGTHS)
    boundary, total = _LENGTHS[0], sum(_LENGTHS)
    last_changed = second.clone()
    last_changed[-1] = (second[-1] + vocab_size // 2) % vocab_size

    def run(documents: list[Tensor], at: range) -> Tensor:
        batch = Batch.of([(tokens, torch.full_like(tokens, -100)) for tokens in documents])
        return logits(batch.to(device), torch.tensor(list(at), device=device))

    # All four come before any verdict: a rank that left early would leave the others waiting in a collective.
    packed = run([first, second], range(total))
    other_neighbour = run([(first + vocab_size // 2) % vocab_size, second], range(boundary, total))
    other_last = run([first, last_changed], range(total - 1))
    alone = run([second], range(_LENGTHS[1]))

    if not packed.isfinite().all():
        raise UserError(
            "this model's logits are not finite: its weights are damaged, or overflow in this precision; get the model "
            "again, or set training.precision to another."
        )
    scale = packed.abs().max().clamp(min=1e-6)
    # Comparisons that NaN fails, since a model that gives NaN proves nothing.
    if not (other_neighbour - packed[boundary:]).abs().max() <= _SAME_SHAPE * scale:
        _refuse("its documents attend to each other")
    if not (other_last - packed[:-1]).abs().max() <= _SAME_SHAPE * scale:
        _refuse("its tokens see later tokens")
    if not (alone - packed[boundary:]).abs().max() <= _OTHER_SHAPE[compute_dtype] * scale:
        _refuse("a document's logits depend on where in the batch it stands")


def _refuse(finding: str) -> None:
    raise UserError(
        f"this model cannot be made document-aware: {finding}; choose an architecture whose attention goes through "
        "transformers' attention interface."
    )
