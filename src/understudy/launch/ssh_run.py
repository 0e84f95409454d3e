"""Runs a host's part of a run on each of several, over ssh, and watches them. Imports no torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO

from understudy.errors import LostProcessError, StoppedError, UnderstudyError
from understudy.launch.cause import FailedRunError
from understudy.launch.hostfile import ListedHost
from understudy.launch.keeper_note import ALIVE_SECONDS, SILENT_SECONDS
from understudy.launch.signals import StopRequests
from understudy.launch.ssh_keeper import ALIVE, ALIVE_BYTE, KILL, RESTART_BYTE

__all__ = ["LostHostsError", "run_on_hosts"]

POLL_SECONDS = 0.1
SETTLE_SECONDS = 20.0
"""For hosts to end by themselves once one has failed: they tell each other, and then what was the cause."""
KILLED_SECONDS = 10.0
"""For a host to say that it has killed what ran there."""
SSH_FAILED = 255
STOPPED = StoppedError.exit_status


class LostHostsError(LostProcessError):
    """Connections to hosts broke; `left` are those that ended by themselves, after `restarts` of their own."""

    def __init__(self, lost: Sequence[ListedHost], left: Sequence[ListedHost], restarts: int) -> None:
        names = " and ".join(host.name for host in lost)
        super().__init__(f"{names}: the connection was lost; the host is down, or its network is.")
        self.lost = tuple(lost)
        self.left = tuple(left)
        self.restarts = restarts


@dataclass
class _Part:
    """What runs on one host."""

    host: ListedHost
    process: subprocess.Popen[bytes]
    copiers: tuple[threading.Thread, ...] = ()
    ended_order: int | None = None
    given_up: bool = False
    """It is not waited for any longer: it has fallen silent, and so have all that have not ended."""
    heard_at: float = field(default_factory=time.monotonic)
    restarts: int = 0
    """For losses, by the hosts themselves; the leading one counts them."""

    @property
    def lost(self) -> bool:
        return self.given_up or self.process.returncode == SSH_FAILED

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        with suppress(OSError):  # it has ended, or takes nothing now
            os.write(self.process.stdin.fileno(), f"{line}\n".encode())


def run_on_hosts(
    hosts: Sequence[ListedHost],
    commands: Sequence[Sequence[str]],
    secrets: Mapping[str, str],
    requests: StopRequests,
    *,
    going_on: Callable[[int], bool],
) -> None:
    """Runs `commands`, one on each of `hosts`, until all have ended with 0. What they print appears here, each line
    after its host's name.

    A request to stop is passed on to all, and then it takes as long as they take, or until the second one, which kills
    them. When one fails the others get a while to end too, unless `going_on`, given how many are left, says that they
    can do without a host that was lost; those that have fallen silent are not waited for. Raises `LostHostsError` when
    the first host was lost, or all that were left failed for that; `StoppedError` when they stopped on request; else
    `FailedRunError` with the status of the first that failed. Nothing is left running on a host that can be reached.
    """
    parts: list[_Part] = []
    try:
        for host, command in zip(hosts, commands):
            requests.check()
            parts.append(_start(host, command, secrets))
        _watch(parts, requests, going_on)
    finally:
        _end(parts)
    _raise_outcome(parts, requests)


def _start(host: ListedHost, command: Sequence[str], secrets: Mapping[str, str]) -> _Part:
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    os.set_blocking(process.stdin.fileno(), False)
    part = _Part(host, process)
    pairs = ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    part.copiers = tuple(threading.Thread(target=_copy, args=(part, *pair), daemon=True) for pair in pairs)
    for copier in part.copiers:
        copier.start()
    part.tell(json.dumps(dict(secrets)))
    return part


def _copy(part: _Part, source: IO[bytes], target: IO[str]) -> None:
    """Line by line, but for the signs of its keeper."""
    begun = b""
    while more := os.read(source.fileno(), 2**16):
        part.heard_at = time.monotonic()
        part.restarts += more.count(RESTART_BYTE)
        *lines, begun = (begun + more.replace(ALIVE_BYTE, b"").replace(RESTART_BYTE, b"")).split(b"\n")
        for line in lines:
            _print(part.host, line, target)
    if begun:
        _print(part.host, begun, target)


def _print(host: ListedHost, line: bytes, target: IO[str]) -> None:
    target.write(f"{host.name}: {line.decode(errors='replace').rstrip()}\n")
    target.flush()


def _watch(parts: Sequence[_Part], requests: StopRequests, going_on: Callable[[int], bool]) -> None:
    ended = 0
    asked = False
    stop_at: float | None = None
    alive_at = 0.0
    while any(part.ended_order is None for part in parts) and len(requests.received) < 2:
        now = time.monotonic()
        if requests.received and not asked:
            asked = True
            for part in parts:
                part.tell(requests.received[0].name)
        if now >= alive_at:
            alive_at = now + ALIVE_SECONDS
            for part in parts:
                part.tell(ALIVE)
        for part in parts:
            if part.ended_order is None and part.process.poll() is not None:
                part.ended_order, ended = ended, ended + 1
        bad = [part for part in parts if part.process.returncode not in (None, 0, STOPPED)]
        running = [part for part in parts if part.ended_order is None]
        if bad and all(now - part.heard_at > SILENT_SECONDS for part in running):
            for part in running:
                part.given_up = True
            return
        if bad and stop_at is None and not (_without(bad, parts[0]) and going_on(len(parts) - len(bad))):
            stop_at = now + SETTLE_SECONDS
        if stop_at is not None and now >= stop_at:
            return
        time.sleep(POLL_SECONDS)


def _without(bad: Sequence[_Part], first: _Part) -> bool:
    """Whether the first host may be going on without these: they are lost, to us or to it."""
    gone = (SSH_FAILED, LostProcessError.exit_status)
    return first not in bad and all(part.process.returncode in gone for part in bad)


def _end(parts: Sequence[_Part]) -> None:
    """Ends what still runs: on the hosts, then our connections to them."""
    running = [part for part in parts if part.process.poll() is None]
    for part in running:
        part.tell(KILL)
    deadline = time.monotonic() + KILLED_SECONDS
    for part in running:
        if not part.given_up:
            with suppress(subprocess.TimeoutExpired):
                part.process.wait(max(0.0, deadline - time.monotonic()))
        if part.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(part.process.pid, signal.SIGKILL)
        part.process.wait()
    for part in parts:
        for copier in part.copiers:
            copier.join(1.0)


def _raise_outcome(parts: Sequence[_Part], requests: StopRequests) -> None:
    order = sorted((part for part in parts if part.ended_order is not None), key=lambda part: part.ended_order or 0)
    lost = [part for part in parts if part.lost]
    failed = [part for part in order if part.process.returncode not in (0, STOPPED, SSH_FAILED)]
    if len(requests.received) > 1 and len(order) < len(parts):
        raise FailedRunError(f"stopped by {requests} before a checkpoint was committed.", 1)
    told = [part for part in failed if part.process.returncode != LostProcessError.exit_status]
    if told:
        raise _failure(told[0])
    # The first host has the last word: it may have gone on without others that were lost, to us or only to it.
    if parts[0].process.returncode == 0:
        return
    if parts[0].process.returncode == STOPPED:
        raise StoppedError("stopped on request; run again to go on.")
    if lost and (failed or parts[0] in lost or len(order) < len(parts)):
        left = [part.host for part in parts if part not in lost]
        raise LostHostsError([part.host for part in lost], left, parts[0].restarts)
    if failed:
        raise _failure(failed[0])
    if len(order) < len(parts):
        raise LostProcessError(f"{parts[0].host.name} did not end with the others.")


def _failure(part: _Part) -> UnderstudyError:
    status = part.process.returncode
    return FailedRunError(f"the run failed on {part.host.name} with status {status}; see what it said above.", status)
