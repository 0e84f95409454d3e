"""Where the hosts of a job meet, and what must be the same on all of them before they run it."""

from __future__ import annotations

import hashlib
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from understudy.errors import LostProcessError, UserError
from understudy.launch.host_group import HostGroup, Store
from understudy.launch.packages import package_version
from understudy.recipe.environment import HostEnvironment, host_name, without_torch_traces
from understudy.recipe.schema import Recipe
from understudy.recipe.source_map import SourceMap

if TYPE_CHECKING:
    from understudy.training.prepare import Prepared

__all__ = ["introduction", "meet", "prepared_things", "require_alike", "require_same_things"]

MEETING_SECONDS = 1800.0
"""How long the first host is waited for."""
NAMELESS_SECONDS = 300.0
"""How long, where its name is not known: one that is being started may have none yet."""
REMIND_SECONDS = 30.0
RETRY_SECONDS = 0.5
STORE_TIMEOUT = timedelta(seconds=30)
REACH_SECONDS = 5.0
PACKAGES = ("understudy", "torch", "transformers", "peft", "deepspeed")


@contextmanager
def meet(host: HostEnvironment, recipe: Recipe, sources: SourceMap, say: Callable[[str], None]) -> Iterator[HostGroup]:
    """This host among those of its job. The first one opens the port where all meet, the others wait for it.

    Raises `UserError` when the recipe is for another number of hosts, the port is in use or the address leads nowhere,
    `LostProcessError` when the first host does not come or is another service.
    """
    asked, least = recipe.cluster.nodes, recipe.cluster.min_nodes
    if asked not in (1, host.nodes):
        raise sources.error(
            "cluster.nodes", f"{asked} hosts, but the environment has NNODES={host.nodes}; make them the same."
        )
    if least is not None and least > host.nodes:
        raise sources.error("cluster.min_nodes", f"{least} hosts at least, but there are {host.nodes} at most.")
    if host.node:
        _await(host, say)
    group = HostGroup(_open(host), host.node, host.nodes, host_name(), say)
    try:
        yield group
    finally:
        group.close()


def introduction(recipe: Recipe, processes: int) -> dict[str, Any]:
    """What a host tells the others of itself."""
    return {
        "name": host_name(),
        "processes": processes,
        "packages": {name: package_version(name) for name in PACKAGES},
        "recipe": _flat(recipe.model_dump(mode="json", exclude={"cluster"})),
    }


def require_alike(told: Mapping[int, Mapping[str, Any]]) -> None:
    """Raises `UserError` naming the first host whose packages or recipe are not those of the first one."""
    first = told[0]
    for node, one in told.items():
        for what, note in (("packages", "install the same on all hosts"), ("recipe", "give all hosts the same recipe")):
            ours, theirs = first[what], one[what]
            if differing := sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)):
                key = differing[0]
                more = f" ({len(differing) - 1} more differ)" if len(differing) > 1 else ""
                raise UserError(
                    f"{key} is {theirs.get(key)} on host {node} ({one['name']}) but {ours.get(key)} on host 0 "
                    f"({first['name']}){more}; {note}."
                )


def prepared_things(prepared: Prepared) -> dict[str, Any]:
    """What each host has prepared or found by itself, by digest."""
    job = prepared.job
    return {
        "name": host_name(),
        "the training data": prepared.data_digest,
        "the evaluation data": None if job.evaluation is None else job.evaluation.name,
        "the model": _model(job.model_directory),
        "the adapter": None if job.adapter_directory is None else _model(job.adapter_directory),
        "the teacher's cache": [None if place.cache is None else place.cache.name for place in job.teachers],
    }


def require_same_things(told: Mapping[int, Mapping[str, Any]]) -> None:
    """Raises `UserError` naming the first host that has other data or another model than the first one."""
    first = told[0]
    for node, one in told.items():
        for what, digest in one.items():
            if what != "name" and digest != first[what]:
                raise UserError(
                    f"{what} of host {node} ({one['name']}) are not those of host 0 ({first['name']}); copy the same "
                    "files to all hosts, or put them on a disk that all share."
                )


def _await(host: HostEnvironment, say: Callable[[str], None]) -> None:
    """Until the first host listens."""
    began = time.monotonic()
    remind_at = began + REMIND_SECONDS
    while True:
        try:
            socket.create_connection((host.address, host.port), timeout=REACH_SECONDS).close()
            return
        except OSError as error:
            why, nameless = str(error.strerror or error), isinstance(error, socket.gaierror)
        now = time.monotonic()
        if nameless and now - began > NAMELESS_SECONDS:
            raise UserError(
                f"MASTER_ADDR={host.address} is the name of no host that is known here ({why}); set it to the first "
                "host's address."
            )
        if now - began > MEETING_SECONDS:
            raise LostProcessError(
                f"the first host does not answer at {host.address}:{host.port} ({why}); start the command there with "
                "NODE_RANK=0, and see that MASTER_ADDR is its address and the port is open."
            )
        if now > remind_at:
            say(f"waiting for the first host at {host.address}:{host.port} ({why})")
            remind_at = now + REMIND_SECONDS
        time.sleep(RETRY_SECONDS)


def _open(host: HostEnvironment) -> Store:
    listening = _listen(host) if host.node == 0 else None
    with without_torch_traces():  # a store that is gone, or is none, is told by us, not by a trace of torch's own code
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

    open_store = partial(TCPStore, host.address, host.port, wait_for_workers=False, timeout=STORE_TIMEOUT)
    try:
        if listening is not None:
            kept: Store = open_store(is_master=True, master_listen_fd=listening.detach())
            return kept
        return _in_time(open_store)
    except (RuntimeError, TimeoutError) as error:  # torch's own names for what goes wrong there
        raise LostProcessError(
            f"{host.address}:{host.port} is no meeting place of this job ({str(error).splitlines()[0]}); see that "
            "MASTER_ADDR and MASTER_PORT are the same on every host, and that nothing else uses the port."
        ) from error


def _listen(host: HostEnvironment) -> socket.socket:
    """On the port where the others come."""
    try:
        if socket.has_dualstack_ipv6():
            listening = socket.create_server(("", host.port), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            listening = socket.create_server(("", host.port))
    except OSError as error:
        raise UserError(
            f"MASTER_PORT={host.port} cannot be opened on this host ({os.strerror(error.errno or 0)}); choose another "
            "port, the same on every host, or end what uses it: another launcher with NODE_RANK=0, perhaps."
        ) from error
    try:
        socket.create_connection((host.address, host.port), timeout=REACH_SECONDS).close()
    except OSError as error:
        listening.close()
        raise UserError(
            f"NODE_RANK=0 is the first host, but MASTER_ADDR={host.address} does not lead to this one "
            f"({error.strerror or error}); set MASTER_ADDR to an address of this host, or NODE_RANK to its number."
        ) from error
    return listening


def _in_time(open_store: Callable[[], Store]) -> Store:
    """The store that this opens. Another service may never answer, for which torch's code waits without a limit, and
    without an ear for signals."""
    answers: queue.Queue[Store | RuntimeError] = queue.Queue()

    def ask() -> None:
        try:
            answers.put(open_store())
        except RuntimeError as error:
            answers.put(error)

    threading.Thread(target=ask, name="meeting", daemon=True).start()
    deadline = time.monotonic() + STORE_TIMEOUT.total_seconds() + REACH_SECONDS  # after what torch has to say
    while True:
        try:
            answer = answers.get(timeout=RETRY_SECONDS)
        except queue.Empty:
            if time.monotonic() > deadline:
                raise TimeoutError("what is there does not answer as one") from None
        else:
            if isinstance(answer, RuntimeError):
                raise answer
            return answer


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """By dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{before}{key}"
        if isinstance(value, dict):
            flat |= _flat(value, f"{name}.")
        elif isinstance(value, list):
            flat |= _flat({str(index): entry for index, entry in enumerate(value)}, f"{name}.")
        else:
            flat[name] = value
    return flat


def _model(directory: Path) -> str:
    """Tells one model from another by its configuration and the sizes of its files, without reading its weights."""
    digest = hashlib.sha256()
    for file in sorted(directory.glob("*")):
        if file.suffix in (".safetensors", ".json"):
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    for name in ("config.json", "adapter_config.json"):
        if (directory / name).exists():
            digest.update((directory / name).read_bytes())
    return digest.hexdigest()
