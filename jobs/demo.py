"""`make demo`: the whole way once, from raw images to pictures drawn by a model trained on them."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from tempfile import TemporaryDirectory

from jobs.demo_report import print_summary, summarize_demo, write_demo_report
from jobs.pipeline import StagesJob, draw_and_judge, make_training_table, raise_first, train_pipeline
from jobs.runner import run_job
from jobs.timings import Timings
from pipelines.schema import SCORES, scores_path
from pipelines.select import choose_caption
from pipelines.shapes import NEW_COLORS, ShapesConfig, phrasings, sample_scene, write_caption, write_folder
from pipelines.storage import find_files, is_local, upload_folder
from pipelines.tables import Table

FIRST_SCENE = 30_000_000  # the demo draws its scenes where the shipped models never looked
FIRST_PROMPT = 40_000_000


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """The drawn scenes that stand in for photographs.

    Args:
        shapes: which scenes there are.
        num_images: how many are drawn.
        num_prompts: of the evaluation, before and after training; every other one asks for a color that is new to the model.
    """

    shapes: ShapesConfig = field(default_factory=ShapesConfig)
    num_images: int = 1000
    num_prompts: int = 48


@dataclass(frozen=True, kw_only=True)
class DemoJob(StagesJob):
    """The stages on drawn scenes or on your own images, with pictures from before and after the training.

    Args:
        images: a folder of your own images (or tars, or Parquet) to read in place of `ingest.source`; unless given, scenes of
            the Shapes world are drawn there.
        world: the drawn scenes.
    """

    images: str | None = None
    world: WorldConfig = field(default_factory=WorldConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train.init is None:
            raise ValueError("train.init=None: the demo goes on from a pipeline, such as zoo://pipeline")
        if self.images is None and is_local(self.ingest.source) and not is_local(self.dataset_uri):
            raise ValueError(
                f"ingest.source={self.ingest.source} is on one machine, and dataset_uri={self.dataset_uri} is for several: let "
                f"the scenes be drawn where all see them, such as --ingest.source {self.dataset_uri.rstrip('/')}-raw"
            )


def run(job: DemoJob) -> None:
    """Every stage, then the closing table and the report."""
    timings = Timings()
    if job.images is None:
        timings.measure("draw scenes", lambda: draw_scenes(job))
    source = replace(job.ingest, source=job.images or job.ingest.source)
    failures = make_training_table(job, source, timings)
    prompts = world_prompts(job.world) if job.images is None else photo_prompts(job)
    assert job.train.init is not None
    draw_and_judge(job, "before", job.train.init, prompts, step=0, timings=timings)
    trained = train_pipeline(job, timings)
    draw_and_judge(job, "after", trained.pipeline, prompts, step=trained.num_steps, timings=timings)
    summary = summarize_demo(job, trained, timings)
    report = write_demo_report(job, summary)
    print_summary(job, summary, report)
    raise_first(failures)


def draw_scenes(job: DemoJob) -> None:
    """Into `ingest.source`; those that are there already stay as they are."""
    world, source = job.world, job.ingest.source
    if is_local(source):
        write_folder(source, FIRST_SCENE, world.num_images, world.shapes)
    elif len(find_files(source)) < 2 * world.num_images:  # each has a .json beside it
        with TemporaryDirectory() as folder:
            write_folder(folder, FIRST_SCENE, world.num_images, world.shapes)
            upload_folder(folder, source)
    print(f"{'draw scenes':<22} {world.num_images} images in {source}", flush=True)


def world_prompts(world: WorldConfig) -> list[str]:
    """One-object prompts: of the colors that are new to the model and of the others, by turns."""
    known = tuple(color for color in world.shapes.colors if color not in NEW_COLORS)
    prompts = []
    for number in range(world.num_prompts):
        colors = NEW_COLORS if number % 2 == 0 else known
        scene = sample_scene(FIRST_PROMPT + number, ShapesConfig(colors=colors, pair_share=0.0))
        prompts.append(write_caption(scene, phrasings(scene)[number // 2 % 2]))
    return prompts


def photo_prompts(job: DemoJob) -> list[str]:
    """The selected captions of the first images."""
    table = Table(job.dataset_uri, scores_path(job.scorer.name), SCORES)
    rows = [row for shard in table.list_shards() for row in table.read_shard(shard).to_pylist()]
    chosen = [
        choose_caption(row["captions"], job.train.data.selection, seed=0, epoch=0, sample_id=row["id"])
        for row in rows[: job.world.num_prompts]
    ]
    return [caption["caption"] for caption in chosen if caption is not None]


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(DemoJob, run, argv, prog="python -m jobs.demo", description="From raw images to pictures, once.")


if __name__ == "__main__":
    sys.exit(main())
