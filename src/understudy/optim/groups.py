"""Parameter groups: which parameters decay, and which are the hidden matrices."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

__all__ = ["NamedParameters", "decay_groups", "is_hidden_matrix", "ndim"]

NamedParameters = Iterable[tuple[str, nn.Parameter]]

_NUMBERED_LAYER = re.compile(r"\.\d+\.")


def ndim(parameter: nn.Parameter) -> int:
    """Dimensions of the whole parameter. Under DeepSpeed ZeRO-3 the parameter itself is an empty vector between uses
    and its true shape is `ds_shape`."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """A matrix inside one of the numbered decoder layers, so neither embedding nor head, norm or bias."""
    return ndim(parameter) == 2 and _NUMBERED_LAYER.search(name) is not None


def decay_groups(named_parameters: NamedParameters, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, empty ones left out: matrices decay, norms and biases do not.

    Norms and biases are the parameters of fewer than two dimensions. Frozen parameters belong to no group. The order
    within a group is the order given, the same on every rank.
    """
    trainable = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if ndim(parameter) >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if ndim(parameter) < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
