"""`python -m jobs.serve`: pictures over HTTP, by OpenAI's API for images, and a web page. Runs until it is stopped."""

import ipaddress
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field, fields
from io import StringIO
from typing import TYPE_CHECKING, Any

import yaml

from jobs.common.commands import COMMANDS, program
from jobs.common.config import parse_config
from jobs.common.exit_codes import ExitCode
from jobs.common.job import run_command
from jobs.common.ray import JobStopped, RayConfig, RayStartError, start_ray
from jobs.common.resources import check_local, on_cluster
from pipelines.serve.config import KEYS_VARIABLE, ServeConfig

if TYPE_CHECKING:
    from ray import serve
    from ray.serve.schema import LoggingConfig

STARTS = 3
PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60"}
"""For Serve's controller, which else kills a proxy that does not answer within 5 or 10 seconds, as on a busy machine."""


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
            with serving(job, has_keys) as address:
                print(f"serving {job.served_name} at {address}/ (Ctrl-C ends it)", flush=True)
                stopped = threading.Event()
                signal.signal(signal.SIGTERM, lambda *_: stopped.set())
                stopped.wait()
    except (KeyboardInterrupt, JobStopped):
        note("stopped")
    return ExitCode.DONE


@contextmanager
def serving(job: ServeJob, has_keys: bool) -> Iterator[str]:
    """Within, the application runs on the Ray that is connected; yields its address, when the model is loaded."""
    import ray
    from ray import serve
    from ray.serve.schema import LoggingConfig

    from pipelines.serve.deploy import APPLICATION, build_app

    if not job.resources.num_gpus and ray.cluster_resources().get("GPU"):
        note("the replicas draw on the CPU: --resources.num_gpus 1 gives each a GPU")
    note(f"loading {job.model}")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    start_proxy(job.host, job.port, quiet)
    try:
        app = build_app(job.to_serve(), keys_expected=has_keys, host=job.host)
        serve.run(app, name=APPLICATION, route_prefix="/", logging_config=quiet)
        yield f"http://{shown_host(job.host)}:{job.port}"
    finally:
        if on_cluster():  # a local Ray ends with this process
            serve.delete(APPLICATION)


def start_proxy(host: str, port: int, logging_config: "LoggingConfig") -> None:
    """Start Ray Serve with its HTTP proxy.

    Raises ValueError if the address is taken, or if Serve runs on this cluster already, at another one; RayStartError if no
    proxy starts.
    """
    from ray import serve
    from ray.exceptions import RayActorError
    from ray.serve.context import _get_global_client  # Serve has no public way to the address that it listens on

    if not on_cluster():
        check_address(host, port)
    for attempts_left in reversed(range(STARTS)):
        try:
            serve.start(
                proxy_location="HeadOnly",
                http_options={"host": host, "port": port},
                logging_config=logging_config,
                controller_options={"runtime_env": {"env_vars": PATIENCE}},
            )
            break
        except (TimeoutError, RayActorError) as error:  # the controller goes on, and the next call finds it
            if not attempts_left:
                reason = str(error).splitlines()[0]
                raise RayStartError(f"Ray Serve's proxy did not start: {reason}: is the machine busy? try again") from error
    client = _get_global_client()
    assert client is not None
    running = client.http_config
    if (running.host, running.port) != (host, port):
        raise ValueError(
            f"host={host}, port={port}: Ray Serve runs on this cluster already, and has one address alone: "
            f"give --host {running.host} --port {running.port}, or end it by `serve shutdown`"
        )


def check_address(host: str, port: int) -> None:
    """Raise ValueError if nothing can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ValueError(f"host={host}, port={port} cannot be listened on ({error}): give another port") from error


def build(arguments: dict[str, Any]) -> "serve.Application":
    """The application for a RayService or `serve deploy`: `import_path: jobs.serve:build`.

    `arguments`: the settings of this command, as in its YAML. Raises ValueError for what the command would refuse.
    """
    from pipelines.serve.deploy import build_app

    return build_app(read_arguments(arguments))


def read_arguments(arguments: dict[str, Any]) -> ServeConfig:
    """The settings that `build` is given, read as those of a YAML file. Raises ValueError."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file, redirect_stderr(StringIO()) as told:
        yaml.safe_dump(arguments, file)
        file.flush()
        try:
            return parse_config(ServeConfig, ["--config", file.name], prog=program("serve"), description=COMMANDS["serve"])
        except SystemExit as ended:
            raise ValueError(told.getvalue().strip()) from ended


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
