"""A real command with its own Ray: what listens, what it leaves when it is killed, and where its secrets turn up."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from tests.support.http_server import Handler, Server
from tests.support.sockets import listening
from tests.support.whole_dataset import make_dataset

ROOT = Path(__file__).parents[2]
SECRETS = {name: f"hunter2{name}hunter2" for name in ("url", "key", "extra", "text", "env", "engine", "model")}
SECONDS = 400.0


class HoldingServer(Server):
    """Answers only when it is let go; then it quotes each request with its headers, as servers do that complain."""

    def __init__(self) -> None:
        super().__init__(HoldingHandler)
        self.asked, self.let_go = threading.Event(), threading.Event()


class HoldingHandler(Handler):
    server: HoldingServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.set()
        self.server.let_go.wait(SECONDS)
        content = json.loads(body)
        content.pop("messages")
        told = f"unfit: {content} {dict(self.headers.items())} {SECRETS['text']}"
        self.reply(400, json.dumps({"error": {"message": told, "code": 400}}).encode())


@dataclass
class Job:
    """A command that waits for a server's answers, with all processes that belong to it."""

    driver: subprocess.Popen[str]
    server: HoldingServer
    folder: Path

    def family(self) -> list[psutil.Process]:
        driver = psutil.Process(self.driver.pid)
        return [driver, *driver.children(recursive=True)]

    def session(self) -> Path:
        """The folder of its Ray's logs, whose name ends in the driver's pid."""
        (found,) = Path("/tmp/ray").glob(f"session_*_{self.driver.pid}")
        return found


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    make_dataset(str(tmp_path / "data"))
    with HoldingServer().running() as server:
        http = {"base_url": f"http://user:{SECRETS['url']}@{server.url.partition('://')[2]}/v1", "api_key_variable": "MY_KEY"}
        http |= {"extra": {"api_key": SECRETS["extra"], "style": {"note": SECRETS["text"]}, "top_k": 5}}
        vllm = {"env": {"LEVEL": SECRETS["env"]}, "engine_args": {"hf_token": SECRETS["engine"]}}
        captioner = {"name": "vlm", "engine": "http", "http": http, "vllm": vllm, "max_reject_share": 1.0}
        captioner["model"] = f"http://me:{SECRETS['model']}@host/model"
        config = tmp_path / "job.yaml"
        config.write_text(yaml.safe_dump({"dataset_uri": str(tmp_path / "data"), "captioner": captioner}))
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
        driver = subprocess.Popen(
            [sys.executable, "-m", "jobs.caption", "--config", str(config), "--ray.num_cpus", "4"],
            cwd=ROOT,
            env=environment | {"MY_KEY": SECRETS["key"]},
            stdout=(tmp_path / "output").open("w"),
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            assert server.asked.wait(SECONDS), (tmp_path / "output").read_text()
            yield Job(driver, server, tmp_path)
        finally:
            server.let_go.set()
            driver.kill()
            driver.wait()


def test_a_job_listens_on_loopback_and_shows_no_secret(job: Job) -> None:
    owned = [(address, port, owner) for address, port, owner in listening(job.family()) if owner is not None]
    for name in ("gcs_server", "raylet/raylet", "DashboardAgent", "ray::", "jobs.caption"):
        assert any(name in owner for _, _, owner in owned), f"{name} is not among {owned}: is the list whole?"
    assert [one for one in owned if one[0].removeprefix("::ffff:") != "127.0.0.1"] == []
    session = job.session()
    job.server.let_go.set()
    assert job.driver.wait(SECONDS) == 0, (job.folder / "output").read_text()

    (job.folder / "job.yaml").unlink()
    written = [path for place in (job.folder, session) for path in place.rglob("*") if path.is_file()]
    names = {path.name for path in written}
    assert {"_manifest.json", "report.html", "mlflow.db", "config.yaml", "output", "raylet.out"} <= names
    rejects = pq.read_table(job.folder / "data" / "rejects" / "captions" / "vlm" / "00000.parquet").to_pylist()
    assert "unfit: {'model': 'http://me:***@host/model'" in rejects[0]["detail"] and "'top_k': 5" in rejects[0]["detail"]
    for path in written:
        content = str(pq.read_table(path).to_pylist()).encode() if path.suffix == ".parquet" else path.read_bytes()
        shown = {name for name, secret in SECRETS.items() if secret.encode() in content}
        if path.name in ("_manifest.json", "report.html"):
            shown -= {"text"}  # a field of the requests whose name tells of no secret: it may change the captions
        assert not shown, f"{path} shows {shown}"


def test_nothing_of_a_killed_job_lives_on(job: Job) -> None:
    family = job.family()
    assert len(family) > 6
    os.kill(job.driver.pid, signal.SIGKILL)
    killed = time.monotonic()
    job.driver.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, f"{[process.name() for process in alive]} live on"
    assert time.monotonic() - killed < 20
    watchers = [one for one in psutil.process_iter(["cmdline"]) if str(job.driver.pid) in (one.info["cmdline"] or [])]
    assert not psutil.wait_procs(watchers, timeout=20)[1], "the watcher goes too"
