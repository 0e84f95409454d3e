"""Which of this host's networks leads to the others. Imports no torch."""

from __future__ import annotations

import fcntl
import socket
import struct

__all__ = ["interface_to", "is_loopback"]

_SIOCGIFADDR = 0x8915
_ANY_PORT = 9


def interface_to(address: str) -> str | None:
    """The network interface through which `address`, a host's name or IPv4 address, is reached, or that has it itself.
    None where nobody can tell: the name is not known, there is no way to it, or the system is not Linux.

    gloo takes the interface of this host's own name otherwise, which is often the loopback's, or another network's.
    """
    source = _source_of(address)
    if source is None:
        return None
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if _address_of(name) == source), None)


def is_loopback(address: str) -> bool:
    """Whether `address` is this host whoever asks."""
    source = _source_of(address)
    return source is not None and source.startswith("127.")


def _source_of(address: str) -> str | None:
    """Our own address, seen from there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, _ANY_PORT))  # of a datagram socket: nothing is sent
        except OSError:
            return None
        return str(probe.getsockname()[0])


def _address_of(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:  # it has none
            return None
    return socket.inet_ntoa(answer[20:24])
