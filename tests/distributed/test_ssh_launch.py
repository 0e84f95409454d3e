"""`understudy launch` over hosts that a real sshd answers on: the losses of one host, and one end for all."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.hosts import Hosts, hosts
from tests.distributed.small_run import rows, run, small_recipe, understudy, write

pytestmark = pytest.mark.distributed

SECONDS = 240
LONG = 100_000
WRONG, LOST, STOPPED = 2, 5, 75


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with hosts(3, tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture
def three_hosts(made_once: Hosts) -> Iterator[Hosts]:
    yield made_once
    made_once.restore()


def short_recipe(directory: Path, steps: int) -> Path:
    directory.mkdir(exist_ok=True)
    recipe = small_recipe(directory)
    recipe |= {"strategy": "fsdp", "evaluation": {}, "cluster": {"processes": "auto"}}
    recipe["training"] |= {"max_steps": steps, "global_batch_size": 6}
    recipe["optimizer"]["learning_rate"] = 2.0e-3  # so that the rounding of another number of processes does not grow
    return write(recipe, directory)


@dataclass(frozen=True)
class Launched:
    """`understudy launch`, running."""

    process: subprocess.Popen[bytes]
    directory: Path

    def said(self) -> str:
        return (self.directory / "launch.log").read_text()

    def wait_for(self, line: str, after: str = "") -> None:
        """Until it says this, the beginning of a line, after it has said `after`."""
        deadline = time.monotonic() + SECONDS
        while f"\n{line}" not in self.said().partition(after or "\n")[2]:
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def check_checkpoints(self) -> None:
        """One is committed, and what is committed verifies."""
        found = list((self.directory / "run" / "checkpoints").glob("*/COMMITTED"))
        assert found, self.said()
        for mark in found:
            done = understudy(["verify", str(mark.parent)], self.directory)
            assert done.returncode == 0, done.stderr


@contextmanager
def launched(
    recipe: Path, made: Hosts, lines: Sequence[str], more: Sequence[str] = (), *, on: int = 0
) -> Iterator[Launched]:
    directory = recipe.parent
    command = made[on].command(made.launch(recipe, lines, ["checkpoint.every=10", *more]))
    with (directory / "launch.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env=made.environment(directory),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield Launched(process, directory)
    finally:
        process.kill()
        process.wait()


def test_a_request_to_stop_reaches_all_and_ends_in_a_checkpoint(three_hosts: Hosts, tmp_path: Path) -> None:
    with launched(short_recipe(tmp_path, LONG), three_hosts, ["hostA", "hostB"]) as job:
        job.wait_for("hostA: checkpoint: ")
        job.process.send_signal(signal.SIGTERM)
        assert job.process.wait(SECONDS) == STOPPED, job.said()
        three_hosts.wait_until_empty(10)
        job.check_checkpoints()


def test_what_runs_on_a_host_ends_when_the_launcher_is_killed(three_hosts: Hosts, tmp_path: Path) -> None:
    with launched(short_recipe(tmp_path, LONG), three_hosts, ["hostB"]) as job:
        job.wait_for("hostB: checkpoint: ")
        job.process.kill()
        three_hosts.wait_until_empty(30)
        job.check_checkpoints()


def test_a_host_that_is_cut_off_is_named_and_left_out_while_enough_are_left(three_hosts: Hosts, tmp_path: Path) -> None:
    more = ["cluster.max_restarts=2", "cluster.min_nodes=2"]
    with launched(short_recipe(tmp_path, LONG), three_hosts, ["hostA", "hostB", "hostC"], more) as job:
        job.wait_for("hostA: checkpoint: ")
        three_hosts[1].pull_cable()
        job.wait_for("hostA: lost: host 1 (hostB) no longer answers")
        job.wait_for("hostA: checkpoint: ", after="hostA: lost: ")
        three_hosts[2].pull_cable()
        assert job.process.wait(SECONDS) == LOST, job.said()
        assert "host 2 (hostC) no longer answers" in job.said(), job.said()
        three_hosts.wait_until_empty(10)
        job.check_checkpoints()


def test_the_others_go_on_without_the_first_host_as_if_nothing_had_been(three_hosts: Hosts, tmp_path: Path) -> None:
    """It may not go on alone meanwhile, though one host would be enough: there would be two runs."""
    alone = tmp_path / "alone"
    done = understudy(["train", str(short_recipe(alone, 60)), "cluster.processes=1"], alone)
    assert done.returncode == 0, done.stderr
    recipe = short_recipe(tmp_path / "together", 60)
    more = ["cluster.max_restarts=1", "cluster.min_nodes=1", "cluster.nodes=3"]
    with launched(recipe, three_hosts, ["hostA", "hostB", "hostC"], more, on=1) as job:
        job.wait_for("hostA: checkpoint: ")
        three_hosts[0].pull_cable()
        assert job.process.wait(SECONDS) == 0, job.said()
        assert "hostA: the connection was lost" in job.said()
        assert "hostB: going on from " in job.said()
        three_hosts.wait_until_empty(10)
        job.check_checkpoints()
    assert losses(recipe.parent) == pytest.approx(losses(alone), rel=1e-5)


def losses(directory: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(directory) if "loss" in row}


def refusal(command: list[str], directory: Path, status: int) -> str:
    done = run(command, directory)
    assert done.returncode == status, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert not (directory / "run").exists()
    return errors[0]


def test_hosts_that_cannot_take_part_are_refused_in_a_sentence_before_anything_starts(
    three_hosts: Hosts, tmp_path: Path
) -> None:
    recipe = short_recipe(tmp_path, 4)

    def refused(status: int, *lines: str, more: Sequence[str] = ()) -> str:
        return refusal(three_hosts[0].command(three_hosts.launch(recipe, lines, more)), tmp_path, status)

    assert "hostX: there is no host of this name" in refused(WRONG, "hostA", "hostX")
    assert "10.77.0.9 cannot be reached" in refused(
        LOST, "hostA", "10.77.0.9", more=["--ssh-option", "ConnectTimeout=2"]
    )
    known = tmp_path / "known_hosts"
    known.write_text((three_hosts.keys / "known_hosts").read_text().replace("hostB,", "hostA,"))
    wrong_key = ["--ssh-option", f"UserKnownHostsFile={known}"]
    assert "hostB: its host key is not known" in refused(WRONG, "hostB", more=wrong_key)
    lines = known.read_text().splitlines()
    known.write_text(f"hostB {lines[0].partition(' ')[2]}\n")
    assert "hostB: its host key is not the one that is known" in refused(WRONG, "hostB", more=wrong_key)
    assert "hostB: it lets nobody in without a password" in refused(
        WRONG, "hostB", more=["--ssh-option", "PubkeyAuthentication=no"]
    )
    other = tmp_path / "other.yaml"
    other.write_text(recipe.read_text() + "name: other\n")
    with three_hosts.shown(three_hosts[2], recipe, other):
        assert f"{recipe} differs there" in refused(WRONG, "hostA", "hostC")
        assert "hostC must see the same file" in refused(WRONG, "hostA", "hostC")


def test_another_version_on_a_host_is_refused(three_hosts: Hosts, tmp_path: Path) -> None:
    import understudy as package

    recipe = short_recipe(tmp_path, 4)
    there = tmp_path / "there.py"
    there.write_text('__version__ = "9.9"\n')
    with three_hosts.shown(three_hosts[2], Path(str(package.__file__)), there):
        error = refusal(three_hosts[0].command(three_hosts.launch(recipe, ["hostA", "hostC"])), tmp_path, WRONG)
    assert f"hostC has understudy 9.9, and this host {package.__version__}" in error
