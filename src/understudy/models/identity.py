"""What a model's files hold, as one digest, by which an adapter names its base. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from understudy.models.source import read_config_file
from understudy.recipe.cache_disk import writing_cache

__all__ = ["model_digest"]

CHUNK_BYTES = 2**24
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What config.json says of a model that does not change what it computes.
_PASSING = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")


def model_digest(directory: Path, cache: Path) -> str:
    """SHA-256 over the configuration and every byte of the weights in `directory`, hexadecimal; the same wherever the
    directory lies.

    A file is read once: what came of it is remembered in `cache` under its place, size and time of change. Files of the
    Hub's cache are named by their digest and not read at all.
    """
    config = {key: value for key, value in read_config_file(directory).items() if key not in _PASSING}
    files = {file.name: _file_digest(file, cache) for file in sorted(directory.glob("*.safetensors"))}
    return hashlib.sha256(json.dumps([config, files], sort_keys=True).encode()).hexdigest()


def _file_digest(file: Path, cache: Path) -> str:
    whole = file.resolve()
    if _SHA256.fullmatch(whole.name):
        return whole.name
    status = whole.stat()
    place = json.dumps([str(whole), status.st_size, status.st_mtime_ns, status.st_ino])
    known = cache / "digests" / hashlib.sha256(place.encode()).hexdigest()
    try:
        if _SHA256.fullmatch(digest := known.read_text(encoding="ascii")):
            return digest
    except (OSError, UnicodeDecodeError):
        pass
    digest = _sha256(whole)
    with writing_cache(known.parent):
        known.parent.mkdir(parents=True, exist_ok=True)
        written = known.with_name(f"{known.name}.{os.getpid()}")
        written.write_text(digest, encoding="ascii")
        written.replace(known)
    return digest


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
