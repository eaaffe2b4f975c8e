"""`python -m jobs.score --config jobs/configs/score.yaml`: images and captions -> embeddings and CLIP scores."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jobs import embed_images
from jobs.common.job import JobConfig, run_job
from jobs.common.stage_job import require_tables, track_stage
from pipelines.score.config import ScorerConfig, SelectionConfig
from pipelines.stages.contract import StageResult
from pipelines.tables.captions import captions_table, check_scorer
from pipelines.tables.schema import SCORES, scores_path
from pipelines.tables.table import Table

if TYPE_CHECKING:
    from pipelines.workers.models import FoundModel


@dataclass(frozen=True, kw_only=True)
class ScoreJob(JobConfig):
    """Configuration of scoring captions.

    Args:
        scorer: the CLIP, and whose captions it scores.
        selection: the policy that the report shows; it changes nothing in the tables.
    """

    scorer: ScorerConfig
    selection: SelectionConfig = field(default_factory=SelectionConfig)


def run(job: ScoreJob) -> list[StageResult]:
    """Embed the images that are not embedded yet, then score each captioner's captions; an MLflow run for each table.

    Returns the results, that of the images first. Runs on the Ray that is connected.
    """
    from pipelines.score.captions import STAGE
    from pipelines.workers.models import find_model

    scorer = job.scorer
    check_scorer(job.dataset_uri, scorer.name, STAGE)
    for captioner in scorer.captioners:
        captions_table(job.dataset_uri, captioner).require()  # before hours go into the images
        if job.on_stale == "refuse":
            Table(job.dataset_uri, scores_path(scorer.name, captioner), SCORES).refuse_old()
    model = find_model(scorer.model, scorer.revision)
    embedded = embed_images.run_embedding(job, scorer.clip, model)
    return [embedded, *(_score(job, captioner, model) for captioner in scorer.captioners)]


def _score(job: ScoreJob, captioner: str, model: "FoundModel") -> StageResult:
    from pipelines.reports.scores import scores_report
    from pipelines.score.captions import run_score

    return track_stage(
        job,
        f"score {captioner}",
        lambda on_progress, leases: run_score(
            job.dataset_uri, job.scorer, captioner, model, on_progress=on_progress, leases=leases
        ),
        make_report=lambda: scores_report(job.dataset_uri, job.scorer.name, captioner, job.selection),
    )


def look_first(job: ScoreJob) -> bool:
    """Refuse a job without its input before Ray starts."""
    return require_tables(job.dataset_uri, *(captions_table(job.dataset_uri, name).path for name in job.scorer.captioners))


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(ScoreJob, run, argv, name="score", look_first=look_first)


if __name__ == "__main__":
    sys.exit(main())
