"""`python -m jobs.score --config jobs/configs/score.yaml`: images and captions -> CLIP scores."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from jobs.common.job import JobConfig, run_job
from jobs.common.stage_job import track_stage
from pipelines.score.config import ScorerConfig, SelectionConfig
from pipelines.stages.contract import StageResult


@dataclass(frozen=True, kw_only=True)
class ScoreJob(JobConfig):
    """Configuration of scoring captions.

    Args:
        scorer: the CLIP, and whose captions compete.
        selection: the policy that the report shows; it changes nothing in the table.
    """

    scorer: ScorerConfig
    selection: SelectionConfig = field(default_factory=SelectionConfig)


def run(job: ScoreJob) -> StageResult:
    """Run the stage in an MLflow run, on the Ray that is connected."""
    from pipelines.reports.scores import scores_report
    from pipelines.score.captions import run_score

    return track_stage(
        job,
        "score",
        lambda on_progress, leases: run_score(job.dataset_uri, job.scorer, on_progress=on_progress, leases=leases),
        make_report=lambda: scores_report(job.dataset_uri, job.scorer.name, job.selection),
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(ScoreJob, run, argv, name="score")


if __name__ == "__main__":
    sys.exit(main())
