"""Writes what SkyPilot and Kubeflow's training operator accept, as JSON schemas, beside this file. They are facts of
packages under Apache-2.0, too heavy to be installed for a test:

pip install skypilot==0.14.1 kubeflow-training==1.9.4 && python tests/unit/schedulers/extract.py
"""

from __future__ import annotations

import inspect
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kubernetes.client
from kubeflow.training import models
from sky import task
from sky.utils import schemas

HERE = Path(__file__).parent
PLAIN = {"str": "string", "int": "integer", "bool": "boolean", "float": "number", "datetime": "string"}
KEPT = {
    *("KubeflowOrgV1PyTorchJob", "KubeflowOrgV1PyTorchJobSpec", "KubeflowOrgV1RunPolicy", "KubeflowOrgV1ReplicaSpec"),
    *("V1ObjectMeta", "V1PodTemplateSpec", "V1PodSpec", "V1Container", "V1EnvVar", "V1ResourceRequirements"),
    *("V1Volume", "V1VolumeMount", "V1PersistentVolumeClaimVolumeSource", "V1EmptyDirVolumeSource"),
}
"""Of the hundreds of types of a pod; what is of another is not looked into."""


def type_schema(name: str) -> dict[str, Any]:
    if found := re.fullmatch(r"list\[(.*)\]", name):
        return {"type": "array", "items": type_schema(found[1])}
    if found := re.fullmatch(r"dict\(str, (.*)\)", name):
        return {"type": "object", "additionalProperties": type_schema(found[1])}
    if name in PLAIN:
        return {"type": PLAIN[name]}
    return {"$ref": f"#/$defs/{name}"} if name in KEPT else {}


def class_schema(name: str) -> dict[str, Any]:
    kind = getattr(models, name, None) or getattr(kubernetes.client, name)
    needed = re.findall(r"client_side_validation and (\w+) is None", inspect.getsource(kind))
    return {
        "type": "object",
        "properties": {kind.attribute_map[key]: type_schema(told) for key, told in kind.openapi_types.items()},
        "required": sorted({kind.attribute_map[key] for key in needed}),
        "additionalProperties": False,
    }


def write(name: str, packages: list[str], values: dict[str, Any]) -> None:
    told = {"from": {package: version(package) for package in packages}, "license": "Apache-2.0", **values}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in told.items()]
    (HERE / name).write_text("{" + ",\n".join(lines) + "}\n")


write(
    "skypilot.json",
    ["skypilot"],
    {"name": task._VALID_NAME_REGEX, "task": schemas.get_task_schema(), "resources": schemas.get_resources_schema()},
)
root = {"$ref": "#/$defs/KubeflowOrgV1PyTorchJob", "$defs": {name: class_schema(name) for name in sorted(KEPT)}}
write("pytorchjob.json", ["kubeflow-training", "kubernetes"], {"job": root})
