"""MLflow: one run for each job, with the resolved configuration, the fingerprints of what it read, and what it made.

Everything goes through a client of its own: nothing is set for the whole process, and no run that somebody else began, in this
process or by MLFLOW_RUN_ID, is taken over.
"""

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking.context import registry
from PIL import Image
from sqlalchemy.exc import SQLAlchemyError

from pipelines.tables.table import table_uri
from pipelines.tracking.config import TrackingConfig
from pipelines.tracking.faults import describe, first_line, naming_the_store
from pipelines.tracking.names import MAX_NAME, flatten, safe_name
from pipelines.tracking.stores import (
    artifacts_uri,
    client_of,
    find_experiment,
    follow_the_folder,
    make_database,
    tracking_uri,
)
from sana_model.files.redact import redact, redact_uri

RunEnd = Literal["FINISHED", "FAILED", "KILLED"]
VERSIONS = ("torch", "ray", "deepspeed", "transformers", "mlflow")
MAX_BATCH = 100
"""Parameters that MLflow takes in one request."""
MAX_VALUE = 6000
"""Characters of a parameter's value; config.yaml has all of it."""


@contextmanager
def start_run(
    name: str, config: Mapping[str, Any], *, tracking: TrackingConfig, output_dir: str | Path
) -> Iterator["TrackedRun"]:
    """Start an MLflow run. It ends as FAILED if the body raises, as KILLED if it was stopped.

    Raises TrackingError if MLflow will never take it, StorageError if it cannot store it now.
    """
    request = RunRequest.make(name, config, tracking=tracking, output_dir=output_dir)
    with naming_the_store(request.uri):
        run = request.connect()
    try:
        yield run
    except BaseException as error:
        status = end_status(error)
        request.try_to(lambda begun: begun.end(status), run)
        if isinstance(error, (MlflowException, SQLAlchemyError)):
            raise describe(error, request.uri) from error
        raise
    with naming_the_store(request.uri):
        run.end("FINISHED")


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
        key: identifies the run within the experiment: a request with the same key continues the same run. None: a new run.
    """

    name: str
    config: Mapping[str, Any]
    uri: str
    experiment: str
    artifacts: str | None
    tags: Mapping[str, str]
    key: str | None = None

    @classmethod
    def make(
        cls,
        name: str,
        config: Mapping[str, Any],
        *,
        tracking: TrackingConfig,
        output_dir: str | Path,
        key: str | None = None,
    ) -> "RunRequest":
        """Make a request. Raises TrackingError if the URI is none that MLflow could keep runs in."""
        uri = tracking_uri(tracking, output_dir)
        return cls(
            name=name,
            config=config,
            uri=uri,
            experiment=tracking.experiment,
            artifacts=artifacts_uri(uri, output_dir),
            tags=registry.resolve_tags(code_tags()),
            key=None if key is None else redact_uri(key),
        )

    def connect(self) -> "TrackedRun":
        """Make or find the run. Raises TrackingError, and MLflow's own errors: `faults.is_passing` tells them apart."""
        for name, value in {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}.items():
            os.environ.setdefault(name, value)  # our callers try again by themselves
        self._prepare()
        experiment_id = find_experiment(self.uri, self.experiment, self.artifacts)
        client = client_of(self.uri)
        if (found := self._find_in(experiment_id)) is not None:
            client.update_run(found.run_id, status="RUNNING")
            return found
        tags = {"stage": self.name, **({"run_key": self.key} if self.key is not None else {}), **self.tags}
        run_id = client.create_run(experiment_id, tags=tags, run_name=self.name).info.run_id
        params = [Param(safe_name(key), redact(str(value))[:MAX_VALUE]) for key, value in flatten(self.config).items()]
        for start in range(0, len(params), MAX_BATCH):
            client.log_batch(run_id, params=params[start : start + MAX_BATCH])
        client.log_text(run_id, redact(yaml.safe_dump(dict(self.config), sort_keys=False)), "config.yaml")
        return TrackedRun(run_id, self.uri)

    def _prepare(self) -> None:
        """Make a SQLite file that is missing, and let one that was moved know where it is."""
        make_database(self.uri)
        follow_the_folder(self.uri, self.artifacts)

    def find(self) -> "TrackedRun | None":
        """Return the run, or None if it was not made yet. Raises MLflow's own errors."""
        self._prepare()
        experiment = client_of(self.uri).get_experiment_by_name(self.experiment)
        return None if experiment is None else self._find_in(experiment.experiment_id)

    def _find_in(self, experiment_id: str) -> "TrackedRun | None":
        """Return the run that has this key in an experiment, or None. Raises MLflow's own errors."""
        if self.key is None:
            return None
        quote = "'" if "'" not in self.key else '"'
        wanted = f"tags.run_key = {quote}{self.key}{quote}"
        if quote in self.key:  # MLflow's filters have no escapes
            wanted = f"tags.stage = '{self.name}'"
        found = client_of(self.uri).search_runs([experiment_id], wanted)
        runs = (run.info.run_id for run in found if run.data.tags.get("run_key") == self.key)
        return next((TrackedRun(run_id, self.uri) for run_id in runs), None)

    def try_to(self, log: Callable[["TrackedRun"], None], run: "TrackedRun | None" = None) -> str | None:
        """Log to `run`, or to the one of this request, if it was made. Return the reason if MLflow cannot be reached."""
        try:
            run = run or self.find()
            if run is not None:
                log(run)
        except Exception as error:  # of MLflow, its server, its database, the network: no work is undone for it
            return first_line(error)
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

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None, *, at: float | None = None) -> None:
        """Log metrics, measured at the time `at` (`time.time()`; None: now)."""
        moment = int(1000 * (at or time.time()))
        values = [Metric(safe_name(name), float(value), moment, step or 0) for name, value in metrics.items()]
        client_of(self.uri).log_batch(self.run_id, metrics=values)

    def last_steps(self) -> dict[str, int]:
        """The last step at which each metric was logged."""
        return {point.key: point.step for point in client_of(self.uri).get_run(self.run_id).data._metric_objs}

    def set_tags(self, tags: Mapping[str, str]) -> None:
        client_of(self.uri).log_batch(
            self.run_id, tags=[RunTag(safe_name(name), redact(value)[:5000]) for name, value in tags.items()]
        )

    def end(self, status: RunEnd) -> None:
        client_of(self.uri).set_terminated(self.run_id, status)

    def log_image(self, image: Image.Image, key: str, step: int | None = None) -> None:
        client_of(self.uri).log_image(self.run_id, image, key=key, step=step, synchronous=True)

    def log_html(self, html: str, name: str) -> None:
        client_of(self.uri).log_text(self.run_id, redact(html), name)

    def log_inputs(self, dataset_uri: str, fingerprints: Mapping[str, str], context: str) -> None:
        """Record the tables (name: fingerprint) that this run read as MLflow's datasets, and what for (`context`)."""
        inputs = []
        for name, fingerprint in fingerprints.items():
            called = name if len(name) <= MAX_NAME else safe_name(name)
            source = redact(table_uri(dataset_uri, name))
            dataset = Dataset(name=called, digest=fingerprint[:32], source_type="table", source=source)
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
        client_of(self.uri).log_inputs(self.run_id, inputs)

    def tag_tables(self, fingerprints: Mapping[str, str]) -> None:
        """Tag the run with the tables (name: fingerprint) that it read or made."""
        for name, fingerprint in fingerprints.items():
            client_of(self.uri).set_tag(self.run_id, safe_name(f"table.{name}"), fingerprint)
