"""`python -m jobs.caption --config jobs/configs/caption.yaml`: images -> one captioner's captions."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.runner import JobConfig, run_job, track_stage
from pipelines.caption import CaptionerConfig, run_caption
from pipelines.report import captions_report
from pipelines.stage import StageResult


@dataclass(frozen=True, kw_only=True)
class CaptionJob(JobConfig):
    """Have one VLM describe every image of a dataset.

    Args:
        captioner: the VLM, its prompt and its sampling.
    """

    captioner: CaptionerConfig


def run(job: CaptionJob) -> StageResult:
    """The stage in an MLflow run, on the Ray that is there."""
    return track_stage(
        job,
        f"caption {job.captioner.name}",
        lambda on_progress: run_caption(job.dataset_uri, job.captioner, on_progress=on_progress),
        make_report=lambda: captions_report(job.dataset_uri, job.captioner.name),
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(CaptionJob, run, argv, prog="python -m jobs.caption", description="Images -> one captioner's captions.")


if __name__ == "__main__":
    sys.exit(main())
