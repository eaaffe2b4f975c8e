"""Starting Ray for a job, and stopping the job on SIGTERM."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any, ClassVar

from jobs.common.local_ray import isolated
from jobs.common.resources import on_cluster
from pipelines.storage.errors import ErrorKind

MOST_CPUS = 128
"""Logical CPUs of a local Ray, on a machine with few cores; else 8 for each core."""
STOPPED = b"\nstopped: all shards and checkpoints written so far stay; run the same command again to go on from there\n"


class RayStartError(RuntimeError):
    """Ray did not start, or did not answer."""

    error_kind: ClassVar[ErrorKind] = "fault"


class JobStopped(BaseException):
    """SIGTERM arrived. Not an Exception, so that no handler mistakes it for an ordinary failure and continues."""


_stop_asked = threading.Event()


def raise_if_stopped() -> None:
    """Raise JobStopped once more where the signal's own was lost, as in a finalizer, from which Python lets nothing out."""
    if _stop_asked.is_set():
        raise JobStopped


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """The Ray that a job runs on: the cluster of RAY_ADDRESS (as under `ray job submit`), or else a local one.

    Args:
        num_cpus: logical CPUs of a local Ray; None: the machine's. A larger number lets light actors share a core.
        num_gpus: GPUs of a local Ray; None: those that Ray finds.
    """

    num_cpus: int | None = None
    num_gpus: int | None = None

    def __post_init__(self) -> None:
        most = max(MOST_CPUS, 8 * (os.cpu_count() or 1))
        if self.num_cpus is not None and not 1 <= self.num_cpus <= most:
            raise ValueError(f"num_cpus={self.num_cpus} must be from 1 to {most}: Ray starts a process for each")
        if self.num_gpus is not None and not 0 <= self.num_gpus <= MOST_CPUS:
            raise ValueError(f"num_gpus={self.num_gpus} must be from 0 to {MOST_CPUS}")


@contextmanager
def start_ray(config: RayConfig) -> Iterator[None]:
    """Connect to the cluster, or start a local Ray and stop it at the end. A Ray that this process has is used, and left.

    A local Ray is for this job alone, see `isolated`.
    """
    import ray
    import ray.data  # sets up its loggers

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    was_there = ray.is_initialized()
    with nullcontext(_ignore) if was_there or on_cluster() else isolated() as tell_started:
        if not was_there:
            _init_ray(config)
            tell_started()
        _quiet_libraries()
        before = signal.signal(signal.SIGTERM, _stop)  # after ray.init, which sets a handler of its own
        try:
            yield
        finally:
            _stop_asked.clear()
            if was_there:
                signal.signal(signal.SIGTERM, before)
            else:
                ray.shutdown()


def _ignore() -> None:
    """Nobody waits for the start."""


def _init_ray(config: RayConfig) -> None:
    """Connect or start. A local start is tried twice: on a busy machine the first may take too long. Raises RayStartError."""
    import ray

    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's C++ side writes to this process's own stderr
    options: dict[str, Any] = {}
    if not on_cluster():
        # "local": a Ray that runs here already may be another user's.
        options = {"address": "local", "num_cpus": config.num_cpus, "num_gpus": config.num_gpus, "include_dashboard": False}
    for attempts_left in (1, 0):
        try:
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
            break
        except ValueError:  # settings that it refuses
            raise
        except (Exception, SystemExit) as error:  # Ray raises one or the other, by what was too slow
            ray.shutdown()
            if not attempts_left or isinstance(error, ConnectionError):
                raise RayStartError(_explain(error)) from error


def _explain(error: BaseException) -> str:
    """Say why Ray did not start, and what to do."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if on_cluster():
        return f"the Ray cluster at RAY_ADDRESS={os.environ['RAY_ADDRESS']} does not answer: {reason}"
    return f"Ray did not start here, twice: {reason}: is the machine busy, or out of memory or disk? try again"


@contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """Stop a job that needs no Ray on SIGTERM, as `start_ray` does."""
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        _stop_asked.clear()
        signal.signal(signal.SIGTERM, before)


def _quiet_libraries() -> None:
    """Show only the warnings of libraries: a stage prints its own progress. Ray's log files keep everything."""
    for name in ("ray", "ray.data"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setLevel(logging.WARNING)  # the loggers' own levels are set anew by whoever calls ray.init() again
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that there are no bars
    llm = logging.getLogger("ray.llm")
    llm.addHandler(logging.NullHandler())  # without one its modules, imported later, add their own
    llm.setLevel(logging.WARNING)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # of this process alone: the engines' are Ray's workers


def _stop(signum: int, frame: FrameType | None) -> None:
    """Print a message at once, because `ray job stop` leaves 3 seconds. A second SIGTERM does not interrupt the cleanup."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _stop_asked.set()
    os.write(sys.stderr.fileno(), STOPPED)
    raise JobStopped
