"""Runs Slurm's programs: submits a script and follows a job. Imports no torch."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from understudy.errors import UnderstudyError, UserError

__all__ = ["follow", "submit_script"]

POLL_SECONDS = 1.0
_OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
_LOST = {"NODE_FAIL", "TIMEOUT", "BOOT_FAIL", "DEADLINE", "PREEMPTED"}


def submit_script(script: str) -> str:
    """The id of the job that now waits. Raises `UserError` when there is no Slurm here or it refuses."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no sbatch here; run this on a login host of the cluster, or see the script with --dry-run."
        )
    done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"sbatch refused the job: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]


def follow(job: str, say: Callable[[str], None]) -> int:
    """Gives `say` what the job prints until it is over, however often it starts again; the status it ended with."""
    position = 0
    while True:
        fields = _fields(job)
        state = fields.get("JobState", "")
        position = _print_new(Path(fields["StdOut"]), position, say) if "StdOut" in fields else position
        if state in _OVER:
            return _status(state, fields.get("ExitCode", "1:0"))
        time.sleep(POLL_SECONDS)


def _print_new(path: Path, position: int, say: Callable[[str], None]) -> int:
    if not path.exists():
        return position
    with path.open("rb") as file:
        file.seek(position)
        for line in file:
            if not line.endswith(b"\n"):
                break
            position += len(line)
            say(line[:-1].decode(errors="replace"))
    return position


def _status(state: str, told: str) -> int:
    status = int(told.partition(":")[0])
    if state == "COMPLETED":
        return status
    return 5 if state in _LOST else status or 1


def _fields(job: str) -> dict[str, str]:
    done = subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True)
    if done.returncode:
        raise UnderstudyError(f"Slurm no longer tells of job {job}: {' '.join(done.stderr.split())}")
    return dict(re.findall(r"(\w+)=(.*?)(?= [\w:/]+=|$)", done.stdout.strip()))
