"""A task for SkyPilot. Pure; imports no torch."""

from __future__ import annotations

import re
from shlex import join, quote
from typing import Any

import yaml

from understudy.errors import UserError
from understudy.launch.submission import Submission

__all__ = ["skypilot_task"]

_PORT = 29500
_RUN = """\
export NNODES="$SKYPILOT_NUM_NODES"
export NODE_RANK="$SKYPILOT_NODE_RANK"
MASTER_ADDR=$(printf '%s\\n' "$SKYPILOT_NODE_IPS" | head -n 1)
export MASTER_ADDR
export MASTER_PORT={port}
{cd}exec {command}
"""


def skypilot_task(job: Submission) -> str:
    """The task: a launcher of ours on each host, which SkyPilot tells its place.

    Raises `UserError` for GPUs of an unknown kind, which SkyPilot could not find.
    """
    resources: dict[str, Any] = {}
    if job.gpus_per_node is not None:
        if job.accelerator is None:
            raise UserError("--to skypilot with --gpus-per-node needs --accelerator, such as H100.")
        resources["accelerators"] = f"{job.accelerator}:{job.gpus_per_node}"
    if job.image is not None:
        resources["image_id"] = f"docker:{job.image}"
    task: dict[str, Any] = {"name": _task_name(job.name), "num_nodes": job.nodes, "resources": resources}
    variables = dict(job.variables)
    if job.gpus_per_node is not None:
        variables["NPROC_PER_NODE"] = str(job.gpus_per_node)
    if variables:
        task["envs"] = variables
    cd = f"cd -- {quote(job.directory)}\n"
    task["run"] = _RUN.format(port=_PORT, cd=cd, command=join(["understudy", *job.command]))
    return yaml.safe_dump(task, sort_keys=False)


def _task_name(name: str) -> str:
    """As SkyPilot has names."""
    return "-".join(re.findall("[a-zA-Z0-9]+", name)) or "understudy"
