"""Why PyTorch cannot use the accelerators that this machine has."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

__all__ = ["Obstacle", "find_obstacle"]


@dataclass(frozen=True)
class Obstacle:
    """What is in the way, and a sentence that says how to get it out of there."""

    found: str
    fix: str


def find_obstacle(root: Path = Path("/")) -> Obstacle:
    """For a machine on which `detect_machine` counts accelerators and `find_device` gives the CPU."""
    if list((root / "dev").glob("davinci[0-9]*")):
        return _npu_obstacle()
    if torch.version.cuda is None and torch.version.hip is None:
        return Obstacle(
            f"this PyTorch ({torch.__version__}) is built for processors only",
            "Install a PyTorch that is built for the GPU: PyTorch's installation page names the command.",
        )
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError as error:
        words = str(error).strip().splitlines()[0]
        if "too old" in words or "insufficient" in words:
            fix = (
                f"Update the NVIDIA driver to one for CUDA {torch.version.cuda}, or install a PyTorch that is built "
                "for an older CUDA."
            )
        else:
            fix = (
                "Check that `nvidia-smi` shows the GPUs; in a container, start it with access to them (`--gpus all`); "
                "after an update of the driver, restart the machine."
            )
        return Obstacle(f"PyTorch cannot open them: {words}", fix)
    return Obstacle(
        "PyTorch counts none of them", "Check that `nvidia-smi` shows the GPUs and that none is in use alone."
    )


def _npu_obstacle() -> Obstacle:
    if find_spec("torch_npu") is None:
        return Obstacle("torch_npu is not installed", "Install the torch_npu that belongs to this torch and CANN.")
    return Obstacle(
        "torch_npu finds none of them",
        "Check that `npu-smi info` shows the NPUs, and that CANN's set_env.sh was sourced in this shell.",
    )
