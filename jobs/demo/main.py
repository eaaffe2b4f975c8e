"""`make demo`: the full pipeline once, from raw images to pictures drawn by a model trained on them."""

from collections.abc import Sequence
from dataclasses import replace
from tempfile import TemporaryDirectory

from jobs import caption, score
from jobs.common.job import run_job
from jobs.common.timings import Timings
from jobs.demo.config import DemoJob, WorldConfig
from jobs.pipeline import draw_and_judge, make_training_table, raise_first, stage_job, train_pipeline
from pipelines.score.selection import choose_caption
from pipelines.shapes.grammar import phrasings, write_caption
from pipelines.shapes.scenes import NEW_COLORS, ShapesConfig, sample_scene
from pipelines.stages.contract import StageResult
from pipelines.storage.files import find_files, is_local, upload_folder

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
    metrics = ("clip_score", "shapes") if job.images is None else ("clip_score",)
    draw_and_judge(job, "before", job.train.init, prompts, step=0, timings=timings, metrics=metrics)
    trained = train_pipeline(job, timings)
    draw_and_judge(job, "after", trained.pipeline, prompts, step=trained.num_steps, timings=timings, metrics=metrics)
    joined = add_captioner(job, timings)
    summary = summarize_demo(job, trained, joined, timings)
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
    candidates = job.candidates
    contests = [contest for shard in candidates.list_scored() for contest in candidates.read(shard).items()]
    chosen = [
        choose_caption(captions, job.train.data.selection, seed=0, epoch=0, sample_id=row_id)
        for row_id, captions in contests[: job.world.num_prompts]
    ]
    return [caption["caption"] for caption in chosen if caption is not None]


def add_captioner(job: DemoJob, timings: Timings) -> list[StageResult]:
    """Let the late captioner describe the images of the finished dataset, and score what it says.

    Returns the results of its captions, of the images' embeddings, and of each captioner's scores.
    """
    scorer = replace(job.scorer, captioners=(*job.scorer.captioners, job.late_captioner.name))
    late = stage_job(caption.CaptionJob, job, captioner=job.late_captioner)
    said = timings.measure(f"caption {job.late_captioner.name}", lambda: caption.run_captioner(late))
    again = stage_job(score.ScoreJob, job, scorer=scorer, selection=job.train.data.selection)
    return [said, *timings.measure("score it", lambda: score.run(again))]


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(DemoJob, run, argv, name="demo")
