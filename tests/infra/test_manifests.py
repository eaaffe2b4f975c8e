"""Every overlay renders, and what it renders has no field that its kind does not have."""

import json
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest

from tests.support.manifests import Document, check, find, misspelt, overlays, pod_specs, render, walk

QUEUE = "kueue.x-k8s.io/queue-name"
INVALID = (jsonschema.ValidationError, kubernetes_validate.ValidationError)


@pytest.mark.parametrize("overlay", overlays())
def test_every_document_is_valid(overlay: str) -> None:
    documents = render(overlay)
    assert len(documents) > 5
    for document in sorted(documents, key=is_ray):  # last: where the CRDs are absent, what came before has been checked
        check(document)


def is_ray(document: Document) -> bool:
    return document["apiVersion"].startswith("ray.io/")


def test_a_typo_in_any_kind_is_caught() -> None:
    everything = sorted((document for overlay in overlays() for document in render(overlay)), key=is_ray)
    documents = {document["kind"]: document for document in everything}
    assert {"RayCluster", "RayJob", "Deployment", "NetworkPolicy", "PrometheusRule", "LocalQueue"} <= set(documents)
    for kind, document in documents.items():
        typos = dict(misspelt(document))
        assert typos, kind
        for place, wrong in typos.items():
            with pytest.raises(INVALID):
                check(wrong)
                pytest.fail(f"{kind}: nobody saw the typo at {place}")


def test_typos_of_the_kind_that_kubectl_lets_pass() -> None:
    (cluster,) = find(render("cluster"), "RayCluster")
    text = json.dumps(cluster)
    for right, wrong in {
        '"rayStartParams"': '"rayStartParam"',
        '"containerPort"': '"containerPrt"',
        '"minReplicas": 0': '"minReplicas": "none"',
        '"mode": "token"': '"mode": "tokens"',
        '"idleTimeoutSeconds"': '"idleTimeoutSecond"',
    }.items():
        assert right in text
        with pytest.raises(INVALID):
            check(json.loads(text.replace(right, wrong, 1)))


@pytest.mark.parametrize("overlay", overlays())
def test_pods_have_no_rights_and_limits(overlay: str) -> None:
    pods = [pod for document in render(overlay) for pod in pod_specs(document)]
    assert pods
    for pod in pods:
        security = pod["securityContext"]
        assert security["runAsNonRoot"] and security["runAsUser"] > 0 and security["seccompProfile"]["type"] == "RuntimeDefault"
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert not any("hostPath" in volume for volume in pod.get("volumes", []))
        for container in pod["containers"]:
            assert container["securityContext"] == container["securityContext"] | {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= set(container["resources"]["limits"]), container["name"]
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]), container["name"]


@pytest.mark.parametrize("overlay", overlays())
def test_no_door_is_open_to_the_world(overlay: str) -> None:
    documents = render(overlay)
    for service in find(documents, "Service"):
        assert service["spec"].get("type", "ClusterIP") == "ClusterIP"
    assert not find(documents, "Ingress")
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in find(documents, "NetworkPolicy")}
    assert policies["deny-ingress"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    for name, policy in policies.items():
        for rule in policy.get("ingress", []):
            assert rule.get("from"), f"{name} lets anybody in"
    clusters = [inner for document in documents for inner in walk(document) if "headGroupSpec" in inner]
    assert clusters
    for cluster in clusters:
        assert cluster["authOptions"] == {"mode": "token"}
        assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"


@pytest.mark.parametrize("overlay", overlays())
def test_no_secret_is_in_the_repository(overlay: str) -> None:
    assert not find(render(overlay), "Secret")


def test_jobs_get_the_cluster_of_their_overlay() -> None:
    for overlay in ("cluster", "spot"):
        documents = render(overlay)
        (cluster,) = find(documents, "RayCluster")
        jobs = find(documents, "RayJob")
        assert len(jobs) == 8
        assert all(job["metadata"]["name"] == f"sana-{job['metadata']['labels']['sana.dev/job']}" for job in jobs)
        for job in jobs:
            assert job["spec"]["rayClusterSpec"] == cluster["spec"] and job["spec"]["suspend"] is True
    groups = {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}
    for name in ("caption", "encode", "train"):
        assert groups[name]["template"]["spec"]["nodeSelector"]["karpenter.sh/capacity-type"] == "spot"


def test_a_queued_training_has_a_fixed_size_that_its_quota_admits() -> None:
    documents = render("kueue")
    (queue,) = find(documents, "LocalQueue")
    queued = {job["metadata"]["name"]: job["metadata"]["labels"].get(QUEUE) for job in find(documents, "RayJob")}
    assert {name for name, label in queued.items() if label} == {"sana-train"}
    assert queued["sana-train"] == queue["metadata"]["name"]
    (job,) = [job for job in find(documents, "RayJob") if job["metadata"]["name"] == "sana-train"]
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is False
    pods = [(1, cluster["headGroupSpec"])] + [(group["replicas"], group) for group in cluster["workerGroupSpecs"]]
    (quotas,) = [group["flavors"][0]["resources"] for group in find(documents, "ClusterQueue")[0]["spec"]["resourceGroups"]]
    for quota in quotas:
        needed = sum(
            count * quantity(container["resources"]["requests"].get(quota["name"], 0))
            for count, group in pods
            for container in group["template"]["spec"]["containers"]
        )
        assert 0 < needed <= quantity(quota["nominalQuota"]), quota["name"]


def test_shared_memory_fits_the_memory_limit() -> None:
    for document in render("cluster"):
        for pod in pod_specs(document):
            limit = quantity(pod["containers"][0]["resources"]["limits"]["memory"])
            for volume in pod.get("volumes", []):
                if volume.get("emptyDir", {}).get("medium") == "Memory":
                    assert 0.2 * limit <= quantity(volume["emptyDir"]["sizeLimit"]) <= 0.5 * limit, Path(volume["name"])


def quantity(value: str | int) -> float:
    """A Kubernetes quantity."""
    units = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    text = str(value)
    for unit, factor in units.items():
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    return float(text)


def test_nothing_keeps_the_notice_of_a_spot_node_from_its_pods() -> None:
    """Karpenter evicts them: no disruption budget may refuse that, and no annotation."""
    documents = render("spot")
    clusters = [*find(documents, "RayCluster"), *({"spec": job["spec"]["rayClusterSpec"]} for job in find(documents, "RayJob"))]
    groups = [group for cluster in clusters for group in cluster["spec"]["workerGroupSpecs"]]
    spot = [group for group in groups if group["template"]["spec"].get("nodeSelector", {}).get("karpenter.sh/capacity-type")]
    assert {group["groupName"] for group in spot} == {"caption", "encode", "train"}
    assert not any(group["template"].get("metadata", {}).get("annotations") for group in spot)
    guarded = [str(budget["spec"]["selector"]) for budget in find(documents, "PodDisruptionBudget")]
    assert guarded and not any("group" in selector for selector in guarded)
