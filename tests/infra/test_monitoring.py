"""Dashboards and alerts ask only for what is exported: every expression is parsed, and held against a scrape of a real job."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families
from ray.dashboard.consts import GPU_TAG_KEYS
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from tests.support.http_server import free_port
from tests.support.manifests import ROOT

MONITORING = ROOT / "infra/monitoring"
DASHBOARD = json.loads((MONITORING / "dashboards/sana.json").read_text())
ALERTS = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
MONITOR = yaml.safe_load((MONITORING / "podmonitor.yaml").read_text())
VARIABLES = {variable["name"] for variable in DASHBOARD["templating"]["list"]}


def expressions() -> dict[str, str]:
    """By the panel or the alert that they belong to."""
    found = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", [])
    }
    for group in ALERTS["spec"]["groups"]:
        found |= {rule["alert"]: rule["expr"] for rule in group["rules"]}
    return found


def uses(expression: Any, grouped: frozenset[str] = frozenset()) -> Iterator[tuple[str, set[str]]]:
    """Every metric of a parsed expression, and the labels that it must have."""
    if isinstance(expression, promql_parser.MatrixSelector):
        expression = expression.vector_selector
    if isinstance(expression, promql_parser.VectorSelector):
        yield expression.name, {matcher.name for matcher in expression.matchers.matchers} | grouped
    elif isinstance(expression, promql_parser.AggregateExpr):
        yield from uses(expression.expr, grouped | set(expression.modifier.labels if expression.modifier else ()))
    else:
        for name in ("lhs", "rhs", "expr"):
            if hasattr(expression, name):
                yield from uses(getattr(expression, name), grouped)
        for argument in getattr(expression, "args", []):
            yield from uses(argument, grouped)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Every metric's labels: scraped, and of GPUs, which this machine may lack, as Ray's agent defines them."""
    command = [sys.executable, "-m", "tests.support.metrics_probe", str(tmp_path_factory.mktemp("metrics")), str(free_port())]
    run = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(run.stdout.partition("\nEXPORTED\n")[2]):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    for name in METRICS_GAUGES:
        if name.startswith(("node_gpu", "node_gram")):
            labels[f"ray_{name}"] = set(GPU_TAG_KEYS)
    assert labels
    return labels


def test_every_expression_asks_for_what_is_exported(exported: dict[str, set[str]]) -> None:
    of_pods = {re.sub(r"\W", "_", label) for label in MONITOR["spec"]["podTargetLabels"]}
    assert len(expressions()) > 20
    for place, expression in expressions().items():
        metrics = list(uses(promql_parser.parse(expression)))
        assert metrics, place
        for name, labels in metrics:
            assert name in exported, f"{place}: nobody exports {name}"
            assert labels <= exported[name] | of_pods, f"{place}: {name} has no {labels - exported[name]}"


def test_what_our_jobs_export_is_shown(exported: dict[str, set[str]]) -> None:
    shown = {name for expression in expressions().values() for name, _ in uses(promql_parser.parse(expression))}
    ours = {name for name in exported if name.startswith("ray_sana_")}
    assert ours - shown == {"ray_sana_stage_rows_per_second"}  # for `curl`: the dashboard takes the rate of the rows


def test_labels_in_texts_are_those_of_the_expression() -> None:
    texts = {rule["alert"]: rule["annotations"]["summary"] for group in ALERTS["spec"]["groups"] for rule in group["rules"]}
    for alert, text in texts.items():
        grouped = set().union(*(labels for _, labels in uses(promql_parser.parse(expressions()[alert]))))
        for label in re.findall(r"\$labels\.(\w+)", text):
            assert label in grouped or "by (" not in expressions()[alert], f"{alert}: {label} is summed away"
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            grouped = set().union(*(labels for _, labels in uses(promql_parser.parse(target["expr"]))))
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= grouped | {"dataset", "training"}, panel["title"]


def test_a_wrong_name_or_label_would_be_seen() -> None:
    assert list(uses(promql_parser.parse('sum by (stage) (rate(ray_a_total{x="1"}[5m])) > time() - ray_b'))) == [
        ("ray_a_total", {"x", "stage"}),
        ("ray_b", set()),
    ]
    with pytest.raises(ValueError):
        promql_parser.parse("sum by stage (ray_a")


def unknown_to_grafana(given: Any, read: Any, place: str = "") -> Iterator[str]:
    """Where what Grafana's schema made of a dashboard lacks or changes what was given."""
    if isinstance(given, dict) and isinstance(read, dict):
        for name, value in given.items():
            if name in read:
                yield from unknown_to_grafana(value, read[name], f"{place}.{name}")
            else:
                yield f"{place}.{name}"
    elif isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        for index, (one, other) in enumerate(zip(given, read, strict=True)):
            yield from unknown_to_grafana(one, other, f"{place}[{index}]")
    elif given != read:
        yield place


def through_grafana(dashboard: dict[str, Any]) -> dict[str, Any]:
    """Read into Grafana's own classes, plugins' options too, and written out of them again."""
    register_default_plugins()
    read: dict[str, Any] = json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))
    return read


def test_grafanas_schema_knows_every_field_of_the_dashboard() -> None:
    assert not list(unknown_to_grafana(DASHBOARD, through_grafana(DASHBOARD)))


def test_a_field_that_grafanas_schema_does_not_know_would_be_seen() -> None:
    planted = json.loads(json.dumps(DASHBOARD))
    planted["panels"][1]["fieldConfig"]["defaults"]["custom"]["fillOpacty"] = 10
    planted["panels"][1]["targets"][0]["legendFromat"] = "{{stage}}"
    planted["time"]["form"] = "now-6h"
    found = set(unknown_to_grafana(planted, through_grafana(planted)))
    assert found == {".time.form", ".panels[1].fieldConfig.defaults.custom.fillOpacty", ".panels[1].targets[0].legendFromat"}


def test_the_dashboard_is_laid_out_and_refers_to_what_is_there() -> None:
    """The fields that an import needs, no panel over another, no variable that is not there."""
    assert {"uid", "title", "schemaVersion", "panels", "templating", "time"} <= set(DASHBOARD) and "id" not in DASHBOARD
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["type"] == "timeseries" and panel["title"] and panel["description"]
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            refs = [target["refId"] for target in panel["targets"]]
            assert len(set(refs)) == len(refs) > 0
    text = Path(MONITORING / "dashboards/sana.json").read_text()
    assert set(re.findall(r"\$\{?(\w+)\}?", text)) <= VARIABLES
