"""Machines with faults, for the checks of `understudy doctor`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import pytest

from understudy.diagnosis.check import Host

HOST = Host()


def host_with(root: Path, files: dict[str, str]) -> Host:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return Host(root)


@contextmanager
def installed(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> Iterator[None]:
    """Inside, packages seem to be installed in other versions, or, with None, not at all."""
    real = metadata.version

    def version(name: str) -> str:
        if name in versions:
            if versions[name] is None:
                raise metadata.PackageNotFoundError(name)
            return str(versions[name])
        return real(name)

    with monkeypatch.context() as patch:
        patch.setattr(metadata, "version", version)
        yield
