"""The devices that PyTorch can use: which they are, and that each computes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from understudy.diagnosis.check import Finding, Host, broken, check, ok, warning
from understudy.diagnosis.sizes import shown

if TYPE_CHECKING:
    import torch

    from understudy.devices.device import Device, DeviceDescription

BUSY_SHARE = 0.1
"""More of a device's memory than this in use before a run begins is somebody else's work."""
SMALLEST, LARGEST = 256, 8192
MEASURED_SECONDS = 0.05
ROUNDING = 0.02
"""Relative to the largest value; a product of bf16 numbers, added up in fp32 or better, is rounded to 2⁻⁸."""
FAILS = "See what the vendor's tool (`nvidia-smi`, `npu-smi`) says of the devices; restart the machine if it hangs too."


@check("devices", seconds=120, if_lost=FAILS)
def devices(host: Host) -> Finding:
    from understudy.devices.device import find_device
    from understudy.devices.obstacle import find_obstacle

    expected = host.machine.devices
    device = find_device()
    if device.name == "cpu" and expected:
        obstacle = find_obstacle(host.root)
        return broken(
            f"{expected} accelerators are there, but {obstacle.found}", obstacle.fix, count=0, present=expected
        )
    described = device.describe()
    found = f"{_listed(described)}; {device.software()}"
    details = {
        "kind": device.name,
        "software": device.software(),
        "devices": [
            {"name": each.name, "total_bytes": each.total_bytes, "free_bytes": each.free_bytes} for each in described
        ],
    }
    if not host.machine.accelerated:
        return ok(f"no accelerator, so all runs on the processor: {found}", **details)
    if len(described) < expected:
        fix = "See whether the vendor's tool shows all of them; a device that fell off the bus needs a restart."
        return broken(f"PyTorch opens {len(described)} of {expected}: {found}", fix, **details)
    busy = [index for index, each in enumerate(described) if each.free_bytes < (1 - BUSY_SHARE) * each.total_bytes]
    if busy:
        used = ", ".join(f"{i} ({shown(described[i].total_bytes - described[i].free_bytes)})" for i in busy)
        fix = "End the processes that the vendor's tool shows there, or leave these devices out."
        return warning(f"{found}; memory is in use on {used}", fix, **details)
    return ok(found, **details)


@check("matrix-product", seconds=120, alone=True, if_lost=FAILS)
def matrix_product(host: Host) -> Finding:
    """In bf16, on every device, against fp32 on the processor."""
    import torch

    from understudy.devices.device import find_device

    device = find_device()
    rates = []
    for index in range(max(1, host.machine.devices) if device.name != "cpu" else 1):
        where = device.torch_device(index)
        if (error := _error(where)) > ROUNDING:
            return broken(
                f"device {index} computes wrong results (off by {error:.1%} of the largest)",
                "Do not train on it: leave it out, and have it tested by its vendor's tools.",
                device=index,
            )
        rates.append(_rate(device, where))
    found = f"right; {min(rates) / 1e12:,.1f} TFLOP/s" + (f" or more on each of {len(rates)}" if len(rates) > 1 else "")
    details = {"flops_per_second": rates}
    if torch.bfloat16 not in device.compute_dtypes:
        fix = "Set `training.precision: fp16`, for which the device has fast units."
        return warning(f"{found}, but the device only imitates bf16", fix, **details)
    return ok(f"bf16 is {found}", **details)


def _listed(described: tuple[DeviceDescription, ...]) -> str:
    """Equal ones once, with how many there are: `8 × NVIDIA A100, 80 GiB each`."""
    counts: dict[tuple[str, int], int] = {}
    for each in described:
        counts[each.name, each.total_bytes] = counts.get((each.name, each.total_bytes), 0) + 1
    return " and ".join(
        f"{f'{count} × ' if count > 1 else ''}{name}, {shown(size)}{' each' if count > 1 else ''}"
        for (name, size), count in counts.items()
    )


def _error(where: torch.device) -> float:
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(SMALLEST, SMALLEST, generator=generator).bfloat16() for _ in range(2))
    expected = left.float() @ right.float()
    computed = (left.to(where) @ right.to(where)).cpu().float()
    return float((computed - expected).abs().max() / expected.abs().max())


def _rate(device: Device, where: torch.device) -> float:
    """Floating-point operations a second, in products as large as take long enough to be measured."""
    import torch

    size = SMALLEST
    while True:
        left = torch.ones(size, size, dtype=torch.bfloat16, device=where)
        left @ left  # the first one may choose a kernel
        device.synchronize()
        began = time.monotonic()
        left @ left
        device.synchronize()
        seconds = time.monotonic() - began
        if seconds > MEASURED_SECONDS or size >= LARGEST:
            return 2 * size**3 / seconds
        size *= 2
