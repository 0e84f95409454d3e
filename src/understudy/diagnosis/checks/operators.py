"""What DeepSpeed compiles on this machine: that it can be compiled, and computes what PyTorch does."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING

from understudy.diagnosis.check import Finding, Host, broken, check, ok, warning
from understudy.recipe.environment import extensions_directory

if TYPE_CHECKING:
    import torch

STEPS = 3
ROUNDING = 1e-6
"""Of weights around 1, after some steps in fp32."""
MEANWHILE = "Until then ddp and fsdp work."
SECONDS = 900
"""Compiling takes a minute or two, more where the machine is busy, and may wait for another process that does it."""


@check(
    "compiled-operators",
    seconds=SECONDS,
    if_lost=(
        "Remove the directory `extensions` in Understudy's cache directory, or what TORCH_EXTENSIONS_DIR names: what "
        "is there may be half built, or built for another processor. Then run this again."
    ),
)
def compiled_operators(host: Host) -> Finding:
    """Builds what ZeRO with optimizer state in host memory needs, where runs will find it, and takes some steps."""
    try:
        release = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        return warning(
            "nothing to compile: DeepSpeed is not installed, which strategies zero0 to zero3 need",
            "Where you need them, run `pip install 'understudy[deepspeed]'`; ddp and fsdp work without.",
        )
    from understudy.devices.build_failures import OperatorBuildError
    from understudy.strategies.compiled_operators import build_operators, builders_for
    from understudy.strategies.deepspeed import import_deepspeed

    accelerator = import_deepspeed().accelerator.get_accelerator()
    builders = builders_for(accelerator, host_optimizer=True, nvme=False)
    try:
        build_operators(accelerator, builders)
    except OperatorBuildError as error:
        fix = f"{error.fix[0].upper()}{error.fix[1:]}. {MEANWHILE}"
        found = f"DeepSpeed's operator {error.operator} could not be compiled: {error.words}"
        return broken(found, fix, operator=error.operator, words=error.words)
    directory = str(extensions_directory())
    difference = _difference_from_adamw()
    if not difference <= ROUNDING:
        return broken(
            f"DeepSpeedCPUAdam computes other weights than AdamW (off by {difference:.1e} after {STEPS} steps)",
            f"Remove {directory}, so that it is compiled anew for this processor. {MEANWHILE}",
            difference=difference,
        )
    return ok(
        f"built with DeepSpeed {release}; DeepSpeedCPUAdam steps as AdamW does (within {difference:.0e})",
        difference=difference,
        directory=directory,
    )


def _difference_from_adamw() -> float:
    """The largest difference of any weight after the same steps by the compiled AdamW and by PyTorch's."""
    import torch

    from understudy.recipe.schema import Optimizer
    from understudy.strategies.host_adamw import make_host_adamw

    settings = Optimizer(learning_rate=1e-2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4099, generator=generator)  # no multiple of what vector instructions take at once
    gradients = [torch.randn(4099, generator=generator) for _ in range(STEPS)]
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.double())
    group = {"params": [ours], "weight_decay": settings.weight_decay}
    _take_steps(make_host_adamw(settings, [group]), ours, gradients)
    reference = torch.optim.AdamW(
        [theirs],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    _take_steps(reference, theirs, gradients)
    return float((ours.detach().double() - theirs.detach()).abs().max())


def _take_steps(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, gradients: list[torch.Tensor]) -> None:
    for gradient in gradients:
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
