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
    # Its usual initialisation would draw from the caller's random state.
    small = nn.Linear(width, _VOCABULARY, bias=linear.bias is not None, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.normal_(std=_RAW_SCALE / width**0.5, generator=generator)
        raw = small(hidden)
        try:
            theirs = _own_logits(network, small, hidden)
        # Its forward pass does more than pass the backbone's result on: it met a weight that is not there.
        except (RuntimeError, TypeError, AttributeError, ValueError) as error:
            raise _unknown_logits(network) from error
    for transform in candidate_transforms(network.config.get_text_config()):
        ours, _ = transform(raw.clone(), derivative=False)
        if theirs is not None and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4):
            return transform
    raise _unknown_logits(network)


def _unknown_logits(network: PreTrainedModel) -> UserError:
    return UserError(
        f"{type(network).__name__} computes its logits in a way that is not known here, so its loss cannot be computed "
        "in chunks; choose another architecture."
    )


class _Output(BaseModelOutputWithPast):  # type: ignore[misc]
    """Final hidden states, and None for whatever else an architecture's backbone gives beside them."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class _Given(nn.Module):
    """Stands in for a backbone, and for any part of it that is called in its place: whatever the input, these hidden
    states."""

    def __init__(self, hidden: Tensor, backbone: nn.Module) -> None:
        super().__init__()
        self.hidden = hidden
        # A tuple, so that the backbone does not become a submodule.
        self._replaced = (backbone,)

    def __getattr__(self, name: str) -> Any:
        if "_replaced" not in self.__dict__:
            return super().__getattr__(name)
        found = getattr(self._replaced[0], name)
        return self if isinstance(found, nn.Module) else found

    def forward(self, *_: Any, **__: Any) -> _Output:
        return _Output(last_hidden_state=self.hidden.unsqueeze(0))


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
