"""An MLflow run that a training logs to without ever waiting for MLflow, or failing with it."""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from PIL import Image
from tenacity import RetryCallState, Retrying

from pipelines.tracking.runs import RunRequest, TrackedRun
from sana_model.files.retry import Backoff

BACKOFF = Backoff(first=2.0, longest=30.0)
CLOSING_WAIT = 1.0  # seconds between attempts while the run is closed
CLOSE_SECONDS = 60.0  # for what still waits at the end

Entry = tuple[int, Mapping[str, float]]
"""A step and its metrics."""


class PatientRun:
    """Sends entries in a thread, in order. While MLflow cannot be reached, they wait here and in the training's checkpoints.

    Steps that MLflow has already are not sent again, so steps that are repeated after a restart appear once.

    Args:
        run_request: the run to log to.
        say: called with notices for the user.
        waiting: metrics that a checkpoint kept; they are sent first.
    """

    def __init__(self, run_request: RunRequest, *, say: Callable[[str], None], waiting: Sequence[Entry] = ()):
        self._request = run_request
        self._say = say
        self._run: TrackedRun | None = None
        self._monitor: SystemMetricsMonitor | None = None
        self._last_step = -1
        self._said = False
        self._deadline = float("inf")
        self._closing = threading.Event()
        self._wake = threading.Condition()
        self._waiting: deque[tuple[int | None, Any]] = deque(waiting)  # metrics, or a function that logs to the run
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        self._thread.start()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._put(step, dict(metrics))

    def log_image(self, image: Image.Image, key: str, step: int) -> None:
        self._put(step, lambda run: run.log_image(image, key, step))

    def log_inputs(self, dataset_uri: str, fingerprints: Mapping[str, str], context: str) -> None:
        self._put(None, lambda run: run.log_inputs(dataset_uri, fingerprints, context))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._put(None, lambda run: run.set_tags(tags))

    def waiting(self) -> list[tuple[int, dict[str, float]]]:
        """Return the metrics that are not sent yet, to be kept in a checkpoint."""
        with self._wake:
            return [(step, dict(what)) for step, what in self._waiting if isinstance(what, Mapping) and step is not None]

    def close(self) -> None:
        """Send what still waits, for `CLOSE_SECONDS` at most, and say how many entries could not be sent."""
        self._deadline = time.monotonic() + CLOSE_SECONDS
        self._closing.set()
        with self._wake:
            self._wake.notify()
        self._thread.join(CLOSE_SECONDS + 30.0)
        if self._monitor is not None:
            self._monitor.finish()
        if self._waiting:
            self._say(f"{len(self._waiting)} entries could not be sent to MLflow at {self._request.uri}")

    def _put(self, step: int | None, what: Any) -> None:
        with self._wake:
            self._waiting.append((step, what))
            self._wake.notify()

    def _send_all(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting or self._closing.is_set())
                if not self._waiting:
                    return
                step, what = self._waiting[0]
            retrying = Retrying(
                stop=lambda state: time.monotonic() > self._deadline,
                wait=BACKOFF,
                sleep=self._pause,
                after=self._say_why,
                reraise=True,
            )
            try:
                retrying(self._send, step, what)
            except Exception:  # of MLflow, its server, its database, the network: a training goes on without it
                return
            with self._wake:
                self._waiting.popleft()

    def _pause(self, seconds: float) -> None:
        if self._closing.wait(seconds):
            time.sleep(CLOSING_WAIT)

    def _say_why(self, state: RetryCallState) -> None:
        """Say once that MLflow cannot be reached, until it can be reached again."""
        if self._said:
            return
        self._said = True
        assert state.outcome is not None
        error = state.outcome.exception()
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        self._say(f"MLflow at {self._request.uri} cannot be reached, figures wait and are sent later: {reason}")

    def _send(self, step: int | None, what: Any) -> None:
        if self._run is None:
            run = self._request.connect()
            self._last_step = run.last_step("loss")
            self._run = run
        self._keep_monitoring(self._run)
        if step is not None and step <= self._last_step:
            return
        if isinstance(what, Mapping):
            self._run.log_metrics(what, step or 0)
        else:
            what(self._run)
        if self._said:
            self._said = False
            self._say(f"MLflow at {self._request.uri} can be reached again")

    def _keep_monitoring(self, run: TrackedRun) -> None:
        """Keep MLflow's monitor of the machine running: it ends with the first request that fails; start it again then."""
        if self._monitor is not None and self._monitor._process is not None and self._monitor._process.is_alive():
            return
        self._monitor = SystemMetricsMonitor(run.run_id, resume_logging=True, tracking_uri=run.uri)
        self._monitor.start()
