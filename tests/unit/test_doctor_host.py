"""`understudy doctor` on hosts with faults: each one gives its status and a fix."""

from __future__ import annotations

import errno
import json
import os
import resource
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tests.planted_faults import HOST, host_with
from understudy.diagnosis.check import Host
from understudy.diagnosis.checks import (
    disk,
    hub,
    launching,
    limits,
    memory,
    shadowing,
    threads,
)
from understudy.diagnosis.registry import checks_named

pytestmark = pytest.mark.unit


# Limits of the system.


@pytest.mark.parametrize(("limit", "status"), [(200, "broken"), (600, "warning"), (4096, "ok")])
def test_few_open_files_are_told_before_they_run_out(limit: int, status: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        finding = limits.open_files(HOST)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert finding.status == status
    assert f"{limit:,}" in finding.found
    assert (finding.fix is None) == (status == "ok")


def test_a_network_card_needs_memory_that_may_be_locked(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, hard))
    try:
        assert limits.locked_memory(Host(tmp_path)).status == "ok"
        finding = limits.locked_memory(host_with(tmp_path, {"sys/class/infiniband/mlx5_0/name": ""}))
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))
    assert finding.status == "warning"
    assert "64 KiB" in finding.found
    assert "ulimit -l" in (finding.fix or "")


@pytest.mark.parametrize(
    ("most", "now", "status"), [("100", "60", "broken"), ("1000", "60", "warning"), ("max", "9", "ok")]
)
def test_a_control_groups_limit_on_processes_counts(most: str, now: str, status: str, tmp_path: Path) -> None:
    host = host_with(tmp_path, {"sys/fs/cgroup/pids.max": most, "sys/fs/cgroup/pids.current": now})
    finding = limits.process_limit(host)
    assert finding.status == status
    assert ("--pids-limit" in (finding.fix or "")) == (status != "ok")


@pytest.mark.parametrize(
    ("available_kb", "limit", "status", "said"),
    [
        (64 * 2**20, "max", "ok", "64 GiB"),
        (64 * 2**20, str(2**31), "warning", "2 GiB"),
        (300_000, "max", "broken", "free"),
    ],
)
def test_memory_is_what_host_and_control_group_leave(
    available_kb: int, limit: str, status: str, said: str, tmp_path: Path
) -> None:
    meminfo = f"MemTotal: {2**26} kB\nMemAvailable: {available_kb} kB\n"
    finding = memory.host_memory(host_with(tmp_path, {"proc/meminfo": meminfo, "sys/fs/cgroup/memory.max": limit}))
    assert finding.status == status
    assert said in finding.found


def test_shared_memory_is_missed_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = memory.shared_memory(Host(tmp_path))
    assert finding.status == "broken"
    (tmp_path / "dev/shm").mkdir(parents=True)
    monkeypatch.setattr(memory, "LITTLE_SHARED_BYTES", 2**62)
    finding = memory.shared_memory(Host(tmp_path))
    assert finding.status == "warning"
    assert "--shm-size" in (finding.fix or "")


@pytest.mark.parametrize(
    ("chosen", "status"), [(None, "ok"), ("1", "ok"), ("100000", "warning"), ("4,2", "broken"), ("0", "broken")]
)
def test_threads_are_held_against_cores(chosen: str | None, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if chosen is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    finding = threads.threads(HOST)
    assert finding.status == status
    assert ("OMP_NUM_THREADS" in (finding.fix or "")) == (status != "ok")


# Disks.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(disk, "LITTLE_BYTES", 0)
    monkeypatch.setattr(disk, "LEAST_BYTES", 0)
    monkeypatch.setattr(disk, "SLOW_BYTES_PER_SECOND", 0)
    monkeypatch.setattr(disk, "SLOW_SYNC_SECONDS", 1000)
    monkeypatch.setattr(disk, "WRITTEN_BYTES", 2**20)
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "not" / "there"))
    return tmp_path


def test_a_cache_that_is_not_there_yet_is_tried_where_it_will_be_and_nothing_stays(cache: Path) -> None:
    finding = disk.cache(HOST)
    assert finding.status == "ok"
    assert str(cache / "not" / "there") in finding.found
    assert list(cache.iterdir()) == []


def test_a_cache_under_a_file_cannot_be_written(cache: Path) -> None:
    (cache / "not").touch()
    finding = disk.cache(HOST)
    assert finding.status == "broken"
    assert "UNDERSTUDY_CACHE" in (finding.fix or "")


@pytest.mark.parametrize(
    ("number", "cache_status", "working_status", "said"),
    [
        (errno.EROFS, "broken", "warning", "Read-only file system"),
        (errno.EACCES, "broken", "warning", "Permission denied"),
        (errno.ENOSPC, "broken", "broken", "no space is left"),
    ],
)
def test_a_directory_that_takes_nothing_is_told_with_where_else_to_go(
    number: int,
    cache_status: str,
    working_status: str,
    said: str,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(**_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    for finding, status, elsewhere in (
        (disk.cache(HOST), cache_status, "UNDERSTUDY_CACHE"),
        (disk.working(HOST), working_status, "output_dir"),
    ):
        assert finding.status == status
        assert said in finding.found
        assert elsewhere in (finding.fix or "")


@pytest.mark.parametrize(
    ("name", "value", "status", "said"),
    [
        ("LEAST_BYTES", 2**62, "broken", "free"),
        ("LITTLE_BYTES", 2**62, "warning", "free"),
        ("SLOW_BYTES_PER_SECOND", 2**62, "warning", "slow"),
        ("SLOW_SYNC_SECONDS", -1.0, "warning", "slow"),
    ],
)
def test_little_room_and_slow_disks_are_told(
    name: str, value: float, status: str, said: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, name, value)
    finding = disk.working(HOST)
    assert finding.status == status
    assert said in finding.found


def test_a_network_file_system_is_seen_by_the_mount_that_holds_the_directory(cache: Path) -> None:
    mounts = (
        "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        "30 22 0:41 / /home rw,relatime shared:9 - nfs4 server:/home rw\n"
        "31 30 8:2 / /home/fast rw - xfs /dev/sdb1 rw\n"
        f"32 22 0:43 / {cache} rw - nfs server:/cache rw\n"
    )
    host = host_with(cache / "root", {"proc/self/mountinfo": mounts})
    kinds = {
        path: disk.network_type(Path(path), host.root) for path in ("/home/me/x", "/home/fast/x", "/homework", "/")
    }
    assert kinds == {"/home/me/x": "nfs4", "/home/fast/x": None, "/homework": None, "/": None}
    finding = disk.cache(host)
    assert finding.status == "warning"
    assert "network file system (nfs)" in finding.found


# Variables.

PLACE = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("variables", "status", "said"),
    [
        ({}, "ok", "none"),
        (PLACE, "warning", "process 1 of 4"),
        ({**PLACE, "TORCHELASTIC_RUN_ID": "x"}, "ok", "process 1 of 4"),
        ({"RANK": "3"}, "warning", "RANK"),
        ({"RANK": "1", "WORLD_SIZE": "4"}, "broken", "MASTER_ADDR"),
        ({**PLACE, "RANK": "7"}, "broken", "outside"),
        ({**PLACE, "RANK": "one"}, "broken", "must be a number"),
        ({**PLACE, "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "2"}, "broken", "contradict"),
    ],
)
def test_a_launchers_variables_that_are_left_over_are_told(
    variables: dict[str, str], status: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*PLACE, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    finding = launching.launcher_variables_agree(HOST)
    assert finding.status == status
    assert said in finding.found
    assert ("unset RANK" in (finding.fix or "")) == (status != "ok")


def test_devices_that_are_hidden_and_debugging_that_was_forgotten_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launching.debugging(HOST).status == launching.devices_hidden(Host(tmp_path)).status == "ok"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    finding = launching.devices_hidden(host_with(tmp_path, {"dev/nvidia0": "", "dev/nvidia1": ""}))
    assert finding.status == "warning"
    assert "hides 2" in finding.found
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "detail")
    finding = launching.debugging(HOST)
    assert finding.status == "warning"
    assert "unset TORCH_DISTRIBUTED_DEBUG" in (finding.fix or "")


def test_a_file_called_like_a_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets").mkdir()  # without __init__.py it stands in for nothing
    assert shadowing.shadowed_modules(HOST).status == "ok"
    (tmp_path / "random.py").touch()
    finding = shadowing.shadowed_modules(HOST)
    assert finding.status == "warning"
    assert "random.py" in finding.found


# The Hub.

TOKEN = "hf_secret_that_nobody_sees"


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPServer]:
    """A Hub that refuses every token but TOKEN."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_GET(self) -> None:
            self.send_response(200 if self.headers["authorization"] == f"Bearer {TOKEN}" else 401)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("token", "status", "said"),
    [(None, "ok", "no access token"), (TOKEN, "ok", "accepted"), ("hf_old_secret", "warning", "refused")],
)
def test_a_token_is_tried_and_never_shown(
    token: str | None, status: str, said: str, endpoint: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    finding = hub.hub(HOST)
    assert finding.status == status
    assert said in finding.found
    assert "secret" not in json.dumps([finding.found, finding.fix, finding.details])


def test_a_hub_that_is_not_reached_is_only_a_warning(endpoint: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    finding = hub.hub(HOST)
    assert finding.status == "warning"
    assert "local directories work" in (finding.fix or "")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.hub(HOST).status == "ok"
    assert checks_named(["hub"])[0].lost_is == "warning"
