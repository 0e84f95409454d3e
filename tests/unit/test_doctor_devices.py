"""`understudy doctor` on devices, operators and collectives with faults: each one gives its status and a fix."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.planted_faults import HOST, host_with, installed
from understudy.devices import obstacle
from understudy.devices.attention import AttentionRule, Documents
from understudy.devices.build_failures import OperatorBuildError
from understudy.diagnosis.check import Finding
from understudy.diagnosis.checks import (
    collectives,
    devices,
    kernels,
    operators,
)
from understudy.diagnosis.pairs import pair_rounds
from understudy.errors import UserError
from understudy.launch.run_directory import RunDirectory
from understudy.recipe.environment import host_name
from understudy.strategies import compiled_operators, deepspeed

pytestmark = pytest.mark.unit


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
    name = f"rank 1 on {host_name()}"
    assert finding.found.startswith(f"all-reduce: rank 1 did not get there, {name} was killed by SIGKILL")
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


def test_more_processes_than_cores_can_start_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "try_collectives", lambda *given, **more: pytest.fail("they were started"))
    host = replace(host_with(tmp_path, {}), processes=100_000)
    with pytest.raises(UserError, match=r"100000 processes are too many .* give --processes at most \d+"):
        collectives.collectives(host)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_every_pair_comes_once_and_no_process_twice_a_round(size: int) -> None:
    rounds = pair_rounds(size)
    assert Counter(pair for pairs in rounds for pair in pairs) == Counter(
        (a, b) for a in range(size) for b in range(a + 1, size)
    )
    for pairs in rounds:
        assert max(Counter(rank for pair in pairs for rank in pair).values(), default=0) <= 1
