"""peft, which makes the adapters' layers; it is not needed where nothing is adapted."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from typing import Any

from understudy.errors import UserError

__all__ = ["import_peft", "require_peft"]


def require_peft() -> None:
    """Raises `UserError` saying what to install where peft is absent. Takes no time."""
    if importlib.util.find_spec("peft") is None:
        raise UserError(
            "adapters need peft, which is not installed; run `pip install 'understudy[adapters]'`.",
            key="adapter",
        )


def import_peft() -> Any:
    require_peft()
    # Which it imports, and which warns of a kernel that it has a replacement for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return importlib.import_module("peft")
