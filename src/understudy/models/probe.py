"""Finds out what an architecture makes of its head's output, by running its own code on a small head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from understudy.errors import UserError
from understudy.models.logits import LogitTransform, candidate_transforms

__all__ = ["find_logit_transform"]

_ROWS, _VOCABULARY = 4, 16
_RAW_SCALE = 20.0
"""Spread of the raw logits tried: caps are around 30, and an uncapped value would not tell a cap from none."""


def find_logit_transform(network: PreTrainedModel) -> LogitTransform:
    """The transform under which our head's logits equal the architecture's own, checked on random hidden states.

    Takes milliseconds and touches no weight of `network`, which may be on the meta device. Raises `UserError` when none
    of the known transforms fits.
    """
    generator = torch.Generator().manual_seed(0)
    linear = network.get_output_embeddings()
    width = linear.in_features
    hidden = torch.randn(_ROWS, width, generator=generator)
    small = nn.Linear(width, _VOCABULARY, bias=linear.bias is not None)
    with torch.no_grad():
        small.weight.copy_(torch.randn(_VOCABULARY, width, generator=generator) * _RAW_SCALE / width**0.5)
        raw = small(hidden)
        theirs = _own_logits(network, small, hidden)
    for transform in candidate_transforms(network.config.get_text_config()):
        ours, _ = transform(raw.clone(), derivative=False)
        if theirs is not None and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4):
            return transform
    raise UserError(
        f"{type(network).__name__} computes its logits in a way that is not known here, so its loss cannot be computed "
        "in chunks; choose another architecture."
    )


class _Given(nn.Module):
    """Stands in for a backbone: whatever the input, these final hidden states."""

    def __init__(self, hidden: Tensor, backbone: nn.Module) -> None:
        super().__init__()
        self.hidden = hidden
        self.attributes = vars(backbone)

    def __getattr__(self, name: str) -> Any:
        attributes = self.__dict__.get("attributes", {})
        return attributes[name] if name in attributes else super().__getattr__(name)

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.hidden.unsqueeze(0))


def _own_logits(network: PreTrainedModel, head: nn.Linear, hidden: Tensor) -> Tensor | None:
    """Logits [n, v] that the architecture's own forward makes of `hidden` [n, H] with `head`; None if it has no such
    parts."""
    backbone, own_head = network.base_model, network.get_output_embeddings()
    if backbone is network:
        return None
    setattr(network, network.base_model_prefix, _Given(hidden, backbone))
    network.set_output_embeddings(head)
    try:
        logits: Tensor = network(input_ids=torch.zeros(1, len(hidden), dtype=torch.int64), use_cache=False).logits
        return logits.squeeze(0)
    finally:
        setattr(network, network.base_model_prefix, backbone)
        network.set_output_embeddings(own_head)
