"""How long the command line takes to answer when there is nothing to compute."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.table import Row, print_table

__all__ = ["compare"]

REPETITIONS = 10
WRONG_RECIPE = """\
model: {path: somewhere}
data:
  train: [{path: data.json}]
training: {epochz: 3}
"""


def compare() -> None:
    program = str(Path(sys.executable).with_name("understudy"))
    with tempfile.TemporaryDirectory() as directory:
        recipe = Path(directory) / "wrong.yaml"
        recipe.write_text(WRONG_RECIPE)
        helped = _median_seconds([program, "--help"], 0)
        refused = _median_seconds([program, "train", str(recipe)], 2)
    print_table(
        f"Startup: median of {REPETITIONS}",
        "",
        [
            Row("understudy --help", f"{helped:.3f} s", goal="at most 0.3 s", reached=helped <= 0.3),
            Row("error of a wrong recipe", f"{refused:.3f} s", goal="at most 0.5 s", reached=refused <= 0.5),
        ],
    )


def _median_seconds(command: list[str], status: int) -> float:
    seconds = []
    for _ in range(REPETITIONS):
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, check=False)
        seconds.append(time.perf_counter() - began)
        if done.returncode != status:
            sys.exit(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr.decode()}")
    return statistics.median(seconds)
