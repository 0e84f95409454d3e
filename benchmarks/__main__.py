"""Runs every benchmark and prints its table: `python -m benchmarks [NAME …] [--model DIR] [--data DIR]`.

Nothing here asserts a time. A goal that is missed is said to be missed; look at the load of the machine first.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import checkpoints, head, startup, tokenizing, training
from benchmarks.process import ROOT
from benchmarks.smollm2 import require_model

DATA_FILES = ("alpaca_en_demo.json", "c4_demo.jsonl")
NAMES = ("startup", "tokenizing", "head", "training", "checkpoints")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measures speed and memory; a few minutes."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which to run, of {', '.join(NAMES)}; default: all")
    parser.add_argument(
        "--model", type=Path, default=ROOT / "build" / "smollm2", help="directory of SmolLM2-135M-Instruct"
    )
    parser.add_argument("--data", type=Path, default=ROOT / ".." / "shared" / "data", help="where the data files are")
    arguments = parser.parse_args()
    names = arguments.names or NAMES
    if unknown := sorted(set(names) - set(NAMES)):
        parser.error(f"there is no benchmark {unknown[0]}; there are {', '.join(NAMES)}.")
    if {"tokenizing", "training"} & set(names):
        missing = [name for name in DATA_FILES if not (arguments.data / name).is_file()]
        if missing:
            sys.exit(f"{arguments.data} has no {missing[0]}; name the directory that has it with --data.")
    if {"tokenizing", "training", "checkpoints"} & set(names):
        require_model(arguments.model)
    if "startup" in names:
        startup.compare()
    if "tokenizing" in names:
        tokenizing.compare(arguments.model, arguments.data)
    if "head" in names:
        head.compare()
    if "training" in names:
        training.compare(arguments.model, arguments.data)
    if "checkpoints" in names:
        checkpoints.compare(arguments.model)


if __name__ == "__main__":
    main()
