"""Runs DeepSpeed's `ds_to_universal` on one checkpoint, in a process of its own.

A process, because DeepSpeed prints on stdout, configures logging and reads pickles, none of which the program that
imports a checkpoint should have in it. `python -m understudy.checkpoint.deepspeed_conversion TAG OUT STEPS` converts
the directory TAG into OUT and writes the number of steps that each parameter's moments have seen, where known, to
STEPS, as JSON. When that fails, the last line on stderr says why, for a reader where the status is 2.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from understudy.errors import UserError

__all__ = ["convert"]


def convert(tag: Path, out: Path) -> dict[str, float]:
    """Converts `tag` into `out`, which must not exist, and returns the steps of each parameter's moments, where known.

    One rank's optimizer file is in memory at a time. Both paths go into patterns unescaped (DeepSpeed 0.19.8), so they
    must be free of special characters. Raises `UserError` for a stage that this release of DeepSpeed does not convert,
    and whatever DeepSpeed raises.
    """
    from deepspeed import __version__
    from deepspeed.checkpoint import ds_to_universal as tool

    stage_3 = any(tag.glob("zero_pp_rank_*_model_states.pt"))
    if stage_3 and not hasattr(tool, "extract_zero_shards_stage3"):
        raise UserError(
            f"is of ZeRO stage 3, and DeepSpeed {__version__} converts stages 1 and 2 only; install a newer release to "
            "read it, which reads what this one wrote."
        )
    tool.DeepSpeedCheckpoint = _repaired(tool.DeepSpeedCheckpoint)
    tool.main(
        SimpleNamespace(
            input_folder=str(tag),
            output_folder=str(out),
            num_extract_workers=1,  # each worker holds all of one rank's optimizer state
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=False,
        )
    )
    return _steps(out, _shapes(tag))


def _repaired(base: Any) -> Any:
    from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO
    from deepspeed.utils.tensor_fragment import fragment_address

    class Repaired(base):  # type: ignore[misc]
        """A stage 1 or 2 checkpoint whose record of what lies where is right."""

        def get_checkpoint_info(self, info_key: str = "checkpoint_info") -> Any:
            """Engines write this entry for some models only; DeepSpeed 0.14.4 has no `inject_missing_state`."""
            info = super().get_checkpoint_info(info_key)
            return {} if info is None and info_key == UNIVERSAL_CHECKPOINT_INFO else info

        def get_zero_checkpoint_state(self, pp_index: int, tp_index: int, dp_index: int) -> Any:
            """DeepSpeed 0.14.4 to 0.19.8 partitions parameters in another order where `round_robin_gradients` is set,
            and records their places in the old one, so that the tool would give each the values of others. The order
            of `param_shapes` is the true one.
            """
            sizes = self._partition_sizes()  # before the rank's own state, so that only one is in memory
            state = super().get_zero_checkpoint_state(pp_index=pp_index, tp_index=tp_index, dp_index=dp_index)
            optimizer = state["optimizer_state_dict"]
            held = optimizer["single_partition_of_fp32_groups"]
            paddings = optimizer.get("param_alignment_paddings") or [[0] * len(group) for group in self._groups()]
            optimizer["param_slice_mappings"] = [
                {
                    name: fragment_address(start=start, numel=numel)
                    for name, start, numel in _fragments(group, padding, dp_index * size, dp_index * size + len(part))
                }
                for group, padding, size, part in zip(self._groups(), paddings, sizes, held)
            ]
            return state

        def _groups(self) -> list[dict[str, torch.Size]]:
            if not hasattr(self, "_shapes"):
                self._shapes = _shapes(Path(self.dir))
            return self._shapes

        def _partition_sizes(self) -> list[int]:
            """Elements of a rank's part of each group; only the last rank's part is stored shorter."""
            if not hasattr(self, "_sizes"):
                first = super().get_zero_checkpoint_state(pp_index=0, tp_index=0, dp_index=0)
                groups = first["optimizer_state_dict"]["single_partition_of_fp32_groups"]
                self._sizes = [len(part) for part in groups]
            return self._sizes

    return Repaired


def _fragments(shapes: dict[str, torch.Size], paddings: list[int], begin: int, end: int) -> list[tuple[str, int, int]]:
    """(name, start relative to `begin`, elements) of the parts that lie in [begin, end) of the flattened group."""
    found, offset = [], 0
    for (name, shape), padding in zip(shapes.items(), paddings):
        start, stop = max(offset, begin), min(offset + shape.numel(), end)
        if start < stop:
            found.append((name, start - begin, stop - start))
        offset += shape.numel() + padding
    return found


def _shapes(tag: Path) -> list[dict[str, torch.Size]]:
    """Shapes by name of each flattened group, in the order in which it was flattened."""
    file = min(tag.glob("*mp_rank_00_model_states.pt"))
    shapes: list[dict[str, torch.Size]] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)[
        "param_shapes"
    ]
    return shapes


def _steps(out: Path, groups: list[dict[str, torch.Size]]) -> dict[str, float]:
    """Steps by parameter, from the optimizer's own state or, for optimizers that count by group, from its groups.

    At stage 3, `groups` are the engine's sub-groups, one flattened tensor in the optimizer each.
    """
    from deepspeed.runtime.fp16 import loss_scaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    known = [loss_scaler.LossScaler, loss_scaler.DynamicLossScaler, ZeroStageEnum, fragment_address]
    with torch.serialization.safe_globals(known):
        saved = torch.load(out / "zero" / "optimizer_state.pt", map_location="cpu", weights_only=True, mmap=True)
    flat = saved.get("optimizer_state_dict", {}).get("state", {})
    steps = {}
    for index, names in enumerate(groups):
        counted = [group for group in saved["param_groups"] if index in group["params"]]
        step = next((source["step"] for source in (flat.get(index, {}), *counted) if "step" in source), None)
        for name in names:
            stored = out / "zero" / name / "step.pt"
            own = torch.load(stored, map_location="cpu", weights_only=True) if stored.exists() else step
            if own is not None:
                steps[name] = float(own)
    return steps


if __name__ == "__main__":
    tag, out, steps = (Path(argument) for argument in sys.argv[1:])
    try:
        steps.write_text(json.dumps(convert(tag, out)))
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_status)
