"""A flat micro-batch with the same learned vectors in front of every document (prompt tuning).

Shape letters: T tokens, D documents, P learned vectors, H hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from understudy.contracts import Batch

__all__ = ["Prompted"]


@dataclass(frozen=True)
class Prompted:
    """Where everything is in the longer stream of T + D·P positions."""

    document_offsets: Tensor
    """[D+1] int32, on the CPU."""
    positions: Tensor
    """[T+D·P] int64, restarts at 0 in each document; the first token of one is at P."""
    rows: Tensor
    """[T] int64: where each token is."""

    @staticmethod
    def of(batch: Batch, length: int) -> Prompted:
        """`length` is P."""
        device = batch.tokens.device
        offsets = batch.document_offsets.long()
        sizes = offsets.diff()
        longer = offsets + length * torch.arange(len(offsets))
        rows = torch.arange(len(batch.tokens)) + length * (torch.arange(len(sizes)) + 1).repeat_interleave(sizes)
        positions = torch.arange(int(longer[-1])) - longer[:-1].repeat_interleave(sizes + length)
        return Prompted(longer.to(torch.int32), positions.to(device), rows.to(device))

    def join(self, prompt: Tensor, embedded: Tensor) -> Tensor:
        """`prompt` [P, H] and the tokens' vectors [T, H] as one stream [T+D·P, H]."""
        places = self.positions.clone()  # of the prompt's vectors; a token's is behind all of these
        places[self.rows] = len(prompt) + torch.arange(len(embedded), device=places.device)
        return torch.cat([prompt.to(embedded.dtype), embedded]).index_select(0, places)
