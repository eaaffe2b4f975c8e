"""`python -m jobs.score --config jobs/configs/score.yaml`: images and captions -> CLIP scores."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from jobs.runner import JobConfig, run_job, track_stage
from pipelines.report import scores_report
from pipelines.score import ScorerConfig, run_score
from pipelines.select import SelectionConfig, choose_caption
from pipelines.stage import Row, StageResult


@dataclass(frozen=True, kw_only=True)
class ScoreJob(JobConfig):
    """Score every caption of every image of a dataset with a CLIP.

    Args:
        scorer: the CLIP, and whose captions compete.
        selection: the policy that the report shows; it changes nothing in the table.
    """

    scorer: ScorerConfig
    selection: SelectionConfig = field(default_factory=SelectionConfig)


def run(job: ScoreJob) -> StageResult:
    """The stage in an MLflow run, on the Ray that is there."""

    def choose(captions: list[Row], image_id: str) -> Row | None:
        return choose_caption(captions, job.selection, seed=0, epoch=0, sample_id=image_id)

    return track_stage(
        job,
        "score",
        lambda on_progress: run_score(job.dataset_uri, job.scorer, on_progress=on_progress),
        make_report=lambda: scores_report(job.dataset_uri, job.scorer.name, choose),
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(ScoreJob, run, argv, prog="python -m jobs.score", description="Images and captions -> CLIP scores.")


if __name__ == "__main__":
    sys.exit(main())
