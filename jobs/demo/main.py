"""`make demo`: the full pipeline once, from raw images to pictures drawn by a model trained on them."""

from collections.abc import Sequence
from dataclasses import replace
from tempfile import TemporaryDirectory

from jobs.common.job import run_job
from jobs.common.timings import Timings
from jobs.demo.config import DemoJob, WorldConfig
from jobs.pipeline import draw_and_judge, make_training_table, raise_first, train_pipeline
from pipelines.score.selection import choose_caption
from pipelines.shapes.grammar import phrasings, write_caption
from pipelines.shapes.scenes import NEW_COLORS, ShapesConfig, sample_scene
from pipelines.storage.files import find_files, is_local, upload_folder
from pipelines.tables.schema import SCORES, scores_path
from pipelines.tables.table import Table

FIRST_SCENE = 30_000_000  # the demo draws its scenes where the shipped models never looked
FIRST_PROMPT = 40_000_000


def run(job: DemoJob) -> None:
    """Run every stage, then print the closing tables and write the report."""
    from jobs.demo.report import print_summary, summarize_demo, write_demo_report

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
    """Draw the scenes into `ingest.source`, those that are not there yet."""
    from pipelines.shapes.drawing import write_folder

    world, source = job.world, job.ingest.source
    if is_local(source):
        write_folder(source, FIRST_SCENE, world.num_images, world.shapes)
    elif len(find_files(source)) < 2 * world.num_images:  # each has a .json beside it
        with TemporaryDirectory() as folder:
            write_folder(folder, FIRST_SCENE, world.num_images, world.shapes)
            upload_folder(folder, source)
    print(f"{'draw scenes':<22} {world.num_images} images in {source}", flush=True)


def world_prompts(world: WorldConfig) -> list[str]:
    """Prompts about one object, by turns in a color that is new to the model and in one that it knows."""
    known = tuple(color for color in world.shapes.colors if color not in NEW_COLORS)
    prompts = []
    for number in range(world.num_prompts):
        colors = NEW_COLORS if number % 2 == 0 else known
        scene = sample_scene(FIRST_PROMPT + number, ShapesConfig(colors=colors, pair_share=0.0))
        prompts.append(write_caption(scene, phrasings(scene)[number // 2 % 2]))
    return prompts


def photo_prompts(job: DemoJob) -> list[str]:
    """The selected captions of the first images, as prompts."""
    table = Table(job.dataset_uri, scores_path(job.scorer.name), SCORES)
    rows = [row for shard in table.list_shards() for row in table.read_shard(shard).to_pylist()]
    chosen = [
        choose_caption(row["captions"], job.train.data.selection, seed=0, epoch=0, sample_id=row["id"])
        for row in rows[: job.world.num_prompts]
    ]
    return [caption["caption"] for caption in chosen if caption is not None]


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(DemoJob, run, argv, name="demo")
