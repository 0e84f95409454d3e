"""What is installed on this host. Imports no torch."""

from __future__ import annotations

from importlib import metadata

__all__ = ["package_version"]


def package_version(package: str) -> str | None:
    """None where `package` is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
