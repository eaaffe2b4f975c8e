"""`python -m jobs.score_images --config jobs/configs/score_images.yaml`: images -> one score for each."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.common.job import JobConfig, run_job
from jobs.common.stage_job import require_tables, track_stage
from pipelines.score.config import ImageScorerConfig
from pipelines.stages.contract import StageResult
from pipelines.tables.schema import IMAGES_PATH, image_embeds_path


@dataclass(frozen=True, kw_only=True)
class ScoreImagesJob(JobConfig):
    """Configuration of scoring images alone.

    Args:
        scorer: the model, and which of its labels counts.
    """

    scorer: ImageScorerConfig


def run(job: ScoreImagesJob) -> StageResult:
    """Run the stage in an MLflow run, on the Ray that is connected."""
    from pipelines.reports.image_scores import image_scores_report
    from pipelines.score.images import run_image_scores

    return track_stage(
        job,
        f"score images {job.scorer.name}",
        lambda on_progress, leases: run_image_scores(job.dataset_uri, job.scorer, on_progress=on_progress, leases=leases),
        make_report=lambda: image_scores_report(job.dataset_uri, job.scorer.name),
    )


def look_first(job: ScoreImagesJob) -> bool:
    """Refuse a job without its input before Ray starts."""
    return require_tables(job.dataset_uri, image_embeds_path(job.scorer.clip) if job.scorer.clip else IMAGES_PATH)


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(ScoreImagesJob, run, argv, name="score_images", look_first=look_first)


if __name__ == "__main__":
    sys.exit(main())
