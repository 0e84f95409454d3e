"""A batch script for Slurm: one launcher a host, a checkpoint before time is up, and again from there. Pure; imports no
torch."""

from __future__ import annotations

import re
from shlex import quote

from understudy.errors import UserError
from understudy.launch.submission import Submission

__all__ = ["slurm_script"]

_BEGINNING = """\
# Names are taken literally, whatever a shell could make of them.
# shellcheck disable=SC2016,SC1003
set -u
cd -- {directory} || exit 2

# Slurm asks the steps to stop, by USR1 before the time limit and by TERM for a preemption; this shell gets TERM when
# the job is cancelled, and then must not bring it back.
cancelled=
trap 'cancelled=1' TERM
trap : USR1

# Another job may have had the number.
losses={losses}
[ "${{SLURM_RESTART_COUNT:-0}}" -gt 0 ] || rm -f -- "$losses"
nodes=$SLURM_JOB_NUM_NODES
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p' | head -n 1)
export NNODES="$nodes"
export MASTER_ADDR="${{address:-$first}}"
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
unset NODE_RANK RANK WORLD_SIZE
"""

_END = """\
status=$?

# 75: stopped as asked, with a checkpoint; a launcher that is asked before it can listen ends by the signal itself.
# 5, or another signal: a host or a process was lost, which can pass. Those are counted: SLURM_RESTART_COUNT counts
# every start.
again=
case $status in
    75 | 138 | 143)
        status=75
        again=1
        ;;
    5 | 12[89] | 1[3-9][0-9] | 2[0-9][0-9])
        if [ -z "$cancelled" ] && echo "$(date) status $status" >> "$losses"; then
            count=$(wc -l < "$losses")
            [ "$count" -le {max_restarts} ] && again=1
            echo "status $status is loss $count of this job; cluster.max_restarts allows {max_restarts}"
        fi
        status=5
        ;;
esac
if [ -n "$again" ] && [ -z "$cancelled" ]; then
    echo "ended with status $status; queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""

_HAVE = """\
if ! command -v understudy > /dev/null; then
    echo "error: the job's environment has no understudy; give 'understudy submit' another --environment." >&2
    exit 2
fi"""
_NO_LIMIT = re.compile(r"0+|-1|UNLIMITED|INFINITE", re.IGNORECASE)
_MEMORY = re.compile(r"\d+(?:[KMGT]B?)?", re.ASCII | re.IGNORECASE)
_LIMIT = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)


def slurm_script(job: Submission) -> str:
    """The whole script, for `sbatch`. Every name in it is quoted; it holds no secret and runs nothing else.

    Raises `UserError` for a time limit that leaves no time before the signal, and for what is no size of memory."""
    _check_time(job)
    if (memory := job.options.get("mem")) is not None and not _MEMORY.fullmatch(memory):
        raise UserError(f"--mem {memory} is no size; write a whole number and K, M, G or T, such as 64G.")
    nodes = str(job.nodes) if job.min_nodes in (None, job.nodes) else f"{job.min_nodes}-{job.nodes}"
    directives: dict[str, str | None] = {
        "job-name": job.name,
        "nodes": nodes,
        "ntasks-per-node": "1",
        "signal": f"USR1@{job.signal_seconds}",
        "requeue": None,
        "open-mode": "append",
        **job.options,
    }
    if job.gpus_per_node is not None:
        directives["gpus-per-node"] = str(job.gpus_per_node)
    if job.log_directory is not None:
        directives["output"] = f'"{job.log_directory}/%x-%j.out"'
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH --{name}" + ("" if value is None else f"={value}") for name, value in directives.items()]
    losses = f"{quote(job.log_directory or '.')}/slurm-$SLURM_JOB_ID.losses"
    lines += ["", _BEGINNING.format(directory=quote(job.directory), losses=losses)]
    variables = dict(job.variables)
    if job.gpus_per_node is not None:
        variables["NPROC_PER_NODE"] = str(job.gpus_per_node)
    lines += [f"export {name}={quote(value)}" for name, value in variables.items()]
    lines += [*_activation(job), f"{_srun(job)}", _END.format(max_restarts=job.max_restarts)]
    return "\n".join(lines)


def _check_time(job: Submission) -> None:
    text = job.options.get("time")
    if text is None or _NO_LIMIT.fullmatch(text):
        return
    seconds = _limit_seconds(text)
    if seconds is None:
        raise UserError(f"--time {text!r} is no time limit; write minutes, 12:00:00 or 2-00:00:00.")
    if seconds <= job.signal_seconds:
        raise UserError(
            f"--time {text} is no longer than --signal-seconds {job.signal_seconds}, the time for a last checkpoint; "
            "make one longer or the other smaller."
        )


def _limit_seconds(text: str) -> int | None:
    """minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or days-hours:minutes:seconds."""
    if (found := _LIMIT.fullmatch(text)) is None:
        return None
    days, *clock = found.groups()
    numbers = [int(number) for number in clock if number is not None]
    if days is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    hours, minutes, seconds = {1: [0, *numbers, 0], 2: [0, *numbers], 3: numbers}[len(numbers)]
    return (hours * 60 + minutes) * 60 + seconds


def _activation(job: Submission) -> list[str]:
    kind, _, name = job.environment.partition(":")
    if kind == "venv":
        return [f'export PATH={quote(name)}:"$PATH"', _HAVE]
    if kind == "conda":
        return ['eval "$(conda shell.bash hook)"', f"conda activate {quote(name)} || exit 2", _HAVE]
    return []


def _srun(job: Submission) -> str:
    kind, _, name = job.environment.partition(":")
    # Launchers of a job end together by themselves, and each with the status that counts: the first to end must not
    # have the others killed.
    words = ["srun", '--nodes="$nodes"', '--ntasks="$nodes"', "--ntasks-per-node=1", "--kill-on-bad-exit=0"]
    words += ["--wait=60"]
    if cores := job.options.get("cpus-per-task"):
        words.append(f"--cpus-per-task={cores}")  # which srun no longer takes from the job
    if kind == "container":
        words += [f"--container-image={quote(name)}", f"--container-workdir={quote(job.directory)}"]
    return " ".join([*words, "understudy", *map(quote, job.command)])
