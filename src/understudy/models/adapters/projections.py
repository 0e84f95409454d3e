"""The random projections of VeRA, which all layers share, no file holds and nobody trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["draw_projections"]


def draw_projections(network: nn.Module, config: Any, dtype: torch.dtype) -> None:
    """Draws the projections of every layer that has some from the seed in peft's `config`, on the CPU, as peft does."""
    from peft.tuners.vera.model import _kaiming_init

    generator = torch.Generator().manual_seed(config.projection_prng_key)
    drawn: dict[str, torch.Tensor] = {}
    for layer in network.modules():
        for name in ("vera_A", "vera_B"):
            shared: Any = getattr(layer, name, None)
            for adapter, projection in list(shared.items()) if shared is not None else ():
                if name not in drawn:
                    drawn[name] = _kaiming_init(tuple(projection.shape), generator).to(dtype)
                shared[adapter] = drawn[name]
