"""`python -m jobs.ingest --config jobs/configs/ingest.yaml`: raw images -> the images table."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.common.job import JobConfig, run_job
from jobs.common.stage_job import track_stage
from pipelines.ingest.config import IngestConfig
from pipelines.stages.contract import StageResult
from pipelines.tables.table import REPORT


@dataclass(frozen=True, kw_only=True)
class IngestJob(JobConfig):
    """Configuration of reading raw images into a dataset.

    Args:
        ingest: what to read, and what to refuse.
    """

    ingest: IngestConfig


def run(job: IngestJob) -> StageResult:
    """Run the stage in an MLflow run, on the Ray that is connected."""
    from pipelines.ingest.not_taken import describe_not_taken
    from pipelines.ingest.run import run_ingest
    from pipelines.reports.images import images_report

    result = track_stage(
        job,
        "ingest",
        lambda on_progress, leases: run_ingest(job.dataset_uri, job.ingest, on_progress=on_progress, leases=leases),
        make_report=lambda: images_report(job.dataset_uri),
    )
    print(f"{'':<22} {describe_captions(result)}", flush=True)
    print(f"{'':<22} {describe_rejects(result)}the page: {result.table.uri}/{REPORT}", flush=True)
    if not_taken := describe_not_taken(result.figures):
        print(f"{'':<22} not taken: {not_taken}", flush=True)
    return result


def describe_rejects(result: StageResult) -> str:
    """Why images were refused, and where each is told; empty if none was."""
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(result.rejects_by_reason.items()))
    return f"refused: {reasons}; which, and why, is on " if reasons else ""


def describe_captions(result: StageResult) -> str:
    """How many images came with a caption, and under which keys the captions were found."""
    from pipelines.ingest.sidecars import CAPTION_COUNTS

    counts = {name: int(count) for name, count in result.figures.items() if name.startswith(CAPTION_COUNTS)}
    keys = ", ".join(f"{name.removeprefix(CAPTION_COUNTS)} {count}" for name, count in sorted(counts.items()))
    return f"{sum(counts.values())} of {result.num_rows} images came with a caption{f', by key: {keys}' if keys else ''}"


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(IngestJob, run, argv, name="ingest")


if __name__ == "__main__":
    sys.exit(main())
