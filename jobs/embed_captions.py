"""`python -m jobs.embed_captions --config jobs/configs/embed_captions.yaml`: captions -> the text encoder's output."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.common.job import JobConfig, run_job
from jobs.common.stage_job import track_stage
from pipelines.extract.config import EmbedConfig
from pipelines.stages.contract import StageResult


@dataclass(frozen=True, kw_only=True)
class EmbedJob(JobConfig):
    """Configuration of the text embeddings.

    Args:
        embed: the text encoder, and whose captions it reads.
    """

    embed: EmbedConfig


def run(job: EmbedJob) -> StageResult:
    """Run the stage in an MLflow run, on the Ray that is connected."""
    from pipelines.extract.embed_captions import run_embed_captions
    from pipelines.reports.caption_embeds import caption_embeds_report

    return track_stage(
        job,
        "embed_captions",
        lambda on_progress, leases: run_embed_captions(job.dataset_uri, job.embed, on_progress=on_progress, leases=leases),
        make_report=lambda: caption_embeds_report(job.dataset_uri, job.embed.path),
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(EmbedJob, run, argv, name="embed_captions")


if __name__ == "__main__":
    sys.exit(main())
