"""What the planner knows of a machine. Imports no torch; `understudy.devices.detect` fills it in."""

from __future__ import annotations

from dataclasses import dataclass

from understudy.recipe.schema import Recipe
from understudy.recipe.sizes import limited_bytes

__all__ = ["Machine"]


@dataclass(frozen=True)
class Machine:
    devices: int
    """Accelerators; 0 where there is only the host's processor."""
    device_bytes: int
    """Memory of one accelerator, or of the host without one."""
    cores: int
    """Processor cores this process may use."""

    @property
    def accelerated(self) -> bool:
        return self.devices > 0

    def process_bytes(self, processes: int) -> int:
        """What one of `processes` on this host has: an accelerator's memory, or its part of the host's. 0 where nobody
        knows."""
        return self.device_bytes if self.accelerated else self.device_bytes // processes

    def limit_bytes(self, recipe: Recipe, processes: int) -> int | None:
        """What `training.memory_limit` lets each of `processes` on this host take; None where nothing limits it."""
        return limited_bytes(recipe.training.memory_limit, self.process_bytes(processes))
