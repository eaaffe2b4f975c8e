"""An MLflow run that a training logs to without ever waiting for MLflow, or failing with it."""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from PIL import Image
from tenacity import RetryCallState, Retrying

from pipelines.tracking.faults import is_passing, is_refused, tell_waiting
from pipelines.tracking.runs import RunRequest, TrackedRun
from pipelines.tracking.unsent import Entry
from sana_model.files.retry import Backoff

BACKOFF = Backoff(first=2.0, longest=30.0)
CLOSING_WAIT = 1.0  # seconds between attempts while the run is closed
CLOSE_SECONDS = 60.0  # for what still waits at the end


class PatientRun:
    """Sends entries in a thread, in order. While MLflow cannot be reached, they wait here and in the training's checkpoints.

    Metrics that MLflow has already are not sent again, so steps that are repeated after a restart appear once. An entry that
    MLflow will never take is told and left out.

    Args:
        run_request: the run to log to.
        say: called with notices for the user.
        waiting: entries of earlier starts; they are sent first.
        monitors: whether MLflow's monitor of the machine runs along.
    """

    def __init__(
        self,
        run_request: RunRequest,
        *,
        say: Callable[[str], None],
        waiting: Sequence[Entry] = (),
        monitors: bool = True,
    ):
        self._request = run_request
        self._say = say
        self._monitors = monitors
        self._run: TrackedRun | None = None
        self._monitor: SystemMetricsMonitor | None = None
        self._started = time.time()
        self._last_steps: dict[str, int] = {}  # of each metric that MLflow has had before
        self._said = False
        self._deadline = float("inf")
        self._closing = threading.Event()
        self._wake = threading.Condition()
        self._waiting: deque[Entry] = deque(waiting)
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        self._thread.start()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._put(Entry("metrics", dict(metrics), step))

    def log_image(self, image: Image.Image, key: str, step: int) -> None:
        self._put(Entry.of_image(image, key, step))

    def log_inputs(self, dataset_uri: str, fingerprints: Mapping[str, str], context: str) -> None:
        self._put(Entry("inputs", [dataset_uri, dict(fingerprints), context]))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._put(Entry("tags", dict(tags)))

    def waiting(self) -> list[tuple[int, dict[str, float]]]:
        """Return the metrics that are not sent yet, to be kept in a checkpoint."""
        with self._wake:
            return [(entry.step or 0, dict(entry.content)) for entry in self._waiting if entry.kind == "metrics"]

    def close(self) -> list[Entry]:
        """Send what still waits, for `CLOSE_SECONDS` at most. Returns the entries that could not be sent."""
        self._deadline = time.monotonic() + CLOSE_SECONDS
        self._closing.set()
        with self._wake:
            self._wake.notify()
        self._thread.join(CLOSE_SECONDS + 30.0)
        if self._monitor is not None:
            self._monitor.finish()
        with self._wake:
            return list(self._waiting)

    def _put(self, entry: Entry) -> None:
        with self._wake:
            self._waiting.append(entry)
            self._wake.notify()

    def _send_all(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting or self._closing.is_set())
                if not self._waiting:
                    return
                entry = self._waiting[0]
            retrying = Retrying(
                stop=lambda state: time.monotonic() > self._deadline,
                wait=BACKOFF,
                sleep=self._pause,
                after=self._say_why,
                reraise=True,
            )
            try:
                retrying(self._send, entry)
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
        assert error is not None
        self._say(tell_waiting(error, self._request.uri))

    def _send(self, entry: Entry) -> None:
        if self._run is None:
            run = self._request.connect()
            self._last_steps = run.last_steps()
            self._run = run
        if self._monitors:
            self._keep_monitoring(self._run)
        if self._is_known(entry):
            return
        try:
            entry.send(self._run)
        except Exception as error:
            if is_refused(error):
                self._say(entry.describe_refusal(self._request.uri, error))
                return
            if not is_passing(error):
                self._run = None  # deleted, for example: the next attempt finds or makes another one
            raise
        if self._said:
            self._said = False
            self._say(f"MLflow at {self._request.uri} can be reached again")

    def _is_known(self, entry: Entry) -> bool:
        """Whether MLflow had this entry before this start: its step is repeated since the last checkpoint."""
        step = entry.step or 0
        if entry.kind == "image" and entry.at >= self._started:
            return step <= self._last_steps.get("loss", -1)
        return entry.kind == "metrics" and all(step <= self._last_steps.get(name, -1) for name in entry.content)

    def _keep_monitoring(self, run: TrackedRun) -> None:
        """Keep MLflow's monitor of the machine running: it ends with the first request that fails; start it again then."""
        if self._monitor is not None and self._monitor._process is not None and self._monitor._process.is_alive():
            return
        monitor = SystemMetricsMonitor(run.run_id, resume_logging=True, tracking_uri=run.uri)
        monitor.start()
        self._monitor = monitor
