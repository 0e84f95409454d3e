"""Reads a checkpoint that DeepSpeed's engine saved in its own format (ZeRO stages 1 to 3), one whole tensor at a time.

DeepSpeed's checkpoints are pickles, and its tools run what is in them: open only a checkpoint that you trust.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from understudy.errors import UserError
from understudy.recipe.environment import child_environment

__all__ = ["MOMENTS", "DeepSpeedCheckpoint", "find_tag", "match_names", "open_deepspeed_checkpoint"]

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Those that DeepSpeed's tool knows (0.19.8)."""

_WRAPPERS = re.compile(r"^(?:module\.)+|(?:(?<=\.)|^)(?:_orig_mod|_checkpoint_wrapped_module)\.")


def find_tag(directory: Path) -> Path:
    """The `global_stepN` directory that the file `latest` in `directory` names, or `directory` when it is one itself.

    Raises `UserError` when it is no DeepSpeed checkpoint.
    """
    if any(directory.glob("*_optim_states.pt")):
        return directory
    latest = directory / "latest"
    if not latest.is_file():
        raise UserError(
            "is no DeepSpeed checkpoint; name the directory that the engine's save_checkpoint wrote, which holds the "
            "file `latest`, or a `global_stepN` directory with optimizer states (*_optim_states.pt) in it.",
            file=directory,
        )
    name = latest.read_text(encoding="utf-8", errors="replace").strip()
    tag = directory / name
    if name in ("", ".", "..") or tag.parent != directory or not tag.is_dir():
        raise UserError(f"names {name!r}, which is no directory beside it; name the one to read.", file=latest)
    if not any(tag.glob("*_optim_states.pt")):
        raise UserError(
            "holds no ZeRO optimizer states (*_optim_states.pt); only checkpoints of ZeRO stages 1 to 3 that were "
            "saved with their optimizer can be read.",
            file=tag,
        )
    return tag


def open_deepspeed_checkpoint(directory: Path, scratch: Path) -> DeepSpeedCheckpoint:
    """Converts the checkpoint in `directory` with DeepSpeed's own tool into `scratch`, and opens the result.

    `directory` is what `find_tag` takes; nothing is written there. `scratch` is an empty directory of the caller, which
    removes it afterwards, and takes two to three times the checkpoint's size; memory takes one rank's optimizer
    file at a time. DeepSpeed's tool runs whatever code the checkpoint's pickles hold; it does so in a process of its
    own, which protects from what it prints, not from what it does.

    Raises `UserError` without DeepSpeed, for a checkpoint which is incomplete or of a kind that cannot be read (tensor
    or pipeline parallelism, experts, optimizer state on NVMe, other moments than Adam's), and for a full disk.
    """
    version = _deepspeed_version()
    tag = find_tag(directory)
    _refuse_unreadable(tag)
    first, *others = (_load(file) for file in _model_files(tag))
    if (found := len(list(tag.glob("*_optim_states.pt")))) != first["dp_world_size"]:
        raise UserError(
            f"holds optimizer states of {found} ranks, and {first['dp_world_size']} wrote it; copy all its files.",
            file=tag,
        )
    steps = _convert(tag, scratch, version)
    return DeepSpeedCheckpoint(
        tag=tag,
        step=int(first["global_steps"]),
        _shapes={name: shape for group in first["param_shapes"] for name, shape in group.items()},
        _frozen_shapes=first.get("frozen_param_shapes") or {},
        _frozen=[state.get("frozen_param_fragments") or {} for state in (first, *others)],
        _steps=steps,
        _converted=scratch / "universal" / "zero",
    )


@dataclass(frozen=True)
class DeepSpeedCheckpoint:
    """Whole tensors of a checkpoint, each read when it is asked for, on the CPU."""

    tag: Path
    """The directory that was read."""
    step: int
    """Optimizer steps done, those included that were skipped because a gradient was not finite."""
    _shapes: Mapping[str, torch.Size]
    _frozen_shapes: Mapping[str, torch.Size]
    _frozen: list[Mapping[str, Tensor]]
    _steps: Mapping[str, float]
    _converted: Path

    def names(self) -> list[str]:
        """Every parameter's name, as the engine's module calls it; of tied ones, one. Frozen parameters are last."""
        return [*self._shapes, *self._frozen_shapes]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._shapes[name] if name in self._shapes else self._frozen_shapes[name])

    def is_trained(self, name: str) -> bool:
        """Whether it has moments."""
        return name in self._shapes

    def weight(self, name: str) -> Tensor:
        """The parameter in its own shape, fp32: the master weight; of a frozen parameter, what it computed with."""
        if name in self._shapes:
            return self._read(name, "fp32")
        shape = self._frozen_shapes[name]
        # At stages 1 and 2 there is one model file, with all of it; at stage 3 the last rank's part is padded.
        parts = torch.cat([rank[name].flatten() for rank in self._frozen])
        return parts[: shape.numel()].view(shape).float()

    def moments(self, name: str) -> dict[str, Tensor]:
        """`exp_avg` and `exp_avg_sq`, fp32, in the parameter's shape, and `step`, a scalar, where it is known.

        Empty for a frozen parameter.
        """
        if name in self._frozen_shapes:
            return {}
        moments = {key: self._read(name, key) for key in MOMENTS}
        if name in self._steps:
            moments["step"] = torch.tensor(self._steps[name], dtype=torch.float32)
        return moments

    def _read(self, name: str, key: str) -> Tensor:
        stored = torch.load(self._converted / name / f"{key}.pt", map_location="cpu", weights_only=True)
        # The tool wraps tensors of stages 1 and 2, and leaves those of stage 3 flat (0.19.8).
        tensor: Tensor = stored["param"] if isinstance(stored, dict) else stored
        return tensor.detach().float().reshape(self._shapes[name])


def match_names(
    ours: Collection[str], theirs: Iterable[str], aliases: Mapping[str, Iterable[str]], *, file: Path
) -> dict[str, str]:
    """For each of our canonical names, the name by which the checkpoint in `file` calls it.

    `aliases` gives the other names of tied parameters. What wraps a module is left out of a name (`module.`,
    `_orig_mod.`); then all names of the checkpoint may lack one prefix of ours, or have one in common that we lack,
    because the engine wrapped the base model, or a module around ours.

    Raises `UserError` that lists what is missing, unknown, or there twice although it is tied.
    """
    canonical = {name: name for name in ours}
    for name in ours:
        canonical.update(dict.fromkeys(aliases.get(name, ()), name))
    plain = {name: _WRAPPERS.sub("", name) for name in theirs}
    candidates = [
        {name: canonical.get(add + inner.removeprefix(remove)) for name, inner in plain.items()}
        for remove in _common_prefixes(plain.values())
        for add in dict.fromkeys(["", *_prefixes(ours)])
    ]
    # The first of the best: names as they are come first.
    best = max(candidates, key=lambda candidate: len(set(candidate.values()) - {None}))
    matched: dict[str, str] = {}
    problems = []
    for name, found in best.items():
        if found in matched:
            problems.append(f"{matched[found]} and {name} apart, which this model ties")
        elif found is not None:
            matched[found] = name
    if missing := [name for name in ours if name not in matched]:
        problems.append(f"no {_listed(missing)}")
    if unknown := [name for name, found in best.items() if found is None]:
        problems.append(f"{_listed(unknown)}, which this model has not")
    if problems:
        raise UserError(
            f"does not fit the model: it holds {', and '.join(problems)}; name the model that it was trained from.",
            file=file,
        )
    return matched


def _common_prefixes(names: Iterable[str]) -> list[str]:
    """Leading components that all names share, shortest first, with the empty one."""
    listed = list(names)
    first = listed[0].split(".")[:-1] if listed else []
    prefixes = ["".join(f"{part}." for part in first[:length]) for length in range(len(first) + 1)]
    return [prefix for prefix in prefixes if all(name.startswith(prefix) for name in listed)]


def _prefixes(names: Iterable[str]) -> Iterator[str]:
    """The first one and two components of each name."""
    for name in names:
        parts = name.split(".")[:-1]
        for length in (1, 2):
            yield "".join(f"{part}." for part in parts[:length])


def _deepspeed_version() -> str:
    try:
        return metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        raise UserError(
            "a DeepSpeed checkpoint can be read with DeepSpeed only, which is not installed; run "
            "`pip install 'understudy[deepspeed]'`."
        ) from None


def _refuse_unreadable(tag: Path) -> None:
    foreign = {
        "with tensor or pipeline parallelism": [*tag.glob("*mp_rank_01*"), *tag.glob("layer_*-model_*")],
        "with experts": list(tag.glob("*expert_*")),
        "with its optimizer's state on NVMe": list(tag.glob("offloaded_tensors*")),
    }
    for kind, files in foreign.items():
        if files:
            raise UserError(f"was saved {kind} ({files[0].name}), which cannot be read; save it without.", file=tag)


def _model_files(tag: Path) -> list[Path]:
    """One at stages 1 and 2, one a rank at stage 3, in order of rank."""
    files = list(tag.glob("*_model_states.pt"))
    if not files:
        raise UserError("holds no model states (*_model_states.pt); copy all its files.", file=tag)
    return sorted(files, key=lambda file: [int(number) for number in re.findall(r"\d+", file.name)])


def _load(file: Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise UserError(
            f"holds more than tensors and plain values ({_first_line(error)}), such as a client_state given to the "
            "engine's save_checkpoint; save it without.",
            file=file,
        ) from error
    except (RuntimeError, OSError, EOFError) as error:
        raise UserError(f"cannot be read ({_first_line(error)}); copy it again.", file=file) from error
    if absent := [key for key in ("param_shapes", "global_steps", "dp_world_size") if not loaded.get(key)]:
        raise UserError(f"does not say its {absent[0]}; save it with its optimizer, after its first step.", file=file)
    return loaded


def _convert(tag: Path, scratch: Path, version: str) -> dict[str, float]:
    """Runs the tool; returns steps by parameter."""
    _require_space(tag, scratch)
    # The tool puts paths into patterns unescaped and writes beside its output (0.19.8): it gets plain relative ones.
    (scratch / "tag").symlink_to(tag.absolute(), target_is_directory=True)
    arguments = ["understudy.checkpoint.deepspeed_conversion", "tag", "universal", "steps.json"]
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=scratch,
        # DeepSpeed 0.14.4 loads without saying whether pickles may be more than weights, and torch has since
        # changed the default.
        env=child_environment({"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode < 0:
        raise UserError(
            f"DeepSpeed's ds_to_universal was killed by signal {-done.returncode}; it may need more memory.", file=tag
        )
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
    if done.returncode == UserError.exit_status:
        raise UserError(lines[-1], file=tag)
    if done.returncode:
        raise UserError(
            f"DeepSpeed {version} could not convert it ({lines[-1]}); it must be complete and undamaged, and its "
            "optimizer must have Adam's moments.",
            file=tag,
        )
    steps: dict[str, float] = json.loads((scratch / "steps.json").read_text())
    return steps


def _require_space(tag: Path, scratch: Path) -> None:
    optimizer = [file.stat().st_size for file in tag.glob("*_optim_states.pt")]
    model = [file.stat().st_size for file in _model_files(tag)]
    # Fragments and merged tensors are there together, with copies of the model states and of one rank's optimizer.
    needed_bytes = 2 * sum(optimizer) + sum(model) + max(optimizer)
    free_bytes = shutil.disk_usage(scratch).free
    if free_bytes < needed_bytes:
        raise UserError(
            f"has {free_bytes:,} bytes free, and converting {tag} takes {needed_bytes:,}; free some, or set TMPDIR to "
            "a directory on another disk.",
            file=scratch,
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _listed(items: list[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
