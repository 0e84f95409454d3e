"""Runs over several hosts have the losses of the same run on one, whichever launcher starts their processes."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.hosts import Host, Hosts, hosts
from tests.distributed.small_run import rows, small_recipe, understudy, write

pytestmark = pytest.mark.distributed

SECONDS = 240

Commands = list[list[str]]
"""One for each host, in order."""


@pytest.fixture(scope="module")
def three_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with hosts(3, tmp_path_factory.mktemp("hosts")) as made:
        yield made


def short_recipe(directory: Path) -> Path:
    """Four FSDP2 steps."""
    directory.mkdir()
    recipe = small_recipe(directory)
    recipe |= {"strategy": "fsdp", "evaluation": {}, "cluster": {}}
    recipe["training"] |= {"max_steps": 4, "global_batch_size": 6}
    return write(recipe, directory)


def losses(directory: Path) -> list[dict[str, Any]]:
    """What a run logged, without timings."""
    kept = ("step", "loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens", "eval_loss")
    return [{key: row[key] for key in kept if key in row} for row in rows(directory)]


@pytest.fixture(scope="module")
def on_one_host(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("one") / "host"
    done = understudy(["train", str(short_recipe(directory)), "cluster.processes=2"], directory)
    assert done.returncode == 0, done.stderr
    return losses(directory)


def torchrun(recipe: Path, made: Hosts, used: Sequence[Host]) -> Commands:
    meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint={used[0].name}:29400", "--rdzv-id=one"]
    command = [str(made.python), "-m", "torch.distributed.run", f"--nnodes={len(used)}", "--nproc-per-node=1", *meet]
    return [[*command, "-m", "understudy", "train", str(recipe)]] * len(used)


def accelerate(recipe: Path, made: Hosts, used: Sequence[Host]) -> Commands:
    # As torchrun with --node-rank, --master-addr and --master-port.
    size = [f"--num_machines={len(used)}", f"--num_processes={len(used)}"]
    place = [f"--main_process_ip={used[0].name}", "--main_process_port=29500"]
    command = [str(made.python), "-m", "accelerate.commands.launch", "--multi_gpu", *size, *place]
    run = ["--module", "understudy", "train", str(recipe)]
    return [[*command, f"--machine_rank={i}", *run] for i in range(len(used))]


def deepspeed(recipe: Path, made: Hosts, used: Sequence[Host]) -> Commands:
    """It starts what runs on the others over ssh, by pdsh."""
    if shutil.which("pdsh") is None:
        assert not os.environ.get("CI")
        pytest.skip("this machine lacks pdsh (make system-packages)")
    place = [f"--hostfile={deepspeed_hostfile(recipe, used)}", f"--master_addr={used[0].address}", "--no_ssh_check"]
    command = [str(made.python), "-m", "deepspeed.launcher.runner", *place]
    carried = recipe.with_name("carried")
    carried.write_text(f"UNDERSTUDY_CACHE={recipe.parent / 'cache'}\nOMP_NUM_THREADS=1\n")
    options = " ".join(f"-o {name}={value}" for name, value in made.ssh_options.items())
    variables = [f"PDSH_SSH_ARGS_APPEND={options}", f"DS_ENV_FILE={carried}"]
    return [["env", *variables, *command, "--module", "understudy", "train", str(recipe)]]


def deepspeed_on_each(recipe: Path, made: Hosts, used: Sequence[Host]) -> Commands:
    place = [f"--hostfile={deepspeed_hostfile(recipe, used)}", f"--master_addr={used[0].address}", "--no_ssh"]
    command = [str(made.python), "-m", "deepspeed.launcher.runner", *place]
    return [[*command, f"--node_rank={i}", "--module", "understudy", "train", str(recipe)] for i in range(len(used))]


def deepspeed_hostfile(recipe: Path, used: Sequence[Host]) -> Path:
    hostfile = recipe.with_name("hostfile")
    hostfile.write_text("".join(f"{host.name} slots=1\n" for host in used))
    return hostfile


def launch(recipe: Path, made: Hosts, used: Sequence[Host]) -> Commands:
    lines = [used[0].name, *(f"{host.name} slots=1" for host in used[1:-1]), f"root@{used[-1].name}  # the last"]
    return [made.launch(recipe, lines)]


@pytest.mark.parametrize(
    ("commands", "count"),
    [
        (torchrun, 3),
        pytest.param(torchrun, 2, marks=pytest.mark.matrix),
        (accelerate, 2),
        pytest.param(accelerate, 3, marks=pytest.mark.matrix),
        (deepspeed, 3),
        pytest.param(deepspeed, 2, marks=pytest.mark.matrix),
        (deepspeed_on_each, 2),
        pytest.param(deepspeed_on_each, 3, marks=pytest.mark.matrix),
        (launch, 3),
        pytest.param(launch, 2, marks=pytest.mark.matrix),
    ],
)
def test_a_launcher_over_several_hosts_trains_as_one_host_does(
    commands: Callable[[Path, Hosts, Sequence[Host]], Commands],
    count: int,
    three_hosts: Hosts,
    on_one_host: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    directory, used = tmp_path / "run", three_hosts.hosts[:count]
    recipe = short_recipe(directory)
    environment = three_hosts.environment(directory)
    started: list[tuple[subprocess.Popen[bytes], Path]] = []
    for host, command in zip(used, commands(recipe, three_hosts, used)):
        log = directory / f"{host.name}.log"
        started.append((host.start(command, environment, log), log))
    statuses = [process.wait(SECONDS) for process, _ in started]
    assert not any(statuses), "\n".join(log.read_text() for _, log in started)
    three_hosts.wait_until_empty(10)
    theirs = losses(directory)
    assert [row["step"] for row in theirs] == [1, 2, 3, 4, 4]
    for mine, other in zip(on_one_host, theirs, strict=True):
        assert other == pytest.approx(mine, rel=1e-6)
    if commands is launch:
        assert "hostA: model: " in log.read_text()
