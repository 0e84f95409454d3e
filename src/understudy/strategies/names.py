"""Canonical parameter names: what `transformers` calls a weight, whatever has wrapped the module since."""

from __future__ import annotations

import re

__all__ = ["canonical_name"]

_WRAPPERS = re.compile(r"^(?:module\.)?network\.|_orig_mod\.|_checkpoint_wrapped_module\.")
_PARAMETRIZED = re.compile(r"parametrizations\.([^.]+)\.original$")


def canonical_name(name: str) -> str:
    """`module.network.lm_head.parametrizations.weight.original` becomes `lm_head.weight`."""
    return _PARAMETRIZED.sub(r"\1", _WRAPPERS.sub("", name))
