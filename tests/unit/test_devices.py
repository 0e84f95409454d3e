"""What a machine has, and what a CPU answers."""

from __future__ import annotations

from mmap import PAGESIZE, mmap
from pathlib import Path

import pytest
import torch

from understudy.devices.cpu import CPU
from understudy.devices.detect import detect_machine, hidden_devices
from understudy.devices.host_memory import memory_limit_bytes

pytestmark = pytest.mark.unit


def test_the_memory_peak_follows_what_was_held_and_can_be_reset() -> None:
    device = CPU()
    device.reset_memory_peak()
    before = device.memory_peak_bytes()
    with mmap(-1, 2**26) as held:  # an allocator could give what it holds already
        for page in range(0, len(held), PAGESIZE):
            held[page] = 1
        raised = device.memory_peak_bytes()
        assert raised >= before + len(held) // 2
    device.reset_memory_peak()
    assert device.memory_peak_bytes() < raised


def test_a_seed_decides_every_draw() -> None:
    device = CPU()
    device.seed(5)
    first = torch.rand(3)
    device.seed(5)
    assert torch.equal(torch.rand(3), first)


@pytest.mark.parametrize(
    ("visible", "devices"), [(None, 4), ("0,2", 2), ("", 0), ("-1", 0), ("0,9,1", 1), ("GPU-1f2e,GPU-3a4b", 2)]
)
def test_gpus_are_counted_less_those_hidden(
    visible: str | None, devices: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    machine = detect_machine(tmp_path)
    assert (machine.devices, machine.accelerated) == (devices, devices > 0)
    assert hidden_devices(tmp_path) == ({} if devices == 4 else {"CUDA_VISIBLE_DEVICES": 4 - devices})


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limits_bound_cores_and_memory(version: int, tmp_path: Path) -> None:
    files = {
        1: {
            "cpu/cpu.cfs_quota_us": "100000",
            "cpu/cpu.cfs_period_us": "100000",
            "memory/memory.limit_in_bytes": "4096",
        },
        2: {"cpu.max": "100000 100000", "memory.max": "4096"},
    }
    for name, text in files[version].items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    machine = detect_machine(tmp_path)
    assert (machine.devices, machine.cores, machine.device_bytes) == (0, 1, 4096)


@pytest.mark.parametrize(
    ("groups", "limits", "lowest"),
    [
        ("0::/batch/job_7/step_0\n", {"batch/memory.max": "max", "batch/job_7/memory.max": "4096"}, 4096),
        ("0::/batch/job_7\n", {"batch/memory.max": "4096", "batch/job_7/memory.max": "8192"}, 4096),
        ("5:memory,hugetlb:/job_7\n0::/\n", {"memory/job_7/memory.limit_in_bytes": "4096"}, 4096),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("", {}, None),
    ],
)
def test_a_batch_systems_limit_on_memory_is_found_in_the_group_it_is_set_on(
    groups: str, limits: dict[str, str], lowest: int | None, tmp_path: Path
) -> None:
    for name, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{k}": v for k, v in limits.items()}}.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert memory_limit_bytes(tmp_path) == lowest
