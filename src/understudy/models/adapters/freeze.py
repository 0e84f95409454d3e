"""Training some of a model's own parameters and leaving the others as they are."""

from __future__ import annotations

import re

from understudy.errors import UserError
from understudy.models.language_model import LanguageModel
from understudy.models.names import canonical_name
from understudy.recipe.adapters import Freeze

__all__ = ["freeze"]

DEFAULT_LAYERS = 2


def freeze(model: LanguageModel, settings: Freeze) -> None:
    """Leaves `requires_grad` with the parameters that `settings` names: those of the last decoder layers and those that
    a regular expression is found in the canonical name of. Raises `UserError` when one names nothing."""
    trained: set[int] = set()
    last = settings.last_layers or (DEFAULT_LAYERS if settings.parameters is None else 0)
    layers = model.decoder_layers()
    if last > len(layers):
        raise UserError(
            f"the last {last} layers are to be trained (`adapter.last_layers`), and the model has {len(layers)}.",
            key="adapter.last_layers",
        )
    trained |= {id(parameter) for layer in layers[len(layers) - last :] for parameter in layer.parameters()}
    named = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    for expression in settings.parameters or ():
        found = {id(parameter) for name, parameter in named.items() if _compiled(expression).search(name)}
        if not found:
            raise UserError(
                f"`adapter.parameters` names {expression}, which no parameter's name has in it; there are "
                f"{', '.join(list(named)[:3])} and {len(named) - 3} more.",
                key="adapter.parameters",
            )
        trained |= found
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def _compiled(expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise UserError(
            f"`adapter.parameters` names {expression!r}, which is no regular expression ({error}).",
            key="adapter.parameters",
        ) from None
