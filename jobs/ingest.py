"""`python -m jobs.ingest --config jobs/configs/ingest.yaml`: raw images -> the images table."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.runner import JobConfig, run_job, track_stage
from pipelines.ingest import IngestConfig, run_ingest
from pipelines.lease import hold
from pipelines.report import images_report
from pipelines.schema import IMAGES_PATH
from pipelines.stage import StageResult
from pipelines.tables import absolute_uri


@dataclass(frozen=True, kw_only=True)
class IngestJob(JobConfig):
    """Read images from a folder, tars or Parquet into a dataset.

    Args:
        ingest: what to read, and what to refuse.
    """

    ingest: IngestConfig


def run(job: IngestJob) -> StageResult:
    """The stage in an MLflow run, on the Ray that is there. The lease is held from before the plan of sources is made."""
    with hold(f"{absolute_uri(job.dataset_uri)}/{IMAGES_PATH}"):
        return track_stage(
            job,
            "ingest",
            lambda on_progress: run_ingest(job.dataset_uri, job.ingest, on_progress=on_progress),
            make_report=lambda: images_report(job.dataset_uri),
        )


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(IngestJob, run, argv, prog="python -m jobs.ingest", description="Raw images -> the images table.")


if __name__ == "__main__":
    sys.exit(main())
