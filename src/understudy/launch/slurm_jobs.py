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
SILENCE_SECONDS = 300.0
"""For a controller that does not answer, until the job is given up."""
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
        raise UserError(f"Slurm refused the job: {_told(done.stderr)}.")
    return done.stdout.strip().partition(";")[0]


def follow(job: str, say: Callable[[str], None], note: Callable[[str], None]) -> int:
    """Gives `say` what the job prints until it is over, however often it starts again, and `note` what it waits for;
    the status it ended with. Ctrl-C ends the following alone."""
    try:
        return _follow(job, say, note)
    except KeyboardInterrupt:
        raise UnderstudyError(f"no longer following job {job}, which goes on; `scancel {job}` stops it.") from None


def _follow(job: str, say: Callable[[str], None], note: Callable[[str], None]) -> int:
    position, waiting = 0, ""
    while True:
        fields = _fields(job)
        state, why = fields.get("JobState", ""), fields.get("Reason", "None")
        position = _print_new(Path(fields["StdOut"]), position, say) if "StdOut" in fields else position
        if state in _OVER:
            return _status(state, fields.get("ExitCode", "1:0"))
        if state == "PENDING" and why not in ("None", waiting):
            note(f"job {job} waits: Slurm's reason is {why}")
        waiting = why if state == "PENDING" else ""
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
    """What Slurm says of a job. A controller that does not answer may be starting again."""
    deadline = time.monotonic() + SILENCE_SECONDS
    while True:
        done = subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True)
        if not done.returncode:
            return dict(re.findall(r"(\w+)=(.*?)(?= [\w:/]+=|$)", done.stdout.strip()))
        if time.monotonic() > deadline or "Invalid job id" in done.stderr:
            raise UnderstudyError(f"Slurm no longer tells of job {job}: {_told(done.stderr)}.")
        time.sleep(POLL_SECONDS)


def _told(errors: str) -> str:
    """In one line, without the program's name before each."""
    lines = [re.sub(r"^\w+: (error: )?", "", line.strip()).rstrip(".") for line in errors.splitlines()]
    return "; ".join(line for line in lines if line) or "it does not say why"
