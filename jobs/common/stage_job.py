"""Running a stage as a job: an MLflow run, progress in one line, rebuilding of stale tables, and the report."""

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any, Self

from jobs.common.config import to_dict
from jobs.common.job import TableJobConfig
from jobs.common.ray import raise_if_stopped
from jobs.common.resources import telling_what_is_awaited
from jobs.common.status_line import StatusLine, describe_progress, describe_result
from pipelines.stages.contract import OnProgress, Progress, StageResult
from pipelines.storage.files import list_folder
from pipelines.storage.lease import Leases
from pipelines.tables.errors import StaleTableError
from pipelines.tables.schema import TABLE_SCHEMAS
from pipelines.tables.table import REPORT, Table

if TYPE_CHECKING:
    from pipelines.tracking.runs import TrackedRun


class LazyRun:
    """The MLflow run of a job, which several stages may share. It is made when it is first needed."""

    def __init__(self, job: TableJobConfig, name: str):
        self.job, self.name = job, name
        self.run: TrackedRun | None = None
        self.stack = ExitStack()

    def start(self) -> "TrackedRun":
        """The run; it is made at the first call."""
        from pipelines.tracking.runs import start_run

        if self.run is None:
            tracked = start_run(self.name, to_dict(self.job), tracking=self.job.tracking, output_dir=self.job.dataset_uri)
            self.run = self.stack.enter_context(tracked)
        return self.run

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: Any) -> None:
        self.stack.__exit__(*raised)


def track_stage(
    job: TableJobConfig,
    name: str,
    run_stage: Callable[[OnProgress, Leases], StageResult],
    *,
    make_report: Callable[[], str] | None = None,
    log: "Callable[[TrackedRun, StageResult], None] | None" = None,
    is_due: bool = False,
    shared: LazyRun | None = None,
    section: str = "",
) -> StageResult:
    """Run one stage in an MLflow run of its own, or in one that it shares, and put its report into its table and into the run.

    A stage that has nothing to do makes no run and no new report, unless `is_due`: its shards were made along with another
    stage's. A table that lacks its report gets one in any case: its job was killed at the very end.

    Args:
        name: of the stage, for the run and the status line.
        run_stage: runs the stage, and reports its progress.
        make_report: returns the page of the finished table.
        log: adds the stage's own figures to the run.
        shared: a run that several stages share, which the caller ends; the names of this stage's figures then begin with
            that of its table.
        section: dotted name of the stage's part of the job's configuration, where others of its parts do not run now.
    """
    from jobs.common.prometheus import StageMetrics

    raise_if_stopped()
    line = StatusLine()
    with nullcontext(shared) if shared else LazyRun(job, name) as tracked:
        run: TrackedRun | None = None

        def on_progress(progress: Progress) -> None:
            nonlocal run
            raise_if_stopped()
            if run is None and (is_due or progress.done_shards < progress.num_shards):
                run = tracked.start()
            metrics.update(progress)
            line.show(describe_progress(name, progress))

        with (
            StageMetrics(job.dataset_uri, name) as metrics,
            telling_what_is_awaited(job, name, line.say, section),
            line.running(f"{name:<22} finds its inputs and models"),
        ):
            result = _run_rebuilding(job, name, lambda leases: run_stage(on_progress, leases), line)
        if make_report is not None and (run is not None or _lacks_report(result)):
            _publish_report(make_report(), result, run)
        if run is not None:
            log_result(run, result, name.split()[0], prefix=f"{result.table.path.rpartition('/')[2]}." if shared else "")
            if log is not None:
                log(run, result)
    line.clear()
    print(describe_result(name, result, is_due=is_due), flush=True)
    return result


def _publish_report(html: str, result: StageResult, run: "TrackedRun | None") -> None:
    """Write the page into the stage's table, and into its run if there is one."""
    result.table.write_report(html)
    if run is not None:
        run.log_html(html, REPORT)


def require_tables(dataset_uri: str, *paths: str) -> bool:
    """For `run_job`'s `look_first`: raise MissingTableError before Ray starts if one of a stage's inputs is not there."""
    for path in paths:
        Table(dataset_uri, path, TABLE_SCHEMAS[path.split("/")[0]]).require()
    return False


def _lacks_report(result: StageResult) -> bool:
    return result.num_shards > 0 and REPORT not in list_folder(result.table.uri)


def _run_rebuilding(
    job: TableJobConfig, name: str, run_stage: Callable[[Leases], StageResult], line: StatusLine
) -> StageResult:
    """Run the stage; where the job may, delete each stale table that it names, and run it again.

    The leases are held all the while: nobody else gets at a table between its deletion and its making.
    """
    from pipelines.audit.rebuild import delete_table

    deleted: set[str] = set()
    with Leases(job.lease) as leases:
        while True:
            try:
                return run_stage(leases)
            except StaleTableError as error:
                table = error.table
                if table is None or table.uri in deleted or not (job.on_stale == "rebuild" or table.deletion_begun()):
                    raise
                line.clear()
                differing = [field for field in str(error).splitlines() if field.startswith("  ")]
                print("\n".join([f"{name:<22} {table.path} is stale: deleting it, to make it anew", *differing]), flush=True)
                delete_table(table, leases)
                deleted.add(table.uri)


def log_result(run: "TrackedRun", result: StageResult, context: str, *, prefix: str = "") -> None:
    """Log a stage's counts, figures and tables.

    Args:
        context: what the tables that it read were read for.
        prefix: of the names of counts and figures.
    """
    figures = {
        "rows": result.num_rows,
        "rejects": result.num_rejects,
        "shards": result.num_shards,
        "shards_found": result.found_shards,
        "seconds": result.seconds,
        "rows_per_second": result.rows_per_second,
        **{f"rejects.{reason}": count for reason, count in result.rejects_by_reason.items()},
        **result.figures,
    }
    run.log_metrics({f"{prefix}{name}": value for name, value in figures.items()})
    run.tag_tables({**result.inputs, result.table.path: result.fingerprint})
    if result.inputs:
        run.log_inputs(result.table.dataset_uri, result.inputs, context)
