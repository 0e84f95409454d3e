"""The loss head on the device against the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from understudy.devices.device import Device
from understudy.models.head import LossHead
from understudy.objectives.causal_lm import CrossEntropy

pytestmark = pytest.mark.device

HIDDEN, VOCABULARY, ROWS = 64, 1000, 300


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_loss_and_gradients_equal_the_cpus(here: torch.device, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    reference = LossHead.replacing(nn.Linear(HIDDEN, VOCABULARY, bias=False).to(dtype).float())
    hidden = torch.randn(ROWS, HIDDEN).to(dtype).float()
    labels = torch.randint(VOCABULARY, (ROWS,))
    head = copy.deepcopy(reference).to(here, dtype)
    head.chunk_bytes = 4 * VOCABULARY * 64

    theirs, ours = hidden.clone().requires_grad_(), hidden.to(here, dtype).requires_grad_()
    expected, _ = reference(theirs, CrossEntropy(labels))
    loss, metrics = head(ours, CrossEntropy(labels.to(here)))
    expected.backward()
    loss.backward()

    assert (loss.dtype, metrics["correct"].device.type) == (torch.float32, here.type)
    assert float(loss) == pytest.approx(float(expected), rel=tolerance)
    for mine, exact in ((ours.grad, theirs.grad), (head.weight.grad, reference.weight.grad)):
        assert mine is not None
        assert exact is not None
        assert (mine.float().cpu() - exact).norm() <= tolerance * exact.norm()


def test_peak_memory_does_not_grow_with_tokens_times_vocabulary(device: Device, here: torch.device) -> None:
    """65,536 supervised tokens of a 65,536-token vocabulary: whole logits would be 16 GiB in fp32."""
    head = LossHead.replacing(nn.Linear(64, 65_536, bias=False, device=here, dtype=torch.bfloat16))
    hidden = torch.randn(65_536, 64, device=here, dtype=torch.bfloat16, requires_grad=True)
    device.reset_memory_peak()
    before = device.memory_peak_bytes()
    head(hidden, CrossEntropy(torch.zeros(65_536, dtype=torch.int64, device=here)))[0].backward()
    device.synchronize()
    assert device.memory_peak_bytes() - before < 2 * 2**30
