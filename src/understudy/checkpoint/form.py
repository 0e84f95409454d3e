"""What of a strategy's weights is saved, and under which keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor

from understudy.contracts import TensorSpec
from understudy.models.names import is_beside_model

__all__ = ["OPTIMIZER_STATE", "WHOLE_MODEL", "Everything", "Form", "WholeModel"]


class Form(Protocol):
    """One of a kind for a run: a pure function of what every rank knows."""

    @property
    def stem(self) -> str:
        """What file names begin with."""
        ...

    @property
    def spread(self) -> bool:
        """Whether every rank writes a file of its own; else rank 0 writes all."""
        ...

    @property
    def keeps_buffers(self) -> bool:
        """Whether the model's persistent buffers are saved beside the weights."""
        ...

    def keeps(self, name: str) -> bool:
        """Whether the weight with this canonical name is saved."""
        ...

    def specs(self, name: str, spec: TensorSpec) -> Mapping[str, TensorSpec]:
        """What is stored of a weight, by key."""
        ...

    def parts(self, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        """The tensors to store, in the order of `specs`."""
        ...


class Everything:
    """All there is, under its own names."""

    spread = True
    keeps_buffers = True

    def __init__(self, stem: str) -> None:
        self.stem = stem

    def keeps(self, name: str) -> bool:
        return True

    def specs(self, name: str, spec: TensorSpec) -> dict[str, TensorSpec]:
        return {name: spec}

    def parts(self, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        return [(name, tensor)]


class WholeModel(Everything):
    """All weights of the model, and nothing that trains beside it."""

    def keeps(self, name: str) -> bool:
        return not is_beside_model(name)


WHOLE_MODEL = WholeModel("model")
OPTIMIZER_STATE = Everything("optimizer")
