"""What `understudy submit` writes for Kubernetes and SkyPilot: what their own schemas accept, with a place for each
host."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from understudy.cli.main import exit_status
from understudy.launch.kubernetes import kubernetes_manifest
from understudy.launch.network_profiles import network_variables
from understudy.launch.skypilot import skypilot_task
from understudy.launch.submission import Submission

pytestmark = pytest.mark.unit

SCHEMAS = Path(__file__).parent / "schedulers"
"""Extracted from the schedulers' own packages by `extract.py` there."""
FULL: dict[str, Any] = {
    "nodes": 3,
    "gpus_per_node": 8,
    "max_restarts": 2,
    "image": "registry/image:1",
    "accelerator": "H100",
    "variables": network_variables("efa", "eth0"),
    "overrides": ("training.epochs=1", "name=$(x) \n\"'"),
}
NAMES = ["job", "My_Job", "--x..y__z--", "été", "日本", "a" * 300, "1.5b"]


def submission(**changes: Any) -> Submission:
    fields: dict[str, Any] = {"name": "job", "recipe": "/r.yaml", "directory": "/", "environment": "venv:/opt/v/bin"}
    return Submission(**{**fields, **changes})


def check(value: Any, file: str, part: str) -> None:
    schema = json.loads((SCHEMAS / file).read_text())[part]
    Draft202012Validator.check_schema(schema)
    assert [error.message for error in Draft202012Validator(schema).iter_errors(value)] == []


@pytest.mark.parametrize("changes", [{"image": "i"}, FULL, FULL | {"volumes": (("claim", "/data"), ("c.2", "/runs"))}])
def test_manifests_are_what_the_training_operator_accepts(changes: dict[str, Any]) -> None:
    check(yaml.safe_load(kubernetes_manifest(submission(**changes))), "pytorchjob.json", "job")


def test_the_schema_refuses_what_the_training_operator_does() -> None:
    manifest = yaml.safe_load(kubernetes_manifest(submission(image="i")))
    manifest["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]["imagee"] = "i"
    with pytest.raises(AssertionError, match="imagee"):
        check(manifest, "pytorchjob.json", "job")


@pytest.mark.parametrize("changes", [{}, FULL])
def test_tasks_are_what_skypilot_accepts(changes: dict[str, Any]) -> None:
    task = yaml.safe_load(skypilot_task(submission(**changes)))
    check(task, "skypilot.json", "task")
    check(task["resources"], "skypilot.json", "resources")


@pytest.mark.parametrize("name", NAMES)
def test_names_become_what_each_scheduler_can_have(name: str) -> None:
    recipe = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)  # as the command makes one of a recipe's name
    task = yaml.safe_load(skypilot_task(submission(name=recipe)))
    assert re.fullmatch(json.loads((SCHEMAS / "skypilot.json").read_text())["name"], task["name"])
    manifest = yaml.safe_load(kubernetes_manifest(submission(name=recipe, image="i")))
    assert re.fullmatch("[a-z0-9]([a-z0-9-]{0,48}[a-z0-9])?", manifest["metadata"]["name"])


def test_volumes_are_mounted_where_the_user_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {path: m}\ndata: {train: [{path: d.jsonl}]}\n")
    asked = ["submit", str(recipe), "--to", "kubernetes", "--image", "i", "--dry-run"]
    assert exit_status(asked) == 0
    assert "--volume" in capsys.readouterr().err
    assert exit_status([*asked, "--volume", "team-disk:/work"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    pod = yaml.safe_load(printed.out)["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    (mount,) = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["mountPath"] == "/work"]
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == mount["name"]]
    assert volume["persistentVolumeClaim"] == {"claimName": "team-disk"}


def test_a_training_operator_job_has_a_pod_for_each_host() -> None:
    manifest = yaml.safe_load(kubernetes_manifest(submission(name="My_Job", nodes=3, gpus_per_node=8, image="i:1")))
    assert manifest["metadata"]["name"] == "my-job"
    specs = manifest["spec"]["pytorchReplicaSpecs"]
    assert {kind: spec["replicas"] for kind, spec in specs.items()} == {"Master": 1, "Worker": 2}
    container = specs["Worker"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["torchrun", "-m", "understudy", "train", "/r.yaml"]
    assert manifest["spec"]["nprocPerNode"] == "8"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}


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
