"""A linear layer whose weight is one frozen flat parameter of quantized bytes."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from understudy.errors import UserError
from understudy.models.quantization.codec import Codec, Scheme

__all__ = ["QuantizedLinear", "replace_linears"]


class QuantizedLinear(nn.Linear):
    """A frozen linear layer that dequantizes its weight whenever it computes, and keeps no dequantized copy.

    `weight` is 1-D, of the layer's storage dtype (fp32, bf16 or fp16), which is also the dtype of its input, `bias` and
    output. It holds bytes (see `Codec`): strategies may cut, send and join it, and must not cast it. Made on the meta
    device. Works under hooks that gather parameters for each pass and free them in between (FSDP2, ZeRO-3).
    """

    def __init__(self, linear: nn.Linear, codec: Codec, storage_dtype: torch.dtype) -> None:
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta", dtype=storage_dtype
        )
        packed = torch.empty(codec.numel(storage_dtype), dtype=storage_dtype, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.requires_grad_(False)
        self.codec = codec

    @property
    def W_q(self) -> Tensor:  # noqa: N802
        """The packed weight, by the name that makes peft (0.21) ask this layer to dequantize itself, which DoRA needs;
        peft means HQQ's layer by it."""
        return self.weight

    def dequantize(self) -> Tensor:
        """The weight [out_features, in_features] in the storage dtype, newly made. `weight` must be whole."""
        return self.codec.dequantize(self.weight.detach())

    def forward(self, hidden: Tensor) -> Tensor:
        """`hidden` [..., in_features] in the storage dtype to [..., out_features]. Can be differentiated once."""
        out: Tensor = _FrozenLinear.apply(hidden, self.weight, self.bias, self.codec)  # type: ignore[no-untyped-call]
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        before = self.weight.dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        assert self.weight.dtype == before, "a cast destroys a quantized weight"
        return self


class _FrozenLinear(torch.autograd.Function):
    """Keeps only the packed parameter for the backward pass, itself and no view of it: whoever gathers parameters gives
    that same object its values back."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, packed: Tensor, bias: Tensor | None, codec: Codec) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.codec = codec
        return F.linear(hidden, codec.dequantize(packed), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        (packed,) = ctx.saved_tensors
        return grad_output @ ctx.codec.dequantize(packed), None, None, None


def replace_linears(network: nn.Module, scheme: Scheme, storage_dtype: torch.dtype, stored: Container[str]) -> None:
    """Swaps each linear layer of `network`, on the meta device, that is quantized among the `stored` names (a
    `WeightReader` will do) for a `QuantizedLinear` under the same name.

    Raises `UserError` where nothing is quantized, and where a layer is that is not a plain linear one.
    """
    quantized = [name for name, module in network.named_modules() if f"{name}.{scheme.marker}" in stored]
    if not quantized:
        raise UserError(
            f"config.json says that the model is quantized ({scheme.name}), and no linear layer of it is stored so; "
            "get the model again, or name the model that it was made from.",
            key="model.path",
        )
    for name in quantized:
        linear = network.get_submodule(name)
        if type(linear) is not nn.Linear:
            raise UserError(
                f"{name} is quantized ({scheme.name}), and only the linear layers inside decoder layers may be; name "
                "the model that it was made from, and set quantization.",
                key="model.path",
            )
        codec = scheme.codec(linear.out_features, linear.in_features)
        network.set_submodule(name, QuantizedLinear(linear, codec, storage_dtype))
