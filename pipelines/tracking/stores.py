"""Where MLflow keeps runs: its URI, the SQLite file that is the default, the experiment, and the folder of artifacts."""

import os
import re
import sqlite3
from contextlib import closing
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipelines.storage.home import expand_home
from pipelines.tracking.config import TrackingConfig
from pipelines.tracking.faults import TrackingError

SQLITE = "sqlite:///"
DATABASE = "mlflow.db"
ARTIFACTS = "mlartifacts"
PLACES = {"experiments": "artifact_location", "runs": "artifact_uri", "logged_models": "artifact_location"}
"""Tables and columns in which MLflow stores the absolute place of artifacts."""
HOST = re.compile(r"[\w.-]+:\d+(/.*)?")
KIND = {"mlflow.experimentKind": "custom_model_development"}
"""The experiment's tag that makes MLflow 3 open it in its view for the training of models, not in that for agents."""


def tracking_uri(config: TrackingConfig, output_dir: str | Path) -> str:
    """MLflow's URI: as configured, as in the environment, or a SQLite file in `output_dir` (if it is local, or else here).

    A relative path of a SQLite file is made absolute, since Ray's workers run in other folders.

    Raises TrackingError for what is no URI that MLflow could keep runs in.
    """
    name = "tracking.uri" if config.uri else "MLFLOW_TRACKING_URI"
    given = config.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not given:
        name, given = "dataset_uri", f"{SQLITE}{local_folder(output_dir)}/{DATABASE}"
        if unquote(given) != given:
            raise TrackingError(f"no URI of SQLite can name {given.removeprefix(SQLITE)}, for its %: give tracking.uri")
    uri = expand_home(given)
    _check(uri, f"{name}={given}")
    if not uri.startswith(SQLITE):
        return uri
    path, mark, query = uri.removeprefix(SQLITE).partition("?")
    if mark and ("/" in query or "=" not in query):
        raise TrackingError(f"{name}={given}: no URI of SQLite can name a path with a ?: give tracking.uri another place")
    return f"{SQLITE}{Path(path).absolute()}{mark}{query}"


def _check(uri: str, told: str) -> None:
    """Raise TrackingError for a URI that is written wrong; `told`: the setting and its value."""
    scheme, _, rest = uri.partition(":")
    if scheme == "sqlite" and not uri.startswith(SQLITE):
        raise TrackingError(f"{told}: a SQLite file is written {SQLITE}{rest.lstrip('/')} (or {SQLITE}/folder/{DATABASE})")
    if uri.rstrip("/") == SQLITE.rstrip("/") or ":memory:" in uri:
        raise TrackingError(f"{told} names no file, and a database in memory ends with its process: {SQLITE}{DATABASE}")
    if scheme in ("http", "https") and not rest.strip("/"):
        raise TrackingError(f"{told} names no host: write {scheme}://host:5000")
    if HOST.fullmatch(uri):
        raise TrackingError(f"{told} has no scheme: write http://{uri}")
    if scheme == "file" or ("://" not in uri and not uri.startswith(("databricks", "uc:"))):
        folder = unquote(rest.removeprefix("//")) if scheme == "file" else uri
        raise TrackingError(f"{told} is a folder, and MLflow 3 keeps no runs in folders: write {SQLITE}{folder}/{DATABASE}")


def local_folder(output_dir: str | Path) -> Path:
    """The folder itself if it is local, or else the one that this process runs in."""
    return Path.cwd() if "://" in str(output_dir) else Path(output_dir).absolute()


def artifacts_uri(uri: str, output_dir: str | Path) -> str | None:
    """The place of the artifacts of a new experiment; None: a server chooses it."""
    return f"{local_folder(output_dir).as_uri()}/{ARTIFACTS}" if uri.startswith(SQLITE) else None


@cache
def client_of(uri: str) -> MlflowClient:
    """The client of a store; it changes no setting of the process."""
    return MlflowClient(uri)


def _sqlite_path(uri: str) -> Path | None:
    return Path(unquote(uri.removeprefix(SQLITE).partition("?")[0])) if uri.startswith(SQLITE) else None


def make_database(uri: str) -> None:
    """Make MLflow's SQLite file if it is missing, whole or not at all: MLflow cannot repair a file that is half made."""
    path = _sqlite_path(uri)
    if path is None or path.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # takes half a second, and is seldom needed

    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        made = Path(folder, path.name)
        SqlAlchemyStore(f"{SQLITE}{made}", f"{path.parent.as_uri()}/{ARTIFACTS}").engine.dispose()
        try:
            os.link(made, path)
        except FileExistsError:
            return  # another job was faster
        except OSError:  # a file system without hard links
            made.replace(path)


def follow_the_folder(uri: str, artifacts: str | None) -> None:
    """Let a SQLite file that was moved along with its artifacts name the folder in which they are now.

    MLflow stores their absolute path; new artifacts would go to the old place, and old ones would not be found.

    Args:
        artifacts: where a new experiment would put them. Nothing is done unless the database lies beside them.
    """
    path = _sqlite_path(uri)
    if path is None or not path.exists() or artifacts != f"{path.parent.as_uri()}/{ARTIFACTS}":
        return
    here = path.parent / ARTIFACTS
    with closing(sqlite3.connect(path, timeout=30)) as database, database:
        places = [place for (place,) in database.execute("SELECT artifact_location FROM experiments")]
        roots = {match[1] for place in places if (match := re.match(rf"(.*/{ARTIFACTS})(/|$)", place or ""))}
        for root in roots - {artifacts}:
            if here.exists() or not Path(unquote(root.removeprefix("file://"))).exists():
                _rename_root(database, root, artifacts)


def _rename_root(database: sqlite3.Connection, old: str, new: str) -> None:
    """Let all that MLflow keeps below the folder `old` be kept below `new`."""
    tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    for table, column in PLACES.items():
        if table in tables:
            below = f"{column} = ? OR substr({column}, 1, ?) = ?"
            values = (new, len(old) + 1, old, len(old) + 1, f"{old}/")
            database.execute(f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {below}", values)


def find_experiment(uri: str, name: str, artifacts: str | None) -> str:
    """Find or make the experiment, and return its id.

    Raises TrackingError if it was deleted, and MLflow's own errors.
    """
    client = client_of(uri)
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, artifacts, tags=KIND)
        except MlflowException:  # another job may have been faster
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"the experiment {name!r} of MLflow at {uri} was deleted: restore it (mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}), or give tracking.experiment another name"
        )
    for key, value in KIND.items():
        if key not in experiment.tags:
            client.set_experiment_tag(experiment.experiment_id, key, value)
    return experiment.experiment_id
