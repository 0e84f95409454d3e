"""The launchers that users have start the same run as our own: same steps, same losses, one model."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.small_run import rows, run, small_recipe, write

pytestmark = pytest.mark.distributed

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launcher(name: str) -> list[str]:
    """The command line that starts a module as two processes without accelerators."""
    if name == "torchrun":
        return [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2", "-m"]
    if name == "accelerate":
        port = f"--main_process_port={free_port()}"
        return [str(BIN / "accelerate"), "launch", "--cpu", "--num_processes=2", port, "--module"]
    return [str(BIN / "deepspeed"), "--num_gpus=2", f"--master_port={free_port()}", "--module"]


def trained_rows(command: list[str], directory: Path) -> list[dict[str, Any]]:
    """What six FSDP2 steps log under `command`, without timings."""
    directory.mkdir()
    recipe = small_recipe(directory)
    recipe |= {"strategy": "fsdp", "evaluation": {}}
    recipe["training"]["max_steps"] = 6
    done = run([*command, "understudy", "train", str(write(recipe, directory))], directory)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("reloaded with transformers") == 1
    index = json.loads((directory / "run" / "model" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 2, "both processes write their share"
    assert {path.name for path in (directory / "run" / "logs").iterdir()} == {"rank-0.log", "rank-1.log"}
    kept = ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens", "eval_loss")
    return [{key: row[key] for key in kept if key in row} for row in rows(directory)]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return trained_rows([sys.executable, "-m"], tmp_path_factory.mktemp("ours") / "run")


@pytest.mark.parametrize("name", ["torchrun", "accelerate", "deepspeed"])
def test_a_launcher_starts_the_run_that_we_would(name: str, ours: list[dict[str, Any]], tmp_path: Path) -> None:
    theirs = trained_rows(launcher(name), tmp_path / name)
    assert [row["step"] for row in theirs] == [1, 2, 3, 4, 5, 6, 6]
    for mine, other in zip(ours, theirs):
        assert other == pytest.approx(mine, rel=1e-6)
    assert len(ours) == len(theirs)
