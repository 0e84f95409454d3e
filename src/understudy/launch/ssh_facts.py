"""What must be the same on every host of a run: `python -m understudy.launch.ssh_facts DIRECTORY RECIPE FIRST_HOST`
prints it as JSON. Imports no torch."""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
from hashlib import sha256
from importlib import metadata
from pathlib import Path

from understudy import __version__

__all__ = ["host_facts", "main"]


def host_facts(directory: str, recipe: str, first_host: str) -> dict[str, str | None]:
    """Of this host; None for what it lacks. `recipe` is seen from `directory`."""
    return {
        "directory": directory if os.path.isdir(directory) else None,  # noqa: PTH112  # as it is spelled
        "Python": platform.python_version(),
        "understudy": __version__,
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "deepspeed": _version("deepspeed"),
        "recipe": _digest(Path(directory, recipe)),
        "first host": _address(first_host),
    }


def main() -> None:
    json.dump(host_facts(*sys.argv[1:]), sys.stdout)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _digest(path: Path) -> str | None:
    try:
        return sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _address(name: str) -> str | None:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None


if __name__ == "__main__":
    main()
