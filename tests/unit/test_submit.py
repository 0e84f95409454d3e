"""What `understudy submit` writes: quoted, accepted by the shell's own checkers, and running only what was meant."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.cli.main import exit_status
from understudy.errors import UserError
from understudy.launch import slurm_jobs
from understudy.launch.network_profiles import find_network, network_names, network_variables
from understudy.launch.slurm import slurm_script
from understudy.launch.submission import Submission

pytestmark = pytest.mark.unit

HOSTILE = [
    "a;touch pwned",
    "$(touch pwned)",
    "`touch pwned`",
    "a\ntouch pwned",
    "it's",
    '"q"',
    " a b ",
    "*",
    "#x",
    "\\",
]
texts = st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20))
STUB = """#!/bin/sh
case $0 in
*/scontrol) [ "$2" = hostnames ] && echo n1 || { [ "$2" = node ] && echo "   NodeAddr=10.0.0.7 NodeHostName=n1"; } ;;
esac
[ "$1" = requeue ] && echo "$2" > "$OUT/requeued"
[ "${0##*/}" = srun ] && { printf '%s\\0' "$@" > "$OUT/argv"; env > "$OUT/env"; pwd > "$OUT/pwd"
    [ -n "$CANCEL" ] && kill -TERM "$PPID"; exit "$STATUS"; }
exit 0
"""
PLACE = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}


def submission(**changes: Any) -> Submission:
    fields: dict[str, Any] = {"name": "job", "recipe": "/r.yaml", "directory": "/", "environment": "venv:/opt/v/bin"}
    return Submission(**{**fields, **changes})


def run_script(
    script: str, scratch: Path, status: int = 0, *, cancel: bool = False, restarts: int = 9
) -> subprocess.CompletedProcess[bytes]:
    bin_directory = scratch / "bin"
    bin_directory.mkdir(exist_ok=True)
    for name in ("srun", "scontrol", "conda", "understudy"):
        (bin_directory / name).write_text(STUB)
        (bin_directory / name).chmod(0o755)
    environment = {
        "PATH": f"{bin_directory}:{os.environ['PATH']}",
        "OUT": str(scratch),
        "STATUS": str(status),
        "CANCEL": "1" if cancel else "",
        **PLACE,
        "SLURM_RESTART_COUNT": str(restarts),
    }
    return subprocess.run(["bash"], input=script.encode(), env=environment, capture_output=True, timeout=60)


@settings(max_examples=25, deadline=None)
@given(texts, st.lists(texts, max_size=3), texts, st.sampled_from(["venv", "conda", "container"]))
def test_hostile_names_reach_the_command_as_they_are_and_run_nothing(
    tmp_path_factory: pytest.TempPathFactory, recipe: str, overrides: list[str], place: str, kind: str
) -> None:
    scratch = tmp_path_factory.mktemp("job")
    work = scratch / f"w{place.replace('/', '_')}"
    work.mkdir()
    job = submission(
        recipe=f"/{recipe}", overrides=tuple(overrides), directory=str(work), environment=f"{kind}:{place}"
    )
    done = run_script(slurm_script(job), scratch)
    assert done.returncode == 0, done.stderr
    argv = (scratch / "argv").read_bytes().decode().split("\0")[:-1]
    assert argv[argv.index("understudy") :] == ["understudy", "train", f"/{recipe}", *overrides]
    assert list(work.iterdir()) == []
    assert (scratch / "pwd").read_bytes() == f"{work}\n".encode()


@pytest.mark.parametrize("kind", ["venv", "conda", "container"])
@pytest.mark.parametrize("name", HOSTILE)
def test_scripts_with_hostile_names_pass_the_shells_own_checkers(kind: str, name: str) -> None:
    checker = shutil.which("shellcheck")
    if checker is None:
        assert not os.environ.get("CI"), "this machine lacks shellcheck (make system-packages)"
        pytest.skip("this machine lacks shellcheck (make system-packages)")
    job = submission(
        recipe=name, overrides=(name,), directory=name, environment=f"{kind}:{name}", variables={"A": name}
    )
    script = slurm_script(job)
    for command in (["bash", "-n"], [checker, "-s", "bash", "-"]):
        done = subprocess.run(command, input=script, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", [name for name in HOSTILE if name.isprintable() and not set(name) & set('"\\%')])
def test_losses_are_noted_in_a_log_directory_of_any_name(tmp_path: Path, name: str) -> None:
    logs = tmp_path / "work" / name
    logs.mkdir(parents=True)
    job = submission(directory=str(logs.parent), log_directory=str(logs), max_restarts=1)
    done = run_script(slurm_script(job), tmp_path, 5)
    assert (done.returncode, done.stderr) == (5, b"")
    assert [path.name for path in logs.iterdir()] == ["slurm-12345.losses"]
    assert list(logs.parent.iterdir()) == [logs]


@pytest.mark.parametrize("name", ["a;b", "$(x)", "a\nb", "a b", "'", '"', "#x"])
def test_what_a_directive_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="could misread"):
        submission(name=name)
    with pytest.raises(UserError, match="could misread"):
        submission(options={"partition": name})


@pytest.mark.parametrize(
    ("name", "has"),
    [("it's\nmine", "' and a line break"), ('a "b"', 'a space and "'), ("\x1b[0m", "U+001B"), ("é", "é")],
)
def test_a_name_that_is_refused_is_told_by_what_is_wrong_and_what_would_do(name: str, has: str) -> None:
    with pytest.raises(UserError) as refused:
        submission(name=name)
    assert str(refused.value) == (
        f"--job-name has {has}, which the batch system could misread; write it with letters a to z and A to Z, digits, "
        "and _ . , : + = @ / [ ] * & | ( ) -."
    )
    submission(name="azAZ09_.,:+=@/[]*&|()-")


@pytest.mark.parametrize("memory", ["12XB", "1.5G", "G", "12Gi", "-1"])
def test_what_is_no_size_of_memory_is_refused(memory: str) -> None:
    with pytest.raises(UserError, match=r"--mem \S+ is no size"):
        slurm_script(submission(options={"mem": memory}))


@pytest.mark.parametrize("memory", ["0", "4096", "64G", "64gb"])
def test_sizes_of_memory_are_passed_on(memory: str) -> None:
    assert f"#SBATCH --mem={memory}\n" in slurm_script(submission(options={"mem": memory}))


@pytest.mark.parametrize("directory", ['"', "a\nb", "%j", "\\"])
def test_a_log_directory_that_slurm_would_read_otherwise_is_refused(directory: str) -> None:
    with pytest.raises(UserError, match="log-dir"):
        submission(log_directory=directory)


@pytest.mark.parametrize(
    ("status", "ends", "again"),
    [
        (0, 0, 0),
        (1, 1, 0),
        (2, 2, 0),
        (3, 3, 0),
        (4, 4, 0),
        (75, 75, 9),
        (138, 75, 9),
        (143, 75, 9),
        (5, 5, 2),
        (137, 5, 2),
    ],
)
def test_a_job_is_queued_again_when_that_can_help_and_after_losses_as_often_as_allowed(
    tmp_path: Path, status: int, ends: int, again: int
) -> None:
    script = slurm_script(submission(directory=str(tmp_path), max_restarts=2))
    for start in range(min(again, 3) + 1):
        done = run_script(script, tmp_path, status)
        assert done.returncode == ends
        assert (tmp_path / "requeued").exists() == (start < again), done.stdout
        (tmp_path / "requeued").unlink(missing_ok=True)


def test_being_preempted_uses_up_no_restart(tmp_path: Path) -> None:
    script = slurm_script(submission(directory=str(tmp_path), max_restarts=1))
    for status, again in [(75, True), (75, True), (5, True), (75, True), (5, False)]:
        done = run_script(script, tmp_path, status)
        assert (tmp_path / "requeued").exists() == again, done.stdout
        (tmp_path / "requeued").unlink(missing_ok=True)
    run_script(script, tmp_path, 5, restarts=0)  # another job, of the same number
    assert (tmp_path / "requeued").exists()


@pytest.mark.parametrize("status", [75, 143, 5])
def test_a_job_that_is_cancelled_stays_so(tmp_path: Path, status: int) -> None:
    done = run_script(slurm_script(submission(directory=str(tmp_path), max_restarts=2)), tmp_path, status, cancel=True)
    assert done.returncode in (status, 75)
    assert not (tmp_path / "requeued").exists()


def test_an_environment_without_understudy_is_said_and_ends_with_2(tmp_path: Path) -> None:
    script = slurm_script(submission(environment="venv:/nowhere"))
    done = subprocess.run(
        ["bash"], input=script, env=PLACE | {"PATH": "/bin:/usr/bin"}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "environment has no understudy" in done.stderr


@pytest.mark.parametrize(
    ("time", "signal_seconds"),
    [("2", 120), ("2:00", 120), ("0:01:59", 119), ("0-0:1", 60), ("0-0:1:1", 61), ("1:0:0", 3600)],
)
def test_a_time_limit_that_is_over_before_the_signal_is_refused(time: str, signal_seconds: int) -> None:
    slurm_script(submission(options={"time": time}, signal_seconds=signal_seconds - 1))
    with pytest.raises(UserError, match="--signal-seconds"):
        slurm_script(submission(options={"time": time}, signal_seconds=signal_seconds))


@pytest.mark.parametrize("time", ["soon", "-5", "1:2:3:4", "1-2-3", "1h", ":"])
def test_what_is_no_time_limit_is_refused(time: str) -> None:
    with pytest.raises(UserError, match="no time limit"):
        slurm_script(submission(options={"time": time}))


@pytest.mark.parametrize("time", ["0", "UNLIMITED", "infinite", "3", "12:00:00", "2-00:00:00", "1-0"])
def test_time_limits_are_passed_on(time: str) -> None:
    assert f"#SBATCH --time={time}\n" in slurm_script(submission(options={"time": time}))


def test_hosts_are_told_where_to_meet(tmp_path: Path) -> None:
    run_script(slurm_script(submission(gpus_per_node=4, variables=network_variables("efa", "ens5"))), tmp_path)
    told = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)
    expected = {"NNODES": "2", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": str(20000 + 345), "NPROC_PER_NODE": "4"}
    expected |= {"FI_PROVIDER": "efa", "NCCL_SOCKET_IFNAME": "ens5"}
    assert {name: told[name] for name in expected} == expected


def test_networks_are_found_by_what_drivers_show(tmp_path: Path) -> None:
    assert find_network(tmp_path) is None
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/hccn.conf").touch()
    assert find_network(tmp_path) == "hccs"
    port = tmp_path / "sys/class/infiniband/mlx5_0/ports/1"
    port.mkdir(parents=True)
    for layer, name in (("Ethernet", "roce"), ("InfiniBand", "infiniband")):
        (port / "link_layer").write_text(f"{layer}\n")
        assert find_network(tmp_path) == name
    (tmp_path / "sys/class/infiniband/efa_0").mkdir()
    assert find_network(tmp_path) == "efa"


def test_no_network_names_an_interface_by_itself() -> None:
    for name in network_names():
        variables = network_variables(name, None)
        assert not [key for key in variables if "IFNAME" in key]
        assert "eth7" in network_variables(name, "eth7").values()


def test_bad_input_ends_with_2_and_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {path: m}\ndata: {train: [{path: d.jsonl}]}\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    cases = {
        ("submit", str(recipe)): "no sbatch here",
        ("submit", str(recipe), "--nodes", "1", "--min-nodes", "2"): "--min-nodes",
        ("submit", str(recipe), "--to", "kubernetes", "--dry-run"): "--image",
        ("submit", str(recipe), "--to", "skypilot"): "--dry-run",
        ("submit", str(recipe), "trainin.epochs=1", "--dry-run"): "training",
        ("submit", str(recipe), "--environment", "magic:x"): "venv:",
        ("submit", str(recipe), "--nodes", "0"): "--nodes",
        ("submit", str(recipe), "--dry-run", "--volume", "c:/p"): "--volume",
        ("submit", str(recipe), "--to", "kubernetes", "--image", "i", "--dry-run", "--volume", "c:p"): "--volume",
        ("submit", str(recipe), "--to", "kubernetes", "--image", "i", "--dry-run", "--volume", "A b:/p"): "--volume",
        ("submit", str(recipe), "--nodes", "2", "cluster.nodes=4"): "cluster.nodes",
        ("submit", str(recipe), "--nodes", "2", "cluster.min_nodes=3"): "--min-nodes",
        ("submit", str(recipe), "--gpus-per-node", "4", "cluster.processes=2"): "cluster.processes",
    }
    for arguments, sentence in cases.items():
        assert exit_status(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert sentence in error


@pytest.mark.parametrize(
    ("scheduler", "given", "named"),
    [
        ("kubernetes", ("--partition", "p", "--follow"), "--partition and --follow"),
        ("kubernetes", ("--accelerator", "H100", "--signal-seconds", "120"), "--signal-seconds and --accelerator"),
        ("skypilot", ("--volume", "c:/p", "--mem", "4G"), "--mem and --volume"),
        ("slurm", ("--image", "i"), "--image"),
    ],
)
def test_options_that_a_scheduler_has_no_use_for_are_refused_by_name(
    scheduler: str, given: tuple[str, ...], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {path: m}\ndata: {train: [{path: d.jsonl}]}\n")
    assert exit_status(["submit", str(recipe), "--to", scheduler, *given, "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith(f"error: --to {scheduler} has no use for {named}; ")


def test_an_environment_that_is_not_here_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, programs = tmp_path / "r.yaml", tmp_path / "venv" / "bin"
    recipe.write_text("model: {path: m}\ndata: {train: [{path: d.jsonl}]}\n")
    asked = ["submit", str(recipe), "--environment", f"venv:{programs.parent}", "--dry-run"]
    assert exit_status(asked) == 0
    assert capsys.readouterr().err == (
        f"note: there is no {programs / 'understudy'} on this host; the job's hosts must have it\n"
    )
    programs.mkdir(parents=True)
    (programs / "understudy").touch()
    assert exit_status(asked) == 0
    assert capsys.readouterr().err == ""


def stub(directory: Path, name: str, script: str) -> None:
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


def test_what_slurm_refuses_is_said_in_its_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {path: m}\ndata: {train: [{path: d.jsonl}]}\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    stub(
        tmp_path,
        "sbatch",
        "echo sbatch: error: no such partition >&2; echo sbatch: error: Batch job failed. >&2; exit 1",
    )
    assert exit_status(["submit", str(recipe)]) == 2
    assert capsys.readouterr().err == "error: Slurm refused the job: no such partition; Batch job failed.\n"
    (tmp_path / "file").touch()
    assert exit_status(["submit", str(recipe), "--log-dir", str(tmp_path / "file" / "logs")]) == 2
    assert "--log-dir" in capsys.readouterr().err


def test_following_shows_what_a_job_prints_and_waits_for_and_ends_as_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(slurm_jobs, "POLL_SECONDS", 0.01)
    output = tmp_path / "o u t"
    output.write_text("one\ntwo\n")
    told = [
        "echo 'JobId=7 JobState=PENDING Reason=Priority Restarts=0 ExitCode=0:0'",
        "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1",
        "echo 'JobId=7 JobState=PENDING Reason=Resources Restarts=0 ExitCode=0:0'",
        f"echo 'JobId=7 JobState=RUNNING Reason=None StdOut={output} Power= ExitCode=0:0'",
        f"echo 'JobId=7 JobState=FAILED Reason=None StdOut={output} Power= ExitCode=3:0'",
    ]
    for number, answer in enumerate(told):
        stub(tmp_path, f"answer{number}", answer)
    (tmp_path / "count").write_text("0")
    stub(tmp_path, "scontrol", f"cd {tmp_path}; read n < count; echo $((n+1)) > count; exec ./answer$n")
    said: list[str] = []
    notes: list[str] = []
    assert slurm_jobs.follow("7", said.append, notes.append) == 3
    assert said == ["one", "two"]
    assert [note.split()[-1] for note in notes] == ["Priority", "Resources"]


def test_dry_run_prints_the_script_and_submits_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {path: m}\ndata: {train: [{path: d.jsonl}]}\n")
    assert exit_status(["submit", str(recipe), "--nodes", "4", "--min-nodes", "2", "--dry-run", "--json"]) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert text.startswith("#!/bin/bash\n")
    assert "#SBATCH --nodes=2-4\n" in text


def test_a_recipe_that_can_do_with_fewer_hosts_starts_again_on_fewer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {path: m}\ndata: {train: [{path: d.jsonl}]}\ncluster: {nodes: 4, min_nodes: 3}\n")
    assert exit_status(["submit", str(recipe), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --nodes=3-4\n" in text
    assert " cluster.nodes=1 cluster.min_nodes=null\n" in text
