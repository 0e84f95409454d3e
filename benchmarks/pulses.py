"""What it costs a process to tell once a second what it is at: `python -m benchmarks.pulses`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.table import print_figures
from understudy.launch.pulses import TRAINING
from understudy.launch.run_directory import RunDirectory
from understudy.recipe.environment import remember_collectives
from understudy.training.headway import Headway
from understudy.training.hooks import TrainingState
from understudy.training.pulse import REMEMBERED, beating

BEATS = 20
BY_DEFAULT = 2000
"""Collectives that PyTorch's flight recorder keeps where nobody says how many."""


def main() -> None:
    counts = [*map(int, sys.argv[1:])]
    if counts:
        print_seconds(*counts)
        return
    rows = []
    for count in (REMEMBERED, BY_DEFAULT):  # the recorder's size is settled with a process's first group
        measured = subprocess.run(
            [sys.executable, "-m", "benchmarks.pulses", str(count)], check=True, capture_output=True, text=True
        )
        seconds = float(measured.stdout)
        rows.append((f"{count:,} collectives remembered", f"{seconds * 1e3:.1f} ms", f"{seconds:.2%}"))
    print_figures(f"Pulse: processor time of one, mean of {BEATS}", ("a pulse", "of a core, one a second"), rows)


def print_seconds(count: int) -> None:
    remember_collectives(count)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    headway = Headway()
    headway.before_step(TrainingState())
    for _ in range(count):
        dist.all_reduce(torch.zeros(4))
    with tempfile.TemporaryDirectory() as path:
        directory = RunDirectory(Path(path))
        directory.logs.mkdir()
        with beating(directory, 0, 1, headway):
            time.sleep(0.2)
            used = time.process_time() - time.thread_time()
            for _ in range(BEATS):
                headway.begin(TRAINING)  # has it tell at once
                time.sleep(0.1)
            used = time.process_time() - time.thread_time() - used
    dist.destroy_process_group()
    sys.stdout.write(f"{used / BEATS}\n")


if __name__ == "__main__":
    main()
