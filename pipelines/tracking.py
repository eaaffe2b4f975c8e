"""MLflow: one run for each job, with the resolved configuration, the fingerprints of what it read, and what it made."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import yaml
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
    """The run that is going on in this process."""

    run_id: str
    uri: str

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        mlflow.log_metrics({name: float(value) for name, value in metrics.items()}, step=step)

    def log_image(self, image: Image.Image, key: str, step: int | None = None) -> None:
        mlflow.log_image(image, key=key, step=step)

    def log_file(self, path: str | Path) -> None:
        mlflow.log_artifact(str(path))

    def log_html(self, html: str, name: str) -> None:
        mlflow.log_text(html, name)

    def tag_tables(self, fingerprints: Mapping[str, str]) -> None:
        """Say which tables (path: fingerprint) this run read or made."""
        mlflow.set_tags({f"table.{path}": fingerprint for path, fingerprint in fingerprints.items()})


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists to dotted names."""
    if isinstance(value, Mapping):
        entries = value.items()
    elif isinstance(value, (list, tuple)) and any(isinstance(inner, Mapping) for inner in value):
        entries = enumerate(value)
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, inner in entries:
        flat |= flatten(inner, f"{prefix}.{name}" if prefix else str(name))
    return flat
