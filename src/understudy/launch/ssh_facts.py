"""What must be the same on every host of a run, or must not: `python -m understudy.launch.ssh_facts DIRECTORY RECIPE
FIRST_HOST PORT` prints it as JSON. Imports no torch."""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
from hashlib import sha256
from pathlib import Path

from understudy import __version__
from understudy.launch.packages import package_version

__all__ = ["host_facts", "main"]


def host_facts(directory: str, recipe: str, first_host: str, port: str) -> dict[str, str | None]:
    """Of this host; None for what it lacks. `recipe` is seen from `directory`; `port` is one that the first host is to
    open."""
    return {
        "directory": directory if os.path.isdir(directory) else None,  # noqa: PTH112  # as it is spelled
        "Python": platform.python_version(),
        "understudy": __version__,
        "torch": package_version("torch"),
        "transformers": package_version("transformers"),
        "deepspeed": package_version("deepspeed"),
        "recipe": _digest(Path(directory, recipe)),
        "first host": _address(first_host),
        "machine": _machine(),
        "why the port is not free": _why_not_free(int(port)),
    }


def main() -> None:
    json.dump(host_facts(*sys.argv[1:]), sys.stdout)


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


def _machine() -> str | None:
    """Tells it from every other, containers on one machine included."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {socket.gethostname()}"
    except OSError:
        return None


def _why_not_free(port: int) -> str | None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.strerror
    return None


if __name__ == "__main__":
    main()
