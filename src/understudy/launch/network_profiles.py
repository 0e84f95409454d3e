"""What collective libraries are to be told of the network between hosts, from what vendors document. Imports no
torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["find_network", "network_names", "network_variables"]

_FILE = Path(__file__).with_suffix(".toml")


def network_names() -> tuple[str, ...]:
    """The networks that have a profile."""
    return tuple(_profiles())


def network_variables(name: str | None, interface: str | None) -> dict[str, str]:
    """The environment variables of the profile `name`; `interface` is what sockets use, where the user names one."""
    profile: dict[str, Any] = {} if name is None else _profiles()[name]
    names = profile.get("interface", ["NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"])
    variables = dict(profile.get("variables", {}))
    return variables if interface is None else variables | dict.fromkeys(names, interface)


def find_network(root: Path = Path("/")) -> str | None:
    """The profile of the fast network that this host has, by what its drivers show under `root`; None without one."""
    adapters = root / "sys/class/infiniband"
    if any(adapters.glob("efa_*")):
        return "efa"
    layers = {path.read_text().strip() for path in adapters.glob("*/ports/*/link_layer")}
    if "InfiniBand" in layers:
        return "infiniband"
    if "Ethernet" in layers:
        return "roce"
    return "hccs" if (root / "etc/hccn.conf").exists() else None


def _profiles() -> dict[str, dict[str, Any]]:
    profiles: dict[str, dict[str, Any]] = tomllib.loads(_FILE.read_text())
    return profiles
