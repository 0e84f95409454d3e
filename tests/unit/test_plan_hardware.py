"""The catalogue of accelerators, and how a machine is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from understudy.devices.detect import accelerator_name
from understudy.errors import UserError
from understudy.plan.hardware.catalogue import accelerators, bytes_of, links
from understudy.plan.hardware.hardware import local_hardware, parse_hardware

pytestmark = pytest.mark.unit

GIB = 2**30
ASKED_FOR = ["A10", "A100-40GB", "A100-80GB", "H100", "H200", "B200", "L4", "L40S", "T4", "V100-16GB", "V100-32GB"]
ASKED_FOR += ["RTX-3090", "RTX-4090", "RTX-5090", "MI300X", "910B-32GB", "910B-64GB", "910C"]


@pytest.mark.parametrize("name", ASKED_FOR)
def test_every_accelerator_is_there_with_numbers_that_can_be_and_a_source(name: str) -> None:
    one = accelerators()[name]
    assert one.source.startswith("https://")
    assert 0.9 * one.device_bytes <= one.usable_bytes <= one.device_bytes
    assert 0 < one.context_bytes < 2 * GIB
    assert 0 < one.fp32 < one.fp16
    assert one.bf16 in (0.0, one.fp16)
    assert (one.bf16 == 0.0) == (name[:2] in ("T4", "V1"))
    assert 20 < one.fp16 / one.memory_bandwidth < 500  # operations a byte
    assert one.host_link.bandwidth <= one.link.bandwidth <= one.memory_bandwidth
    assert 0.3 < one.matmul < 0.9


def test_every_link_is_there_with_a_source() -> None:
    families = ("NVLink", "PCIe", "RoCE", "IB", "EFA", "HCCS")
    assert all(any(name.startswith(family) for name in links()) for family in families)
    for link in links().values():
        assert link.source.startswith(("https://", "measured"))
        assert 0 < link.efficiency < 1
        assert link.latency < 1e-3
        assert link.reached < link.bandwidth


@pytest.mark.parametrize(
    ("text", "name", "devices"),
    [
        ("8xA100-80GB", "A100-80GB", 8),
        ("4x910B-64GB", "910B-64GB", 4),
        ("H100", "H100", 1),
        ("2 × a100 40gb", "A100-40GB", 2),
        ("4*rtx4090", "RTX-4090", 4),
        # As drivers say it.
        ("NVIDIA A100-SXM4-80GB", "A100-80GB", 1),
        ("NVIDIA H100 80GB HBM3", "H100", 1),
        ("NVIDIA GeForce RTX 3090", "RTX-3090", 1),
        ("Tesla T4", "T4", 1),
        ("Tesla V100-SXM2-32GB", "V100-32GB", 1),
        ("AMD Instinct MI300X", "MI300X", 1),
        ("910B3", "910B-64GB", 1),
    ],
)
def test_a_machine_is_named_as_people_and_drivers_name_it(text: str, name: str, devices: int) -> None:
    found = parse_hardware(text)
    assert (found.name, found.devices) == (name, devices)


def test_processors_hosts_and_links_can_be_said() -> None:
    processor = parse_hardware("cpu:24GiB", processes=2)
    assert (processor.devices, processor.accelerator.usable_bytes, processor.host_bytes) == (2, 24 * GIB, 48 * GIB)
    assert not processor.accelerated
    cluster = parse_hardware("8xH100@efa", nodes=4)
    assert (cluster.devices, cluster.network.name) == (32, "EFA")
    assert cluster.described() == "32 × H100 on 4 hosts"
    assert parse_hardware("H100", processes=3).devices == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("8xA101-80GB", "did you mean A100-80GB?"),
        ("8xA100", "did you mean A100-40GB or A100-80GB?"),
        ("H10", "did you mean H100?"),
        ("rtx 4080", "RTX-4090"),
        ("910D", "910C"),
        ("abacus", "it has A10, "),
        ("cpu", "write cpu:24GiB"),
        ("cpu:plenty", "write cpu:24GiB"),
        ("0xA10", "1 to 1024"),
        ("2000xA10", "1 to 1024"),
        ("8xH100@EFS", "did you mean EFA?"),
        ("8xH100@string", "it has IB-200, "),
        ("", "it has A10, "),
    ],
)
def test_what_is_not_in_the_catalogue_is_answered_with_the_nearest(text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_hardware(text)
    assert said in caught.value.message


def test_this_machine_is_its_devices_or_its_processor() -> None:
    held = local_hardware("NVIDIA A100-SXM4-40GB", 8, int(39.4 * GIB), 900 * GIB, 64, None)
    assert (held.name, held.devices, held.host_bytes) == ("A100-40GB", 8, 900 * GIB)
    # A driver's name that says no size: memory decides.
    assert local_hardware("A100", 2, 79 * GIB, 0, 64, None).name == "A100-80GB"
    # Some of the devices are in use by others, or are left out by the recipe.
    assert local_hardware("NVIDIA L4", 4, 10 * GIB, 0, 8, 2).devices == 2
    assert local_hardware("NVIDIA L4", 4, 10 * GIB, 0, 8, 2).accelerator.usable_bytes == 10 * GIB
    unknown = local_hardware("Acme X1", 1, 30 * GIB, 0, 8, None)
    assert (unknown.name, unknown.accelerator.device_bytes) == ("Acme X1", 30 * GIB)
    processor = local_hardware("", 0, 0, 8 * GIB, 4, 2)
    assert (processor.name, processor.devices, processor.accelerator.usable_bytes) == ("cpu", 2, 4 * GIB)


def test_a_machine_without_accelerators_has_no_name(tmp_path: Path) -> None:
    assert accelerator_name(tmp_path) == ""


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * GIB), ("24GB", 24 * 10**9), ("1.5 tib", 1.5 * 2**40), ("512", 512), ("x", None), ("5 miles", None)],
)
def test_sizes(text: str, size: int | None) -> None:
    assert bytes_of(text) == size
