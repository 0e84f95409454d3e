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

from understudy.errors import UserError
from understudy.recipe.cache_disk import writing_cache
from understudy.recipe.environment import cache_directory, extensions_directory, set_build_environment

__all__ = ["build_operators", "choose_directory"]

STALE_LOCK = "lock"
"""Name of the file that PyTorch's extension loader holds while it builds."""


def choose_directory(deepspeed_version: str) -> None:
    """Says where this release's operators are built. Comes before DeepSpeed is imported."""
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    release = f"deepspeed-{deepspeed_version}-torch-{torch.__version__}-{python}"
    set_build_environment(cache_directory() / "extensions" / release, Path(sys.executable).parent)


def build_operators(
    accelerator: Any, builders: Iterable[str], report: Callable[[str], None] = lambda line: None
) -> None:
    """Loads the operators of DeepSpeed's `builders` on its `accelerator`, compiling those that are not there yet, which
    takes a minute each; `report` is given a line about each of them. One that the accelerator does not have is left
    out.

    Raises `UserError` with the compiler's words when one cannot be built. No collective.
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
            except (RuntimeError, ImportError, OSError) as problem:
                raise UserError(
                    f"DeepSpeed's operator {builder.name} could not be compiled ({_compiler_words(problem)}); install "
                    "a C++ compiler and Python's headers, or choose a strategy that does not need it: ddp or fsdp."
                ) from problem


def _compiler_words(problem: BaseException) -> str:
    """The first line that names an error, else the first line."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()] or [type(problem).__name__]
    return next((line for line in lines if "error:" in line.lower()), lines[0])
