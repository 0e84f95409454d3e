"""What hosts ask of one another before they run a job together."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_choosing import recipe_with
from understudy.errors import LostProcessError, UserError
from understudy.recipe.environment import HostEnvironment
from understudy.recipe.source_map import SourceMap
from understudy.training import meeting
from understudy.training.meeting import introduction, meet, require_alike, require_same_things

pytestmark = pytest.mark.unit


def told(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return introduction(recipe_with(tmp_path, **changes), 2)


def test_hosts_may_have_other_numbers_of_processes(tmp_path: Path) -> None:
    require_alike({0: told(tmp_path), 1: {**told(tmp_path, cluster={"processes": 4}), "processes": 4}})


def test_another_recipe_is_refused_by_its_first_key_and_host(tmp_path: Path) -> None:
    other = {**told(tmp_path, training={"seed": 7}), "name": "b"}
    with pytest.raises(UserError, match=r"training.seed is 7 on host 1 \(b\) but 42 on host 0 .*the same recipe"):
        require_alike({0: told(tmp_path), 1: other})


def test_another_release_is_refused(tmp_path: Path) -> None:
    ours = told(tmp_path)
    other = {**ours, "packages": {**ours["packages"], "torch": "1.0"}}
    with pytest.raises(UserError, match=r"^torch is 1.0 on host 1 .* install the same on all hosts"):
        require_alike({0: ours, 1: other})


def test_other_data_is_refused() -> None:
    ours = {"name": "a", "the training data": "x", "the model": "y"}
    require_same_things({0: ours, 1: {**ours, "name": "b"}})
    with pytest.raises(UserError, match=r"the training data of host 1 \(b\) are not those of host 0 \(a\)"):
        require_same_things({0: ours, 1: {**ours, "name": "b", "the training data": "z"}})


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        ({"nodes": 3}, "3 hosts, but the environment has NNODES=2"),
        ({"min_nodes": 3}, "3 hosts at least, but there are 2 at most"),
    ],
)
def test_a_recipe_for_another_number_of_hosts_is_refused(tmp_path: Path, cluster: dict[str, int], message: str) -> None:
    place = HostEnvironment(0, 2, None, "127.0.0.1", 1)
    with (
        pytest.raises(UserError, match=message),
        meet(place, recipe_with(tmp_path, cluster=cluster), SourceMap(), lambda _: None),
    ):
        pytest.fail("it should not have met")


def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        place = HostEnvironment(0, 2, None, "127.0.0.1", taken.getsockname()[1])
        with (
            pytest.raises(UserError, match=r"cannot be opened on this host .*choose another port"),
            meet(place, recipe_with(tmp_path), SourceMap(), lambda _: None),
        ):
            pytest.fail("it should not have met")


def test_a_first_host_that_does_not_come_is_waited_for_and_then_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "MEETING_SECONDS", 0.2)
    monkeypatch.setattr(meeting, "REMIND_SECONDS", 0.0)
    monkeypatch.setattr(meeting, "RETRY_SECONDS", 0.01)
    said: list[str] = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and does not listen
        place = HostEnvironment(1, 2, None, "127.0.0.1", free.getsockname()[1])
        with (
            pytest.raises(LostProcessError, match=r"the first host does not answer at 127.0.0.1:.*NODE_RANK=0"),
            meet(place, recipe_with(tmp_path), SourceMap(), said.append),
        ):
            pytest.fail("it should not have met")
    assert said[0].startswith("waiting for the first host at 127.0.0.1:")


def test_a_name_that_is_not_known_is_waited_for_and_then_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "NAMELESS_SECONDS", 0.2)
    monkeypatch.setattr(meeting, "RETRY_SECONDS", 0.01)
    place = HostEnvironment(1, 2, None, "no.such.host.invalid", 29500)
    with (
        pytest.raises(UserError, match=r"MASTER_ADDR=no.such.host.invalid is the name of no host that is known here"),
        meet(place, recipe_with(tmp_path), SourceMap(), lambda _: None),
    ):
        pytest.fail("it should not have met")


@pytest.mark.parametrize("address", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_that_does_not_lead_to_the_first_host_is_refused_there(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "REACH_SECONDS", 0.2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (
        pytest.raises(UserError, match=rf"NODE_RANK=0 is the first host, but MASTER_ADDR={address} does not lead to"),
        meet(HostEnvironment(0, 2, None, address, port), recipe_with(tmp_path), SourceMap(), lambda _: None),
    ):
        pytest.fail("it should not have met")


def test_a_service_that_never_answers_is_no_meeting_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "STORE_TIMEOUT", timedelta(seconds=0.5))
    monkeypatch.setattr(meeting, "REACH_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = HostEnvironment(1, 2, None, "127.0.0.1", silent.getsockname()[1])
        with (
            pytest.raises(LostProcessError, match=r"is no meeting place of this job \(what is there does not answer"),
            meet(place, recipe_with(tmp_path), SourceMap(), lambda _: None),
        ):
            pytest.fail("it should not have met")


CLIENT = """\
import sys
from datetime import timedelta
from understudy.errors import LostProcessError
from understudy.recipe.place import HostEnvironment
from understudy.training import meeting

port, foreign = map(int, sys.argv[1:])
store = meeting._open(HostEnvironment(1, 2, None, "127.0.0.1", port))
print("open", flush=True)
sys.stdin.readline()
try:
    store.set("key", "value")
    store.get("key")
except Exception:
    meeting.STORE_TIMEOUT = timedelta(seconds=0.2)
    try:
        meeting._open(HostEnvironment(1, 2, None, "127.0.0.1", foreign))
    except LostProcessError as error:
        print(error)
"""


def test_a_meeting_place_that_is_gone_or_another_s_is_no_trace_of_torch_s_own_code() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kept = meeting._open(HostEnvironment(0, 2, None, "127.0.0.1", port))
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with socket.create_server(("127.0.0.1", 0)) as another:
        threading.Thread(target=greet, args=(another,), daemon=True).start()
        arguments = [str(port), str(another.getsockname()[1])]
        with subprocess.Popen([sys.executable, "-c", CLIENT, *arguments], text=True, **pipes) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == "open\n"
            del kept
            said, errors = client.communicate("\n", timeout=60)
    assert errors == ""
    assert said.startswith(f"127.0.0.1:{arguments[1]} is no meeting place of this job (")
    assert "see that MASTER_ADDR and MASTER_PORT are the same on every host" in said


def greet(server: socket.socket) -> None:
    """As a service that is none of ours does, until it is closed."""
    with suppress(OSError):
        while True:
            connection, _ = server.accept()
            connection.sendall(b"220 example.org\r\n")
