"""What `understudy launch` reads in a hostfile, runs on each host, and says of hosts that cannot take part."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from understudy.cli.main import exit_status
from understudy.errors import UserError
from understudy.launch import ssh_keeper, ssh_run
from understudy.launch.hostfile import ListedHost, read_hostfile
from understudy.launch.ssh import SshLauncher
from understudy.launch.ssh_check import UnfitHostsError, check_hosts
from understudy.launch.ssh_facts import host_facts
from understudy.recipe.environment import carried_variables

pytestmark = pytest.mark.unit

HOSTS = (ListedHost("node1", 4), ListedHost("me@node2", None))


def launcher(**variables: str) -> SshLauncher:
    return SshLauncher("/opt/my env/bin/python", Path("/data/a b"), 29500, ("Port=2222",), variables)


def test_a_hostfile_may_have_comments_users_and_lines_without_slots(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# all\nnode1 slots=4\n\nme@node2   # as many as it has\n10.0.0.3\tslots=2\n")
    assert read_hostfile(file) == (*HOSTS, ListedHost("10.0.0.3", 2))
    assert [host.name for host in read_hostfile(file)] == ["node1", "node2", "10.0.0.3"]


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("a slots=2\nb slots=0\n", 2, "slots=0"),
        ("a slots=two\n", 1, "slots=two"),
        ("a slots=²\n", 1, "slots=²"),
        ("a slots=1 slots=2\n", 1, "'slots=2' is not understood"),
        ("a\n\nb max_slots=2\n", 3, "'max_slots=2' is not understood"),
        ("a 2\n", 1, "'2' is not understood"),
        ("a\nme@A slots=1\n", 2, "A is on line 1 too"),
        ("-oProxyCommand=reboot\n", 1, "is no host's name"),
        ("a;reboot\n", 1, "is no host's name"),
        ("# none\n", None, "it lists no host"),
    ],
)
def test_a_wrong_line_is_named(text: str, line: int | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_hostfile(file)
    assert said in str(caught.value)
    assert (caught.value.file, caught.value.line) == (str(file), line)


def test_each_host_is_told_its_place_and_the_first_one_where_all_meet() -> None:
    for node, line in enumerate(launcher().run(HOSTS, ["train", "recipe.yaml"])):
        assert line[0] == "ssh"
        assert line[-2] == HOSTS[node].target
        assert line.index("Port=2222") < line.index("BatchMode=yes"), "of two the first one counts"
        place = ["NNODES=2", f"NODE_RANK={node}", "MASTER_ADDR=node1", "MASTER_PORT=29500"]
        slots = ["NPROC_PER_NODE=4"] if node == 0 else []
        assert shlex.split(line[-1])[:-6] == ["exec", "env", *place, *slots]


def test_a_shell_at_the_other_end_gets_every_word_as_it_is() -> None:
    hostile = ["name=a b;reboot", "x=$(reboot)", "y=`reboot`", "z='\"\n!", "*"]
    [line] = launcher(NCCL_DEBUG_FILE="/a b/$HOME").run(HOSTS[:1], ["train", "my recipe.yaml", *hostile])
    # It is to print what it was given.
    remote = line[-1].replace("exec env", f"exec env PRINT=1 {shlex.quote(sys.executable)} -c {shlex.quote(PRINT)}", 1)
    told = json.loads(subprocess.run(["sh", "-c", remote], capture_output=True, text=True, check=True).stdout)
    assert "NCCL_DEBUG_FILE=/a b/$HOME" in told
    assert told[-len(hostile) - 2 :] == ["train", "my recipe.yaml", *hostile]


PRINT = "import json, sys; print(json.dumps(sys.argv[1:]))"


def test_variables_are_carried_by_name_and_secrets_apart() -> None:
    shown, secrets = carried_variables(
        {
            "NCCL_DEBUG": "INFO",
            "PYTHONPATH": "/a",
            "UNDERSTUDY_CACHE": "/c",
            "UNDERSTUDY_CONSOLE": "5",
            "UNDERSTUDY_TEACHER_API_KEY": "k",
            "HF_TOKEN": "t",
            "PATH": "/bin",
            "MASTER_ADDR": "x",
        }
    )
    assert shown == {"NCCL_DEBUG": "INFO", "PYTHONPATH": "/a", "UNDERSTUDY_CACHE": "/c"}
    assert secrets == {"UNDERSTUDY_TEACHER_API_KEY": "k", "HF_TOKEN": "t"}


def test_a_dry_run_prints_commands_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    (tmp_path / "hosts").write_text("node1\nnode2\n")
    (tmp_path / "recipe.yaml").write_text("model: {path: m}\ndata: {train: [{path: d.jsonl}]}\n")
    command = ["launch", str(tmp_path / "recipe.yaml"), "--hostfile", str(tmp_path / "hosts"), "--dry-run", "name=a b"]
    assert exit_status(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [shlex.split(line)[-2] for line in lines] == ["node1", "node2"]
    assert all("NCCL_DEBUG=INFO" in line and "hf_secret" not in line for line in lines)
    assert all(shlex.split(shlex.split(line)[-1])[-1] == "name=a b" for line in lines)


def fake_ssh(directory: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a program called ssh before all others."""
    program = directory / "ssh"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"torch": "2.9.0"}, "node1 has torch 2.9.0, and this host "),
        ({"transformers": None}, "node1 has transformers not installed, and this host "),
        ({"recipe": None}, "recipe.yaml is not there: node1 must see the same file"),
        ({"directory": None}, "node1 has no directory "),
    ],
)
def test_every_host_that_differs_is_named(
    change: dict[str, str | None], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.yaml").write_text("a")
    ours = host_facts(str(tmp_path), "recipe.yaml", "10.0.0.1", "0")
    changes = [{"machine": machine, **change} for machine in "ab"]
    lines = refusals(tmp_path, ours, changes, monkeypatch).splitlines()
    assert said in lines[0]
    assert len(lines) == len(HOSTS)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({}, {"first host": None}, "node2 does not know the name node1"),
        (
            {"first host": "127.0.0.1"},
            {"first host": "127.0.1.1"},
            "node1 is node2 itself there; list the first host by",
        ),
        ({"why the port is not free": "Address already in use"}, {}, "node1 cannot open port 29500, where the hosts"),
        ({"machine": "m"}, {"machine": "m"}, "node1 and node2 are one host; give it one line"),
    ],
)
def test_hosts_that_do_not_fit_together_are_named(
    first: dict[str, str | None],
    second: dict[str, str | None],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = host_facts(str(tmp_path), "recipe.yaml", "10.0.0.1", "0")
    line = refusals(tmp_path, ours, [{"machine": "a", **first}, {"machine": "b", **second}], monkeypatch)
    assert line.startswith(said)
    assert "\n" not in line


def test_what_only_the_first_host_opens_may_be_in_use_on_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        facts = host_facts(str(tmp_path), "recipe.yaml", "10.0.0.1", str(taken.getsockname()[1]))
    assert facts["why the port is not free"] == "Address already in use"
    free = {"why the port is not free": None, "machine": "a"}
    answers(tmp_path, facts, [free, {}], monkeypatch)
    check_hosts(launcher(), HOSTS, "recipe.yaml", facts)


def refusals(
    directory: Path,
    ours: dict[str, str | None],
    changes: Sequence[dict[str, str | None]],
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    answers(directory, ours, changes, monkeypatch)
    with pytest.raises(UnfitHostsError) as caught:
        check_hosts(launcher(), HOSTS, "recipe.yaml", ours)
    assert caught.value.exit_status == 2
    return str(caught.value)


def answers(
    directory: Path,
    ours: dict[str, str | None],
    changes: Sequence[dict[str, str | None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Has each host answer with our facts, changed."""
    for host, change in zip(HOSTS, changes):
        (directory / host.target).write_text("Welcome\n" + json.dumps({**ours, **change}))
    fake_ssh(
        directory, f'for word; do [ -f {directory}/"$word" ] && cat {directory}/"$word"; done; exit 0', monkeypatch
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("cluster.nodes=3", "3 hosts, but {file} lists 2; make them the same"),
        ("cluster.min_nodes=3", "3 hosts at least, but {file} lists 2"),
        ("cluster.processes=2", "2 processes a host, but {file} has slots=4 for node1"),
    ],
)
def test_a_hostfile_that_contradicts_the_recipe_is_refused_before_any_host_is_asked(
    override: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "hosts"
    file.write_text("node1 slots=4\nnode2\n")
    (tmp_path / "recipe.yaml").write_text("model: {path: m}\ndata: {train: [{path: d.jsonl}]}\n")
    command = ["launch", str(tmp_path / "recipe.yaml"), "--hostfile", str(file), "--dry-run", override]
    assert exit_status(command) == 2
    assert said.format(file=file) in capsys.readouterr().err


def test_without_the_environment_on_a_host_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ssh(tmp_path, "echo 'sh: 1: /opt/my env/bin/python: not found' >&2; exit 127", monkeypatch)
    with pytest.raises(UnfitHostsError, match=r"node1: /opt/my env/bin/python cannot run understudy there"):
        check_hosts(launcher(), HOSTS[:1], "recipe.yaml", {})


def test_without_ssh_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no ssh here"):
        check_hosts(launcher(), HOSTS, "recipe.yaml", {})


FAKE_HOSTS = """\
for last; do :; done
case "$last" in
*ssh_facts*) sed "s/MACHINE/$$/" {directory}/facts; exit 0 ;;
esac
echo "$last" >> {directory}/starts
case "$last" in
*NODE_RANK=0*) {first} ;;
esac
{others}
"""


def launch_on_fake_hosts(
    directory: Path, first: str, others: str, limits: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> int:
    """The status of `launch` where, in place of two hosts, these lines of shell run."""
    (directory / "recipe.yaml").write_text("model: {path: m}\ndata: {train: [{path: d.jsonl}]}\n")
    (directory / "hosts").write_text("node1\nnode2\n")
    monkeypatch.chdir(directory)
    facts = host_facts(str(directory), "recipe.yaml", "10.0.0.1", "0")
    same = {"first host": "10.0.0.1", "machine": "MACHINE", "why the port is not free": None}
    (directory / "facts").write_text(json.dumps(facts | same))
    fake_ssh(directory, FAKE_HOSTS.format(directory=directory, first=first, others=others), monkeypatch)
    return exit_status(["launch", "recipe.yaml", "--hostfile", "hosts", *limits])


@pytest.mark.parametrize(("most", "starts"), [(1, ["1"]), (2, ["2", "0"]), (3, ["3", "1"])])
def test_restarts_count_the_same_whether_the_hosts_or_their_launcher_begins_them(
    most: int,
    starts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first host of each start is lost after one restart by itself."""
    limits = [f"cluster.max_restarts={most}", "cluster.min_nodes=1"]
    first = "printf 'one\\000\\n\\001two\\n'; exit 255"
    assert launch_on_fake_hosts(tmp_path, first, "exit 5", limits, monkeypatch) == 5
    last = [line for line in (tmp_path / "starts").read_text().splitlines() if "NODE_RANK=0" in line]
    assert [re.findall(r"max_restarts=(\d+)", line)[-1] for line in last] == starts
    assert "node1: one\nnode1: two\n" in capsys.readouterr().out


@pytest.mark.parametrize("status", [0, 75])
def test_what_the_first_host_ends_with_counts_where_it_went_on_without_another(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = ["cluster.max_restarts=1", "cluster.min_nodes=1"]
    assert launch_on_fake_hosts(tmp_path, f"sleep 0.5; exit {status}", "exit 5", limits, monkeypatch) == status


def test_a_host_that_has_fallen_silent_is_not_waited_for_once_the_others_have_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ssh_run, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(ssh_run, "SETTLE_SECONDS", 100.0)
    assert launch_on_fake_hosts(tmp_path, "exit 5", "exec sleep 100", [], monkeypatch) == 5
    assert "node2: the connection was lost" in capsys.readouterr().err


def test_a_keeper_gives_signs_of_life_and_of_restarts(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    keeper = ssh_keeper._Keeper()
    telling = "from understudy.launch.keeper_note import *; tell_of_restart(); print(cut_off_from_launch())"
    started = {"stdin": keeper._note.fileno(), "env": {**os.environ, "UNDERSTUDY_KEPT": "1"}}
    told = subprocess.run([sys.executable, "-c", telling], capture_output=True, check=True, **started)
    assert told.stdout == b"False\n"
    now = time.monotonic()
    for later in (0.0, 0.1, 2.1):
        keeper._tell(now + later)
    assert capfdbinary.readouterr().out == b"\0\1\0"


def test_a_keeper_that_was_held_up_itself_does_not_take_the_connection_for_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keeper = ssh_keeper._Keeper()
    reading, writing = os.pipe()
    monkeypatch.setattr(ssh_keeper, "STDIN", reading)
    monkeypatch.setattr(ssh_keeper, "SILENCE_SECONDS", 0.0)
    os.write(writing, b"ALIVE\n")
    assert not keeper._is_forsaken()
    os.read(reading, 100)
    assert keeper._is_forsaken()
