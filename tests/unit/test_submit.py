"""What `understudy submit` writes: quoted, accepted by the shell's own checkers, and running only what was meant."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.cli.main import exit_status
from understudy.errors import UserError
from understudy.launch.kubernetes import kubernetes_manifest
from understudy.launch.network_profiles import find_network, network_names, network_variables
from understudy.launch.skypilot import skypilot_task
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
[ "${0##*/}" = srun ] && { printf '%s\\0' "$@" > "$OUT/argv"; env > "$OUT/env"; pwd > "$OUT/pwd"; exit "$STATUS"; }
exit 0
"""


def submission(**changes: Any) -> Submission:
    fields: dict[str, Any] = {"name": "job", "recipe": "/r.yaml", "directory": "/", "environment": "venv:/opt/v/bin"}
    return Submission(**{**fields, **changes})


def run_script(script: str, scratch: Path, status: int = 0, restarts: int = 0) -> subprocess.CompletedProcess[bytes]:
    bin_directory = scratch / "bin"
    bin_directory.mkdir(exist_ok=True)
    for name in ("srun", "scontrol", "conda"):
        (bin_directory / name).write_text(STUB)
        (bin_directory / name).chmod(0o755)
    environment = {
        "PATH": f"{bin_directory}:{os.environ['PATH']}",
        "OUT": str(scratch),
        "STATUS": str(status),
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
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
    assert (scratch / "pwd").read_text() == f"{work}\n"


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


@pytest.mark.parametrize("name", ["a;b", "$(x)", "a\nb", "a b", "'", '"', "#x"])
def test_what_a_directive_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="could misread"):
        submission(name=name)
    with pytest.raises(UserError, match="could misread"):
        submission(options={"partition": name})


@pytest.mark.parametrize("directory", ['"', "a\nb", "%j", "\\"])
def test_a_log_directory_that_slurm_would_read_otherwise_is_refused(directory: str) -> None:
    with pytest.raises(UserError, match="log-dir"):
        submission(log_directory=directory)


@pytest.mark.parametrize(
    ("status", "restarts", "again"),
    [
        *((status, 0, False) for status in range(5)),
        *[(75, 9, True), (5, 1, True), (5, 2, False), (137, 0, True), (137, 2, False)],
    ],
)
def test_a_job_is_queued_again_when_that_can_help(tmp_path: Path, status: int, restarts: int, again: bool) -> None:
    done = run_script(slurm_script(submission(max_restarts=2)), tmp_path, status, restarts)
    assert done.returncode == status
    assert (tmp_path / "requeued").exists() == again


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


def test_a_training_operator_job_has_a_pod_for_each_host() -> None:
    manifest = yaml.safe_load(kubernetes_manifest(submission(name="My_Job", nodes=3, gpus_per_node=8, image="i:1")))
    assert manifest["metadata"]["name"] == "my-job"
    specs = manifest["spec"]["pytorchReplicaSpecs"]
    assert {kind: spec["replicas"] for kind, spec in specs.items()} == {"Master": 1, "Worker": 2}
    container = specs["Worker"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["torchrun", "-m", "understudy", "train", "/r.yaml"]
    assert manifest["spec"]["nprocPerNode"] == "8"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}


def test_a_skypilot_task_starts_one_launcher_a_host(tmp_path: Path) -> None:
    job = submission(recipe="/a b;c", directory=str(tmp_path), nodes=2, gpus_per_node=8, accelerator="H100")
    task = yaml.safe_load(skypilot_task(job))
    assert (task["num_nodes"], task["resources"]) == (2, {"accelerators": "H100:8"})
    stub = tmp_path / "understudy"
    stub.write_text('#!/bin/sh\nprintf "%s|" "$@" "$NNODES" "$NODE_RANK" "$MASTER_ADDR" "$MASTER_PORT"\n')
    stub.chmod(0o755)
    told = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **told}
    done = subprocess.run(["bash", "-c", task["run"]], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "train|/a b;c|2|1|10.0.0.1|29500|", done.stderr


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
    }
    for arguments, sentence in cases.items():
        assert exit_status(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert sentence in error


def test_dry_run_prints_the_script_and_submits_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {path: m}\ndata: {train: [{path: d.jsonl}]}\n")
    assert exit_status(["submit", str(recipe), "--nodes", "4", "--min-nodes", "2", "--dry-run", "--json"]) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert text.startswith("#!/bin/bash\n")
    assert "#SBATCH --nodes=2-4\n" in text
