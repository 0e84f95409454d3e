"""Computing as the base would, for a moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from understudy.models.adapters.peft_package import import_peft
from understudy.models.language_model import LanguageModel

__all__ = ["without_adapter"]


@contextmanager
def without_adapter(model: LanguageModel) -> Iterator[None]:
    """While inside, the adapter of `model` adds nothing. Parameters and what is trained of them stay as they are."""
    layer_type = import_peft().tuners.tuners_utils.BaseTunerLayer
    layers = [module for module in model.modules() if isinstance(module, layer_type)]
    # peft's own `enable_adapters` would also freeze the adapter's parameters.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
