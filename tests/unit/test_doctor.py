"""`understudy doctor`: each fault that is planted gives its status and a fix, and takes no other check down with it."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch import Tensor

from understudy.cli.main import exit_status
from understudy.devices import obstacle
from understudy.devices.attention import AttentionRule, Documents
from understudy.devices.build_failures import OperatorBuildError
from understudy.diagnosis import runner
from understudy.diagnosis.check import CHECKS, Check, Finding, Host, all_of, broken, ok, warning
from understudy.diagnosis.checks import (
    collectives,
    devices,
    disk,
    hub,
    kernels,
    launching,
    limits,
    memory,
    operators,
    shadowing,
    threads,
    versions,
)
from understudy.diagnosis.pairs import pair_rounds
from understudy.diagnosis.registry import all_checks, checks_named
from understudy.diagnosis.runner import Result, run_checks
from understudy.errors import UserError
from understudy.launch.run_directory import RunDirectory
from understudy.strategies import compiled_operators, deepspeed

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
HOST = Host()


def host_with(root: Path, files: dict[str, str]) -> Host:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return Host(root)


def named(name: str) -> Check:
    [found] = checks_named([name])
    return found


# What runs them.


def test_a_check_that_hangs_is_ended_by_its_limit_and_the_others_go_on() -> None:
    hanging = replace(named("temporary-directory"), seconds=0.01, if_lost="Do this.")
    found = {result.name: result.finding for result in run_checks([hanging, named("python")], HOST)}
    assert found["python"].status == "ok"
    assert found["temporary-directory"].status == "broken"
    assert "not over after" in found["temporary-directory"].found
    assert found["temporary-directory"].fix == "Do this."


def test_a_check_that_crashes_is_a_finding_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crashing = tmp_path / "crashing"
    crashing.write_text("#!/bin/sh\necho loading\necho 'cannot open device' >&2\nkill -ILL $$\n")
    crashing.chmod(0o755)
    monkeypatch.setattr(runner.sys, "executable", str(crashing))
    [result] = run_checks([replace(named("devices"), lost_is="warning")], HOST)
    assert result.finding.status == "warning"
    assert "SIGILL" in result.finding.found
    assert "cannot open device" in result.finding.found


def test_where_no_process_can_be_started_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.sys, "executable", "/nowhere/python")
    found = {
        result.name: result.finding for result in run_checks([named("hub"), named("devices"), named("python")], HOST)
    }
    assert {name: finding.status for name, finding in found.items()} == {
        "python": "ok",
        "hub": "warning",
        "devices": "broken",
    }
    assert "no process can be started" in found["devices"].found


def test_what_a_check_raises_is_what_it_found() -> None:
    def fails(host: Host) -> Finding:
        raise ValueError("no such thing\nmore")

    [result] = run_checks([Check("fails", fails, None, False, "Look.", "broken")], HOST)
    assert (result.finding.status, result.finding.found, result.finding.fix) == (
        "broken",
        "ValueError: no such thing",
        "Look.",
    )


def test_no_process_of_a_check_outlives_the_one_who_asked() -> None:
    running = run_checks([named("temporary-directory"), named("python")], HOST)
    assert next(running).name == "python"
    running.close()
    done = subprocess.run(["ps", "-eo", "ppid=,args="], capture_output=True, text=True, check=True).stdout
    ours = [line for line in done.splitlines() if line.split()[0] == str(os.getpid()) and "diagnosis.child" in line]
    assert ours == []


def test_checks_have_names_of_their_own_and_say_what_to_do_when_they_are_lost() -> None:
    checks = all_checks()
    assert max(Counter(check.name for check in checks).values()) == 1
    assert all(check.if_lost.endswith(".") for check in checks)
    assert len(checks) == len(CHECKS) >= 25


def test_a_check_that_does_not_exist_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean collectives"):
        checks_named(["colectives"])


def test_the_worst_of_several_findings_comes_first_and_all_fixes_stay() -> None:
    whole = all_of([ok("a", one=1), warning("b", "Do b."), broken("c", "Do c.", two=2)])
    assert (whole.status, whole.found, whole.fix) == ("broken", "c; b; a", "Do c. Do b.")
    assert whole.details == {"one": 1, "two": 2}


# The command.


def show(monkeypatch: pytest.MonkeyPatch, *findings: Finding, arguments: tuple[str, ...] = ()) -> int:
    results = [Result(name, finding, 0.5) for name, finding in zip(("python", "torch", "numpy"), findings)]
    monkeypatch.setattr(runner, "run_checks", lambda checks, host, watch: iter(reversed(results)))
    return exit_status(["doctor", "--only", "python", "--only", "torch", "--only", "numpy", *arguments])


def test_lines_are_plain_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show(monkeypatch, ok("fine"), warning("so\x1b[2J", "Do [b]this[/b].")) == 0
    assert capsys.readouterr().out.splitlines() == [
        "warning  torch                so [2J → Do [b]this[/b].",
        "ok       python               fine",
        "warning: torch.",
    ]


def test_something_broken_is_status_1_and_the_json_says_which(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show(monkeypatch, ok("fine", a=1), broken("gone", "Get it."), warning("w", "f"), arguments=("--json",)) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["status"] == "broken"
    assert [(each["name"], each["status"], each["fix"]) for each in said["checks"]] == [
        ("python", "ok", None),
        ("torch", "broken", "Get it."),
        ("numpy", "warning", "f"),
    ]
    assert said["checks"][0]["details"] == {"a": 1}


def test_the_command_imports_neither_torch_nor_what_may_be_missing() -> None:
    script = """
import sys
BLOCKED = {"torch", "transformers", "numpy", "datasets", "deepspeed", "peft", "huggingface_hub", "httpx2", "tokenizers"}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} must not be imported here")
sys.meta_path.insert(0, Blocker())
from understudy.cli.main import exit_status
from understudy.diagnosis.registry import all_checks
names = [check.name for check in all_checks() if check.seconds is None]
sys.exit(exit_status(["doctor", "--json", *[word for name in names for word in ("--only", name)]]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["torch"]["status"] != "broken"
    assert not any("ImportError" in check["found"] for check in checks.values())


# Versions.


@contextmanager
def installed(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> Iterator[None]:
    """Inside, packages seem to be installed in other versions, or, with None, not at all."""
    real = metadata.version

    def version(name: str) -> str:
        if name in versions:
            if versions[name] is None:
                raise metadata.PackageNotFoundError(name)
            return str(versions[name])
        return real(name)

    with monkeypatch.context() as patch:
        patch.setattr(metadata, "version", version)
        yield


@pytest.mark.parametrize(
    ("name", "version", "status", "found", "fix"),
    [
        ("torch", "2.4.1+cu121", "broken", "2.4.1+cu121 is too old", "pip install --upgrade 'torch>=2.10'"),
        ("torch", None, "broken", "not installed", "pip install 'torch>=2.10'"),
        ("torch", "99.1", "warning", "newer than any that was tested", "pip install 'torch=="),
        ("torch", "2.10.0", "ok", "tested with", None),
        ("deepspeed", None, "warning", "zero0 to zero3", "pip install 'understudy[deepspeed]'"),
        ("peft", None, "warning", "LoRA", "pip install 'understudy[adapters]'"),
        ("bitsandbytes", "0.40.0", "broken", "too old", "pip install --upgrade 'bitsandbytes"),
        ("numpy", "1.20.0", "broken", "too old", "pip install --upgrade 'numpy"),
        ("deepspeed", "0.99.0", "warning", "newer", "pip install 'deepspeed=="),
    ],
)
def test_a_version_is_judged_by_what_is_needed_and_what_was_tested(
    name: str, version: str | None, status: str, found: str, fix: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with installed(monkeypatch, **{name: version}):
        finding = versions.package(name, HOST)
    assert finding.status == status
    assert found in finding.found
    assert finding.fix is None if fix is None else fix in (finding.fix or "")


def test_packages_without_a_line_of_their_own_are_missed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert versions.other_packages(HOST).status == "ok"
    with installed(monkeypatch, jinja2="3.0", safetensors=None):
        finding = versions.other_packages(HOST)
    assert finding.status == "broken"
    assert finding.details["wrong"] == ["safetensors>=0.5", "jinja2>=3.1.6"]
    assert "'jinja2>=3.1.6'" in (finding.fix or "")


def test_packages_that_disagree_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(monkeypatch, tokenizers="0.1.0"):
        finding = versions.package_conflicts(HOST)
    assert finding.status == "warning"
    assert any("transformers needs tokenizers" in conflict for conflict in finding.details["conflicts"])


def test_the_tested_versions_are_those_of_the_constraints() -> None:
    script = ROOT / "docs" / "make_tested_versions.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_package_that_is_asked_for_is_in_the_tested_set() -> None:
    missing = [name for name in versions.asked_for() if name != "tomli" and versions.tested_version(name) is None]
    assert missing == []


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
    assert named("hub").lost_is == "warning"


# Devices and kernels.


def test_accelerators_that_pytorch_cannot_use_are_broken_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(obstacle.torch.version, "cuda", None)
    finding = devices.devices(host_with(tmp_path / "gpu", {"dev/nvidia0": "", "dev/nvidia1": ""}))
    assert finding.status == "broken"
    assert finding.found.startswith("2 accelerators are there, but this PyTorch")
    finding = devices.devices(host_with(tmp_path / "npu", {"dev/davinci0": ""}))
    assert "torch_npu is not installed" in finding.found


def test_a_machine_without_accelerators_is_fine() -> None:
    finding = devices.devices(HOST)
    assert finding.status == "ok"
    assert "runs on the processor" in finding.found


def test_a_product_that_comes_out_wrong_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "LARGEST", devices.SMALLEST)
    assert devices.matrix_product(HOST).status == "ok"
    monkeypatch.setattr(devices, "ROUNDING", 0.0)
    finding = devices.matrix_product(HOST)
    assert finding.status == "broken"
    assert "device 0" in finding.found


class Kernel:
    """Attention that may be wrong, or not for this device."""

    def __init__(self, factor: float = 1.0, supported: bool = True) -> None:
        self.factor = factor
        self.supported = supported

    def supports(self, query: Tensor, value: Tensor, rule: AttentionRule) -> bool:
        return self.supported

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents, rule: AttentionRule) -> Tensor:
        key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query.double(), key.double()) * rule.scale
        document = torch.repeat_interleave(torch.tensor(documents.lengths))
        seen = (document[:, None] == document[None]) & torch.ones_like(scores[0], dtype=torch.bool).tril()
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return (torch.einsum("hqk,khd->qhd", weights, value.double()) * self.factor).to(query.dtype)


@pytest.mark.parametrize(
    ("kernel", "status", "said"),
    [
        (Kernel(), "ok", "works"),
        (Kernel(1.1), "broken", "wrong"),
        (Kernel(supported=False), "ok", "not for this device"),
    ],
)
def test_an_attention_kernel_is_compared_with_attention_in_fp32(kernel: Kernel, status: str, said: str) -> None:
    finding = kernels._attention(kernel, torch.device("cpu"), "it", "Set sdpa.")
    assert finding.status == status
    assert said in finding.found


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    finding = kernels.compiles(HOST)
    assert finding.status == "warning"
    assert "there is no compiler" in finding.found
    assert "training.compile" in (finding.fix or "")


# DeepSpeed's operators.


class FakeAccelerator:
    def device_name(self) -> str:
        return "cpu"


class FakeDeepSpeed:
    class accelerator:  # noqa: N801  # the name of DeepSpeed's module
        get_accelerator = FakeAccelerator


@pytest.mark.parametrize(
    ("problem", "said", "fix"),
    [
        (RuntimeError("Error building extension 'cpu_adam'\n/bin/sh: 1: c++: not found"), "c++: not found", "g++"),
        (RuntimeError("Ninja is required to load C++ extensions"), "Ninja", "pip install ninja"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left", "Free some space"),
    ],
)
def test_an_operator_that_cannot_be_built_says_why(
    problem: Exception, said: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(accelerator: object, builders: list[str]) -> None:
        assert builders == ["ShareMemCommBuilder", "CPUAdamBuilder"]
        raise OperatorBuildError("cpu_adam", problem, Path("/cache"))

    monkeypatch.setattr(deepspeed, "import_deepspeed", FakeDeepSpeed)
    monkeypatch.setattr(compiled_operators, "build_operators", build)
    finding = operators.compiled_operators(HOST)
    assert finding.status == "broken"
    assert said in finding.found
    assert "ds_opt_adam" not in finding.found
    assert fix in (finding.fix or "")
    assert "ddp and fsdp work" in (finding.fix or "")


def test_an_operator_that_computes_otherwise_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(deepspeed, "import_deepspeed", FakeDeepSpeed)
    monkeypatch.setattr(compiled_operators, "build_operators", lambda *_: None)
    for difference, status in ((1e-3, "broken"), (float("nan"), "broken"), (1e-8, "ok")):
        monkeypatch.setattr(operators, "_difference_from_adamw", lambda difference=difference: difference)
        finding = operators.compiled_operators(HOST)
        assert finding.status == status
        assert (str(tmp_path) in (finding.fix or "")) == (status == "broken")


def test_without_deepspeed_there_is_nothing_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(monkeypatch, deepspeed=None):
        finding = operators.compiled_operators(HOST)
    assert finding.status == "warning"
    assert "zero0 to zero3" in finding.found


# Collectives, by processes without torch.

WORKER = """
import os, signal, sys, time
from pathlib import Path
from understudy.diagnosis.progress import Progress
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
everyone, progress = tuple(range(size)), Progress(Path(sys.argv[1]), int(os.environ["RANK"]))
with progress.step("meeting", everyone): pass
def reduce(name, members, right=True, rate=1e9):
    with progress.step(name, members) as outcome: outcome.right, outcome.bytes_per_second = right, rate
def hang(name, members):
    with progress.step(name, members): time.sleep(600)
"""


def tried(tmp_path: Path, body: str, processes: int = 3, seconds: float = 30.0) -> Finding:
    worker = (sys.executable, "-c", WORKER + body)
    return collectives.try_collectives(
        worker, processes, RunDirectory(tmp_path), 2, accelerated=False, fix="Do this.", seconds=seconds
    )


def test_a_collective_that_hangs_is_ended_by_the_limit_and_the_pair_is_named(tmp_path: Path) -> None:
    body = """
if rank == 0: reduce("pair 0–1", (0, 1))
if rank == 1: reduce("pair 0–1", (0, 1))
if rank: hang("pair 1–2", (1, 2))
else: hang("all-reduce", everyone)
"""
    finding = tried(tmp_path, body, seconds=2.0)  # it would be ten minutes
    assert (finding.status, finding.fix) == ("broken", "Do this.")
    assert finding.found == "pair 1–2: not over after 2 s"
    done = subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in done


def test_a_process_that_does_not_arrive_is_named(tmp_path: Path) -> None:
    body = "time.sleep(600) if rank == 2 else hang('all-reduce', everyone)"
    finding = tried(tmp_path, body, seconds=2.0)
    assert finding.found == "all-reduce: rank 2 did not get there, not over after 2 s"


def test_a_process_that_vanishes_is_named_with_how(tmp_path: Path) -> None:
    body = "os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else hang('all-reduce', everyone)"
    finding = tried(tmp_path, body)
    assert finding.status == "broken"
    assert finding.found.startswith("all-reduce: rank 1 did not get there, rank 1 was killed by SIGKILL")
    assert str(tmp_path) not in finding.found


def test_wrong_results_are_broken_and_right_ones_told_with_their_rates(tmp_path: Path) -> None:
    right = """
if rank < 2: reduce("pair 0–1", (0, 1), rate=2.0**30 * (rank + 1))
if rank: reduce("pair 1–2", (1, 2), rate=2.0**32)
reduce("all-reduce", everyone, rate=2.0**31)
"""
    (tmp_path / "right").mkdir()
    finding = tried(tmp_path / "right", right)
    assert finding.status == "ok"
    assert finding.found == ("3 processes: all-reduce 2 GiB/s; 2 pairs, from 1 GiB/s (pair 0–1) to 4 GiB/s (pair 1–2)")
    (tmp_path / "wrong").mkdir()
    finding = tried(tmp_path / "wrong", "reduce('pair 0–2', (0, 2), right=rank != 2)")
    assert (finding.status, finding.found) == ("broken", "wrong results: pair 0–2")


def test_more_processes_than_accelerators_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    host = replace(host_with(tmp_path, {"dev/nvidia0": ""}), processes=2)
    with pytest.raises(UserError, match="2 processes do not fit on 1"):
        collectives.collectives(host)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_every_pair_comes_once_and_no_process_twice_a_round(size: int) -> None:
    rounds = pair_rounds(size)
    assert Counter(pair for pairs in rounds for pair in pairs) == Counter(
        (a, b) for a in range(size) for b in range(a + 1, size)
    )
    for pairs in rounds:
        assert max(Counter(rank for pair in pairs for rank in pair).values(), default=0) <= 1
