"""state.json of a checkpoint: how far training was, and what determined it. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from understudy.checkpoint.manifest import DamagedCheckpointError

__all__ = ["STATE", "Progress", "read_progress"]

STATE = "state.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Progress:
    """With the recipe it determines everything but weights and moments (P1)."""

    step: int
    """Optimizer steps done."""
    epoch: float
    tokens: int
    """Real tokens seen, over all ranks."""
    recipe: Mapping[str, Any]
    """What of the recipe determines the course of training, by dotted key."""
    recipe_digest: str
    """Of `recipe`, hexadecimal."""
    data_digest: str
    """Of the prepared training data."""
    loss_scale: tuple[float, int] | None
    """In fp16: its value, and the updates since it changed."""
    eval_loss: float | None
    """In nats a supervised token, where it was evaluated at this step."""
    written_by: Mapping[str, Any]
    """For people: strategy, processes, version."""

    def to_json(self) -> bytes:
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=1).encode()


def read_progress(checkpoint: Path) -> Progress:
    """Raises `DamagedCheckpointError` when the file is not what this release writes."""
    path = checkpoint / STATE
    try:
        values = json.loads(path.read_bytes())
        if (version := values.pop("format_version")) != FORMAT_VERSION:
            raise DamagedCheckpointError(f"has format {version}; this release reads {FORMAT_VERSION}.", file=path)
        scale = values.pop("loss_scale")
        return Progress(**values, loss_scale=None if scale is None else (float(scale[0]), int(scale[1])))
    except FileNotFoundError:
        raise DamagedCheckpointError("is missing.", file=path) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DamagedCheckpointError("does not tell how far training was.", file=path) from None
