"""`python -m jobs.embed_images --config jobs/configs/embed_images.yaml`: images -> CLIP embeddings."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.common.job import JobConfig, run_job
from jobs.common.stage_job import require_tables, track_stage
from pipelines.score.config import ClipConfig
from pipelines.stages.contract import StageResult
from pipelines.tables.schema import IMAGES_PATH

if TYPE_CHECKING:
    from pipelines.workers.models import FoundModel


@dataclass(frozen=True, kw_only=True)
class EmbedImagesJob(JobConfig):
    """Configuration of the images' embeddings. jobs.score makes them too, where they are not there yet.

    Args:
        clip: the CLIP.
    """

    clip: ClipConfig


def run(job: EmbedImagesJob) -> StageResult:
    """Run the stage in an MLflow run, on the Ray that is connected."""
    return run_embedding(job, job.clip)


def run_embedding(job: JobConfig, clip: ClipConfig, model: "FoundModel | None" = None) -> StageResult:
    """Run the stage as a part of any job. `model`: the CLIP, if it was found before."""
    from pipelines.score.embeds import run_image_embeds

    return track_stage(
        job,
        f"embed images {clip.name}",
        lambda on_progress, leases: run_image_embeds(job.dataset_uri, clip, model, on_progress=on_progress, leases=leases),
    )


def look_first(job: EmbedImagesJob) -> bool:
    """Refuse a job without its input before Ray starts."""
    return require_tables(job.dataset_uri, IMAGES_PATH)


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(EmbedImagesJob, run, argv, name="embed_images", look_first=look_first)


if __name__ == "__main__":
    sys.exit(main())
