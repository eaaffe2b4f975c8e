"""A real Prometheus scrapes a real job that makes a shard a minute, and is asked what every panel and every alert asks."""

import json
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.shapes.drawing import write_folder
from pipelines.shapes.scenes import ShapesConfig
from tests.infra.test_monitoring import ALERTS, DASHBOARD
from tests.support.http_server import Handler, Server, free_port
from tests.support.manifests import ROOT

PAUSE = 65.0
"""Seconds from one shard to the next: Ray exports a gauge for 20 s after it was last set."""
SCRAPE = 5
NUM_IMAGES = 3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="prometheus is not installed (Debian: apt-get install prometheus)"
    ),
]


class SlowServer(Server):
    """Serves the files of a folder, one every PAUSE seconds."""

    def __init__(self, folder: Path):
        super().__init__(SlowHandler)
        self.folder, self.turn = folder, threading.Lock()


class SlowHandler(Handler):
    server: SlowServer

    def do_GET(self) -> None:
        with self.server.turn:
            time.sleep(PAUSE)
        self.reply(200, (self.server.folder / self.path.strip("/")).read_bytes())


@contextmanager
def prometheus(folder: Path, target: int) -> Iterator[str]:
    """Start a Prometheus with our rules, which scrapes `target`; yield its address."""
    folder.mkdir()
    port = free_port()
    (folder / "rules.yaml").write_text(yaml.safe_dump(ALERTS["spec"]))
    labels = {"ray_io_cluster": "sana", "ray_io_group": "headgroup"}  # the PodMonitor's podTargetLabels
    config = {
        "global": {"scrape_interval": f"{SCRAPE}s", "evaluation_interval": f"{SCRAPE}s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": [f"127.0.0.1:{target}"], "labels": labels}]}],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    command = [
        "prometheus",
        "--config.file=prometheus.yaml",
        "--storage.tsdb.path=data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("w") as log, subprocess.Popen(command, cwd=folder, stderr=log) as process:
        try:
            yield f"http://127.0.0.1:{port}/api/v1"
        finally:
            process.terminate()


def ask(api: str, path: str, **query: Any) -> Any:
    """The data of an answer of Prometheus."""
    with urllib.request.urlopen(f"{api}/{path}?{urllib.parse.urlencode(query)}", timeout=30) as answer:
        return json.load(answer)["data"]


def curves(api: str, expression: str, start: float, end: float) -> list[list[float]]:
    """What a panel draws: the values of each series, without NaN."""
    found = ask(api, "query_range", query=expression, start=start, end=end, step=SCRAPE)["result"]
    return [[float(value) for _, value in series["values"] if value != "NaN"] for series in found]


def test_series_have_no_gaps_and_panels_and_alerts_are_answered(tmp_path: Path) -> None:
    write_folder(str(tmp_path / "raw"), 0, NUM_IMAGES, ShapesConfig())
    images = sorted(path.name for path in (tmp_path / "raw").glob("*.png"))
    target = free_port()
    with SlowServer(tmp_path / "raw").running() as server, prometheus(tmp_path / "prometheus", target) as api:
        (tmp_path / "urls.csv").write_text("url\n" + "".join(f"{server.url}/{name}\n" for name in images))
        command = [sys.executable, "-m", "tests.support.metrics_probe", str(tmp_path), str(target), str(tmp_path / "urls.csv")]
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as job:
            assert job.stdin is not None and job.stdout is not None
            output = next((line for line in job.stdout if line == "ENDED\n"), "")
            end = time.time()
            assert output, "the job failed"
            check_series(api, end)
            check_panels(api, end)
            check_alerts(api)
            time.sleep(60)
            for name in ("ray_sana_stage_shards", "ray_sana_train_loss"):
                assert not ask(api, "query", query=name)["result"], f"{name} has outlived its job"
            job.stdin.close()


def check_series(api: str, end: float) -> None:
    """While shards came PAUSE seconds apart, every scrape found the stage's and the training's series."""
    start = end - (NUM_IMAGES - 1) * PAUSE
    for name in ('ray_sana_stage_shards{state="done"}', "ray_sana_stage_progress_timestamp_seconds", "ray_sana_train_loss"):
        (values,) = curves(api, name, start, end)
        assert len(values) == int((end - start) // SCRAPE) + 1, name
        assert len(set(values)) >= (1 if "loss" in name else NUM_IMAGES - 1), name


def check_panels(api: str, end: float) -> None:
    empty = set()
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"].replace("$dataset", ".*")
            if not any(curves(api, expression, end - NUM_IMAGES * PAUSE, end)):
                empty.add(panel["title"])
    assert empty <= {"GPU use", "GPU memory"}, empty
    for title in ("Rejects of the run", "Reject share"):
        (panel,) = [panel for panel in DASHBOARD["panels"] if panel["title"] == title]
        (values,) = curves(api, panel["targets"][0]["expr"].replace("$dataset", ".*"), end - PAUSE, end)
        assert set(values) == {0.0}, f"{title}: nothing was refused"


def check_alerts(api: str) -> None:
    rules = [rule for group in ask(api, "rules")["groups"] for rule in group["rules"]]
    assert len(rules) == sum(len(group["rules"]) for group in ALERTS["spec"]["groups"])
    assert all(rule["health"] == "ok" and rule["state"] == "inactive" for rule in rules), rules
