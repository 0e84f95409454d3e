"""Train on several hosts that ssh reaches, listed in a hostfile."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from understudy.cli.arguments import recipe_arguments


@click.command
@recipe_arguments
@click.option(
    "--hostfile",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The hosts, one on each line: `node1 slots=8`. The first one leads.",
)
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=29500,
    show_default=True,
    help="Where the hosts meet on the first one; it must be free there, and let through between them.",
)
@click.option(
    "--ssh-option", "ssh_options", multiple=True, metavar="NAME=VALUE", help="As ssh's own -o; may be given again."
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier run in the output directory.")
@click.option("--dry-run", is_flag=True, help="Only print the commands that would be run.")
def command(
    recipe: Path,
    overrides: tuple[str, ...],
    hostfile: Path,
    port: int,
    ssh_options: tuple[str, ...],
    overwrite: bool,
    dry_run: bool,
) -> None:
    """Train as RECIPE says on all hosts of a hostfile, which ssh must reach without a password.

    Every host must see this directory, the run directory and this Python environment at the same paths. What they print
    appears here after their names; when one fails all are stopped, and so they are when this command ends.

    Example: understudy launch recipe.yaml --hostfile hosts strategy=fsdp
    """
    from understudy.launch.hostfile import read_hostfile, require_enough
    from understudy.launch.ssh import SshLauncher
    from understudy.launch.ssh_job import launch_over_ssh
    from understudy.recipe.environment import carried_variables
    from understudy.recipe.load import load_recipe

    loaded, sources = load_recipe(recipe, overrides)
    cluster, hosts = loaded.cluster, read_hostfile(hostfile)
    require_enough(hosts, hostfile, cluster, sources)
    shown, secrets = carried_variables()
    launcher = SshLauncher(sys.executable, Path.cwd(), port, ssh_options, shown)
    arguments = [*(["--overwrite"] if overwrite else []), *overrides]
    if dry_run:
        for line in launcher.run(hosts, ["train", str(recipe), *arguments]):
            click.echo(shlex.join(line))
        return
    launch_over_ssh(launcher, hosts, str(recipe), arguments, cluster, secrets, say=click.echo)
