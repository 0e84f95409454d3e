"""Document attention on the device against the same documents on a CPU in fp32."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from understudy.devices.attention import AttentionRule, Documents
from understudy.devices.cpu import CPU
from understudy.devices.device import Device
from understudy.models.attention import register_attention

pytestmark = pytest.mark.device

LENGTHS = (70, 1, 200, 33)
OFFSETS = torch.tensor([0, 70, 71, 271, 304], dtype=torch.int32)
HEADS, WIDTH = 8, 64
SCALE = WIDTH**-0.5
RULES = {
    "plain": AttentionRule(scale=SCALE),
    "window": AttentionRule(scale=SCALE, window=16),
    "softcap": AttentionRule(scale=SCALE, softcap=2.0),
    "softcap and window": AttentionRule(scale=SCALE, softcap=2.0, window=16),
    "sinks": AttentionRule(scale=SCALE, sinks=torch.linspace(-1.0, 1.0, HEADS)),
}
# Relative to the largest value: inputs are rounded alike on both sides, products and weights on the device only.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def make_inputs(kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value and the gradient of the output, rounded to `dtype`, in fp32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(HEADS, sum(LENGTHS)), (kv_heads, sum(LENGTHS)), (kv_heads, sum(LENGTHS)), (sum(LENGTHS), HEADS)]
    return [torch.randn(1, *shape, WIDTH, generator=generator).to(dtype).float() for shape in shapes]


def attend(device: Device, where: torch.device, inputs: list[Tensor], rule: AttentionRule, kind: str) -> list[Tensor]:
    """Output and gradients of query, key and value."""
    function = AttentionInterface()[register_attention(kind, device)]  # type: ignore[arg-type]
    *leaves, direction = (tensor.to(where) for tensor in inputs)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    output, _ = function(
        nn.Module(),
        *leaves,
        None,
        scaling=rule.scale,
        sliding_window=rule.window,
        softcap=rule.softcap,
        s_aux=rule.sinks,
        documents=Documents.of(OFFSETS, where),
    )
    return [output.detach(), *torch.autograd.grad(output, leaves, direction)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kv_heads", [HEADS, 2], ids=["full", "grouped"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("kind", ["auto", "sdpa", "eager"])
def test_attention_equals_the_cpus(
    device: Device,
    here: torch.device,
    kind: Literal["auto", "sdpa", "eager"],
    rule: AttentionRule,
    kv_heads: int,
    dtype: torch.dtype,
) -> None:
    inputs = make_inputs(kv_heads, dtype)
    expected = attend(CPU(), torch.device("cpu"), inputs, rule, "eager")
    moved = replace(rule, sinks=None if rule.sinks is None else rule.sinks.to(here, dtype))
    seen = attend(device, here, [tensor.to(dtype) for tensor in inputs], moved, kind)
    for ours, theirs in zip(seen, expected):
        assert ours.dtype == dtype
        difference = (ours.float().cpu() - theirs).abs().max()
        assert difference <= TOLERANCE[dtype] * theirs.abs().max()


def test_half_precision_without_a_soft_cap_runs_in_the_devices_own_kernel(device: Device, here: torch.device) -> None:
    assert device.attention is not None
    query = torch.zeros(4, HEADS, WIDTH, device=here, dtype=torch.bfloat16)
    assert device.attention.supports(query, query, RULES["plain"])
    assert device.attention.supports(query, query, RULES["window"])
    assert not device.attention.supports(query, query, RULES["softcap"])
    assert not device.attention.supports(query.float(), query.float(), RULES["plain"])
