"""The caption-selection ablation on drawn scenes: which of two flawed captioners' captions a training should draw."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from jobs import train
from jobs.common.text_table import format_table
from jobs.common.timings import Timings, print_section
from jobs.demo.figures import SELECTED, caption_figures
from jobs.learning import read_grids, sample_asked
from jobs.paper.ablation import Curves, Figures, PictureJudge, print_curves, run_variants
from jobs.paper.config import CaptionsJob
from jobs.pipeline import make_training_table, raise_first, stage_job
from pipelines.evaluate.distances import Moments
from pipelines.score.candidates import Candidates
from pipelines.score.embeds import to_vectors
from pipelines.score.truth import TRUTH, run_truth_scores
from pipelines.shapes.drawing import write_folder
from pipelines.shapes.grammar import full_caption
from pipelines.shapes.scenes import Scene
from pipelines.tables.schema import image_embeds_path, image_embeds_schema
from pipelines.tables.table import Table
from pipelines.train.loop.record import GRIDS_DIR
from pipelines.train.stream.config import StreamConfig
from pipelines.workers.clip import ClipModel

FIRST_SCENE = 70_000_000
FIRST_PROMPT = 80_000_000
FIGURES = "captions.json"
PUBLISHED = [
    ["one caption", "6.13", "27.10"],
    ["several, at random", "6.15", "27.13"],
    ["several, by CLIP score", "6.12", "27.26"],
]
"""Table 4 of the paper, after 65,000 steps: FID and CLIP score."""


def ablate_captions(job: CaptionsJob) -> None:
    """Make the tables once, train on each selection with each seed, and print attribute accuracy and distance over steps."""
    timings = Timings()
    world = job.world
    write_folder(job.ingest.source, FIRST_SCENE, world.num_images, world.shapes)
    raise_first(make_training_table(job, job.ingest, timings))
    for captioner in job.train.data.captioners:
        timings.measure(f"true scores {captioner}", partial(run_truth_scores, job.dataset_uri, captioner))
    asked = sample_asked(world.shapes, FIRST_PROMPT, world.num_prompts)
    judge = PictureJudge(ClipModel(job.scorer.model, revision=job.scorer.revision), embedded_images(job))
    chosen = selections(job)

    def train_one(name: str, seed: int) -> Mapping[int, Figures]:
        return timings.measure(
            f"{name}, seed {seed}", partial(train_and_judge, job, chosen[name], f"{name}-{seed}", seed, asked, judge)
        )

    curves = run_variants(chosen, job.seeds, train_one)
    path = Path(job.dataset_uri, FIGURES)
    path.write_text(json.dumps(curves, indent=2) + "\n")
    print_section(timings.section())
    print_ablation(job, curves)
    print(f"\nfigures of every seed: {path}", flush=True)


def selections(job: CaptionsJob) -> Mapping[str, StreamConfig]:
    """The ways to choose among the captions of an image, by name: the settings of `job` with another policy.

    By the truth, the captions that say most of the scene's attributes right have equal chances.
    """
    data = job.train.data
    return {
        "random": replace(data, selection=replace(data.selection, policy="random")),
        "clip-paper": replace(data, selection=replace(data.selection, policy="paper")),
        "clip-published": replace(data, selection=replace(data.selection, policy="published")),
        "truth": replace(data, clip=TRUTH, selection=replace(data.selection, policy="paper")),
    }


def embedded_images(job: CaptionsJob) -> Moments:
    """The moments of the CLIP's embeddings of the dataset's images, which the score stage made."""
    table = Table(job.dataset_uri, image_embeds_path(job.scorer.name), image_embeds_schema(-1))
    moments = Moments()
    for shard in table.list_shards():
        moments.add(to_vectors(table.read_shard(shard, ["embedding"])).numpy())
    return moments


def train_and_judge(
    job: CaptionsJob, data: StreamConfig, name: str, seed: int, asked: list[Scene], judge: PictureJudge
) -> dict[int, Figures]:
    """Train with the captions that `data` selects, in the folder `name`; the figures of each grid of pictures, by step.

    A seed is that of the weights, the order of samples and the noise, and gives the pictures their noise: trainings of one
    seed differ in their captions alone.
    """
    grid = replace(job.train.grid, prompts=[full_caption(scene) for scene in asked], seed=seed * len(asked))
    settings = replace(job.train, data=data, grid=grid, seed=seed)
    train.run(stage_job(train.TrainJob, job, train=settings, name=name))
    grids = read_grids(
        Path(job.dataset_uri, name, GRIDS_DIR), len(asked), size=job.extract.resolution, columns=job.train.grid.columns
    )
    return {step: judge.judge(asked, pictures) for step, pictures in grids}


def print_ablation(job: CaptionsJob, curves: Curves) -> None:
    """Print how good the captions of each selection are, the curves, and what the paper published."""
    rows = []
    for name, data in selections(job).items():
        candidates = Candidates(job.dataset_uri, data.captioners, data.clip)
        figures = caption_figures(candidates, data.selection)
        shares = [f"{figures[captioner].selected_share or 0:.1%}" for captioner in data.captioners]
        rows.append([name, f"{figures[SELECTED].exact_share or 0:.1%}", *shares])
    print(f"\n{job.world.num_images} images, {job.world.num_prompts} prompts, seeds {list(job.seeds)}; ± is a 95 % interval")
    print("\ncaptions that are drawn")
    print(format_table(["", "exact", *(f"by {name}" for name in job.train.data.captioners)], rows))
    print_curves(curves)
    print("\npublished, after 65,000 steps")
    print(format_table(["captions", "FID", "CLIP score"], PUBLISHED))
    print(
        "clip-paper: P ~ exp(c / tau), as the paper writes. clip-published: P ~ c^(1 / tau), as NVlabs' code has it. truth:\n"
        "the captions that say most attributes right. The distance is Fréchet's between embeddings of the tiny CLIP, which\n"
        "also chose the captions and reads the pictures. Not comparable: the published FID, of Inception on MJHQ-30K."
    )
