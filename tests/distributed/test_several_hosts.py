"""Runs over several hosts have the losses of the same run on one, whichever launcher starts their processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.hosts import Hosts, hosts
from tests.distributed.small_run import environment, rows, small_recipe, understudy, write

pytestmark = pytest.mark.distributed

BIN = Path(sys.executable).parent
SECONDS = 240


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with hosts(2, tmp_path_factory.mktemp("hosts")) as made:
        yield made


def short_recipe(directory: Path) -> Path:
    """Four FSDP2 steps."""
    directory.mkdir()
    recipe = small_recipe(directory)
    recipe |= {"strategy": "fsdp", "evaluation": {}}
    recipe["training"]["max_steps"] = 4
    return write(recipe, directory)


def losses(directory: Path) -> list[dict[str, Any]]:
    """What a run logged, without timings."""
    kept = ("step", "loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens", "eval_loss")
    return [{key: row[key] for key in kept if key in row} for row in rows(directory)]


@pytest.fixture(scope="module")
def on_one_host(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("one") / "host"
    done = understudy(["train", str(short_recipe(directory))], directory)
    assert done.returncode == 0, done.stderr
    return losses(directory)


def torchrun(recipe: Path, made: Hosts) -> list[list[str]]:
    meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint={made[0].name}:29400", "--rdzv-id=one"]
    command = [str(BIN / "torchrun"), "--nnodes=2", "--nproc-per-node=1", *meet, "-m", "understudy"]
    return [[*command, "train", str(recipe)]] * 2


def accelerate(recipe: Path, made: Hosts) -> list[list[str]]:
    # As torchrun with --node-rank, --master-addr and --master-port.
    place = [f"--main_process_ip={made[0].name}", "--main_process_port=29500", "--num_machines=2", "--num_processes=2"]
    command = [str(BIN / "accelerate"), "launch", "--multi_gpu", *place]
    return [[*command, f"--machine_rank={i}", "--module", "understudy", "train", str(recipe)] for i in range(2)]


def deepspeed(recipe: Path, made: Hosts) -> list[list[str]]:
    hostfile = recipe.with_name("hostfile")
    hostfile.write_text("".join(f"{host.name} slots=1\n" for host in made))
    place = [f"--hostfile={hostfile}", f"--master_addr={made[0].address}", "--no_ssh"]
    command = [str(BIN / "deepspeed"), *place]
    return [[*command, f"--node_rank={i}", "--module", "understudy", "train", str(recipe)] for i in range(2)]


@pytest.mark.parametrize("commands", [torchrun, accelerate, deepspeed])
def test_a_launcher_over_two_hosts_trains_as_one_host_does(
    commands: Callable[[Path, Hosts], list[list[str]]],
    two_hosts: Hosts,
    on_one_host: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    directory = tmp_path / "run"
    recipe = short_recipe(directory)
    logs = [directory / f"{host.name}.log" for host in two_hosts]
    started: list[subprocess.Popen[bytes]] = []
    for host, command, log in zip(two_hosts, commands(recipe, two_hosts), logs):
        started.append(host.start(command, environment(directory), log))
    statuses = [process.wait(SECONDS) for process in started]
    assert statuses == [0, 0], "\n".join(log.read_text() for log in logs)
    two_hosts.wait_until_empty(10)
    theirs = losses(directory)
    assert [row["step"] for row in theirs] == [1, 2, 3, 4, 4]
    for mine, other in zip(on_one_host, theirs):
        assert other == pytest.approx(mine, rel=1e-6)
