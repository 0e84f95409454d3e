"""Names prepared data by its content: the key of a token cache is a hash of all it is a function of.

Imports neither torch nor transformers: a second start must find its data in well under a second.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from understudy.data.cache import FORMAT_VERSION
from understudy.errors import UserError
from understudy.recipe.cache_disk import writing_cache

__all__ = ["FileDigests", "cache_key", "tokenizer_digest"]

_TOKENIZER_FILES = (
    "config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
    "*.model",
    "*.tiktoken",
    "*.py",
)


class FileDigests:
    """SHA-256 of files' contents, remembered by path, size and modification time in small files under `memory`."""

    def __init__(self, memory: Path) -> None:
        self._memory = memory

    def __call__(self, path: Path) -> str:
        path = path.resolve()
        status = path.stat()
        stamp = [str(path), status.st_size, status.st_mtime_ns]
        note = self._memory / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
        if (known := _remembered(note, stamp)) is not None:
            return known
        digest = _sha256(path)
        self._remember(note, {"stamp": stamp, "sha256": digest})
        return digest

    def _remember(self, note: Path, content: Mapping[str, Any]) -> None:
        with writing_cache(self._memory):
            self._memory.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self._memory, prefix=".")
            try:
                with os.fdopen(descriptor, "w") as file:
                    json.dump(content, file)
                Path(temporary).replace(note)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"the file cannot be read ({error.strerror}); check its permissions.", file=path) from error
    return digest.hexdigest()


def _remembered(note: Path, stamp: Sequence[Any]) -> str | None:
    try:
        content = json.loads(note.read_text())
    except (OSError, ValueError):
        return None
    known = content.get("sha256") if isinstance(content, dict) and content.get("stamp") == list(stamp) else None
    return known if isinstance(known, str) else None


def tokenizer_digest(directory: Path, digest: FileDigests) -> str:
    """SHA-256 over the files of `directory` that a tokenizer is made of, and the versions of what reads them."""
    files = sorted({path for pattern in _TOKENIZER_FILES for path in directory.glob(pattern) if path.is_file()})
    named = [[path.relative_to(directory).as_posix(), digest(path)] for path in files]
    return _hash({"files": named, "versions": [version("tokenizers"), version("transformers")]})


def cache_key(parts: Mapping[str, Any]) -> str:
    """The key of the entry that is a function of `parts`, JSON values."""
    return _hash({"format_version": FORMAT_VERSION, **parts})


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
