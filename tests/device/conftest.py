"""What is under test is whatever accelerator this machine has; without one everything here is skipped."""

from __future__ import annotations

import pytest
import torch

from understudy.devices.device import Device, find_device


@pytest.fixture(scope="session")
def device() -> Device:
    found = find_device()
    if found.name == "cpu":
        pytest.skip("this machine has no accelerator that PyTorch can use")
    return found


@pytest.fixture(scope="session")
def here(device: Device) -> torch.device:
    """The accelerator's first device, made current."""
    return device.torch_device(0)
