"""Runs every benchmark and prints its table: `python -m benchmarks [NAME …] [--model DIR] [--data DIR] [--steps N] …`.

Nothing here asserts a time. A goal that is missed is said to be missed; look at the load of the machine first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import (
    adapters,
    checkpoints,
    distillation,
    head,
    planner,
    startup,
    teacher_cache,
    tokenizing,
    training,
)
from benchmarks.process import ROOT
from benchmarks.side_by_side import Extent
from benchmarks.smollm2 import require_model

DATA_FILES = ("alpaca_en_demo.json", "c4_demo.jsonl")
NAMES = (
    "startup",
    "planner",
    "tokenizing",
    "head",
    "distillation",
    "teacher-cache",
    "training",
    "adapters",
    "checkpoints",
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measures speed and memory.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which to run, of {', '.join(NAMES)}; default: all")
    parser.add_argument(
        "--model", type=Path, default=ROOT / "build" / "smollm2", help="directory of SmolLM2-135M-Instruct"
    )
    parser.add_argument("--data", type=Path, default=ROOT / ".." / "shared" / "data", help="where the data files are")
    parser.add_argument(
        "--steps", type=int, default=Extent.steps, help="of training or of a loss, in each process; at least 2"
    )
    parser.add_argument("--rounds", type=int, default=Extent.rounds, help="of training: processes on either side")
    parser.add_argument("--settings", type=int, default=220, help="of the planner, each of them simulated")
    arguments = parser.parse_args(argv)
    names = arguments.names or NAMES
    if arguments.steps < 2 or arguments.rounds < 1:
        parser.error(
            "--steps is at least 2, since the first step of a process does not count, and --rounds at least 1."
        )
    extent = Extent(arguments.steps, arguments.rounds)
    if unknown := sorted(set(names) - set(NAMES)):
        parser.error(f"there is no benchmark {unknown[0]}; there are {', '.join(NAMES)}.")
    if {"tokenizing", "training", "adapters"} & set(names):
        missing = [name for name in DATA_FILES if not (arguments.data / name).is_file()]
        if missing:
            sys.exit(f"{arguments.data} has no {missing[0]}; name the directory that has it with --data.")
    if {"tokenizing", "training", "adapters", "checkpoints"} & set(names):
        require_model(arguments.model)
    if "startup" in names:
        startup.compare()
    if "planner" in names:
        planner.compare_all(arguments.settings)
    if "tokenizing" in names:
        tokenizing.compare(arguments.model, arguments.data)
    if "head" in names:
        head.compare()
    if "distillation" in names:
        distillation.compare(extent.steps)
    if "teacher-cache" in names:
        teacher_cache.compare()
    if "training" in names:
        training.compare(arguments.model, arguments.data, extent)
    if "adapters" in names:
        adapters.compare(arguments.model, arguments.data, extent)
    if "checkpoints" in names:
        checkpoints.compare(arguments.model)


if __name__ == "__main__":
    main()
