"""Which modules of a network an adapter goes around."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from understudy.errors import UserError

__all__ = ["ALL_LINEAR", "find_targets", "linear_modules", "parts_to_save"]

ALL_LINEAR = "all-linear"
_NUMBER = re.compile(r"\.(\d+)\.")


def linear_modules(network: PreTrainedModel) -> list[str]:
    """Paths of the network's linear layers, without the vocabulary head."""
    head = network.get_output_embeddings()
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def find_targets(
    network: PreTrainedModel, targets: Sequence[str] | str, layers: Sequence[int] | None
) -> list[str] | str:
    """`targets` as peft takes them: names that the paths of modules end with, or a regular expression.

    Raises `UserError` for a name that no linear layer has, an expression that is none or fits none, a layer number
    past the last one, and for the vocabulary head, which computes the loss and cannot be wrapped.
    """
    linear = linear_modules(network)
    if targets == ALL_LINEAR:
        names = sorted({path.rpartition(".")[2] for path in linear})
        chosen: list[str] | str = names if _ending(network, names) == set(linear) else linear
        found = set(linear)
    elif isinstance(targets, str):
        chosen, found = targets, _fitting(network, targets)
    else:
        chosen, found = list(targets), _ending(network, targets)
        for name in targets:
            _require_linear(network, linear, name, _ending(network, [name]))
    _require_linear(network, linear, str(targets), found)
    if layers is not None:
        _require_layers(found, layers)
    return chosen


def parts_to_save(network: PreTrainedModel, parts: Sequence[str]) -> list[str]:
    """Names of the modules behind `embeddings` and `head`, as peft's `modules_to_save` takes them. Of tied ones both
    are named: each then has its own copy in the saved adapter."""
    embeddings, head = network.get_input_embeddings(), network.get_output_embeddings()
    assert head is not None, "the network is a language model with a head"
    chosen = [module for part, module in (("embeddings", embeddings), ("head", head)) if part in parts]
    if embeddings.weight is head.weight and chosen:
        chosen = [embeddings, head]
    return [name.rpartition(".")[2] for name, module in network.named_modules() if any(module is c for c in chosen)]


def _ending(network: PreTrainedModel, names: Sequence[str]) -> set[str]:
    return {
        path for path, _ in network.named_modules() if any(path == name or path.endswith(f".{name}") for name in names)
    }


def _fitting(network: PreTrainedModel, expression: str) -> set[str]:
    try:
        compiled = re.compile(expression)
    except re.error as error:
        raise UserError(
            f"`adapter.targets` is {expression!r}, which is no regular expression ({error}); give one for whole module "
            "paths, or a list of names.",
            key="adapter.targets",
        ) from None
    return {path for path, _ in network.named_modules() if compiled.fullmatch(path)}


def _require_linear(network: PreTrainedModel, linear: Sequence[str], named: str, found: set[str]) -> None:
    names = sorted({path.rpartition(".")[2] for path in linear})
    if not found:
        near = difflib.get_close_matches(named, names, n=1)
        raise UserError(
            f"`adapter.targets` names {named}, which no module of this {network.config.model_type} model has; "
            + (f"did you mean {near[0]}?" if near else f"its linear layers are {', '.join(names)}."),
            key="adapter.targets",
        )
    head = network.get_output_embeddings()
    for path in sorted(found - set(linear)):
        if network.get_submodule(path) is head:
            raise UserError(
                f"`adapter.targets` names {path}, the vocabulary head, which computes the loss in chunks; leave it "
                "out, or train it whole with `adapter.train: [head]`.",
                key="adapter.targets",
            )
        raise UserError(
            f"`adapter.targets` names {path}, which is no linear layer; its linear layers are {', '.join(names)}.",
            key="adapter.targets",
        )


def _require_layers(paths: set[str], layers: Sequence[int]) -> None:
    numbers = {int(match[1]) for path in paths if (match := _NUMBER.search(path))}
    if missing := [layer for layer in layers if layer not in numbers]:
        raise UserError(
            f"`adapter.layers` names {missing[0]}, and the targets are in layers {min(numbers, default=0)} to "
            f"{max(numbers, default=0)}.",
            key="adapter.layers",
        )
