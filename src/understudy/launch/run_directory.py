"""The directory of one run: what is where in it, and which of that a run has written. Imports no torch."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from understudy.recipe.yaml_text import CoreLoader

__all__ = ["REPLACED", "RunDirectory", "keep_rows", "move_written", "remove_path", "replace_file", "written_by_runs"]

OWNED = (
    "recipe.yaml",
    "job.json",
    "memory.json",
    "metrics.jsonl",
    "logs",
    "tensorboard",
    "model",
    "model.previous",
    "model.unproven",
    "model.unproven.partial",
)
"""Every name a run writes, apart from the marker and checkpoints; `--overwrite` removes these and nothing else."""

CHECKPOINTS = "checkpoints"
_COMMITTED = re.compile(r"step-(\d{8,})")
_CHECKPOINT = re.compile(r"step-\d{8,}(\..*)?")
"""A checkpoint, or what is left of one."""

REPLACED = ".understudy-replaced"
"""Where an earlier run waits, until the one that replaces it has proved able to train."""


@dataclass(frozen=True)
class RunDirectory:
    """Where things of a run are."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def job(self) -> Path:
        """What every process of the run is told."""
        return self.path / "job.json"

    @property
    def memory(self) -> Path:
        """What the run learned when it ran out of memory, where it did."""
        return self.path / "memory.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def model(self) -> Path:
        """The final model; there once it is proved to load."""
        return self.path / "model"

    @property
    def previous_model(self) -> Path:
        """The final model of a run that was finished, and goes on, until it has another."""
        return self.path / "model.previous"

    @property
    def unproven_model(self) -> Path:
        """The final model until it is proved to load."""
        return self.path / "model.unproven"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def log(self, rank: int) -> Path:
        """What process `rank` and its libraries print."""
        return self.logs / f"rank-{rank}.log"

    def cause(self, rank: int) -> Path:
        """Why process `rank` failed, when it did."""
        return self.logs / f"rank-{rank}.cause.json"

    def pulse(self, rank: int) -> Path:
        """How far process `rank` is, while it trains."""
        return self.logs / f"rank-{rank}.pulse.json"

    def stacks(self, rank: int) -> Path:
        """Where process `rank` was when it was late."""
        return self.logs / f"rank-{rank}.stacks"

    @property
    def slow_ranks(self) -> Path:
        """Which processes the others waited for, where there were any."""
        return self.logs / "slow-ranks.log"

    def accept_model(self) -> None:
        """Makes the unproven model the final one."""
        self.unproven_model.rename(self.model)
        remove_path(self.previous_model)

    def committed_steps(self) -> list[int]:
        """Steps whose checkpoints are complete."""
        found = [_COMMITTED.fullmatch(marker.parent.name) for marker in self.checkpoints.glob("*/COMMITTED")]
        return [int(name[1]) for name in found if name is not None]

    @property
    def recorded_resume(self) -> str | None:
        """`checkpoint.resume` of the run that is here; None where there is none, or its recipe cannot be read."""
        try:
            return str(yaml.load(self.recipe.read_text(encoding="utf-8"), CoreLoader)["checkpoint"]["resume"])
        except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
            return None


def keep_rows(metrics: Path, step: int) -> None:
    """Removes the rows past `step`, which the run is going to write again, and one that was cut short."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            if step > 0 and json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    replace_file(metrics, "".join(kept).encode())


def replace_file(path: Path, content: bytes) -> None:
    """Writes `path` whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError:  # a full disk
        partial.unlink(missing_ok=True)
        raise


def move_written(source: Path, target: Path) -> None:
    """Moves everything that a run writes, within one file system."""
    for entry in written_by_runs(source):
        moved = target / entry.relative_to(source)
        moved.parent.mkdir(exist_ok=True)
        entry.rename(moved)
    with suppress(OSError):  # it is not there, or holds what no run wrote
        (source / CHECKPOINTS).rmdir()


def written_by_runs(path: Path) -> list[Path]:
    """What a run has written into the directory `path`. Among its checkpoints a user may keep things too."""
    found = [path / name for name in OWNED if (path / name).exists()]
    if (path / CHECKPOINTS).is_dir():
        found += [entry for entry in sorted((path / CHECKPOINTS).iterdir()) if _CHECKPOINT.fullmatch(entry.name)]
    return found


def remove_path(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
