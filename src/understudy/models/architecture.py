"""The architecture that a recipe's `model` section describes, as a transformers configuration."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from understudy.errors import UserError
from understudy.models.source import read_config_file
from understudy.recipe import schema

__all__ = ["UNBUILDABLE", "document_limit", "invalid_config", "load_config", "make_config"]

UNBUILDABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What building a network of a wrong configuration raises, in whatever layer meets it first."""


def load_config(directory: Path, model: schema.Model) -> PreTrainedConfig:
    """The configuration in `directory`/config.json with `model.config` laid over it. A vocabulary that
    `model.new_tokens` made larger than `model.config` says stays so."""
    stored, overrides = read_config_file(directory), dict(model.config)
    if model.new_tokens and _is_smaller(overrides.get("vocab_size"), stored.get("vocab_size")):
        del overrides["vocab_size"]
    own_code = stored.get("auto_map")
    if isinstance(own_code, dict) and "AutoConfig" in own_code and model.trust_remote_code:
        try:
            kind = type(AutoConfig.from_pretrained(directory, trust_remote_code=True))
            return kind.from_dict({**stored, **overrides})
        except (StrictDataclassError, OSError, ImportError, *UNBUILDABLE) as error:
            raise invalid_config(str(stored.get("model_type")), overrides, error) from error
    return make_config(stored, overrides)


def _is_smaller(size: Any, other: Any) -> bool:
    return isinstance(size, int) and isinstance(other, int) and size < other


def make_config(stored: dict[str, Any], overrides: dict[str, Any]) -> PreTrainedConfig:
    """A configuration from what a model's config.json says and what the user laid over it.

    Raises `UserError` for an unknown model type or field, and for sizes that contradict each other.
    """
    values = {**stored, **overrides}
    model_type = values.get("model_type")
    if model_type is None:
        raise UserError("the model's configuration names no model_type; set model.config.model_type, such as llama.")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        own_code = "a model that ships its own code needs model.trust_remote_code=true on the command line."
        raise UserError(
            f"transformers knows no model_type {model_type!r:.60}; "
            + (_nearest(str(model_type), list(CONFIG_MAPPING)) or own_code),
            key=_blamed(["model_type"], overrides),
        )
    kind = CONFIG_MAPPING[model_type]
    known = set(kind().to_dict()) | set(kind.attribute_map) | stored.keys() | {"model_type"}
    for name in overrides:
        if name not in known:
            raise UserError(
                f"model.config.{name} is no field of {model_type}; " + (_nearest(name, sorted(known)) or "remove it."),
                key=f"model.config.{name}",
            )
    try:
        config: PreTrainedConfig = kind.from_dict(values)
    # transformers validates with several libraries, and what they raise has no common ancestor but Exception.
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise invalid_config(model_type, overrides, error.__cause__ or error) from error
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{model_type} is no causal language model; choose a decoder-only one.")
    if getattr(config.get_text_config(), "num_hidden_layers", 1) < 1:
        raise UserError(
            "a model without layers cannot be trained; set num_hidden_layers to 1 or more.",
            key=_blamed(["num_hidden_layers"], overrides),
        )
    return config


def invalid_config(model_type: str, overrides: Mapping[str, Any], problem: BaseException) -> UserError:
    """What transformers raised for a configuration, as an error at the override that it mentions."""
    words = " ".join(str(problem).split()) or type(problem).__name__
    reason = f"it knows no {words}" if isinstance(problem, KeyError) else words.rstrip(".")
    return UserError(
        f"transformers can build no {model_type} of this configuration: {reason}; correct "
        + ("model.config." if overrides else "the model's config.json."),
        key=_blamed(re.findall(r"\w+", words), overrides),
    )


def _blamed(words: Iterable[str], overrides: Mapping[str, Any]) -> str | None:
    """The key of the override that `words` name by its field or its value."""
    for name, value in overrides.items():
        if name in words or (isinstance(value, str) and value in words):
            return f"model.config.{name}"
    return "model.config" if overrides else None


def document_limit(network: PreTrainedModel) -> int | None:
    """Most tokens a document may have, or None for any number.

    Learned positions end somewhere. Rotary frequencies that depend on the longest sequence of a batch (`dynamic`,
    `longrope`) would, past their first regime, make a document depend on its neighbours.
    """
    config = network.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    for scaling in _rope_scalings(getattr(config, "rope_parameters", None)):
        if scaling.get("rope_type") == "longrope":
            return int(scaling.get("original_max_position_embeddings", positions))
        if scaling.get("rope_type") == "dynamic":
            return int(positions)
    tokens = network.get_input_embeddings()
    for module in network.modules():
        # Some tables keep a few rows in front for padding.
        if isinstance(module, nn.Embedding) and module is not tokens and 0 <= module.num_embeddings - positions <= 8:
            return int(positions)
    return None


def _rope_scalings(parameters: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Rotary parameters: one mapping, or one for each type of layer."""
    if not parameters:
        return []
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _nearest(name: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {matches[0]!r}?" if matches else ""
