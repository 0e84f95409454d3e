"""From a recipe's `model` section to files on this machine. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from understudy.errors import UserError
from understudy.recipe import schema

__all__ = [
    "cached_config_file",
    "fetched_directory",
    "model_directory",
    "read_config",
    "read_config_file",
    "stored_config",
    "tokenizer_directory",
]

_TOKENIZER_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py"]
_WEIGHT_FILES = ["*.safetensors"]
_OTHER_WEIGHTS = ("pytorch_model*.bin", "*.pt", "*.pth", "*.gguf", "tf_model.h5", "flax_model.msgpack")


def model_directory(model: schema.Model) -> Path:
    """The directory that holds the model's config.json, tokenizer and, but for `init: random`, its weights.

    A directory is taken as it is; anything else is a Hub id, of which only those files are downloaded, at
    `model.revision`. Raises `UserError` when there is no such model or something it needs is missing.
    """
    if model.path is None:
        raise UserError("model.path is missing; name a Hub id or a directory.")
    weighted = model.init != "random"
    directory = _local_or_snapshot(model.path, model.revision, _TOKENIZER_FILES + (_WEIGHT_FILES if weighted else []))
    if not (directory / "config.json").is_file():
        if (directory / "adapter_config.json").is_file():
            raise UserError(
                f"{directory} is an adapter, not a model; name its base in model.path, and the adapter in "
                "`adapter: {kind: …, path: …}` to go on training it."
            )
        inside = directory / "model"
        instead = f"name {inside}" if (inside / "config.json").is_file() else "correct the path"
        raise UserError(f"{directory} has no config.json, so it is no Hugging Face model; {instead}.")
    if weighted:
        _require_safetensors(directory)
    return directory


def fetched_directory(source: str) -> Path:
    """A directory as it is, and of a Hub id everything that a model or an adapter needs, whatever it turns out to be.
    Raises `UserError` when there is neither."""
    return _local_or_snapshot(source, None, _TOKENIZER_FILES + _WEIGHT_FILES)


def tokenizer_directory(model: schema.Model) -> Path:
    """The directory that holds the tokenizer: `model.tokenizer`'s, else the model's own."""
    source = model.tokenizer or model.path
    if source is None:
        raise UserError("model.tokenizer is missing; with no model.path, name the tokenizer's Hub id or directory.")
    revision = model.revision if model.tokenizer is None else None
    directory = _local_or_snapshot(source, revision, _TOKENIZER_FILES)
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise UserError(f"{directory} has no tokenizer; set model.tokenizer to a Hub id or directory that has one.")
    return directory


def read_config(model: schema.Model) -> dict[str, Any]:
    """The model's config.json with `model.config` laid over it, one level deep; only `model.config` without a path."""
    return {**stored_config(model), **model.config}


def stored_config(model: schema.Model) -> dict[str, Any]:
    """The model's config.json as it is; nothing without a path."""
    stored: dict[str, Any] = {}
    if model.path is not None:
        stored = read_config_file(_local_or_snapshot(model.path, model.revision, ["config.json"]))
    return stored


def cached_config_file(model: schema.Model) -> Path | None:
    """config.json of a Hub id, where an earlier download left it on this machine. Asks nobody."""
    if model.path is None or Path(model.path).expanduser().exists() or model.path.count("/") > 1:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def read_config_file(directory: Path) -> dict[str, Any]:
    """What config.json in `directory` says. Raises `UserError` where it is missing or no JSON object."""
    file = directory / "config.json"
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{directory} has no config.json, so it is no Hugging Face model; correct the path.") from None
    except OSError as error:
        raise UserError(f"the file cannot be read ({error.strerror}); get the model again.", file=file) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"the file is not valid JSON ({error}); get the model again.", file=file) from None
    if not isinstance(stored, dict):
        raise UserError("the file must hold a JSON object; get the model again.", file=file)
    return stored


def _local_or_snapshot(source: str, revision: str | None, patterns: list[str]) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise UserError(
                f"{source} is a directory, which has no revisions; remove model.revision.", key="model.revision"
            )
        return path
    if path.is_file():
        raise UserError(f"{source} is a file; name its directory.")
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise UserError(f"there is no directory {source}; correct the path.")
    return _snapshot(source, revision, patterns)


def _snapshot(source: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except HFValidationError:
        raise UserError(f"{source} is neither a directory nor a Hub id (owner/name).") from None
    except GatedRepoError:
        raise UserError(
            f"{source} needs its licence accepted on the Hub; accept it there, then run `hf auth login`."
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{source} is not a directory here and not a model on the Hub; check the spelling, or run `hf auth login` "
            "if it is private."
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{source} has no revision {revision!r} on the Hub; check model.revision.") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{source} is not a directory here, and the Hub cannot be reached; check the path, or download the model "
            "on a machine with network access."
        ) from error


def _require_safetensors(directory: Path) -> None:
    if any(directory.glob("*.safetensors")):
        return
    if any(next(directory.glob(pattern), None) for pattern in _OTHER_WEIGHTS):
        raise UserError(
            f"{directory} holds weights only in a format other than safetensors, which can run code when it is loaded; "
            "convert it where you trust it: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)."
        )
    raise UserError(
        f"{directory} has no weights (*.safetensors); name a complete model, or set model.init to random to start "
        "without any."
    )
