"""A batch script for Slurm: one launcher a host, a checkpoint before time is up, and again from there. Pure; imports no
torch."""

from __future__ import annotations

from shlex import quote

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

# 75: stopped as asked, with a checkpoint. 5, or a signal: a host or a process was lost, which can pass.
again=
case $status in
    75) again=1 ;;
    5 | 12[89] | 1[3-9][0-9] | 2[0-9][0-9]) [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_restarts} ] && again=1 ;;
esac
if [ -n "$again" ] && [ -z "$cancelled" ]; then
    echo "ended with status $status; queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def slurm_script(job: Submission) -> str:
    """The whole script, for `sbatch`. Every name in it is quoted; it holds no secret and runs nothing else."""
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
    lines += ["", _BEGINNING.format(directory=quote(job.directory))]
    variables = dict(job.variables)
    if job.gpus_per_node is not None:
        variables["NPROC_PER_NODE"] = str(job.gpus_per_node)
    lines += [f"export {name}={quote(value)}" for name, value in variables.items()]
    lines += [*_activation(job), f"{_srun(job)}", _END.format(max_restarts=job.max_restarts)]
    return "\n".join(lines)


def _activation(job: Submission) -> list[str]:
    kind, _, name = job.environment.partition(":")
    if kind == "venv":
        return [f'export PATH={quote(name)}:"$PATH"']
    if kind == "conda":
        return ['eval "$(conda shell.bash hook)"', f"conda activate {quote(name)} || exit 2"]
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
