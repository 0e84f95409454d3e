"""A PyTorchJob for Kubeflow's training operator. Pure; imports no torch."""

from __future__ import annotations

import re
from typing import Any

import yaml

from understudy.errors import UserError
from understudy.launch.submission import Submission

__all__ = ["kubernetes_manifest"]


def kubernetes_manifest(job: Submission) -> str:
    """The manifest: torchrun in every pod, which the operator tells its place. PyTorchJob needs nothing but the
    operator in the cluster; the newer TrainJob needs a runtime that an administrator wrote.

    Raises `UserError` without an image.
    """
    if job.image is None:
        raise UserError("--to kubernetes needs --image, a container image that has understudy in it.")
    container: dict[str, Any] = {
        "name": "pytorch",  # by which the operator finds it
        "image": job.image,
        "command": ["torchrun", "-m", "understudy", *job.command],
        "workingDir": job.directory,
    }
    if job.variables:
        container["env"] = [{"name": name, "value": value} for name, value in job.variables.items()]
    if job.gpus_per_node is not None:
        container["resources"] = {"limits": {"nvidia.com/gpu": str(job.gpus_per_node)}}
    # Collectives between the GPUs of a host need more shared memory than the 64 MiB that a container gets.
    volumes: list[dict[str, Any]] = [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}]
    container["volumeMounts"] = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    for number, (claim, path) in enumerate(job.volumes):
        volumes.append({"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": claim}})
        container["volumeMounts"].append({"name": f"volume-{number}", "mountPath": path})
    template = {"spec": {"containers": [container], "volumes": volumes}}
    replica = {"restartPolicy": "OnFailure", "template": template}
    replicas: dict[str, Any] = {"Master": {"replicas": 1, **replica}}
    if job.nodes > 1:
        replicas["Worker"] = {"replicas": job.nodes - 1, **replica}
    manifest = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": _object_name(job.name)},
        "spec": {
            "nprocPerNode": str(job.gpus_per_node or 1),
            "runPolicy": {"backoffLimit": job.max_restarts},
            "pytorchReplicaSpecs": replicas,
        },
    }
    return yaml.dump(manifest, Dumper=_Plain, sort_keys=False)


class _Plain(yaml.SafeDumper):
    """Writes what stands twice twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _object_name(name: str) -> str:
    """As Kubernetes has names: small letters, digits and dashes, of which pods' names leave 50."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:50].strip("-") or "understudy"
