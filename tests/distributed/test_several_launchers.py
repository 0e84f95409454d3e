"""A launcher on each of two hosts, here on one: the run is the one of a single host, whatever ends or is lost."""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.faults import plant
from tests.distributed.forked import ForkedCommand, start_command
from tests.distributed.small_run import environment, read_rows, small_recipe, understudy, write
from tests.distributed.test_launchers import free_port

pytestmark = pytest.mark.distributed

STEPS = 40


def recipe(tmp_path: Path, **cluster: Any) -> Path:
    """Whose steps take long enough to be ended among them."""
    small = small_recipe(tmp_path)
    small["training"]["max_steps"] = STEPS
    small["optimizer"]["learning_rate"] = 2.0e-3  # so that the rounding of another number of processes does not grow
    small["evaluation"] = {"samples": 0}
    small["checkpoint"] = {"every": 5}
    small["cluster"] = {"processes": 1, **cluster}
    return write(small, tmp_path)


def start(path: Path, nodes: int = 2, prepare: Callable[[], None] | None = None) -> list[ForkedCommand]:
    """`understudy train` on each host, after `prepare` in its process."""
    place = {"NNODES": str(nodes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for node in range(nodes):
        scratch = Path(tempfile.mkdtemp(prefix="host-", dir=path.parent))
        variables = {**environment(path.parent), **place, "NODE_RANK": str(node)}
        started.append(start_command(["train", str(path)], variables, scratch, prepare=prepare))
    return started


def until_step(hosts: list[ForkedCommand], directory: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (directory / f"run/checkpoints/step-{step:08d}/COMMITTED").exists():
        assert all(host.process.exitcode is None for host in hosts), [host.errors.read_text() for host in hosts]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended(hosts: list[ForkedCommand]) -> list[tuple[int, str, str]]:
    found = []
    for host in hosts:
        host.process.join(120)
        assert host.process.exitcode is not None
        found.append((host.process.exitcode, host.output.read_text(), host.errors.read_text()))
    return found


def worker_of(launcher: ForkedCommand) -> int:
    """Whose parent is what forks the launcher's workers."""
    [workers] = children(launcher.process.pid)
    [worker] = children(workers)
    return worker


def children(process: int | None) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def gone(process: int) -> bool:
    status = Path(f"/proc/{process}/status")
    return not status.exists() or bool(re.search(r"^State:\s+[ZX]", status.read_text(), re.MULTILINE))


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Of two processes on one host."""
    directory = tmp_path_factory.mktemp("one")
    done = understudy(["train", str(recipe(directory)), "cluster.processes=2"], directory)
    assert done.returncode == 0, done.stderr
    return losses_of(directory)


def losses_of(directory: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_rows(directory / "run") if "loss" in row}


def test_a_killed_process_of_another_host_is_named_by_all_and_the_run_goes_on_as_if_nothing_had_been(
    tmp_path: Path, losses: dict[int, float]
) -> None:
    """Before, a connection is lost, which counts as one start again too."""
    path = recipe(tmp_path, max_restarts=2)
    hosts = start(path, prepare=partial(plant, "connections cut", 1, tmp_path / "struck"))
    until_step(hosts, tmp_path, 5)
    os.kill(worker_of(hosts[1]), signal.SIGKILL)
    (status, output, errors), (other, _, _) = ended(hosts)
    assert (status, other) == (0, 0), errors
    assert re.search(
        r"^lost: rank 1 on \S+ was killed by SIGKILL.*; going on from step \d+ \(restart 2 of 2\)$",
        output,
        re.M,
    )
    assert re.search(
        r"^lost: a connection between ranks was lost, .*; going on from the start \(restart 1", output, re.M
    )
    assert losses_of(tmp_path) == pytest.approx(losses, rel=1e-5)


def test_a_lost_host_is_named_and_the_others_go_on_without_it(tmp_path: Path, losses: dict[int, float]) -> None:
    hosts = start(recipe(tmp_path, max_restarts=1, min_nodes=1))
    until_step(hosts, tmp_path, 5)
    orphan = worker_of(hosts[1])
    hosts[1].process.kill()
    (status, output, errors), _ = ended(hosts)
    assert status == 0, errors
    assert re.search(
        r"^lost: host 1 .* no longer answers.*; going on from step \d+ on 1 host \(restart 1 of 1\)$", output, re.M
    )
    assert gone(orphan)
    assert losses_of(tmp_path) == pytest.approx(losses, rel=1e-5)


def test_a_request_to_any_launcher_stops_all_after_a_checkpoint_and_a_lost_leader_ends_the_run(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    hosts = start(path)
    until_step(hosts, tmp_path, 5)
    assert hosts[1].process.pid is not None
    os.kill(hosts[1].process.pid, signal.SIGUSR1)
    for status, _, errors in ended(hosts):
        assert status == 75
        assert re.fullmatch(r"stopped by SIGUSR1 after step \d+; its checkpoint is .*\n", errors)

    hosts = start(path)
    stopped_at = max(int(place.name[5:]) for place in (tmp_path / "run/checkpoints").iterdir())
    until_step(hosts, tmp_path, stopped_at + 5 - stopped_at % 5)
    orphans = [worker_of(host) for host in hosts]
    hosts[0].process.kill()
    _, (status, _, errors) = ended(hosts)
    assert status == 5
    # Before it stands what torch says where it was imported before the launcher could silence it (`test_meeting`).
    assert errors.splitlines()[-1].startswith("error: host 0 "), errors
    assert all(map(gone, orphans))
