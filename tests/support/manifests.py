"""Render the overlays, and validate every document by a strict schema of its kind."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
OVERLAYS = ROOT / "infra/kuberay/overlays"
CRDS = Path(os.environ.get("KUBERAY_CRDS_DIR", ROOT.parent / "shared/kuberay-crds"))
KUBERNETES = "1.32"  # the oldest that the manifests are meant for

Document = dict[str, Any]


def overlays() -> list[str]:
    return sorted(path.parent.name for path in OVERLAYS.glob("*/kustomization.yaml"))


@cache
def _render(overlay: str) -> str:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: no overlay can be rendered")
    run = subprocess.run(["kubectl", "kustomize", str(OVERLAYS / overlay)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def render(overlay: str) -> list[Document]:
    """Return the documents that `kubectl apply -k` would send."""
    return list(yaml.safe_load_all(_render(overlay)))


def find(documents: list[Document], kind: str) -> list[Document]:
    return [document for document in documents if document["kind"] == kind]


def walk(value: Any) -> Iterator[Document]:
    """Yield every mapping inside a value."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from walk(inner)


def pod_specs(document: Document) -> list[Document]:
    return [inner for inner in walk(document) if "containers" in inner]


def check(document: Document) -> None:
    """Validate a document by the schema of its kind, which allows no field that the kind does not have.

    Raises jsonschema.ValidationError or kubernetes_validate.ValidationError.
    """
    group = document["apiVersion"].partition("/")[0]
    if group != "ray.io" and document["kind"] not in OTHERS:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    for error in _validator(document["kind"], is_ray=group == "ray.io").iter_errors(document):
        raise error


@cache
def _validator(kind: str, *, is_ray: bool) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(_kuberay_schema(kind) if is_ray else _whole(kind))


def _kuberay_schema(kind: str) -> Document:
    """Return the published CRD's schema, made strict. Skip the test where the CRDs are not available."""
    if kind == "RayService":  # its cluster is a RayCluster's spec
        cluster = _kuberay_schema("RayCluster")["properties"]["spec"]
        spec = _object("serveConfigV2 rayClusterConfig", serveConfigV2=TEXT, rayClusterConfig=cluster)
        metadata = _object("name", name=TEXT, namespace=TEXT, labels=TEXTS)
        return _object("apiVersion kind metadata spec", apiVersion=TEXT, kind=TEXT, metadata=metadata, spec=spec)
    path = CRDS / f"{kind.lower()}s.yaml"
    if not path.exists():
        pytest.skip(f"{path} is absent: set KUBERAY_CRDS_DIR to the folder with KubeRay's CRDs")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    definition = yaml.load(path.read_text(), Loader=loader)
    (version,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    return _strict(version["schema"]["openAPIV3Schema"])


def _strict(schema: Any) -> Any:
    """Turn a CRD's schema into a JSON schema that refuses unknown fields and lets defaulted ones be absent."""
    if isinstance(schema, list):
        return [_strict(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {name: _strict(value) for name, value in schema.items() if name not in ("properties", "required")}
    if schema.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
        strict["type"] = ["integer", "string"]
    if "properties" in schema:
        strict["properties"] = {name: _strict(value) for name, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in schema:
            strict["additionalProperties"] = False
        defaulted = {name for name, value in schema["properties"].items() if "default" in value}
        strict["required"] = [name for name in schema.get("required", []) if name not in defaulted]
    if schema.get("properties") == {} or set(schema) <= {"type", "description"}:
        strict.pop("additionalProperties", None)
    return strict


def _object(required: str = "", **properties: Any) -> Document:
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


def _many(item: Document) -> Document:
    return {"type": "array", "items": item, "minItems": 1}


TEXT = {"type": "string", "minLength": 1}
TEXTS = {"type": "object", "additionalProperties": TEXT}
SELECTOR = _object("matchLabels", matchLabels=TEXTS)
DURATION = {"type": "string", "pattern": r"^\d+(s|m|h|d)$"}
QUOTA = _object("name nominalQuota", name=TEXT, nominalQuota={"type": ["integer", "string"]})
OTHERS: dict[str, Document] = {  # the fields that we use of the kinds of the Prometheus operator and of Kueue
    "PodMonitor": _object(
        "selector podMetricsEndpoints",
        selector=SELECTOR,
        podTargetLabels=_many(TEXT),
        podMetricsEndpoints=_many(_object("port", port=TEXT, interval=DURATION)),
    ),
    "PrometheusRule": _object(
        "groups",
        groups=_many(
            _object(
                "name rules",
                name=TEXT,
                rules=_many(
                    _object(
                        "alert expr for labels annotations",
                        alert=TEXT,
                        expr=TEXT,
                        labels=_object("severity", severity={"enum": ["warning", "critical"]}),
                        annotations=_object("summary", summary=TEXT),
                        **{"for": DURATION},
                    )
                ),
            )
        ),
    ),
    "ResourceFlavor": _object(nodeLabels=TEXTS),
    "ClusterQueue": _object(
        "namespaceSelector resourceGroups",
        namespaceSelector=SELECTOR,
        queueingStrategy={"enum": ["BestEffortFIFO", "StrictFIFO"]},
        resourceGroups=_many(
            _object(
                "coveredResources flavors",
                coveredResources=_many(TEXT),
                flavors=_many(_object("name resources", name=TEXT, resources=_many(QUOTA))),
            )
        ),
    ),
    "LocalQueue": _object("clusterQueue", clusterQueue=TEXT),
}


def _whole(kind: str) -> Document:
    metadata = _object("name", name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS)
    return _object("apiVersion kind metadata", apiVersion=TEXT, kind=TEXT, metadata=metadata, spec=OTHERS[kind])


def misspelt(document: Document) -> Iterator[tuple[str, Document]]:
    """Yield copies of a document with one typo each: in a field at the top, in the spec, and in its deepest place."""
    for path in (("metadata",), ("spec",), _deepest(document.get("spec", {}), ("spec",))):
        copy = deepcopy(document)
        place = copy
        for step in path[:-1]:
            place = place[step]
        if not isinstance(place, dict) or path[-1] not in place:
            continue
        place[f"{path[-1]}x"] = place.pop(path[-1])
        yield ".".join(map(str, path)), copy


FREE = ("labels", "annotations", "matchLabels", "nodeSelector", "limits", "requests", "data", "rayStartParams")
"""Mappings whose keys users choose freely."""


def _deepest(value: Any, path: tuple[Any, ...]) -> tuple[Any, ...]:
    """Find the path to the deepest field that a schema names."""
    best = path
    entries: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        entries = list(value.items())
    elif isinstance(value, list):
        entries = list(enumerate(value))
    for name, inner in entries:
        here = (*path, name)
        below = here if name in FREE else _deepest(inner, here)
        while isinstance(below[-1], int):
            below = below[:-1]
        if len(below) > len(best):
            best = below
    return best
