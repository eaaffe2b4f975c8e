"""`python -m jobs.serve`: pictures over HTTP, by OpenAI's API for images, and a web page. Runs until it is stopped."""

import ipaddress
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.common.commands import COMMANDS, program
from jobs.common.config import parse_config
from jobs.common.exit_codes import ExitCode
from jobs.common.job import run_command
from jobs.common.ray import JobStopped, RayConfig, start_ray
from jobs.common.resources import check_local, on_cluster
from pipelines.serve.config import KEYS_VARIABLE, ServeConfig

if TYPE_CHECKING:
    from ray import serve


@dataclass(frozen=True, kw_only=True)
class ServeJob(ServeConfig):
    """Configuration of serving pictures over HTTP.

    Args:
        host: the address that the server listens on. 127.0.0.1: this machine alone; 0.0.0.0: every network of the machine, for
            which keys in the environment variable SANA_API_KEYS are advised.
        port: the port that it listens on.
        ray: the Ray to run on.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    ray: RayConfig = field(default_factory=RayConfig)

    def to_serve(self) -> ServeConfig:
        """The part that the server's processes get."""
        return ServeConfig(**{each.name: getattr(self, each.name) for each in fields(ServeConfig)})


def run(job: ServeJob) -> ExitCode:
    """Serve until Ctrl-C or SIGTERM."""
    has_keys = bool(os.environ.get(KEYS_VARIABLE, "").strip())
    if job.require_key and not has_keys:
        raise ValueError(f"require_key is true, and the environment variable {KEYS_VARIABLE} holds no key")
    if not has_keys and not is_loopback(job.host):
        note(f"WARNING: host={job.host} is no loopback address, and {KEYS_VARIABLE} holds no key: whoever reaches it may draw")
    try:
        with start_ray(job.ray):
            check_local(job)
            serve_until_stopped(job, has_keys)
    except (KeyboardInterrupt, JobStopped):
        note("stopped")
    return ExitCode.DONE


def serve_until_stopped(job: ServeJob, has_keys: bool) -> None:
    """Start the application on the Ray that is connected, and wait."""
    import ray
    from ray import serve
    from ray.serve.schema import LoggingConfig

    from pipelines.serve.deploy import APPLICATION, build_app

    if not job.resources.num_gpus and ray.cluster_resources().get("GPU"):
        note("the replicas draw on the CPU: --resources.num_gpus 1 gives each a GPU")
    note(f"loading {job.model}")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    serve.start(proxy_location="HeadOnly", http_options={"host": job.host, "port": job.port}, logging_config=quiet)
    try:
        app = build_app(job.to_serve(), keys_expected=has_keys)
        serve.run(app, name=APPLICATION, route_prefix="/", logging_config=quiet)
        print(f"serving {job.served_name} at http://{shown_host(job.host)}:{job.port}/ (Ctrl-C ends it)", flush=True)
        stopped = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stopped.set())
        stopped.wait()
    finally:
        if on_cluster():  # a local Ray ends with this process
            serve.delete(APPLICATION)


def build(arguments: dict[str, str]) -> "serve.Application":
    """The application for a RayService or `serve deploy`: `import_path: jobs.serve:build`.

    `arguments`: "config", the path of a YAML file of this command on the nodes. Its host, port and ray count for nothing there.
    """
    from pipelines.serve.deploy import build_app

    path = arguments["config"]
    if not Path(path).is_file():
        raise FileNotFoundError(f"no configuration {path}: mount it into the pods")
    job = parse_config(ServeJob, ["--config", path], prog=program("serve"), description=COMMANDS["serve"])
    return build_app(job.to_serve())


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def shown_host(host: str) -> str:
    """The host of an address that a browser on this machine opens."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(ServeJob, run, argv, name="serve")


if __name__ == "__main__":
    sys.exit(main())
