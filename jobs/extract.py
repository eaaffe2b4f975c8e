"""`python -m jobs.extract --config jobs/configs/extract.yaml`: images and scores -> DC-AE latents."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.runner import JobConfig, run_job, track_stage
from pipelines.extract import ExtractConfig, run_extract
from pipelines.report import latents_report
from pipelines.stage import StageResult


@dataclass(frozen=True, kw_only=True)
class ExtractJob(JobConfig):
    """Encode every scored image of a dataset.

    Args:
        extract: the autoencoder, the resolution and the scores to take along.
    """

    extract: ExtractConfig


def run(job: ExtractJob) -> StageResult:
    """The stage in an MLflow run, on the Ray that is there."""
    return track_stage(
        job,
        "extract",
        lambda on_progress: run_extract(job.dataset_uri, job.extract, on_progress=on_progress),
        make_report=lambda: latents_report(job.dataset_uri, job.extract.path),
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(ExtractJob, run, argv, prog="python -m jobs.extract", description="Images and scores -> DC-AE latents.")


if __name__ == "__main__":
    sys.exit(main())
