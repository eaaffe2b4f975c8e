"""`python -m jobs.duplicates --config jobs/configs/duplicates.yaml`: images -> which of them look alike."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from jobs.common.job import JobConfig, run_job
from jobs.common.stage_job import track_stage
from pipelines.score.config import DuplicatesConfig
from pipelines.stages.contract import StageResult


@dataclass(frozen=True, kw_only=True)
class DuplicatesJob(JobConfig):
    """Configuration of the search for images that look alike.

    Args:
        duplicates: what counts as looking alike.
    """

    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)


def run(job: DuplicatesJob) -> StageResult:
    """Run the stage in an MLflow run, on the Ray that is connected."""
    from pipelines.reports.image_scores import duplicates_report
    from pipelines.score.duplicates import run_duplicates

    return track_stage(
        job,
        "duplicates",
        lambda on_progress, leases: run_duplicates(job.dataset_uri, job.duplicates, on_progress=on_progress, leases=leases),
        make_report=lambda: duplicates_report(job.dataset_uri),
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(DuplicatesJob, run, argv, name="duplicates")


if __name__ == "__main__":
    sys.exit(main())
