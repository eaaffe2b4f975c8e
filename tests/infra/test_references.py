"""What manifests mention exists: entry points, settings, images, ports, Secrets, ConfigMaps, volumes, services, resources."""

import importlib
import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _get_ray_resources_from_group_spec

from jobs.common.config import parse_config
from jobs.common.job import JobConfig
from jobs.serve import build, is_loopback, read_arguments
from pipelines.stages.contract import Resources
from pipelines.train.loop.config import WorkerResources
from tests.infra.test_manifests import quantity
from tests.support.manifests import ROOT, Document, find, overlays, pod_specs, render, walk

DOCKERFILE = (ROOT / "infra/docker/Dockerfile").read_text()
OTHERS_IMAGES = ("redis", "postgres")


@pytest.fixture(params=overlays())
def documents(request: pytest.FixtureRequest) -> list[Document]:
    return render(request.param)


@pytest.fixture(scope="module")
def secrets() -> dict[str, set[str]]:
    """Names and keys of the Secrets that make_secrets.sh makes when it is told everything."""
    told = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "c", "AWS_ENDPOINT_URL_S3": "http://d"}
    told |= {"HF_TOKEN": "e", "MLFLOW_ARTIFACTS": "s3://f/g", "SANA_API_KEYS": "h,i"}
    script = ROOT / "infra/kuberay/make_secrets.sh"
    run = subprocess.run([str(script)], env=os.environ | told, capture_output=True, text=True, check=True)
    made = [document for document in yaml.safe_load_all(run.stdout) if document]
    assert all(document["metadata"]["namespace"] == "sana" for document in made)
    return {document["metadata"]["name"]: set(document["data"]) for document in made}


def templates(documents: list[Document]) -> Iterator[tuple[dict[str, str], Document]]:
    """Labels and spec of every pod that may come to be; Ray's operator adds labels of its own."""
    for document in documents:
        for inner in walk(document):
            if "template" in inner and "containers" in inner["template"].get("spec", {}):
                labels = dict(inner["template"].get("metadata", {}).get("labels", {}))
                if "rayStartParams" in inner:
                    group = inner.get("groupName", "headgroup")
                    kind = "worker" if "groupName" in inner else "head"
                    labels |= {"ray.io/is-ray-node": "yes", "ray.io/node-type": kind, "ray.io/group": group}
                yield labels, inner["template"]["spec"]


def selected(documents: list[Document], labels: dict[str, str]) -> list[Document]:
    return [pod for own, pod in templates(documents) if labels.items() <= own.items()]


def port_names(pods: list[Document]) -> set[str]:
    return {port["name"] for pod in pods for container in pod["containers"] for port in container.get("ports", [])}


def test_config_maps_secrets_and_claims_exist(documents: list[Document], secrets: dict[str, set[str]]) -> None:
    maps = {document["metadata"]["name"]: set(document["data"]) for document in find(documents, "ConfigMap")}
    claims = {document["metadata"]["name"] for document in find(documents, "PersistentVolumeClaim")}
    for inner in (inner for document in documents for inner in walk(document)):
        for key in ("secretKeyRef", "secretRef", "secret"):
            if isinstance(reference := inner.get(key), dict):
                name = reference.get("name", reference.get("secretName"))
                assert name in secrets, f"no {name} in make_secrets.sh"
                assert reference.get("key", next(iter(secrets[name]))) in secrets[name], reference
        for key in ("configMapKeyRef", "configMapRef", "configMap"):
            if isinstance(reference := inner.get(key), dict):
                assert reference["name"] in maps, reference
                assert reference.get("key", next(iter(maps[reference["name"]]))) in maps[reference["name"]], reference
        if isinstance(claim := inner.get("persistentVolumeClaim"), dict):
            assert claim["claimName"] in claims, claim
        if name := inner.get("serviceAccountName"):
            assert name in {document["metadata"]["name"] for document in find(documents, "ServiceAccount")}


def test_volumes_that_are_mounted_exist_and_are_used(documents: list[Document]) -> None:
    for document in documents:
        claims = {claim["metadata"]["name"] for inner in walk(document) for claim in inner.get("volumeClaimTemplates", [])}
        for pod in pod_specs(document):
            volumes = {volume["name"] for volume in pod.get("volumes", [])} | claims
            mounts = [mount for container in pod["containers"] for mount in container.get("volumeMounts", [])]
            assert {mount["name"] for mount in mounts} == volumes
            assert len({mount["mountPath"] for mount in mounts}) == len(mounts)


def test_images_are_targets_of_the_dockerfile_or_pinned(documents: list[Document]) -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE))
    for inner in (inner for document in documents for inner in walk(document)):
        if isinstance(image := inner.get("image"), str):
            name, _, tag = image.rpartition(":")
            if name.rsplit("/", 1)[-1] == "sana":
                assert tag in targets, image
            else:
                assert name in OTHERS_IMAGES and re.match(r"\d+\.\d+", tag), image


def test_services_and_monitors_find_pods_with_their_ports(documents: list[Document]) -> None:
    for service in find(documents, "Service"):
        pods = selected(documents, service["spec"]["selector"])
        assert pods, service["metadata"]["name"]
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in port_names(pods), port
    for monitor in find(documents, "PodMonitor"):
        pods = selected(documents, monitor["spec"]["selector"]["matchLabels"])
        assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= port_names(pods)
    for budget in find(documents, "PodDisruptionBudget"):
        assert selected(documents, budget["spec"]["selector"]["matchLabels"]), budget["metadata"]["name"]


def test_network_policies_select_pods_and_their_ports(documents: list[Document]) -> None:
    for policy in find(documents, "NetworkPolicy"):
        pods = selected(documents, policy["spec"]["podSelector"].get("matchLabels", {}))
        assert pods, policy["metadata"]["name"]
        for rule in policy["spec"].get("ingress", []):
            assert {port["port"] for port in rule.get("ports", [])} <= port_names(pods)
            for peer in rule["from"]:
                labels = peer.get("podSelector", {}).get("matchLabels", {})
                if labels.get("ray.io/node-type") != "redis-cleanup":  # the operator's own, which it makes when it is needed
                    assert not labels or selected(documents, labels), labels


def test_probes_and_scripts_exist(documents: list[Document]) -> None:
    maps = {document["metadata"]["name"]: set(document["data"]) for document in find(documents, "ConfigMap")}
    for pod in (pod for document in documents for pod in pod_specs(document)):
        for container in pod["containers"]:
            ports = {port["name"] for port in container.get("ports", [])}
            for inner in walk({name: probe for name, probe in container.items() if name.endswith("Probe")}):
                assert inner.get("port", next(iter(ports))) in ports
            command = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
            if command is None:
                continue
            script = Path(command[1])
            (volume,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == str(script.parent)]
            (config,) = [entry["configMap"]["name"] for entry in pod["volumes"] if entry["name"] == volume]
            assert script.name in maps[config]
            assert int(command[2]) < pod["terminationGracePeriodSeconds"]


def test_services_that_are_named_exist(documents: list[Document]) -> None:
    ports = {
        (service["metadata"]["name"], port["port"])
        for service in find(documents, "Service")
        for port in service["spec"]["ports"]
    }
    for inner in (inner for document in documents for inner in walk(document)):
        if address := inner.get("redisAddress"):
            host, port = address.split(":")
            assert (host, int(port)) in ports
        for argument in inner.get("args", []) if "image" in inner else []:
            if match := re.search(r"@(\w+):(\d+)/", argument):
                assert (match[1], int(match[2])) in ports


def test_mlflow_lets_the_jobs_in() -> None:
    from mlflow.server.security_utils import is_allowed_host_header

    documents = render("cluster")
    tracking = yaml.safe_load(job_files(documents)["dataset.yaml"])["tracking"]["uri"]
    (server,) = find(documents, "Deployment")
    arguments = dict(
        argument.removeprefix("--").split("=", 1)
        for argument in server["spec"]["template"]["spec"]["containers"][0]["args"]
        if "=" in argument
    )
    allowed = arguments["allowed-hosts"].split(",")
    for host in (urlparse(tracking).netloc, "localhost:5000"):
        assert is_allowed_host_header(allowed, host)
    assert not is_allowed_host_header(allowed, "evil.example.com")
    assert (urlparse(tracking).hostname, urlparse(tracking).port) == ("mlflow", 5000)


def job_files(documents: list[Document]) -> dict[str, str]:
    """What the drivers find in /etc/sana."""
    (files,) = [document["data"] for document in find(documents, "ConfigMap") if document["metadata"]["name"] == "sana-jobs"]
    return files


@pytest.fixture
def jobs(documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, JobConfig]:
    """Every RayJob's configuration, parsed as its entry point parses it."""
    for name, content in job_files(documents).items():
        (tmp_path / name).write_text(content)
    assert "\nWORKDIR /app\nCOPY jobs/configs jobs/configs\n" in DOCKERFILE
    parsed = {}
    for job in find(documents, "RayJob"):
        python, flag, module, *arguments = shlex.split(job["spec"]["entrypoint"])
        assert (python, flag) == ("python", "-m")
        arguments = [re.sub("^/etc/sana/", f"{tmp_path}/", re.sub("^/app/", f"{ROOT}/", argument)) for argument in arguments]
        entry = importlib.import_module("jobs.demo.main" if module == "jobs.demo" else module)
        taken: list[Any] = []
        monkeypatch.setattr(entry, "run_job", lambda job_class, run, argv, taken=taken, **kwargs: taken.append(job_class))
        entry.main([])
        parsed[job["metadata"]["name"]] = parse_config(taken[0], arguments, prog=module, description="")
    return parsed


def test_entry_points_take_their_settings(jobs: dict[str, JobConfig]) -> None:
    assert jobs
    for name, job in jobs.items():
        assert job.dataset_uri.startswith("s3://my-bucket/" if name != "sana-demo" else "/data/"), name


def reserved(config: object) -> Iterator[Resources | WorkerResources]:
    """Every reservation in a job's configuration."""
    if isinstance(config, Resources | WorkerResources):
        yield config
    elif is_dataclass(config):
        for field in fields(config):
            yield from reserved(getattr(config, field.name))
    elif isinstance(config, list | tuple):
        for inner in config:
            yield from reserved(inner)


def test_what_stages_reserve_fits_a_pod_of_their_cluster(documents: list[Document], jobs: dict[str, JobConfig]) -> None:
    for job in find(documents, "RayJob"):
        cluster = job["spec"]["rayClusterSpec"]
        groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
        offers = [offer(group) for group in groups]
        needs = list(reserved(jobs[job["metadata"]["name"]]))
        assert needs
        for need in needs:
            wanted = {"CPU": need.num_cpus, "GPU": need.num_gpus, **need.custom}
            assert any(all(have.get(name, 0) >= count for name, count in wanted.items()) for have in offers), wanted
            if need.num_gpus:
                assert need.custom, f"{job['metadata']['name']}: any GPU would do for {need}"


@pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")  # of Ray Serve, when it is imported
def test_the_server_takes_its_settings_and_fits_a_pod_of_its_cluster() -> None:
    from ray.serve.schema import ServeDeploySchema

    documents = render("serving")
    (service,) = find(documents, "RayService")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    module, _, function = application.import_path.partition(":")
    assert getattr(importlib.import_module(module), function) is build
    job = read_arguments(application.args)
    assert job.require_key and is_loopback(config.http_options.host) is False
    wanted = {"CPU": job.resources.num_cpus, "GPU": job.resources.num_gpus, **job.resources.custom}
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert any(all(offer(group).get(name, 0) >= count for name, count in wanted.items()) for group in groups)
    (policy,) = (policy for policy in find(documents, "NetworkPolicy") if policy["metadata"]["name"] == "serve")
    (rule,) = policy["spec"]["ingress"]
    operator = {"kubernetes.io/metadata.name": "kuberay-system"}  # it asks the proxies before it calls the service ready
    assert operator in [peer["namespaceSelector"]["matchLabels"] for peer in rule["from"]]
    ports = [port for _, pod in templates([service]) for port in pod["containers"][0]["ports"] if port["name"] == "serve"]
    assert {port["containerPort"] for port in ports} == {config.http_options.port} and len(ports) == 1 + len(groups)


def offer(group: Document) -> dict[str, float]:
    """The logical resources of a pod of a group, as KubeRay hands them to `ray start`."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    params = group["rayStartParams"]
    cpus = float(params["num-cpus"]) if "num-cpus" in params else quantity(limits["cpu"])
    return {"CPU": cpus, "GPU": float(params.get("num-gpus", 0)), **by_operator(params.get("resources", "{}"))}


def by_operator(resources: str) -> dict[str, float]:
    """Custom resources as KubeRay 1.7 reads them (getResourcesMap in pod.go): without outer quotes, and nothing unescaped."""
    read: dict[str, float] = json.loads(resources.strip("'\"` "))
    return read


def test_operator_autoscaler_and_ray_start_read_the_same_resources() -> None:
    groups = [
        group for document in render("cluster") for inner in walk(document) for group in inner.get("workerGroupSpecs", [])
    ]
    assert sum("resources" in group["rayStartParams"] for group in groups) > 3
    for group in groups:
        offered, limits = offer(group), group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert offered["GPU"] == quantity(limits.get("nvidia.com/gpu", 0)), group["groupName"]
        autoscaler = _get_ray_resources_from_group_spec(group, is_head=False)
        assert {name: autoscaler.get(name, 0) for name in offered} == offered
        if text := group["rayStartParams"].get("resources"):
            (argument,) = shlex.split(f"--resources={text}")  # the operator writes the command for a shell
            assert json.loads(argument.removeprefix("--resources=")) == by_operator(text)
    with pytest.raises(json.JSONDecodeError):
        by_operator(r'"{\"training\": 8}"')  # the form of Ray's own examples
