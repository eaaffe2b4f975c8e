"""MLflow: one run for each job, with the resolved configuration, the fingerprints of what it read, and what it made."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlflow
import yaml
from mlflow import MlflowClient
from mlflow.entities import Metric
from PIL import Image


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where MLflow keeps its runs.

    Args:
        uri: of an MLflow server or database; unless given MLFLOW_TRACKING_URI, or else a SQLite file in `output_dir`.
        experiment: the experiment's name.
    """

    uri: str | None = None
    experiment: str = "sana"


def tracking_uri(config: TrackingConfig, output_dir: str | Path) -> str:
    """The configured one, the environment's, or a SQLite file in `output_dir` (in the working directory if that is remote)."""
    if config.uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return config.uri or os.environ["MLFLOW_TRACKING_URI"]
    return f"sqlite:///{_local_folder(output_dir)}/mlflow.db"


def _local_folder(output_dir: str | Path) -> Path:
    return Path.cwd() if "://" in str(output_dir) else Path(output_dir).absolute()


@contextmanager
def start_run(
    name: str,
    config: Mapping[str, Any],
    *,
    tracking: TrackingConfig,
    output_dir: str | Path,
    tags: Mapping[str, str] | None = None,
    run_id: str | None = None,
) -> Iterator["TrackedRun"]:
    """An MLflow run; it ends as FAILED if the body raises. `run_id` continues a run."""
    uri = tracking_uri(tracking, output_dir)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(uri)
    experiment = mlflow.get_experiment_by_name(tracking.experiment)
    if experiment is None:
        artifacts = f"{_local_folder(output_dir).as_uri()}/mlartifacts" if uri.startswith("sqlite") else None
        mlflow.create_experiment(tracking.experiment, artifact_location=artifacts)
    mlflow.set_experiment(tracking.experiment)
    with mlflow.start_run(run_id=run_id, run_name=name) as run:
        if run_id is None:
            mlflow.log_params({key: str(value)[:6000] for key, value in flatten(config).items()})
            mlflow.log_text(yaml.safe_dump(dict(config), sort_keys=False), "config.yaml")
        mlflow.set_tags({"stage": name, **(tags or {})})
        yield TrackedRun(run.info.run_id, uri)


@dataclass(frozen=True)
class TrackedRun:
    """A run that is going on. It may be sent to other processes, which then log to it too."""

    run_id: str
    uri: str

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        now = int(1000 * time.time())
        values = [Metric(name, float(value), now, step or 0) for name, value in metrics.items()]
        _client(self.uri).log_batch(self.run_id, metrics=values)

    def log_image(self, image: Image.Image, key: str, step: int | None = None) -> None:
        _client(self.uri).log_image(self.run_id, image, key=key, step=step, synchronous=True)

    def log_file(self, path: str | Path) -> None:
        _client(self.uri).log_artifact(self.run_id, str(path))

    def log_html(self, html: str, name: str) -> None:
        _client(self.uri).log_text(self.run_id, html, name)

    def tag_tables(self, fingerprints: Mapping[str, str]) -> None:
        """Say which tables (path: fingerprint) this run read or made."""
        for path, fingerprint in fingerprints.items():
            _client(self.uri).set_tag(self.run_id, f"table.{path}", fingerprint)


@cache
def _client(uri: str) -> MlflowClient:
    return MlflowClient(uri)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists to dotted names."""
    if isinstance(value, Mapping):
        entries = list(value.items())
    elif isinstance(value, (list, tuple)) and any(isinstance(inner, Mapping) for inner in value):
        entries = list(enumerate(value))
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, inner in entries:
        flat |= flatten(inner, f"{prefix}.{name}" if prefix else str(name))
    return flat
