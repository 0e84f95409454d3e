"""DeepSpeed's compiled operators: built before a collective waits for them, with the compiler's words on a failure.

DeepSpeed compiles them on first use. A process killed while it compiles leaves a lock file behind on which every later
run would wait for ever, and two releases that share a directory compile over each other; so each release has its own
directory, and one process at a time builds there, behind a lock that dies with its holder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from understudy.devices.build_failures import OperatorBuildError
from understudy.recipe.cache_disk import writing_cache
from understudy.recipe.environment import cache_directory, extensions_directory, set_build_environment

__all__ = ["build_operators", "builders_for", "choose_directory"]

STALE_LOCK = "lock"
"""Name of the file that PyTorch's extension loader holds while it builds."""


def choose_directory(deepspeed_version: str) -> None:
    """Says where this release's operators are built. Comes before DeepSpeed is imported."""
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    release = f"deepspeed-{deepspeed_version}-torch-{torch.__version__}-{python}"
    set_build_environment(cache_directory() / "extensions" / release, Path(sys.executable).parent)


def builders_for(accelerator: Any, *, host_optimizer: bool, nvme: bool) -> list[str]:
    """DeepSpeed's names of what an engine needs on `accelerator`, with optimizer state in host memory, and with state
    on a disk."""
    builders = ["ShareMemCommBuilder"] if accelerator.device_name() == "cpu" else []
    if host_optimizer:
        builders.append("CPUAdamBuilder")
    if nvme:
        builders.append("AsyncIOBuilder")
    return builders


def build_operators(
    accelerator: Any, builders: Iterable[str], report: Callable[[str], None] = lambda line: None
) -> None:
    """Loads the operators of DeepSpeed's `builders` on its `accelerator`, compiling those that are not there yet, which
    takes a minute each; `report` is given a line about each of them. One that the accelerator does not have is left
    out.

    Raises `OperatorBuildError` with the compiler's words when one cannot be built. No collective.
    """
    directory = extensions_directory()
    with writing_cache(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / "build.lock"), writing_cache(directory):
        for stale in directory.glob(f"*/{STALE_LOCK}"):
            stale.unlink(missing_ok=True)
        for name in builders:
            builder = accelerator.create_op_builder(name)
            if builder is None:
                continue
            if not (directory / builder.name / f"{builder.name}.so").exists():
                report(f"compiling DeepSpeed's operator {builder.name}, once on this machine; this can take minutes …")
            try:
                builder.load(verbose=False)
            except Exception as problem:  # DeepSpeed, PyTorch and the programs they run have one of their own each
                raise OperatorBuildError(builder.name, problem, directory) from problem
