"""Where the processes of several hosts meet, and which network they then talk over."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from urllib.parse import urlsplit

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from understudy.launch.network import interface_to, is_loopback
from understudy.recipe.environment import ProcessEnvironment, gloo_interface

__all__ = ["meeting"]

INTERFACE = "GLOO_SOCKET_IFNAME"


@contextmanager
def meeting(environment: ProcessEnvironment, timeout: timedelta) -> Iterator[Store]:
    """The store in which all processes find each other. While inside, gloo takes this host's network that leads to the
    others, for groups made later too, unless the user named another one. Every rank must enter, with RANK and
    WORLD_SIZE in its environment.
    """
    found, rank, size = _store(environment, timeout), environment.rank, environment.world_size
    found.set_timeout(timeout)
    interface = None
    if environment.master is not None and gloo_interface() is None:
        if environment.local_world_size == size:
            interface = interface_to(environment.master)
        else:
            interface = _interface_to_peers(environment.master, PrefixStore("understudy", found), rank, size)
    if interface is not None:
        os.environ[INTERFACE] = interface
    try:
        yield PrefixStore("default_pg", found)
    finally:
        if interface is not None:
            os.environ.pop(INTERFACE, None)


def _store(environment: ProcessEnvironment, timeout: timedelta) -> Store:
    where = urlsplit(environment.rendezvous)
    if where.scheme == "store":  # our launcher on the first host keeps it, over all starts of the job
        assert where.hostname is not None
        assert where.port is not None
        kept = TCPStore(where.hostname, where.port, is_master=False, timeout=timeout)
        named: Store = PrefixStore(f"start{where.path}", kept)
        return named
    # As `init_process_group` does; with torchrun the store is its agent's, which keeps other things there too.
    found, _, _ = next(rendezvous(environment.rendezvous, environment.rank, environment.world_size, timeout=timeout))
    store: Store = found
    return store


def _interface_to_peers(master: str, store: Store, rank: int, size: int) -> str | None:
    """Of the first host only the others know the address: there its own name leads to the loopback, as a rule."""
    address = _address_of(master)
    store.set(f"address/{rank}", address)
    if is_loopback(address):
        seen = (store.get(f"address/{other}").decode() for other in range(size))
        address = next((other for other in seen if not is_loopback(other)), address)
    return interface_to(address)


def _address_of(name: str) -> str:
    try:
        return socket.gethostbyname(name)
    except OSError:  # it has none that gloo takes
        return name
