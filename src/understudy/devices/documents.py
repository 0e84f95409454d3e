"""Where the documents of a flat micro-batch lie, in the forms that attention kernels ask for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Documents"]


@dataclass(frozen=True)
class Documents:
    """Made once a micro-batch and handed to every layer; reading it never waits for the device."""

    lengths: tuple[int, ...]
    """Tokens of each document, in order."""
    offsets: Tensor
    """[D+1] int32 on the device that computes, first 0, last T."""
    longest: int
    """Tokens of the longest document."""

    @staticmethod
    def of(document_offsets: Tensor, device: torch.device) -> Documents:
        """From a batch's `document_offsets` [D+1] int32 on the CPU."""
        lengths = tuple(document_offsets.diff().tolist())
        return Documents(lengths, document_offsets.to(device, non_blocking=True), max(lengths))
