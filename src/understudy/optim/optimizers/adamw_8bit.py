"""AdamW with moments in 8 bits, quantised in blocks of 256 (Dettmers et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from understudy.errors import UserError
from understudy.optim.groups import decay_groups
from understudy.optim.shards import over_local_shards
from understudy.optim.state import Kept
from understudy.recipe.schema import Optimizer

__all__ = ["make"]

_BLOCK = 256
_SMALLEST_8BIT_SIZE = 4096
"""bitsandbytes' own default: tensors with fewer elements keep fp32 moments, whose size does not matter."""
_MOMENTS = {"exp_avg": "1", "exp_avg_sq": "2"}
"""Our names of the moments: the suffix of bitsandbytes' own."""


def make(
    optimizer: Optimizer, named_parameters: Sequence[tuple[str, nn.Parameter]], *, fused: bool
) -> torch.optim.Optimizer:
    """Under FSDP and ZeRO the blocks are those of each rank's part, so runs at different world sizes agree to the
    quantisation's accuracy only. So does a checkpoint that goes on where blocks lie elsewhere; where they lie as they
    did, it goes on exactly."""
    groups = decay_groups(named_parameters, optimizer)
    sizes = [[parameter.numel() for parameter in group["params"]] for group in groups]
    return over_local_shards(groups, lambda shards: _adamw_8bit(optimizer, shards, sizes))


def _adamw_8bit(
    settings: Optimizer, groups: list[dict[str, Any]], sizes: Sequence[Sequence[int]]
) -> torch.optim.Optimizer:
    """`sizes` are the elements of the whole parameters: whether moments have 8 bits is the same on every rank."""
    try:
        from bitsandbytes.functional import quantize_blockwise
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "optimizer `adamw_8bit` needs the package bitsandbytes; install it with `pip install bitsandbytes`, "
            "or choose `adamw` or `adamw_bf16`."
        ) from error
    whole_sizes = {
        parameter: size for group, row in zip(groups, sizes) for parameter, size in zip(group["params"], row)
    }

    class KeptAdamW8bit(AdamW8bit):  # type: ignore[misc]
        """Its checkpoint form has for each moment the 8-bit codes and, for each element, the scale of its block: so it
        can be cut and joined anywhere."""

        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            config: dict[str, Any] = super().get_config(gindex, pindex, group)
            parameter = self.param_groups[gindex]["params"][pindex]
            small = whole_sizes.get(parameter, parameter.numel()) < _SMALLEST_8BIT_SIZE
            config.update(optim_bits=32 if small else 8, min_8bit_size=0)
            return config

        def kept_state(self, parameter: Tensor) -> Kept:
            if parameter not in self.state:
                if parameter.numel() or not self.state:
                    return {}
                self._initialize(parameter)  # a part without elements; its peers have state by now
            state = self.state[parameter]
            kept: Kept = {"step": torch.tensor(float(state["step"]))}
            for name, suffix in _MOMENTS.items():
                values = state[f"state{suffix}"]
                if values.dtype == torch.float32:
                    kept[name] = values
                else:
                    scales = state[f"absmax{suffix}"].repeat_interleave(_BLOCK)[: values.numel()]
                    kept[f"{name}_codes"], kept[f"{name}_scale"] = values, scales.view(values.shape)
            return kept

        def restore_state(self, parameter: Tensor, kept: Kept) -> None:
            self._initialize(parameter)
            state = self.state[parameter]
            state["step"] = int(kept["step"])
            for name, suffix in _MOMENTS.items():
                values, qmap = state[f"state{suffix}"], state.get(f"qmap{suffix}")
                moment = self._moment(kept, name, suffix)
                if qmap is None:
                    values.copy_(moment)
                    continue
                self._quantize(state, suffix, moment)
                if f"{name}_codes" in kept:
                    self._keep_blocks(state, suffix, moment, kept[f"{name}_codes"], kept[f"{name}_scale"])

        def _initialize(self, parameter: Tensor) -> None:
            """Makes empty state. Its form depends on the parameter alone; ZeRO-3 has parameters in their groups only
            while it steps."""
            group = self.param_groups[0]
            members, group["params"] = group["params"], [parameter]
            self.init_state(group, parameter, 0, 0)
            group["params"] = members
            if "dynamic" not in self.name2qmap:
                self.fill_qmap()

        def _moment(self, kept: Kept, name: str, suffix: str) -> Tensor:
            """The moment in fp32. A partition may hold small parameters that were kept in fp32 beside others that were
            not: what is not there is zero."""
            moment = torch.zeros(())
            if name in kept:
                moment = kept[name]
            if f"{name}_codes" in kept:
                qmap = self.name2qmap["dynamic" if suffix == "1" else "udynamic"].to(kept[f"{name}_codes"].device)
                moment = moment + qmap[kept[f"{name}_codes"].long()] * kept[f"{name}_scale"]
            return moment

        def _quantize(self, state: dict[str, Any], suffix: str, moment: Tensor) -> None:
            codes, quantized = quantize_blockwise(
                moment.contiguous().to(state[f"state{suffix}"].device), state[f"qmap{suffix}"], blocksize=_BLOCK
            )
            state[f"state{suffix}"].copy_(codes.view(state[f"state{suffix}"].shape))
            state[f"absmax{suffix}"].copy_(quantized.absmax)

        def _keep_blocks(
            self, state: dict[str, Any], suffix: str, moment: Tensor, codes: Tensor, scales: Tensor
        ) -> None:
            """Puts back, as they were, the blocks whose elements were one block before. A zero without a scale is
            padding, which belongs to any block; its code was set by quantising it."""
            values, absmax = state[f"state{suffix}"].view(-1), state[f"absmax{suffix}"]
            padding = (0, -values.numel() % _BLOCK)
            rows = nn.functional.pad(scales.reshape(-1), padding).view(-1, _BLOCK)
            empty = (rows == 0) & (nn.functional.pad(moment.reshape(-1), padding).view(-1, _BLOCK) == 0)
            largest = rows.amax(1)
            same = ((rows == largest[:, None]) | empty).all(1)
            absmax[same] = largest[same].to(absmax.device)
            elements = same.repeat_interleave(_BLOCK)[: values.numel()] & (scales.reshape(-1) != 0)
            values[elements] = codes.reshape(-1)[elements].to(values.device)

    kept: torch.optim.Optimizer = KeptAdamW8bit(
        groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps
    )
    return kept
