"""`python -m jobs.embed_captions --config jobs/configs/embed_captions.yaml`: captions -> the text encoder's output."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.common.job import JobConfig, run_job
from jobs.common.stage_job import require_tables, track_stage
from pipelines.extract.config import EmbedConfig
from pipelines.stages.contract import StageResult
from pipelines.tables.captions import captions_table
from pipelines.tables.schema import caption_embeds_path

if TYPE_CHECKING:
    from pipelines.workers.models import FoundModel


@dataclass(frozen=True, kw_only=True)
class EmbedJob(JobConfig):
    """Configuration of the text embeddings.

    Args:
        embed: the text encoder, and whose captions it reads.
    """

    embed: EmbedConfig


def run(job: EmbedJob) -> list[StageResult]:
    """Run the stage for each captioner in an MLflow run of its own, on the Ray that is connected."""
    from pipelines.workers.models import find_model

    for captioner in job.embed.captioners:
        captions_table(job.dataset_uri, captioner).require()  # before hours go into the first of them
    encoder = find_model(job.embed.text_encoder)
    return [_run_one(job, captioner, encoder) for captioner in job.embed.captioners]


def _run_one(job: EmbedJob, captioner: str, encoder: "FoundModel") -> StageResult:
    from pipelines.extract.embed_captions import run_embed_captions
    from pipelines.reports.caption_embeds import caption_embeds_report

    return track_stage(
        job,
        f"embed {captioner}",
        lambda on_progress, leases: run_embed_captions(
            job.dataset_uri, job.embed, captioner, encoder, on_progress=on_progress, leases=leases
        ),
        make_report=lambda: caption_embeds_report(job.dataset_uri, caption_embeds_path(job.embed.name, captioner)),
    )


def look_first(job: EmbedJob) -> bool:
    """Refuse a job without its input before Ray starts."""
    return require_tables(job.dataset_uri, *(captions_table(job.dataset_uri, name).path for name in job.embed.captioners))


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(EmbedJob, run, argv, name="embed_captions", look_first=look_first)


if __name__ == "__main__":
    sys.exit(main())
