"""Host memory of one host: what is offloaded there, what a checkpoint is copied to, and the processes themselves."""

from __future__ import annotations

from understudy.plan.hardware.hardware import Hardware
from understudy.plan.memory.setting import Costs, Setting
from understudy.plan.memory.teacher import TeacherCosts

__all__ = ["host_bytes"]


def host_bytes(
    setting: Setting, costs: Costs, teacher: TeacherCosts, hardware: Hardware, device_bytes: int, *, background: bool
) -> int:
    """The peak on one host. `device_bytes` is what a process takes on its device, which is the host's memory where
    that is a processor; `background` whether checkpoints are written from a copy while training goes on."""
    processes = hardware.devices_per_node
    own = costs.host + teacher.host_bytes
    if background:
        own += _checkpoint_share(setting)
    if not hardware.accelerated:
        return processes * (device_bytes + own)
    return processes * (hardware.process_bytes + own)


def _checkpoint_share(setting: Setting) -> int:
    """Weights and moments of all that is trained, which the processes share out to write."""
    trained = setting.network.trained
    return -(-trained * (setting.precision.weights + 8) // setting.processes)
