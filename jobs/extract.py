"""`python -m jobs.extract --config jobs/configs/extract.yaml`: images -> DC-AE latents."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jobs.common.job import JobConfig, run_job
from jobs.common.stage_job import require_tables, track_stage
from pipelines.extract.config import ExtractConfig
from pipelines.stages.contract import StageResult
from pipelines.tables.schema import IMAGES, IMAGES_PATH, LATENTS
from pipelines.tables.table import Table

if TYPE_CHECKING:
    from pipelines.reports.latents import DecodeLatents
    from pipelines.workers.models import FoundModel


@dataclass(frozen=True, kw_only=True)
class ExtractJob(JobConfig):
    """Configuration of the extraction of latents.

    Args:
        extract: the autoencoder and the resolution.
        resolutions: several resolutions, each a table of its own, from one decode of every image; `extract.batch_size` is
            the batch of `extract.resolution`, the others have about as many pixels. Empty: `extract.resolution` alone.
    """

    extract: ExtractConfig
    resolutions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.resolutions)) < len(self.resolutions):
            raise ValueError(f"resolutions={list(self.resolutions)} must differ from each other: each is a table of its own")


def run(job: ExtractJob) -> StageResult:
    """Run the stage for each resolution in an MLflow run of its own, on the Ray that is connected. Returns the first result."""
    from pipelines.extract.encode import find_encoder

    Table(job.dataset_uri, IMAGES_PATH, IMAGES).require()  # before any weights are fetched or hashed
    encoder = find_encoder(job.extract.autoencoder)
    resolutions = job.resolutions or (job.extract.resolution,)
    results = [
        _run_one(job, job.extract.at(resolution), encoder, also=resolutions[index + 1 :])
        for index, resolution in enumerate(resolutions)
    ]
    return results[0]


def _run_one(job: ExtractJob, config: ExtractConfig, encoder: "FoundModel", *, also: Sequence[int]) -> StageResult:
    from pipelines.extract.run import run_extract

    def make_report() -> str:
        from pipelines.reports.latents import latents_report

        with remote_decoder(config) as decode:
            return latents_report(job.dataset_uri, config.path, decode)

    manifest = Table(job.dataset_uri, config.path, LATENTS).read_manifest()
    return track_stage(
        replace(job, extract=config),
        f"extract {config.resolution}" if job.resolutions else "extract",
        lambda on_progress, leases: run_extract(
            job.dataset_uri, config, encoder, also=also, on_progress=on_progress, leases=leases
        ),
        make_report=make_report,
        is_due=manifest is not None and not manifest.complete,
    )


@contextmanager
def remote_decoder(config: ExtractConfig) -> "Iterator[DecodeLatents]":
    """A function that decodes latents in an actor with the stage's resources; the driver may be a small CPU machine."""
    import numpy as np
    import ray
    import torch
    from PIL import Image

    from pipelines.extract.encode import LatentEncoder

    resources = config.resources
    options = {"num_cpus": resources.num_cpus, "num_gpus": resources.num_gpus or None, "resources": resources.custom or None}
    actor: Any = ray.remote(LatentEncoder).options(**options).remote(config)

    def decode(latents: np.ndarray) -> Image.Image:
        (image,) = ray.get(actor.decode.remote([torch.from_numpy(latents)]))
        return Image.fromarray(image.round().astype(np.uint8))

    try:
        yield decode
    finally:
        ray.kill(actor)


def look_first(job: ExtractJob) -> bool:
    """Refuse a job without its input before Ray starts."""
    return require_tables(job.dataset_uri, IMAGES_PATH)


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(ExtractJob, run, argv, name="extract", look_first=look_first)


if __name__ == "__main__":
    sys.exit(main())
