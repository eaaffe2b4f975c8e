"""Odd runs of MLflow: what can never pass is said before any work, and nothing that was logged is lost."""

import os
import re
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from pipelines.storage.errors import StorageError
from pipelines.tracking import patient_run
from pipelines.tracking.config import TrackingConfig
from pipelines.tracking.faults import TrackingError, describe, is_passing
from pipelines.tracking.names import MAX_NAME, safe_name
from pipelines.tracking.patient_run import PatientRun
from pipelines.tracking.runs import RunRequest, start_run
from pipelines.tracking.stores import _sqlite_path, client_of, make_database, tracking_uri
from pipelines.tracking.unsent import UNSENT, Entry, read_unsent, send_or_keep, write_unsent
from tests.support.http_server import Handler, Server

NOWHERE = "http://127.0.0.1:9"
BAD = Entry("html", ["../../outside.html", "<p>"])
"""An entry that MLflow never takes, with the code of an internal error."""


@pytest.fixture(autouse=True)
def no_settings_of_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database without runs: to make one takes MLflow seconds."""
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    make_database(f"sqlite:///{path}")
    return path


@pytest.fixture(autouse=True)
def fresh(template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every database that is made be a copy of the template, as the real function leaves it."""

    def copy(uri: str) -> None:
        path = _sqlite_path(uri)
        if path is not None and not path.exists() and path.parent.name != "x":
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(template, path)

    monkeypatch.setattr("pipelines.tracking.runs.make_database", copy)


def make_request(folder: Path, uri: str | None = None, *, key: str | None = "a", **options: Any) -> RunRequest:
    return RunRequest.make("train", options, tracking=TrackingConfig(uri=uri), output_dir=folder, key=key)


def runs_in(folder: Path) -> list[Run]:
    """The runs of the experiment in the folder's database, oldest first."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("sana")
    return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]) if experiment else []


BAD_URIS = {
    "mlruns": r"tracking.uri=mlruns is a folder, and MLflow 3 keeps no runs in folders: write sqlite:///mlruns/mlflow.db",
    "./mlruns": r"write sqlite:///./mlruns/mlflow.db",
    "file:///data/mlruns": r"write sqlite:////data/mlruns/mlflow.db",
    "sqlite://mlflow.db": r"tracking.uri=sqlite://mlflow.db: a SQLite file is written sqlite:///mlflow.db",
    "sqlite:mlflow.db": r"a SQLite file is written sqlite:///mlflow.db",
    "sqlite:///": r"names no file",
    "sqlite:///:memory:": r"names no file, and a database in memory ends with its process",
    "localhost:5000": r"tracking.uri=localhost:5000 has no scheme: write http://localhost:5000",
    "10.0.0.7:5000/mlflow": r"write http://10.0.0.7:5000/mlflow",
    "http://": r"tracking.uri=http:// names no host",
    "sqlite:////data/what?/mlflow.db": r"no URI of SQLite can name a path with a \?",
}


@pytest.mark.parametrize("uri", BAD_URIS)
def test_what_is_no_address_of_mlflow_is_refused_with_the_fix(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrackingError, match=BAD_URIS[uri]):
        make_request(tmp_path, uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_URI="):
        make_request(tmp_path)


def test_a_relative_database_is_where_the_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    taken = {
        "sqlite:///mlflow.db": f"sqlite:///{tmp_path}/mlflow.db",
        "sqlite:///runs/m.db?timeout=30": f"sqlite:///{tmp_path}/runs/m.db?timeout=30",
        "sqlite:////data/m.db": "sqlite:////data/m.db",
        "sqlite:///~/m.db": f"sqlite:///{tmp_path}/home/m.db",
        "http://host:5000": "http://host:5000",
        "postgresql+psycopg2://u@h/db": "postgresql+psycopg2://u@h/db",
        "databricks": "databricks",
        "databricks://profile": "databricks://profile",
    }
    assert {uri: tracking_uri(TrackingConfig(uri=uri), tmp_path) for uri in taken} == taken
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")  # the form that everyone uses
    request = make_request(tmp_path)
    monkeypatch.chdir("/")  # as Ray's workers are elsewhere
    run = PatientRun(request, say=print)
    run.log_metrics({"loss": 1.0}, 1)
    assert run.close() == [] and runs_in(tmp_path)[0].data.metrics["loss"] == 1.0


@pytest.mark.parametrize("name", ["it's here", 'a "b" c', """both ' and " """.strip(), "a#b", "Ωmega ü", "50% off", "a;b&c=d"])
def test_odd_folders_keep_their_runs(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    with start_run("ingest", {"dataset_uri": str(folder)}, tracking=TrackingConfig(), output_dir=folder) as run:
        run.log_html("<p>", "report.html")
    (found,) = runs_in(folder)
    assert found.info.status == "FINISHED" and list(folder.rglob("report.html"))
    request = make_request(folder, key=f"{folder}/train")
    assert request.find() is None and request.connect() == request.connect() == request.find()
    assert len(runs_in(folder)) == 2 and [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["what?", "100%25"])
def test_a_folder_that_no_uri_of_sqlite_can_name_needs_another_place(name: str, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"no URI of SQLite can name .*: give tracking.uri"):
        make_request(tmp_path / name)
    request = make_request(tmp_path / name, f"sqlite:///{tmp_path}/mlflow.db", key=f"{tmp_path}/{name}/train")
    assert request.connect() == request.find()
    run = request.find()
    assert run is not None
    run.log_html("<p>", "report.html")
    assert list((tmp_path / name).rglob("report.html"))


def test_a_deleted_experiment_is_told_before_any_work(tmp_path: Path) -> None:
    request = make_request(tmp_path)
    request.connect()
    client = client_of(request.uri)
    experiment = client.get_experiment_by_name("sana")
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    told = rf"'sana' of MLflow at sqlite:.* was deleted: restore it .*--experiment-id {experiment.experiment_id}\)"
    with pytest.raises(TrackingError, match=told):
        request.connect()
    with pytest.raises(TrackingError, match=told), start_run("x", {}, tracking=TrackingConfig(), output_dir=tmp_path):
        pass
    client.restore_experiment(experiment.experiment_id)
    assert request.connect() == request.find()


def test_runs_of_others_are_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLFLOW_RUN_ID, a run that is active in this process, and the process's own tracking URI are left alone."""
    monkeypatch.setenv("MLFLOW_RUN_ID", "0123456789abcdef0123456789abcdef")
    before = mlflow.get_tracking_uri()
    for stage in ("ingest", "caption"):
        with start_run(stage, {}, tracking=TrackingConfig(), output_dir=tmp_path / "a"):
            pass
    with start_run("score", {}, tracking=TrackingConfig(), output_dir=tmp_path / "b"):
        pass
    assert [run.info.run_name for run in runs_in(tmp_path / "a")] == ["ingest", "caption"]
    assert [run.info.run_name for run in runs_in(tmp_path / "b")] == ["score"]
    assert mlflow.get_tracking_uri() == before and "MLFLOW_TRACKING_URI" not in os.environ and mlflow.active_run() is None
    assert {run.data.tags["mlflow.source.type"] for run in runs_in(tmp_path / "a")} == {"LOCAL"}


def test_settings_of_any_name_and_number_are_logged(tmp_path: Path) -> None:
    odd = {"node@a": 1, "x" * 300: 2, "x" * 300 + "y": 3, "a//b": 4, "50%": 5, "": 6, "..": 7, "ü": 8, "a\nb": 9, "tail/": 10}
    config = {"resources": odd, "value": "v" * 7000, **{f"many.{number}": number for number in range(230)}}
    with start_run("caption", config, tracking=TrackingConfig(), output_dir=tmp_path) as run:
        run.log_metrics({f"rejects.{name}": 1.0 for name in odd})
        run.tag_tables({"s3://bucket/user@host/latents/a": "beef", "/data/it's/latents/" + "b" * 300: "cafe"})
        run.set_tags({"notice@1": "x" * 6000})
        run.log_inputs("d", {"s3://b/" + "t" * 600: "beef"}, "caption")
    (found,) = runs_in(tmp_path)
    assert found.info.status == "FINISHED" and len(found.data.params) == len(odd) + 1 + 230
    assert sorted(int(value) for key, value in found.data.params.items() if key.startswith("resources")) == list(range(1, 11))
    assert found.data.params["many.229"] == "229" and len(found.data.params["value"]) == 6000
    assert len(found.data.metrics) == len(odd) and {"beef", "cafe"} <= set(found.data.tags.values())
    assert [entry.dataset.digest for entry in found.inputs.dataset_inputs] == ["beef"]


def test_names_that_mlflow_takes_stay_and_others_stay_apart() -> None:
    for name in ("loss", "table.latents/a-b", "loss_sigma.0.0-0.2", "a b:c"):
        assert safe_name(name) == name
    assert safe_name("table.s3://bucket/x") == "table.s3:/bucket/x"
    odd = ["a@b", "a%b", "", ".", "..", "../a", "/a", "x" * 251, "x" * 252, "a//b", "a/b", "\udcff"]
    assert len({safe_name(name) for name in odd}) == len(odd) and all(0 < len(safe_name(name)) <= MAX_NAME for name in odd)


def test_mlflow_opens_the_experiment_as_one_of_training(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    make_request(tmp_path).connect()
    client = MlflowClient(uri)
    old = client.create_experiment("old")
    client.set_experiment_tag(client.create_experiment("own"), "mlflow.experimentKind", "genai_development")
    for name in ("old", "own"):
        RunRequest.make("x", {}, tracking=TrackingConfig(experiment=name), output_dir=tmp_path).connect()
    kinds = {one.name: one.tags.get("mlflow.experimentKind") for one in client.search_experiments()}
    assert kinds["sana"] == kinds["old"] == "custom_model_development" and kinds["own"] == "genai_development" and old


def report_of(folder: Path, run_id: str) -> str:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    return Path(client.download_artifacts(run_id, "report.html")).read_text()


@pytest.mark.parametrize("way", ["moved", "copied"])
def test_artifacts_of_a_moved_dataset_are_where_it_is_now(way: str, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new place"
    with start_run("ingest", {}, tracking=TrackingConfig(), output_dir=old) as first:
        first.log_html("<p>old", "report.html")
    shutil.move(old, new) if way == "moved" else shutil.copytree(old, new)
    with start_run("caption", {}, tracking=TrackingConfig(), output_dir=new) as second:
        second.log_html("<p>new", "report.html")
    assert old.exists() == (way == "copied") and len(list(old.rglob("report.html"))) == (way == "copied")
    assert len(list(new.rglob("report.html"))) == 2
    assert [report_of(new, run.run_id) for run in (first, second)] == ["<p>old", "<p>new"]


def test_artifacts_that_lie_elsewhere_on_purpose_stay_there(tmp_path: Path) -> None:
    """A database that two datasets share, and one whose artifacts were put onto another disk."""
    shared = TrackingConfig(uri=f"sqlite:///{tmp_path}/shared/mlflow.db")
    for name in ("a", "b"):
        with start_run("ingest", {}, tracking=shared, output_dir=tmp_path / name) as run:
            run.log_html("<p>", f"{name}.html")
    assert len(list((tmp_path / "a").rglob("*.html"))) == 2 and not list((tmp_path / "b").rglob("*.html"))
    make_request(tmp_path / "c").connect()
    shutil.move(tmp_path / "c" / "mlartifacts", tmp_path / "mlartifacts")
    with sqlite3.connect(tmp_path / "c" / "mlflow.db") as database:
        database.execute("UPDATE experiments SET artifact_location = ?", (f"file://{tmp_path}/mlartifacts",))
    with start_run("ingest", {}, tracking=TrackingConfig(), output_dir=tmp_path / "c") as run:
        run.log_html("<p>", "c.html")
    assert list((tmp_path / "mlartifacts").rglob("c.html")) and not list((tmp_path / "c").rglob("c.html"))


class Answers(Handler):
    """Answers every request with `status`."""

    status = 200

    def do_GET(self) -> None:
        self.reply(self.status, b"<html>Sign in</html>")

    do_POST = do_GET


def spoiled(folder: Path, content: bytes) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "x.db").write_bytes(content)
    return f"sqlite:///{folder}/x.db"


def in_place_of(folder: Path) -> str:
    folder.mkdir()
    return f"sqlite:///{folder}"


FAULTS: dict[str, tuple[Callable[[Path], str], bool, str]] = {
    "no server": (lambda folder: NOWHERE, True, "try again later"),
    "no such host": (lambda folder: "http://host.invalid:5000", True, "try again later"),
    "a file that is no database": (lambda folder: spoiled(folder, b"hello " * 1000), False, "the file holds something else"),
    "a folder in place of the file": (in_place_of, False, "must exist, and be writable"),
    "a place that cannot be made": (lambda folder: "sqlite:////proc/x/m.db", False, "MLflow cannot keep its runs in"),
    "no driver": (lambda folder: "mysql+nodriver://u@h/db", False, "MLflow cannot keep its runs in mysql"),
    "a scheme that is none": (lambda folder: "htp://host:5000", False, "set tracking.uri, or MLFLOW_TRACKING_URI"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_that_pass_and_those_that_never_will(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    make, passing, told = FAULTS[name]
    tracking = TrackingConfig(uri=make(tmp_path / "db"))
    kind = StorageError if passing else TrackingError
    with pytest.raises(kind, match=told), start_run("x", {}, tracking=tracking, output_dir=tmp_path):
        pass


ANSWERS = [(401, False, "MLFLOW_TRACKING_USERNAME"), (404, False, "MLflow server"), (503, True, "later")]


@pytest.mark.parametrize(("status", "passing", "told"), ANSWERS)
def test_answers_of_servers(status: int, passing: bool, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(Answers, "status", status)
    with Server(Answers).running() as server:
        request = make_request(tmp_path, server.url)
        with pytest.raises(Exception) as raised:
            request.connect()
    assert is_passing(raised.value) == passing and told in str(describe(raised.value, server.url))


def test_mlflow_that_fails_within_a_stage_gives_one_message(tmp_path: Path) -> None:
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    with (
        pytest.raises(TrackingError, match="MLflow cannot keep its runs in sqlite"),
        start_run("x", {}, tracking=tracking, output_dir=tmp_path) as run,
    ):
        client_of(run.uri).delete_run(run.run_id)
        run.log_metrics({"rows": 1.0})


def test_what_could_not_be_sent_is_sent_by_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patient_run, "CLOSE_SECONDS", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    notices: list[str] = []
    run = PatientRun(make_request(tmp_path, NOWHERE), say=notices.append)
    run.log_inputs("d", {"latents/a": "beef"}, "training")
    run.log_metrics({"loss": 3.0}, 10)
    run.log_image(Image.new("RGB", (4, 4), "red"), "samples", 10)
    run.set_tags({"checkpoint": "c"})
    folder = str(tmp_path / "out")
    write_unsent(folder, run.close())
    nowhere = make_request(tmp_path, NOWHERE)
    last = [Entry("metrics", {"loss_end": 0.5}, 10), Entry("tables", {"latents/a": "beef"}), Entry("end", "FINISHED")]
    problem = send_or_keep(nowhere, folder, last, say=notices.append)
    told = rf"7 entries could not be sent to MLflow at {NOWHERE} .*: they wait in {folder}/{UNSENT}"
    assert problem is not None and re.match(told, problem)
    kept = read_unsent(folder)
    assert [entry.kind for entry in kept] == ["inputs", "metrics", "image", "tags", "metrics", "tables", "end"]

    there = make_request(tmp_path)
    assert send_or_keep(there, folder, [BAD, Entry("html", ["report.html", "<p>"])], say=notices.append) is None
    assert (
        not (tmp_path / "out" / UNSENT).exists() and send_or_keep(nowhere, folder, say=notices.append) is None
    )  # nothing waits: nothing is asked
    (found,) = runs_in(tmp_path)
    assert found.info.status == "FINISHED" and found.data.metrics == {"loss": 3.0, "loss_end": 0.5}
    assert found.data.tags["checkpoint"] == "c" and found.data.tags["table.latents/a"] == "beef"
    assert [entry.dataset.name for entry in found.inputs.dataset_inputs] == ["latents/a"]
    client = client_of(there.uri)
    assert [point.timestamp for point in client.get_metric_history(found.info.run_id, "loss")] == [int(1000 * kept[1].at)]
    assert {artifact.path for artifact in client.list_artifacts(found.info.run_id)} == {"config.yaml", "images", "report.html"}


def test_a_damaged_file_of_entries_is_named(tmp_path: Path) -> None:
    for content in ("{", '{"what": 1}\n', "[]\n"):
        (tmp_path / UNSENT).write_text(content)
        with pytest.raises(StorageError, match=f"{UNSENT} is damaged"):
            read_unsent(str(tmp_path))


def test_a_run_that_is_deleted_meanwhile_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patient_run, "CLOSING_WAIT", 0.01)
    request, notices = make_request(tmp_path), []
    first = request.connect()
    run = PatientRun(request, say=notices.append)
    run.log_metrics({"loss": 3.0}, 1)
    while run.waiting():
        pass
    client_of(request.uri).delete_run(first.run_id)
    run.log_metrics({"loss": 2.0}, 2)
    run.log_metrics({"loss": 1.0}, 3)
    assert run.close() == []
    (found,) = runs_in(tmp_path)
    history = client_of(request.uri).get_metric_history(found.info.run_id, "loss")
    assert found.info.run_id != first.run_id and [(point.step, point.value) for point in history] == [(2, 2.0), (3, 1.0)]


@pytest.mark.parametrize("entry", [BAD, Entry("metrics", {"loss": 1.0}, 2**70), Entry("metrics", {"loss": "x"}, 1)])
def test_an_entry_that_mlflow_never_takes_holds_up_no_other(entry: Entry, tmp_path: Path) -> None:
    notices: list[str] = []
    run = PatientRun(make_request(tmp_path), say=notices.append)
    run._put(entry)
    run.log_metrics({"loss": 1.0}, 2)
    assert run.close() == []
    assert runs_in(tmp_path)[0].data.metrics["loss"] == 1.0
    assert len(notices) == 1 and re.search(rf"refuses {entry.kind}.*, which are left out: ", notices[0])
