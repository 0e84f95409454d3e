"""What the device says of itself, and its kernels for the optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from understudy.devices.device import Device
from understudy.optim.optimizers.registry import make_optimizer
from understudy.recipe.schema import Optimizer

pytestmark = pytest.mark.device


def test_the_memory_peak_is_counted_from_its_reset(device: Device, here: torch.device) -> None:
    size = 256 * 2**20
    block = torch.empty(size, dtype=torch.uint8, device=here)
    device.reset_memory_peak()
    floor = device.memory_peak_bytes()
    more = torch.empty(2 * size, dtype=torch.uint8, device=here)
    peak = device.memory_peak_bytes()
    assert peak >= floor + 2 * size
    del more
    assert device.memory_peak_bytes() == peak
    assert block.numel() == size


def test_the_same_seed_draws_the_same(device: Device, here: torch.device) -> None:
    device.seed(5)
    first = torch.rand(8, device=here)
    device.seed(5)
    assert torch.equal(torch.rand(8, device=here), first)


def test_matrix_products_run_in_every_dtype_named(device: Device, here: torch.device) -> None:
    for dtype in device.compute_dtypes:
        product = torch.eye(16, device=here, dtype=dtype) @ torch.ones(16, 16, device=here, dtype=dtype)
        assert torch.equal(product.cpu(), torch.ones(16, 16, dtype=dtype))


def test_adamw_as_the_device_runs_it_steps_as_on_a_cpu(device: Device, here: torch.device) -> None:
    recipe = Optimizer(learning_rate=1e-2, weight_decay=0.1)
    torch.manual_seed(0)
    start, gradients = torch.randn(64, 32), torch.randn(5, 64, 32)
    stepped = []
    for where, fused in ((torch.device("cpu"), False), (here, device.fused_adamw)):
        weight = nn.Parameter(start.to(where, copy=True))
        optimizer = make_optimizer(recipe, [("layer.weight", weight)], fused=fused)
        for gradient in gradients:
            weight.grad = gradient.to(where)
            optimizer.step()
        stepped.append(weight.detach().cpu())
    torch.testing.assert_close(stepped[1], stepped[0], rtol=1e-5, atol=1e-6)
