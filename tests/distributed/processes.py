"""Runs one Python script as N gloo processes on this host and gives back what each wrote."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from tests.distributed.forked import run_script, start_forked

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 280


def run_processes(
    script: Path, world_size: int, scratch: Path, arguments: dict[str, Any], timeout_seconds: float = TIMEOUT_SECONDS
) -> list[dict[str, Any]]:
    """Starts `script OUT ARGUMENTS` on every rank and returns each rank's `OUT`, a JSON object, in order of rank.

    Fails with the tail of every rank's output when one fails. Ranks meet in a file, so no port is guessed.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "UNDERSTUDY_RENDEZVOUS": f"file://{scratch}/rendezvous",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(ROOT),
    }
    started = []
    for rank in range(world_size):
        arguments_of_rank = [str(scratch / f"rank-{rank}.json"), json.dumps(arguments)]
        variables = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(start_forked(run_script, script, arguments_of_rank, variables, scratch / f"rank-{rank}.log"))
    try:
        deadline = time.monotonic() + timeout_seconds
        for process in started:
            process.join(max(0.0, deadline - time.monotonic()))
        statuses = [process.exitcode for process in started]
    finally:
        for process in started:
            process.kill()
            process.join()
    if any(status != 0 for status in statuses):  # None of one that ran out of time
        tails = [f"rank {rank}:\n{(scratch / f'rank-{rank}.log').read_text()[-3000:]}" for rank in range(world_size)]
        raise AssertionError(f"exit statuses {statuses}\n" + "\n".join(tails))
    return [json.loads((scratch / f"rank-{rank}.json").read_text()) for rank in range(world_size)]
