"""Hand a job to Slurm, or write it for Kubernetes or SkyPilot."""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from understudy.cli.arguments import recipe_arguments
from understudy.errors import UserError

if TYPE_CHECKING:
    from understudy.launch.submission import Submission
    from understudy.recipe.schema import Cluster
    from understudy.recipe.source_map import SourceMap

_COUNT = click.IntRange(1, 65536)
_OF_SLURM = (
    *("min_nodes", "partition", "account", "qos", "time", "mem", "cpus_per_task", "constraint", "exclusive"),
    *("log_dir", "signal_seconds", "environment", "following"),
)
_ONLY_FOR: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_OF_SLURM, ("slurm",)),
    "image": ("kubernetes", "skypilot"),
    "volumes": ("kubernetes",),
    "accelerator": ("skypilot",),
}
"""Options that others than these have no use for."""


@click.command
@recipe_arguments
@click.option("--nodes", type=_COUNT, help="Hosts.  [default: the recipe's cluster.nodes]")
@click.option("--min-nodes", type=_COUNT, help="Start with as few hosts when no more are free.")
@click.option("--gpus-per-node", type=_COUNT, help="Accelerators of each host, with a process for each.")
@click.option("--to", "scheduler", type=click.Choice(["slurm", "kubernetes", "skypilot"]), default="slurm")
@click.option("--partition", help="Slurm's partition.")
@click.option("--account", help="Slurm's account.")
@click.option("--qos", help="Slurm's quality of service.")
@click.option("--time", help="Time limit, as Slurm has it: 30, 12:00:00, 2-00:00:00.")
@click.option("--mem", help="Memory of each host.")
@click.option("--cpus-per-task", type=_COUNT, help="Cores of each host.")
@click.option("--constraint", help="Features that hosts must have.")
@click.option("--exclusive", is_flag=True, help="Share hosts with no other job.")
@click.option("--job-name", help="[default: the recipe's name]")
@click.option(
    "--log-dir",
    type=click.Path(path_type=Path),
    help="Where the job's own output goes; logs of ranks are in the run directory.  [default: slurm-JOB.out here]",
)
@click.option(
    "--signal-seconds",
    type=click.IntRange(1, 65535),
    default=120,
    show_default=True,
    help="Ask for a checkpoint so long before the time limit.",
)
@click.option(
    "--network",
    type=click.Choice(["auto", "infiniband", "efa", "roce", "hccs", "ethernet", "none"]),
    default="none",
    show_default=True,
    help="Settings for the network between hosts; auto looks at this one.",
)
@click.option("--network-interface", metavar="NAME", help="The interface that connections between hosts use.")
@click.option(
    "--environment",
    metavar="KIND:NAME",
    help="venv:DIRECTORY, conda:NAME or container:IMAGE (pyxis).  [default: the one this runs in]",
)
@click.option("--image", help="Container image, for Kubernetes and SkyPilot.")
@click.option(
    "--volume",
    "volumes",
    multiple=True,
    metavar="CLAIM:PATH",
    help="A Kubernetes volume that holds recipe, data and runs, and where to mount it; may be given again.",
)
@click.option("--accelerator", help="What SkyPilot calls the accelerators, such as H100.")
@click.option("--dry-run", is_flag=True, help="Print what would be submitted.")
@click.option("--follow", "following", is_flag=True, help="Show the job's output until it ends, and end as it did.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    recipe: Path,
    overrides: tuple[str, ...],
    nodes: int | None,
    min_nodes: int | None,
    gpus_per_node: int | None,
    scheduler: str,
    exclusive: bool,
    job_name: str | None,
    log_dir: Path | None,
    signal_seconds: int,
    network: str,
    network_interface: str | None,
    environment: str | None,
    image: str | None,
    volumes: tuple[str, ...],
    accelerator: str | None,
    dry_run: bool,
    following: bool,
    as_json: bool,
    **slurm: str | int | None,
) -> int:
    """Hand RECIPE to Slurm as a job on several hosts, which is queued again when it is preempted, its time is up or a
    host is lost, and goes on from its last checkpoint. Or write it for Kubernetes or SkyPilot.

    Example: understudy submit recipe.yaml --nodes 2 --gpus-per-node 8 --time 12:00:00 --dry-run
    """
    from understudy.launch.network_profiles import find_network, network_variables
    from understudy.launch.submission import Submission
    from understudy.recipe.load import load_recipe

    _refuse_unused(click.get_current_context(), scheduler)
    loaded, sources = load_recipe(recipe, overrides)
    nodes = nodes or loaded.cluster.nodes
    _check_cluster(loaded.cluster, sources, nodes, gpus_per_node)
    if scheduler == "slurm":
        # Slurm starts a job that lost a host on as many as there are; what is left of this start ends first.
        min_nodes = min_nodes or loaded.cluster.min_nodes
        if min_nodes is not None:
            overrides = (*overrides, "cluster.nodes=1", "cluster.min_nodes=null")
    if network == "auto":
        found = find_network()
        click.echo(f"network: {found or 'none of its own found on this host; nothing is set'}", err=True)
    else:
        found = None if network == "none" else network
    options = {name.replace("_", "-"): str(value) for name, value in slurm.items() if value is not None}
    job = Submission(
        name=job_name or re.sub(r"[^\w.-]+", "-", loaded.name, flags=re.ASCII),
        recipe=str(recipe.absolute()),
        directory=str(Path.cwd()),
        overrides=overrides,
        nodes=nodes,
        min_nodes=min_nodes,
        gpus_per_node=gpus_per_node,
        max_restarts=loaded.cluster.max_restarts,
        environment=_environment(environment),
        variables=network_variables(found, network_interface),
        options={**options, **({"exclusive": None} if exclusive else {})},
        log_directory=None if log_dir is None else str(log_dir.absolute()),
        signal_seconds=signal_seconds,
        image=image,
        accelerator=accelerator,
        volumes=tuple((claim, path) for claim, _, path in (volume.partition(":") for volume in volumes)),
    )
    text = _text(scheduler, job)
    if scheduler == "kubernetes" and not volumes:
        click.echo("note: without --volume the image must hold recipe and data, and the run is not kept", err=True)
    if dry_run:
        click.echo(json.dumps({"to": scheduler, "text": text}) if as_json else text, nl=as_json)
        return 0
    if scheduler != "slurm":
        apply = {"kubernetes": "kubectl apply -f FILE", "skypilot": "sky launch FILE"}[scheduler]
        raise UserError(f"--to {scheduler} needs --dry-run; write what it prints to a file and run `{apply}`.")
    from understudy.launch.slurm_jobs import follow, submit_script

    if log_dir is not None:
        _make(log_dir)
    identifier = submit_script(text)
    click.echo(json.dumps({"job": identifier}) if as_json else f"submitted job {identifier}")
    return follow(identifier, click.echo, partial(click.echo, err=True)) if following else 0


def _refuse_unused(context: click.Context, scheduler: str) -> None:
    """Raises `UserError` for options that were given and that `scheduler` has no use for."""
    unused = [
        parameter.opts[0]
        for parameter in context.command.params
        if (name := parameter.name) is not None
        and scheduler not in _ONLY_FOR.get(name, (scheduler,))
        and context.get_parameter_source(name) != ParameterSource.DEFAULT
    ]
    if unused:
        it = "it" if len(unused) == 1 else "them"
        raise UserError(f"--to {scheduler} has no use for {' and '.join(unused)}; leave {it} out.")


def _environment(asked: str | None) -> str:
    if asked is None:
        return f"venv:{Path(sys.executable).parent}"
    kind, _, name = asked.partition(":")
    if kind not in ("venv", "conda", "container") or not name:
        raise click.UsageError("--environment must be venv:DIRECTORY, conda:NAME or container:IMAGE.")
    if kind != "venv":
        return asked
    programs = Path(name).absolute() / "bin"
    if not (programs / "understudy").exists():  # its hosts may have another disk
        click.echo(f"note: there is no {programs / 'understudy'} on this host; the job's hosts must have it", err=True)
    return f"venv:{programs}"


def _make(log_directory: Path) -> None:
    try:
        log_directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--log-dir {log_directory} cannot be made ({error.strerror}); choose another.") from error


def _check_cluster(cluster: Cluster, sources: SourceMap, nodes: int, gpus_per_node: int | None) -> None:
    """Refuses what the job would only find out on its hosts."""
    if cluster.nodes not in (1, nodes):
        message = f"cluster.nodes is {cluster.nodes}, but --nodes {nodes}; leave one of them out."
        raise sources.error("cluster.nodes", message)
    if gpus_per_node is not None and cluster.processes not in ("auto", gpus_per_node):
        message = f"cluster.processes is {cluster.processes}, but --gpus-per-node {gpus_per_node}; leave it out."
        raise sources.error("cluster.processes", message)


def _text(scheduler: str, job: Submission) -> str:
    from understudy.launch.kubernetes import kubernetes_manifest
    from understudy.launch.skypilot import skypilot_task
    from understudy.launch.slurm import slurm_script

    return {"slurm": slurm_script, "kubernetes": kubernetes_manifest, "skypilot": skypilot_task}[scheduler](job)
