"""What the planner knows of a machine. Imports no torch; `understudy.devices.detect` fills it in."""

from __future__ import annotations

from dataclasses import dataclass

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
