"""What a committed checkpoint consists of, to the byte, and whether it still does. Imports no torch.

`manifest.json` lists every file with its size and SHA-256; `COMMITTED`, written last, holds the manifest's SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from understudy.checkpoint.durable import write_durably
from understudy.errors import UserError

__all__ = [
    "MANIFEST",
    "MARKER",
    "DamagedCheckpointError",
    "FileEntry",
    "describe_file",
    "read_manifest",
    "verify_files",
    "verify_sizes",
    "write_manifest",
    "write_marker",
]

MANIFEST = "manifest.json"
MARKER = "COMMITTED"
FORMAT_VERSION = 1
READ_BYTES = 2**22
READERS = 4
"""Files hashed at once: hashing keeps a core busy, and a disk serves several readers."""
READ_BY_NAME = (".safetensors", ".json", ".jinja", ".model", ".py")
"""Files that loading a model would find by their names and read, so they must not be there unlisted."""

_MARKED = re.compile(rb"[0-9a-f]{64}\n")


class DamagedCheckpointError(UserError):
    """A checkpoint is not what was committed; names the file."""


class FileEntry(NamedTuple):
    num_bytes: int
    sha256: str
    """Hexadecimal."""


def describe_file(path: Path) -> FileEntry:
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(READ_BYTES)
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            num_bytes += count
    return FileEntry(num_bytes, digest.hexdigest())


def write_manifest(directory: Path, files: Mapping[str, FileEntry]) -> None:
    """Writes and syncs the manifest; keys of `files` are paths in `directory`, with slashes."""
    entries = {name: {"bytes": entry.num_bytes, "sha256": entry.sha256} for name, entry in sorted(files.items())}
    text = json.dumps({"format_version": FORMAT_VERSION, "files": entries}, indent=1)
    write_durably(directory / MANIFEST, text.encode())


def write_marker(directory: Path) -> None:
    """Writes and syncs the commit marker. Everything it vouches for must be on the disk already."""
    write_durably(directory / MARKER, f"{describe_file(directory / MANIFEST).sha256}\n".encode())


def read_manifest(directory: Path) -> dict[str, FileEntry]:
    """The manifest of a committed checkpoint, checked against its marker. Raises `DamagedCheckpointError`."""
    marker, manifest = directory / MARKER, directory / MANIFEST
    vouched = _read(marker, "is missing: the checkpoint was never committed")
    text = _read(manifest, "is missing")
    if not _MARKED.fullmatch(vouched):
        raise _damaged(marker, "is not a commit marker: it was changed")
    if vouched.strip().decode() != hashlib.sha256(text).hexdigest():
        raise _damaged(manifest, f"is not the one that {MARKER} vouches for: one of the two was changed")
    try:
        content = json.loads(text)
        version = content["format_version"]
        files = {name: FileEntry(entry["bytes"], entry["sha256"]) for name, entry in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(manifest, "is not a manifest") from None
    if version != FORMAT_VERSION:
        raise _damaged(manifest, f"has format {version}, and this release reads {FORMAT_VERSION}")
    return files


def verify_files(directory: Path) -> None:
    """Reads every byte of the checkpoint. Raises `DamagedCheckpointError` naming the first file, in order of name,
    that is missing, changed, or would be read although it is not listed."""
    files = read_manifest(directory)
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if name.endswith(READ_BY_NAME) and name not in files and name != MANIFEST:
            raise _damaged(path, f"is not listed in {MANIFEST}; remove it")
    with ThreadPoolExecutor(READERS) as pool:
        for problem in pool.map(lambda item: _problem(directory / item[0], item[1]), files.items()):
            if problem is not None:
                raise problem


def verify_sizes(directory: Path) -> None:
    """As `verify_files`, at a glance: reads the manifest, and of the files it lists their sizes only."""
    for name, entry in read_manifest(directory).items():
        if (problem := _problem_of_size(directory / name, entry)) is not None:
            raise problem


def _read(path: Path, if_missing: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise _damaged(path, if_missing) from None
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from None


def _problem(path: Path, expected: FileEntry) -> DamagedCheckpointError | None:
    if (problem := _problem_of_size(path, expected)) is not None:
        return problem
    try:
        if describe_file(path) != expected:
            return _damaged(path, "is not what was written: its SHA-256 differs")
    except OSError as error:
        return _damaged(path, f"cannot be read ({error.strerror})")
    return None


def _problem_of_size(path: Path, expected: FileEntry) -> DamagedCheckpointError | None:
    try:
        if (size := path.stat().st_size) != expected.num_bytes:
            return _damaged(path, f"has {size:,} bytes instead of {expected.num_bytes:,}")
    except FileNotFoundError:
        return _damaged(path, "is missing")
    except OSError as error:
        return _damaged(path, f"cannot be read ({error.strerror})")
    return None


def _damaged(path: Path, what: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"{what}.", file=path)
