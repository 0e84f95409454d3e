"""An adapter's directory: peft's own files, and beside them the base that the adapter was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from understudy.errors import UserError

if TYPE_CHECKING:
    from peft import PeftConfig

    from understudy.models.weights import WeightReader

__all__ = [
    "BASE",
    "CONFIG",
    "PROMPT",
    "SETTINGS",
    "WEIGHTS",
    "BaseReference",
    "adapter_settings",
    "is_adapter",
    "open_adapter",
    "read_base",
    "read_config",
    "stored_key",
    "write_base",
]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "base_model.json"
PROMPT = "prompt_embeddings"
"""What prompt tuning learns, under the one name that is no module's."""
SETTINGS = (CONFIG, BASE)
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class BaseReference:
    """The model that an adapter belongs to."""

    path: str
    """As the recipe named it: a Hub id or a directory."""
    revision: str | None
    digest: str
    """`model_digest` of it, before any quantization."""
    quantization: Mapping[str, Any] | None
    """The recipe's, by which it was quantized for training."""
    new_tokens: tuple[str, ...] = ()
    """The recipe's, by which its embeddings grew."""
    residual_rank: int | None = None
    """Of an adapter that began with a part of the base: what of its rank is that part (`residual`)."""


def is_adapter(directory: Path) -> bool:
    return (directory / CONFIG).is_file()


def adapter_settings(directory: Path) -> dict[str, Any]:
    """What adapter_config.json says, as it stands there. Raises `UserError` where it cannot be read."""
    settings = _read_json(directory / CONFIG)
    if not isinstance(settings.get("peft_type"), str):
        raise UserError("names no peft_type, so it is no adapter's configuration.", file=directory / CONFIG)
    return settings


def read_config(directory: Path) -> PeftConfig:
    """peft's configuration of the adapter in `directory`. Raises `UserError` where it is damaged, or peft absent."""
    from understudy.models.adapters.peft_package import import_peft

    peft = import_peft()
    adapter_settings(directory)
    try:
        return cast("PeftConfig", peft.PeftConfig.from_pretrained(str(directory)))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(
            f"cannot be used with peft {peft.__version__} ({' '.join(str(error).split())[:200]}); take the release "
            "that wrote it, or train the adapter anew.",
            file=directory / CONFIG,
        ) from error


def open_adapter(directory: Path) -> WeightReader:
    """A reader of the adapter's parameters under their canonical names. Raises `UserError` without weights."""
    from understudy.models.weights import WeightReader

    if not (directory / WEIGHTS).is_file():
        others = " It has adapter_model.bin, which can run code when it is loaded; convert it where you trust it."
        hint = others if (directory / "adapter_model.bin").is_file() else " Name a directory that peft saved."
        raise UserError(f"{directory} is an adapter without weights ({WEIGHTS}).{hint}")
    keys = WeightReader(directory, only=WEIGHTS).names()
    return WeightReader(directory, only=WEIGHTS, renamed={key: key.removeprefix(_PREFIX) for key in keys})


def stored_key(name: str) -> str:
    """The key in `WEIGHTS` of the parameter with the canonical name `name`."""
    return name if name == PROMPT else f"{_PREFIX}{name}"


def read_base(directory: Path) -> BaseReference | None:
    """The base as training wrote it down; None for an adapter from elsewhere."""
    if not (directory / BASE).is_file():
        return None
    values = _read_json(directory / BASE)
    try:
        return BaseReference(
            path=str(values["path"]),
            revision=values["revision"],
            digest=str(values["digest"]),
            quantization=values["quantization"],
            new_tokens=tuple(values["new_tokens"]),
            residual_rank=values["residual_rank"],
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"does not say which model the adapter belongs to (no {error}); get the adapter again, or remove the file "
            "and name the model with --base.",
            file=directory / BASE,
        ) from error


def write_base(directory: Path, base: BaseReference) -> None:
    (directory / BASE).write_text(json.dumps(asdict(base), indent=2) + "\n", encoding="utf-8")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror}).", file=file) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not valid JSON ({error}); get the adapter again.", file=file) from error
    if not isinstance(values, dict):
        raise UserError("must hold a JSON object; get the adapter again.", file=file)
    return values
