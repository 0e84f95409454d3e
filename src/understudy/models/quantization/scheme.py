"""Finds how a model directory is quantized: the first module of `codecs` whose `scheme_of` knows the format.

A new file is a new codec.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import understudy.models.quantization.codecs as package
from understudy.errors import UserError
from understudy.models.quantization.codec import Scheme, unreadable

__all__ = ["scheme_of"]


def scheme_of(config: Mapping[str, Any]) -> Scheme | None:
    """How a model with this config.json stores its linear layers; None for one that is not quantized.

    Raises `UserError` for a format that is not read, and for one whose package is not installed.
    """
    section = config.get("quantization_config")
    if not section:
        return None
    if not isinstance(section, Mapping):
        raise UserError("quantization_config in the model's config.json is no mapping; get the model again.")
    for read in _readers():
        scheme = read(section)
        if scheme is not None:
            return scheme
    method = str(section.get("quant_method", "an unknown method"))
    raise unreadable(method)


@cache
def _readers() -> tuple[Callable[[Mapping[str, Any]], Scheme | None], ...]:
    names = sorted(found.name for found in pkgutil.iter_modules(package.__path__))
    modules = (importlib.import_module(f"{package.__name__}.{name}") for name in names)
    return tuple(module.scheme_of for module in modules)
