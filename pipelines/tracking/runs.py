"""MLflow: one run for each job, with the resolved configuration, the fingerprints of what it read, and what it made."""

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import mlflow
import yaml
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from PIL import Image
from sqlalchemy.exc import SQLAlchemyError

from pipelines.storage.errors import StorageError
from pipelines.storage.home import expand_home
from pipelines.tables.table import table_uri
from pipelines.tracking.config import TrackingConfig

SQLITE = "sqlite:///"
RunEnd = Literal["FINISHED", "FAILED", "KILLED"]
VERSIONS = ("torch", "ray", "deepspeed", "transformers", "mlflow")


def tracking_uri(config: TrackingConfig, output_dir: str | Path) -> str:
    """MLflow's URI: as configured, as in the environment, or a SQLite file in `output_dir` (if it is local, or else here)."""
    if uri := config.uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return expand_home(uri)
    return f"{SQLITE}{_local_folder(output_dir)}/mlflow.db"


def _local_folder(output_dir: str | Path) -> Path:
    return Path.cwd() if "://" in str(output_dir) else Path(output_dir).absolute()


@contextmanager
def start_run(
    name: str, config: Mapping[str, Any], *, tracking: TrackingConfig, output_dir: str | Path
) -> Iterator["TrackedRun"]:
    """Start an MLflow run. It ends as FAILED if the body raises, as KILLED if it was stopped.

    Raises StorageError if MLflow cannot store it.
    """
    uri = tracking_uri(tracking, output_dir)
    with _naming_the_database(uri):
        make_database(uri)
        mlflow.set_tracking_uri(uri)
        experiment = mlflow.get_experiment_by_name(tracking.experiment)
        if experiment is None:
            artifacts = f"{_local_folder(output_dir).as_uri()}/mlartifacts" if uri.startswith("sqlite") else None
            mlflow.create_experiment(tracking.experiment, artifact_location=artifacts)
        mlflow.set_experiment(tracking.experiment)
        started = mlflow.start_run(run_name=name)
    with started as run:
        mlflow.log_params({key: str(value)[:6000] for key, value in flatten(config).items()})
        mlflow.log_text(yaml.safe_dump(dict(config), sort_keys=False), "config.yaml")
        mlflow.set_tags({"stage": name, **code_tags()})
        try:
            yield TrackedRun(run.info.run_id, uri)
        except BaseException as error:
            mlflow.end_run(end_status(error))
            raise


def make_database(uri: str) -> None:
    """Make MLflow's SQLite file if it is missing, whole or not at all: MLflow cannot repair a file that is half made."""
    path = Path(uri.removeprefix(SQLITE))
    if not uri.startswith(SQLITE) or path.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # takes half a second, and is seldom needed

    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        made = Path(folder, path.name)
        SqlAlchemyStore(f"{SQLITE}{made}", f"{path.parent.as_uri()}/mlartifacts").engine.dispose()
        try:
            os.link(made, path)
        except FileExistsError:
            return  # another job was faster
        except OSError:  # a file system without hard links
            made.replace(path)


@contextmanager
def _naming_the_database(uri: str) -> Iterator[None]:
    """Turn MLflow's errors into a StorageError that names the database."""
    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise StorageError(f"MLflow cannot keep its runs in {uri}: {reason}. What was finished stays") from error


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """An MLflow run to be made or continued by the first process that reaches MLflow. It may be sent to other processes.

    Args:
        name: the run's name, and the value of its tag "stage".
        config: the resolved configuration.
        uri: URI of the MLflow server or database.
        experiment: the experiment's name.
        artifacts: URI of the artifacts of a new experiment; None: the server's choice.
        tags: further tags.
        key: identifies the run within the experiment: a request with the same key continues the same run.
    """

    name: str
    config: Mapping[str, Any]
    uri: str
    experiment: str
    artifacts: str | None
    tags: Mapping[str, str]
    key: str

    @classmethod
    def make(
        cls, name: str, config: Mapping[str, Any], *, tracking: TrackingConfig, output_dir: str | Path, key: str
    ) -> "RunRequest":
        uri = tracking_uri(tracking, output_dir)
        artifacts = f"{_local_folder(output_dir).as_uri()}/mlartifacts" if uri.startswith("sqlite") else None
        return cls(
            name=name,
            config=config,
            uri=uri,
            experiment=tracking.experiment,
            artifacts=artifacts,
            tags=code_tags(),
            key=key,
        )

    def connect(self) -> "TrackedRun":
        """Make or find the run. Raises MLflow's own errors if it cannot be reached."""
        for name, value in {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}.items():
            os.environ.setdefault(name, value)  # our callers try again by themselves
        make_database(self.uri)
        client = _client(self.uri)
        if (found := self.find()) is not None:
            client.update_run(found.run_id, status="RUNNING")
            return found
        experiment = client.get_experiment_by_name(self.experiment)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(self.experiment, self.artifacts)
        tags = {"stage": self.name, "run_key": self.key, **self.tags}
        run_id = client.create_run(experiment_id, tags=tags, run_name=self.name).info.run_id
        params = [Param(key, str(value)[:6000]) for key, value in flatten(self.config).items()]
        client.log_batch(run_id, params=params)
        client.log_text(run_id, yaml.safe_dump(dict(self.config), sort_keys=False), "config.yaml")
        return TrackedRun(run_id, self.uri)

    def find(self) -> "TrackedRun | None":
        """Return the run, or None if it was not made yet. Raises MLflow's own errors."""
        client = _client(self.uri)
        experiment = client.get_experiment_by_name(self.experiment)
        if experiment is None:
            return None
        found = client.search_runs([experiment.experiment_id], f"tags.run_key = '{self.key}'", max_results=1)
        return TrackedRun(found[0].info.run_id, self.uri) if found else None

    def try_to(self, log: Callable[["TrackedRun"], None]) -> str | None:
        """Log to the run, if it was made. Return the reason if MLflow cannot be reached."""
        try:
            run = self.find()
            if run is not None:
                log(run)
        except Exception as error:  # of MLflow, its server, its database, the network: no work is undone for it
            return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        return None


def end_status(error: BaseException) -> RunEnd:
    """The status of a run that an exception ended. A signal or Ctrl-C, which is no Exception, stopped it from outside."""
    return "FAILED" if isinstance(error, Exception) else "KILLED"


def code_tags() -> dict[str, str]:
    """Tags that name the code of a run: the commit (of the checkout, or of the container image) and versions of libraries."""
    tags = {f"version.{name}": version(name) for name in VERSIONS} | {"version.python": platform.python_version()}
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = os.environ.get("SANA_GIT_COMMIT", "")
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})


@dataclass(frozen=True)
class TrackedRun:
    """A run in progress. It may be sent to other processes, which log to it too."""

    run_id: str
    uri: str

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        now = int(1000 * time.time())
        values = [Metric(name, float(value), now, step or 0) for name, value in metrics.items()]
        _client(self.uri).log_batch(self.run_id, metrics=values)

    def last_step(self, metric: str) -> int:
        """The last step at which a metric was logged; -1 if never."""
        metrics = _client(self.uri).get_run(self.run_id).data._metric_objs  # the last step of each metric
        return next((point.step for point in metrics if point.key == metric), -1)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        _client(self.uri).log_batch(self.run_id, tags=[RunTag(name, value[:5000]) for name, value in tags.items()])

    def end(self, status: RunEnd) -> None:
        _client(self.uri).set_terminated(self.run_id, status)

    def log_image(self, image: Image.Image, key: str, step: int | None = None) -> None:
        _client(self.uri).log_image(self.run_id, image, key=key, step=step, synchronous=True)

    def log_html(self, html: str, name: str) -> None:
        _client(self.uri).log_text(self.run_id, html, name)

    def log_inputs(self, dataset_uri: str, fingerprints: Mapping[str, str], context: str) -> None:
        """Record the tables (name: fingerprint) that this run read as MLflow's datasets, and what for (`context`)."""
        inputs = [
            DatasetInput(
                Dataset(name=name, digest=fingerprint[:32], source_type="table", source=table_uri(dataset_uri, name)),
                [InputTag("mlflow.data.context", context)],
            )
            for name, fingerprint in fingerprints.items()
        ]
        _client(self.uri).log_inputs(self.run_id, inputs)

    def tag_tables(self, fingerprints: Mapping[str, str]) -> None:
        """Tag the run with the tables (name: fingerprint) that it read or made."""
        for name, fingerprint in fingerprints.items():
            tag = f"table.{name}".replace("://", ":/")  # MLflow takes no two slashes
            _client(self.uri).set_tag(self.run_id, tag, fingerprint)


@cache
def _client(uri: str) -> MlflowClient:
    return MlflowClient(uri)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts and lists of dicts to one dict with dotted names."""
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
