"""The optional package bitsandbytes, or a sentence that says how to get it."""

from __future__ import annotations

import importlib
import logging
from functools import cache
from typing import Any

from understudy.errors import UserError

__all__ = ["bitsandbytes_functional", "bitsandbytes_version"]


@cache  # every pass of every layer asks
def bitsandbytes_functional() -> Any:
    """The module `bitsandbytes.functional`. Raises `UserError` where the package is not installed."""
    # It warns on each import, on CPUs with AVX512-BF16, of a package for its own inference layers that is absent.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError as error:
        raise UserError(
            "quantized weights need the package bitsandbytes; install it with `pip install "
            "'understudy[quantization]'`, or take a model that is not quantized.",
            key="quantization",
        ) from error


def bitsandbytes_version() -> str:
    """Raises `UserError` as `bitsandbytes_functional` does."""
    bitsandbytes_functional()
    return str(importlib.import_module("bitsandbytes").__version__)
