"""Kernels that are faster than the ordinary ones: attention, 4-bit weights, compiled layers."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING

from understudy.diagnosis.check import Finding, Host, all_of, broken, check, ok, warning
from understudy.diagnosis.installed import installed_version

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from understudy.devices.attention import DocumentAttention

LENGTHS = (70, 1, 57)
"""Tokens of the documents that attention is tried on."""
HEADS, KV_HEADS, WIDTH = 4, 2, 64
ROUNDING = 0.02
COMPILED_ROUNDING = 1e-4
NO_COMPILER = "Install a C++ compiler, in most systems the package g++ or gcc-c++"


@check("attention-kernels", seconds=120, if_lost="Set `model.attention: sdpa`, which needs no special kernel.")
def attention_kernels(host: Host) -> Finding:
    """Those of PyTorch or the vendor, and of the flash-attn package, against attention in fp32 on the processor."""
    from understudy.devices.device import find_device

    device = find_device()
    where = device.torch_device(0)
    if device.attention is None and device.flash_attention is None:
        return ok("none for a processor; attention runs document by document, which `auto` chooses")
    findings = []
    if device.attention is not None:
        fix = "Set `model.attention: sdpa`."
        findings.append(_attention(device.attention, where, "the kernel that `auto` chooses", fix))
    if device.flash_attention is not None:
        fix = "Build flash-attn for this torch, or leave `model.attention` at auto."
        findings.append(_attention(device.flash_attention, where, "the flash-attn package", fix))
    return all_of(findings)


@check("4-bit-weights", seconds=120, if_lost="Reinstall it with `pip install --force-reinstall bitsandbytes`.")
def four_bit_weights(host: Host) -> Finding:
    """bitsandbytes' NF4 on the device: the error of a matrix taken there and back."""
    if installed_version("bitsandbytes") is None:
        fix = "Where you need it, run `pip install 'understudy[quantization]'`."
        return warning("bitsandbytes is not installed, so there is no QLoRA", fix)
    import torch

    from understudy.devices.device import find_device
    from understudy.models.quantization.bitsandbytes_package import bitsandbytes_functional

    functional = bitsandbytes_functional()
    matrix = torch.randn(128, 128, generator=torch.Generator().manual_seed(0)).to(find_device().torch_device(0))
    packed, state = functional.quantize_4bit(matrix, quant_type="nf4")
    error = float((functional.dequantize_4bit(packed, state) - matrix).norm() / matrix.norm())
    if not 0.0 < error < 0.2:  # of normal numbers, NF4 loses some 9 %
        return broken(f"NF4 loses {error:.0%} of a matrix", "Reinstall bitsandbytes for this device's software.")
    return ok("NF4 works here", relative_error=error)


@check(
    "compile",
    seconds=300,
    lost_is="warning",
    if_lost="Leave `training.compile` false, which is the default; see this check's details in `doctor --json`.",
)
def compiles(host: Host) -> Finding:
    """torch.compile of a small function, forward and backward. Only `training.compile: true` needs it."""
    import torch
    from torch.utils.cpp_extension import get_cxx_compiler

    from understudy.devices.device import find_device

    compiler = str(get_cxx_compiler())  # type: ignore[no-untyped-call]
    if shutil.which(compiler.split()[0]) is None:
        return warning(f"there is no compiler ({compiler})", f"{NO_COMPILER}, or leave `training.compile` false.")
    where = find_device().torch_device(0)
    start = torch.linspace(-2.0, 2.0, 1000, device=where)
    results = []
    for function in (_small, torch.compile(_small)):
        leaf = start.clone().requires_grad_()
        results.append(torch.autograd.grad(function(leaf), leaf)[0])
    difference = float((results[0] - results[1]).abs().max())
    if not difference <= COMPILED_ROUNDING:
        return warning(
            f"a compiled function's gradient is off by {difference:.1e}",
            "Leave `training.compile` false.",
            compiler=compiler,
        )
    return ok(f"torch.compile works, with {compiler}", compiler=compiler)


def _small(values: Tensor) -> Tensor:
    return (values.sin() * values + 1.0).relu().sum()


def _attention(kernel: DocumentAttention, where: torch.device, named: str, fix: str) -> Finding:
    import torch

    from understudy.devices.attention import AttentionRule, Documents

    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS, WIDTH), (KV_HEADS, WIDTH), (KV_HEADS, WIDTH))
    inputs = [torch.randn(sum(LENGTHS), *shape, generator=generator).bfloat16() for shape in shapes]
    rule = AttentionRule(scale=WIDTH**-0.5)
    if not kernel.supports(inputs[0].to(where), inputs[2].to(where), rule):
        return ok(f"{named} is not for this device; attention runs document by document")
    offsets = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    documents = Documents.of(offsets, where)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return kernel(query, key, value, documents, rule)

    computed = _with_gradients(attend, [each.to(where) for each in inputs])
    expected = _with_gradients(_document_by_document, [each.float() for each in inputs])
    error = max(float((a.cpu().float() - b).abs().max() / b.abs().max()) for a, b in zip(computed, expected))
    if not error <= ROUNDING:
        return broken(f"{named} computes wrong results (off by {error:.1%} of the largest)", fix)
    return ok(f"{named} works")


def _with_gradients(attend: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of the sum of its squares."""
    import torch

    leaves = [each.requires_grad_() for each in inputs]
    output = attend(*leaves)
    return [output.detach(), *torch.autograd.grad(output.float().square().sum(), leaves)]


def _document_by_document(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[T, H, D] causal attention of each document."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    parts, begin = [], 0
    for length in LENGTHS:
        q, k, v = (each[begin : begin + length].transpose(0, 1) for each in (query, key, value))
        parts.append(scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
        begin += length
    return torch.cat(parts, dim=1).transpose(0, 1)
