"""What the stage jobs share: Ray, an MLflow run, progress in one line, the report, and an exit code."""

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Literal, TypeVar

import ray
import ray.data  # sets up its loggers

from jobs.config import parse_config, to_dict
from jobs.exit_codes import ExitCode, exit_code
from pipelines.lease import LeaseConfig, LeaseLostError, hold, lease_settings
from pipelines.metrics import StageMetrics
from pipelines.rebuild import delete_table
from pipelines.report import write_report
from pipelines.stage import OnProgress, Progress, ShardError, StageError, StageResult, TooManyRejectsError
from pipelines.storage import StorageError, list_folder
from pipelines.tables import REPORT, MissingTableError, StaleTableError, absolute_uri
from pipelines.tracking import TrackedRun, TrackingConfig, start_run
from pipelines.train_config import TrainingError

EXPECTED = (
    MissingTableError,
    StaleTableError,
    LeaseLostError,
    StorageError,
    ShardError,
    StageError,
    TooManyRejectsError,
    TrainingError,
    FileNotFoundError,
    ValueError,
)
"""What a user can put right: shown as one message, without a traceback."""
CLEAR_LINE = "\r\x1b[2K"
PRINT_EVERY = 10.0  # seconds between progress lines in a log file
STOPPED = b"\nstopped: all shards and checkpoints written so far stay; run the same command again to go on from there\n"


class JobStopped(BaseException):
    """SIGTERM came. Not an Exception: nothing on the way may take it for a failure of its own and go on."""


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """The Ray that a job runs on: the cluster of RAY_ADDRESS (as under `ray job submit`), or else a local one.

    Args:
        num_cpus: logical CPUs of a local Ray; None: the machine's. More than there are lets light actors share a core.
        num_gpus: GPUs of a local Ray; None: those that Ray finds.
    """

    num_cpus: int | None = None
    num_gpus: int | None = None


@contextmanager
def start_ray(config: RayConfig) -> Iterator[None]:
    """Connect to the cluster, or start a local Ray and stop it at the end."""
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's C++ side writes to this process's own stderr
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    else:
        ray.init(
            num_cpus=config.num_cpus,
            num_gpus=config.num_gpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    _quiet_libraries()
    signal.signal(signal.SIGTERM, _stop)  # after ray.init, which sets a handler of its own
    try:
        yield
    finally:
        ray.shutdown()


def _quiet_libraries() -> None:
    """Only their warnings are shown: a stage says itself how far it is. Ray's log files keep everything."""
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
    """Says so at once, because `ray job stop` leaves 3 seconds; a second SIGTERM does not disturb the cleaning up."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.write(sys.stderr.fileno(), STOPPED)
    raise JobStopped


class StatusLine:
    """Shows how far something is: one line, rewritten on a terminal; in a log a line now and then."""

    def __init__(self) -> None:
        self.printed = 0.0
        self.is_terminal = sys.stderr.isatty()

    def show(self, text: str) -> None:
        now = time.monotonic()
        if not self.is_terminal and now - self.printed < PRINT_EVERY:
            return
        self.printed = now
        start, end = (CLEAR_LINE, "") if self.is_terminal else ("", "\n")
        print(f"{start}{text}", end=end, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.clear()
        print(text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the line away, where it can be."""
        if self.is_terminal:
            print(CLEAR_LINE, end="", file=sys.stderr, flush=True)


def describe_progress(name: str, progress: Progress) -> str:
    return (
        f"{name:<22} {progress.done_shards}/{progress.num_shards} shards  {progress.num_rows} rows  "
        f"{progress.rows_per_second:.1f} rows/s  {progress.num_rejects} rejects"
    )


def describe(name: str, result: StageResult, *, is_due: bool = False) -> str:
    """One line on what a stage did; `is_due` as in `track_stage`."""
    counts = f"{result.num_rows} rows, {result.num_rejects} rejects in {result.num_shards} shards"
    if result.num_shards == 0:
        return f"{name:<22} nothing to do: no shard of its inputs is ready"
    if result.was_done:
        return f"{name:<22} {counts}: {'made along with another' if is_due else 'all there already, nothing to do'}"
    found = f" ({result.found_shards} were there already)" if result.found_shards else ""
    return f"{name:<22} {counts}{found}, {result.seconds:.0f} s, {result.rows_per_second:.1f} rows/s"


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """What every stage's job is told.

    Args:
        dataset_uri: the folder (any fsspec URI) that holds the dataset's tables.
        ray: the Ray to run on.
        tracking: where MLflow keeps the run.
        lease: what keeps a second job from writing the same table.
        on_stale: what to do with a table that was made in another way than it would be made now. rebuild: delete it with its
            rejects and make it anew. What was made from it is not touched: it is stale then, for its own stage to rebuild.
    """

    dataset_uri: str
    ray: RayConfig = field(default_factory=RayConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    lease: LeaseConfig = field(default_factory=LeaseConfig)
    on_stale: Literal["refuse", "rebuild"] = "refuse"


Job = TypeVar("Job", bound=JobConfig)


def run_job(
    job_class: type[Job],
    run: Callable[[Job], object],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    look_first: Callable[[Job], bool] = lambda job: False,
) -> int:
    """Parse the command line, start Ray, run the job; returns the exit code (see `ExitCode`). `look_first` is called before Ray
    starts: if it returns True, the job is done.

    What a user can put right is one message on stderr; anything else keeps its traceback.
    """
    job = parse_config(job_class, argv, prog=prog, description=description)
    job = replace(job, dataset_uri=absolute_uri(job.dataset_uri))
    try:
        if not look_first(job):
            with start_ray(job.ray), lease_settings(job.lease):
                run(job)
    except JobStopped:
        return ExitCode.STOPPED
    except EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code(error)
    except Exception:
        traceback.print_exc()
        return ExitCode.FAULT
    return ExitCode.DONE


def track_stage(
    job: JobConfig,
    name: str,
    run_stage: Callable[[OnProgress], StageResult],
    *,
    make_report: Callable[[], str] | None = None,
    log: Callable[[TrackedRun, StageResult], None] | None = None,
    is_due: bool = False,
) -> StageResult:
    """Run one stage in an MLflow run of its own, and put its report into its table and into the run.

    A stage that has nothing to do leaves no run and no new report, unless it `is_due`: its shards were made along with
    another's. A table that lacks its report gets it all the same: its job was killed at the very end. `log` adds to the run
    what is the stage's own.
    """
    line = StatusLine()
    metrics = StageMetrics(job.dataset_uri, name)
    with ExitStack() as stack:
        run: TrackedRun | None = None

        def on_progress(progress: Progress) -> None:
            nonlocal run
            if run is None and (is_due or progress.done_shards < progress.num_shards):
                tracked = start_run(name, to_dict(job), tracking=job.tracking, output_dir=job.dataset_uri)
                run = stack.enter_context(tracked)
            metrics.update(progress)
            line.show(describe_progress(name, progress))

        result = _run_rebuilding(job, name, lambda: run_stage(on_progress), line)
        html: str | None = None
        if make_report is not None and (run is not None or _lacks_report(result)):
            html = make_report()
            write_report(result.table, html)
        if run is not None:
            log_result(run, result)
            if html is not None:
                run.log_html(html, REPORT)
            if log is not None:
                log(run, result)
    line.clear()
    print(describe(name, result, is_due=is_due), flush=True)
    return result


def _lacks_report(result: StageResult) -> bool:
    return result.num_shards > 0 and REPORT not in list_folder(result.table.uri)


def _run_rebuilding(job: JobConfig, name: str, run_stage: Callable[[], StageResult], line: StatusLine) -> StageResult:
    """Run it, and delete what stale tables it names on the way, where the job may; nobody else gets at them in between."""
    deleted: set[str] = set()
    with ExitStack() as leases:
        while True:
            try:
                return run_stage()
            except StaleTableError as error:
                table = error.table
                if table is None or table.uri in deleted or not (job.on_stale == "rebuild" or table.deletion_begun()):
                    raise
                line.clear()
                differing = [field for field in str(error).splitlines() if field.startswith("  ")]
                print("\n".join([f"{name:<22} {table.path} is stale: deleting it, to make it anew", *differing]), flush=True)
                leases.enter_context(hold(table.uri))
                delete_table(table)
                deleted.add(table.uri)


def log_result(run: TrackedRun, result: StageResult) -> None:
    run.log_metrics(
        {
            "rows": result.num_rows,
            "rejects": result.num_rejects,
            "shards": result.num_shards,
            "shards_found": result.found_shards,
            "seconds": result.seconds,
            "rows_per_second": result.rows_per_second,
            **{f"rejects.{reason}": count for reason, count in result.rejects_by_reason.items()},
            **result.figures,
        }
    )
    run.tag_tables({**result.inputs, result.table.path: result.fingerprint})
