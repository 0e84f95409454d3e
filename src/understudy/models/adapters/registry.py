"""Finds an adapter by its kind: `adapters/<kind>.py`, whose `make_config` makes peft's configuration of it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol, cast

from transformers import PreTrainedModel

from understudy.recipe.adapters import PeftAdapter

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["make_config"]


class MakeConfig(Protocol):
    """What a module of this folder offers under the name `make_config`."""

    def __call__(self, adapter: PeftAdapter, network: PreTrainedModel) -> PeftConfig: ...


def make_config(adapter: PeftAdapter, network: PreTrainedModel) -> PeftConfig:
    """peft's configuration of the recipe's adapter for `network`, which is on the meta device. Raises `UserError` where
    the two do not fit."""
    kind = adapter.kind  # type: ignore[attr-defined]  # every class of the union has one
    module = importlib.import_module(f"understudy.models.adapters.{kind}")
    return cast(MakeConfig, module.make_config)(adapter, network)
