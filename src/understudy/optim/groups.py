"""Parameter groups: which parameters decay, and which are the hidden matrices."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from understudy.recipe.schema import Optimizer

__all__ = ["NamedParameters", "decay_groups", "is_hidden_matrix", "ndim"]

NamedParameters = Iterable[tuple[str, nn.Parameter]]

_NUMBERED_LAYER = re.compile(r"\.\d+\.")
_LORA_B = re.compile(r"\.lora_(embedding_)?B\b")


def ndim(parameter: nn.Parameter) -> int:
    """Dimensions of the whole parameter. Under DeepSpeed ZeRO-3 the parameter itself is an empty vector between uses
    and its true shape is `ds_shape`."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """A matrix inside one of the numbered decoder layers, so neither embedding nor head, norm or bias."""
    return ndim(parameter) == 2 and _NUMBERED_LAYER.search(name) is not None


def decay_groups(named_parameters: NamedParameters, optimizer: Optimizer) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, empty ones left out: matrices decay, norms and biases do not, and LoRA's B matrices
    have a learning rate of their own (LoRA+, Hayou et al., 2024): `lr_scale` times that of the step.

    Norms and biases are the parameters of fewer than two dimensions. Frozen parameters belong to no group. The order
    within a group is the order given, the same on every rank.
    """
    trainable = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    matrices = [(name, parameter) for name, parameter in trainable if ndim(parameter) >= 2]
    members = [
        ([p for name, p in matrices if not _LORA_B.search(name)], optimizer.weight_decay, 1.0),
        ([p for name, p in matrices if _LORA_B.search(name)], optimizer.weight_decay, optimizer.lora_plus_ratio),
        ([p for _, p in trainable if ndim(p) < 2], 0.0, 1.0),
    ]
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for parameters, decay, scale in members
        if parameters
    ]
