"""Checkpoints against torch.distributed.checkpoint and torch.save, over the same tensors.

SmolLM2-135M with AdamW's moments in fp32 under FSDP2, on two processes. All three sync what they write to the disk.
Understudy writes and checks SHA-256 sums besides, and its checkpoint is a model directory that transformers loads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.process import ROOT
from benchmarks.table import GIBIBYTE, Row, print_table

__all__ = ["compare"]

PROCESSES = 2
ROUNDS = 3
TIMEOUT_SECONDS = 900.0


def compare(model: Path) -> None:
    sides = {side: _measure(side, model.resolve()) for side in ("understudy", "dcp", "torch")}
    num_bytes = sides["understudy"][0]["num_bytes"]
    for side, name in (("dcp", "torch.distributed.checkpoint"), ("torch", "torch.save")):
        rows = [
            _bandwidth("save", sides["understudy"], sides[side], num_bytes),
            _bandwidth("load, with verification", sides["understudy"], sides[side], num_bytes),
            _memory("save", sides["understudy"], sides[side]),
            _memory("load", sides["understudy"], sides[side]),
        ]
        title = f"Checkpoint of {num_bytes / GIBIBYTE:.2f} GiB, {PROCESSES} processes, median of {ROUNDS}"
        print_table(title, name, rows)
    behind = sides["understudy"]
    stall = max(rank["background"]["stall"] for rank in behind)
    committed = max(rank["background"]["seconds"] for rank in behind)
    extra = max(rank["background"]["extra_bytes"] for rank in behind)
    at_once = _seconds(behind, "save")
    print_table(
        "In the background",
        "written at once",
        [
            Row("the loop stands still", f"{stall:.2f} s", f"{at_once:.2f} s", stall / at_once),
            Row("until it is committed", f"{committed:.2f} s"),
            Row("memory over training's, a rank", f"{extra / GIBIBYTE:.2f} GiB"),
        ],
    )


def _bandwidth(name: str, ours: list[Any], theirs: list[Any], num_bytes: int) -> Row:
    action = name.partition(",")[0]
    mine, other = (num_bytes / 2**20 / _seconds(side, action) for side in (ours, theirs))
    return Row(f"{name}: MiB/s", f"{mine:,.0f}", f"{other:,.0f}", mine / other)


def _memory(action: str, ours: list[Any], theirs: list[Any]) -> Row:
    mine, other = (max(rank[action]["extra_bytes"] for rank in side) for side in (ours, theirs))
    return Row(
        f"{action}: memory over training's, a rank",
        f"{mine / GIBIBYTE:.2f} GiB",
        f"{other / GIBIBYTE:.2f} GiB",
        mine / other if other else None,
    )


def _seconds(side: list[Any], action: str) -> float:
    return max(float(rank[action]["seconds"]) for rank in side)


def _measure(side: str, model: Path) -> list[Any]:
    """What each rank saw."""
    with tempfile.TemporaryDirectory(prefix="understudy-bench-", dir=ROOT / "build") as scratch:
        out = Path(scratch) / "answer.json"
        settings = {"side": side, "model": str(model), "scratch": scratch, "rounds": ROUNDS, "out": str(out)}
        environment = {
            **os.environ,
            "WORLD_SIZE": str(PROCESSES),
            "LOCAL_WORLD_SIZE": str(PROCESSES),
            "UNDERSTUDY_RENDEZVOUS": f"file://{scratch}/rendezvous",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        with (Path(scratch) / "log").open("w+") as log:
            started = [
                subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.checkpoint_worker", json.dumps(settings)],
                    cwd=ROOT,
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=log,
                )
                for rank in range(PROCESSES)
            ]
            try:
                statuses = [process.wait(TIMEOUT_SECONDS) for process in started]
            finally:
                for process in started:
                    process.kill()
            if any(statuses):
                log.seek(0)
                sys.exit(f"{side} ended with {statuses}:\n{log.read()[-3000:]}")
        answer: list[Any] = json.loads(out.read_text())
        return answer
