"""A launcher on each of three hosts: whatever is lost, all of them name the same first failure and its host."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from tests.distributed.faults import FAULTS, HANG_SECONDS, STEP, plant
from tests.distributed.forked import ForkedCommand, start_command
from tests.distributed.forking_python import enter
from tests.distributed.hosts import Hosts, hosts
from tests.distributed.small_run import environment, small_recipe, write
from understudy.checkpoint.store import CheckpointStore, verify_checkpoint

pytestmark = [pytest.mark.distributed, pytest.mark.matrix]

EXIT_SECONDS = 10.0
WAIT_SECONDS = 90.0
LOST = 5
LONG = 100_000


@pytest.fixture(scope="module")
def three_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with hosts(3, tmp_path_factory.mktemp("hosts")) as made:
        yield made


def start(
    made: Hosts,
    directory: Path,
    steps: int,
    *,
    fault: str | None = None,
    rank: int = 0,
    hang_seconds: float = HANG_SECONDS,
) -> list[ForkedCommand]:
    """`understudy train` on each host, with one process there."""
    recipe = small_recipe(directory)
    recipe |= {"evaluation": {}, "checkpoint": {"every": STEP - 1, "background": False}}
    recipe["cluster"] = {"processes": 1, "hang_seconds": hang_seconds}
    recipe["training"] |= {"max_steps": steps, "global_batch_size": 6, "out_of_memory_retries": 0}
    recipe["data"]["eval"] = None
    path = write(recipe, directory)
    place = {"NNODES": "3", "MASTER_ADDR": made[0].address, "MASTER_PORT": "29500"}
    started = []
    for node, server in enumerate(made.servers):
        scratch = directory / f"host-{node}"
        scratch.mkdir()
        variables = {**environment(directory), **place, "NODE_RANK": str(node)}
        prepare = partial(prepared, server, fault, rank, directory / "struck")
        started.append(start_command(["train", str(path)], variables, scratch, prepare=prepare))
    return started


def prepared(host: int, fault: str | None, rank: int, note: Path) -> None:
    enter(host)
    if fault is not None:
        plant(fault, rank, note)


def ended(made: Hosts, started: Sequence[ForkedCommand], status: int) -> list[str]:
    """Waits until all have ended so; nothing may run any more. What each said last, on standard error."""
    for command in started:
        command.process.join(WAIT_SECONDS)
    said = [command.errors.read_text() for command in started]
    assert [command.process.exitcode for command in started] == [status] * len(started), said
    assert made.left() == {}
    return [(errors.splitlines() or [""])[-1] for errors in said]


def check_checkpoints(directory: Path) -> None:
    committed = CheckpointStore(directory / "run" / "checkpoints").committed()
    assert committed
    for checkpoint in committed:
        verify_checkpoint(checkpoint)


@pytest.mark.parametrize("node", range(3))
def test_a_host_that_is_cut_off_is_named_and_all_end_within_seconds(
    node: int, three_hosts: Hosts, tmp_path: Path
) -> None:
    started = start(three_hosts, tmp_path, LONG, hang_seconds=600)
    deadline = time.monotonic() + WAIT_SECONDS
    while not list((tmp_path / "run" / "checkpoints").glob("*/COMMITTED")):
        assert time.monotonic() < deadline, [command.errors.read_text() for command in started]
        time.sleep(0.05)
    three_hosts[node].pull_cable()
    pulled = time.monotonic()
    try:
        said = ended(three_hosts, started, LOST)
        seconds = time.monotonic() - pulled
    finally:
        three_hosts.restore()
    names = [f"host {i} ({host.name})" for i, host in enumerate(three_hosts)]
    others = names[:node] + names[node + 1 :]
    down = "the host is down, or its network or launcher is gone"
    for i, (name, line) in enumerate(zip(names, said)):
        if node == 0:
            away = f"{names[0]}, where all hosts meet, no longer answers {name}"
            expected = f"{' and '.join(others)} no longer answer; {down}" if i == 0 else away
        elif i == node:
            expected = f"{names[0]}, where all hosts meet, no longer answers {name}"
        else:
            expected = f"{names[node]} no longer answers; {down}"
        assert line.startswith(f"error: {expected}; last collectives: "), line
    assert seconds < EXIT_SECONDS
    check_checkpoints(tmp_path)


@pytest.mark.parametrize("rank", range(3))
@pytest.mark.parametrize("fault", FAULTS)
def test_all_launchers_name_the_rank_and_its_host(fault: str, rank: int, three_hosts: Hosts, tmp_path: Path) -> None:
    started = start(three_hosts, tmp_path, STEP + 1, fault=fault, rank=rank)
    said = ended(three_hosts, started, FAULTS[fault].status)
    seconds = time.time() - float((tmp_path / "struck").read_text())
    expected = FAULTS[fault].line(rank, three_hosts[rank].name, seen=r"(?:after step \d|while training)")
    assert [line for line in said if not re.fullmatch(expected, line)] == []
    assert seconds < EXIT_SECONDS + (HANG_SECONDS if "no rank got on" in said[0] else 0.0)
    check_checkpoints(tmp_path)
