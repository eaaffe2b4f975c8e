"""Running a metric as a part of a job."""

from typing import TYPE_CHECKING

from jobs.common.job import TableJobConfig
from jobs.common.stage_job import LazyRun, track_stage
from pipelines.stages.contract import StageResult

if TYPE_CHECKING:
    from pipelines.evaluate.metric_config import MetricConfig
    from pipelines.evaluate.pictures import Pictures


def judge_pictures(
    job: TableJobConfig,
    pictures: "Pictures",
    metric: str,
    config: "MetricConfig",
    *,
    shared: LazyRun | None = None,
    section: str = "",
) -> StageResult:
    """Judge pictures by one metric, as `track_stage` runs a stage."""
    from pipelines.evaluate.run import run_metric

    return track_stage(
        job,
        f"evaluate {pictures.name} {metric}",
        lambda on_progress, leases: run_metric(
            job.dataset_uri, pictures, metric, config, on_progress=on_progress, leases=leases
        ),
        shared=shared,
        section=section,
    )
