"""`python -m jobs.duplicates --config jobs/configs/duplicates.yaml`: images or their embeddings -> which of them look alike."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from jobs.common.job import JobConfig, run_job
from jobs.common.stage_job import require_tables, track_stage
from pipelines.score.config import NEAR_DUPLICATES, SEMANTIC_DUPLICATES, DuplicatesConfig, SemanticConfig
from pipelines.stages.contract import StageResult
from pipelines.tables.schema import IMAGES_PATH, image_embeds_path


@dataclass(frozen=True, kw_only=True)
class DuplicatesJob(JobConfig):
    """Configuration of the search for images that look alike.

    Args:
        method: hash: by perceptual hashes, into image_scores/near_duplicates; finds copies that were scaled or compressed.
            semantic: by CLIP embeddings, into image_scores/semantic_duplicates; finds many that were cropped too.
        duplicates: what counts as looking alike for the method hash.
        semantic: what counts as looking alike for the method semantic, which needs it.
    """

    method: Literal["hash", "semantic"] = "hash"
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    semantic: SemanticConfig | None = None

    def __post_init__(self) -> None:
        if self.method == "semantic" and self.semantic is None:
            raise ValueError("method 'semantic' needs --semantic.clip NAME: the table image_embeds/NAME holds the embeddings")


def run(job: DuplicatesJob) -> StageResult:
    """Run the stage in an MLflow run, on the Ray that is connected."""
    from pipelines.reports.image_scores import duplicates_report
    from pipelines.score.duplicates import run_duplicates

    config = job.semantic if job.method == "semantic" else job.duplicates
    assert config is not None
    scorer = SEMANTIC_DUPLICATES if job.method == "semantic" else NEAR_DUPLICATES
    return track_stage(
        job,
        "duplicates",
        lambda on_progress, leases: run_duplicates(job.dataset_uri, config, on_progress=on_progress, leases=leases),
        make_report=lambda: duplicates_report(job.dataset_uri, scorer),
    )


def look_first(job: DuplicatesJob) -> bool:
    """Refuse a job without its input before Ray starts."""
    embeds = [image_embeds_path(job.semantic.clip)] if job.method == "semantic" and job.semantic else []
    return require_tables(job.dataset_uri, IMAGES_PATH, *embeds)


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(DuplicatesJob, run, argv, name="duplicates", look_first=look_first)


if __name__ == "__main__":
    sys.exit(main())
