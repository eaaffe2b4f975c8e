"""`python -m jobs.train_autoencoder --config jobs/configs/dc-ae/phase1.yaml`: images -> a trained DC-AE."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from jobs.common.config import to_dict
from jobs.common.job import run_job
from jobs.common.metric_job import judge_pictures
from jobs.common.stage_job import LazyRun
from jobs.common.training_job import TrainingJobConfig, track_training
from pipelines.evaluate.reconstruction_config import SMALLEST_SIZE, ReconstructionConfig
from pipelines.tables.schema import IMAGES_PATH
from pipelines.tables.table import absolute_uri
from pipelines.train_autoencoder.config import TrainAutoencoderConfig, check_side

if TYPE_CHECKING:
    from pipelines.evaluate.pictures import Pictures
    from pipelines.train_autoencoder.run import TrainAutoencoderResult

Judged = tuple[int, str, dict[str, float]]
"""Size of the pictures, "before" or "after", and the figures."""
ABOUT_FIGURES = (
    "On all pictures that are held out; smaller ones are enlarged. psnr (dB) and ssim: how near what is given back is to the "
    "picture; higher is better, ssim up to 1. sharpness: its high-frequency energy as a share of the picture's; below 1 it is "
    "blurred, above 1 noisy. perceptual, rfd and rfid: distances of features; lower is better."
)
"""What the figures of the judgement are, for a person who reads the page."""


@dataclass(frozen=True, kw_only=True)
class TrainAutoencoderJob(TrainingJobConfig):
    """Configuration of the training of an autoencoder.

    Args:
        train: the training.
        name: name of the training's folder in the dataset, which holds its checkpoints, pictures and autoencoder.
        judge_sizes: sizes of pictures at which the autoencoder is judged at the end, and so is the one it began with, on all
            pictures that are held out. null: that of the fixed pictures. []: none.
        reconstruction: how it is judged; its model and size are given by the training.
    """

    train: TrainAutoencoderConfig
    name: str = "dc-ae"
    judge_sizes: tuple[int, ...] | None = None
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if bad := [size for size in self.judge_sizes or () if size < SMALLEST_SIZE]:
            raise ValueError(f"judge_sizes={bad[0]} must be at least {SMALLEST_SIZE} pixels, SSIM's window")
        if self.train.preset is not None:
            check_side(self.train.new_shape(), "judge_sizes", *self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of `judge_sizes`."""
        if not self.train.holds_out:
            return ()
        return (self.train.picture_size,) if self.judge_sizes is None else self.judge_sizes


def run(job: TrainAutoencoderJob) -> "TrainAutoencoderResult":
    """Train in one MLflow run, and judge what came of it. Raises as `run_train_autoencoder` and `track_training`."""
    from pipelines.train_autoencoder.run import run_train_autoencoder

    train = partial(run_train_autoencoder, job.dataset_uri, job.train)
    return track_training(job, "train_autoencoder", train, lambda result: make_report(job, result, judge(job, result)))


def check_judging(job: TrainAutoencoderJob) -> None:
    """Raise what else would end the job only when the trained autoencoder is judged.

    Raises ValueError if a size of `judge_sizes` does not fit `init`; without `dry_run`, which fetches nothing, also
    FileNotFoundError, ConnectionError or ValueError if a model of `reconstruction` is not there.
    """
    from pipelines.evaluate.reconstruction import Reconstruction
    from pipelines.train.preflight.models import known_autoencoder
    from pipelines.workers.models import find_model, naming

    if job.judge_sizes and job.train.init is not None:
        with naming("train.init"):
            shape = known_autoencoder(job.train.init)
        if shape is not None:
            check_side(shape, "judge_sizes", *job.sizes)
    for name in Reconstruction.more_models if job.sizes and not job.dry_run else ():
        if (path := getattr(job.reconstruction, name)) is not None:
            with naming(f"reconstruction.{name}"):
                find_model(path, getattr(job.reconstruction, f"{name}_revision"))


def judge(job: TrainAutoencoderJob, result: "TrainAutoencoderResult") -> list[Judged]:
    """Judge the autoencoder and the one that the training began with, at each size. Figures are printed, and go to MLflow."""
    from pipelines.evaluate.reconstruction import Reconstruction
    from pipelines.evaluate.run import write_figures

    judged: list[Judged] = []
    models = {"before": job.train.init, "after": result.autoencoder}
    with LazyRun(job, f"evaluate {job.name}") as shared:
        for size in job.sizes:
            for when, model in models.items():
                if model is None:
                    continue
                config = replace(job.reconstruction, model=model, size=size)
                pictures = _pictures(job, f"{job.name}-{when}-{size}")
                table = judge_pictures(
                    job, pictures, Reconstruction.name, config, shared=shared, section="reconstruction"
                ).table
                figures = write_figures(table, Reconstruction.name, config, lease=job.lease)
                if shared.run is not None:
                    shared.run.log_metrics({f"{when}.{size}.{name}": value for name, value in figures.items()})
                print(f"{size} px, {when}: {'  '.join(f'{name} {value:.4g}' for name, value in figures.items())}", flush=True)
                judged.append((size, when, figures))
    return judged


def _pictures(job: TrainAutoencoderJob, name: str) -> "Pictures":
    """The pictures that the training did not see."""
    from pipelines.evaluate.pictures import chosen_pictures, table_pictures
    from pipelines.train_autoencoder.stream import find_sources

    data, other = job.train.data, job.train.validation.dataset_uri
    uri = absolute_uri(other or data.all_sources[0].dataset_uri or job.dataset_uri)
    pictures = table_pictures(job.dataset_uri, name, f"{uri}/{IMAGES_PATH}")
    if other is not None:
        return pictures
    source = find_sources(job.dataset_uri, data)[0]
    choose = partial(source.chosen, held_out_share=data.held_out_share, held_out=True)
    settings: dict[str, Any] = {"held_out_share": data.held_out_share}
    if source.filters is not None:
        settings["image_filters"] = {name: asdict(limit) for name, limit in source.filters.limits.items()}
        settings["filtered_by"] = [table.require().fingerprint for table in source.filters.tables()]
    return chosen_pictures(pictures, choose, settings)


def make_report(job: TrainAutoencoderJob, result: "TrainAutoencoderResult", judged: Sequence[Judged]) -> str:
    """The training's page."""
    from pipelines.reports.runs import Section, training_report
    from pipelines.train.loop.record import COMPARISON

    facts: dict[str, object] = {"Steps": result.num_steps, "Images/s": f"{result.samples_per_second:.1f}"}
    if result.psnr is not None:
        facts["PSNR of the fixed pictures"] = f"{result.psnr:.2f} dB"
    facts["Scale of latents"] = f"{result.scaling_factor:g}"
    names = list(dict.fromkeys(name for *_, figures in judged for name in figures))
    rows = [(size, when, *(f"{figures[name]:.4g}" for name in names)) for size, when, figures in judged]
    comparison = [("picture, before, after, difference to after (four times as strong)", f"{job.output_uri}/{COMPARISON}")]
    return training_report(
        job.train.data.all_sources[0].dataset_uri or job.dataset_uri,
        IMAGES_PATH,
        result.losses,
        result.grids,
        facts=facts,
        config=to_dict(job.train),
        sections=[
            Section(
                title="Before and after",
                text=ABOUT_FIGURES if judged else "",
                columns=("pixels", "", *names),
                rows=rows,
                pictures=comparison,
            ),
        ],
        about="The autoencoder learns to give pictures back from their latents.",
        y_label="loss (sum of its parts)",
        about_samples="Each picture, as it is given back, and the difference four times as strong (white: none).",
    )


def look_first(job: TrainAutoencoderJob) -> bool:
    """Check what only the judgement needs, and show the preflight of a dry run; True if that was all."""
    check_judging(job)
    if job.dry_run:
        from pipelines.train_autoencoder.preflight import format_preflight, run_preflight

        print(format_preflight(run_preflight(job.dataset_uri, job.train, device_gib=job.device_gib)), flush=True)
    return job.dry_run


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(TrainAutoencoderJob, run, argv, name="train_autoencoder", look_first=look_first)


if __name__ == "__main__":
    sys.exit(main())
