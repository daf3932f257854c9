"""The files for clusters hold what Ray and KubeRay know."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from support import ROOT

# Fields of KubeRay's ray.io/v1 at 1.6, from its API reference: https://ray-project.github.io/kuberay/reference/api/
POD = {
    "metadata": None,
    "spec": {"serviceAccountName": None, "containers": None, "nodeSelector": None, "tolerations": None},
}
GROUP = {"rayStartParams": None, "template": POD, "labels": None, "resources": None}
CLUSTER = {
    "rayVersion": None, "enableInTreeAutoscaling": None, "suspend": None, "gcsFaultToleranceOptions": None,
    "authOptions": {"mode": None, "enableK8sTokenAuth": None, "secretName": None},
    "autoscalerOptions": {"version": None, "resources": None, "image": None, "imagePullPolicy": None, "securityContext": None, "env": None, "envFrom": None, "volumeMounts": None, "upscalingMode": None, "idleTimeoutSeconds": None},
    "headGroupSpec": {**GROUP, "serviceType": None, "headService": None, "enableIngress": None},
    "workerGroupSpecs": {**GROUP, "groupName": None, "replicas": None, "minReplicas": None, "maxReplicas": None, "numOfHosts": None, "idleTimeoutSeconds": None, "scaleStrategy": None, "suspend": None},
}  # fmt: skip
JOB = {
    "entrypoint": None, "runtimeEnvYAML": None, "jobId": None, "submissionMode": None, "submitterPodTemplate": None,
    "submitterConfig": None, "metadata": None, "clusterSelector": None, "activeDeadlineSeconds": None, "backoffLimit": None,
    "entrypointNumCpus": None, "entrypointNumGpus": None, "entrypointResources": None, "ttlSecondsAfterFinished": None,
    "shutdownAfterJobFinishes": None, "deletionStrategy": None, "suspend": None, "managedBy": None, "rayClusterSpec": CLUSTER,
}  # fmt: skip
MANIFEST = {"apiVersion": None, "kind": None, "metadata": None, "spec": JOB}


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def ray_schema() -> Any:
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.submodule_search_locations
    return json.loads((Path(spec.submodule_search_locations[0]) / "autoscaler" / "ray-schema.json").read_text())


def unknown(found: Any, known: Any, place: str = "") -> list[str]:
    """Fields that are in a manifest and not in the API."""
    if known is None:
        return []
    if isinstance(found, list):
        return [field for item in found for field in unknown(item, known, place)]
    named = {key: f"{place}.{key}".strip(".") for key in found}
    return [named[key] for key in found if key not in known] + [
        field for key in found if key in known for field in unknown(found[key], known[key], named[key])
    ]


@pytest.mark.parametrize("name", ["cluster.yaml", "deploy/onprem.yaml"])
def test_rays_launcher_takes_it(name: str) -> None:
    jsonschema.validate(load(name), ray_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**load(name), "max_worker": 1}, ray_schema())


def test_nodes_on_aws_have_the_labels_of_the_page() -> None:
    types = load("cluster.yaml")["available_node_types"]
    assert {name: kind["labels"]["tier"] for name, kind in types.items()} == {
        "head": "head",
        "decode": "cpu",
        "encode": "gpu",
    }
    assert types["encode"]["resources"]["GPU"] == 1
    assert load("cluster.yaml")["max_workers"] == sum(kind.get("max_workers", 0) for kind in types.values())


def test_kuberay_knows_every_field() -> None:
    manifest = load("deploy/rayjob.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    assert unknown(manifest, MANIFEST) == []
    manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplica"] = 1
    assert unknown(manifest, MANIFEST) == ["spec.rayClusterSpec.workerGroupSpecs.maxReplica"]


def test_groups_on_kubernetes_are_whole() -> None:
    cluster = load("deploy/rayjob.yaml")["spec"]["rayClusterSpec"]
    assert {group["groupName"]: group["labels"]["tier"] for group in cluster["workerGroupSpecs"]} == {
        "decode": "cpu",
        "encode": "gpu",
    }
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert all(
            {"name", "image", "resources"} <= container.keys() for container in group["template"]["spec"]["containers"]
        )
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_versions_agree() -> None:
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray=="))
    version = pinned.removeprefix("ray==")
    assert load("deploy/rayjob.yaml")["spec"]["rayClusterSpec"]["rayVersion"] == version
    assert f"FROM rayproject/ray:{version}-py311" in (ROOT / "deploy" / "Dockerfile").read_text()
