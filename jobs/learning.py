"""`python -m jobs.learning --config jobs/configs/learning.yaml`: does the recipe learn? A fresh transformer on drawn scenes."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from jobs import extract, ingest, train
from jobs.common.job import JobConfig, run_job
from pipelines.extract.config import ExtractConfig
from pipelines.ingest.config import IngestConfig
from pipelines.shapes.grammar import phrasings, write_caption
from pipelines.shapes.scenes import Scene, ShapesConfig, sample_scene
from pipelines.train.config import TrainConfig

FIRST_SCENE = 50_000_000
FIRST_PROMPT = 60_000_000
FIGURES = "learning.json"


@dataclass(frozen=True, kw_only=True)
class LearningJob(JobConfig):
    """Configuration of a training from scratch on captioned drawn scenes, after ingest and extract.

    Args:
        shapes: which scenes there are.
        num_images: how many are drawn.
        num_prompts: prompts of each grid, about scenes that are not among the drawn ones; their pictures are judged.
        ingest: its source is the folder that the scenes are drawn into.
        judge: the CLIP that reads the pictures: its path.
        extract: the autoencoder and the resolution.
        train: the training; its grids get the prompts.
        name: name of the training's folder.
    """

    shapes: ShapesConfig = field(default_factory=ShapesConfig)
    num_images: int = 6000
    num_prompts: int = 48
    ingest: IngestConfig
    judge: str
    extract: ExtractConfig
    train: TrainConfig
    name: str = "learning"


def run(job: LearningJob) -> None:
    """Run every stage, then write to `learning.json` what share of each grid's pictures shows what was asked for."""
    from pipelines.shapes.drawing import write_folder
    from pipelines.train.record import GRIDS_DIR

    write_folder(job.ingest.source, FIRST_SCENE, job.num_images, job.shapes, captioned=True)
    shared = {"dataset_uri": job.dataset_uri, "ray": job.ray, "tracking": job.tracking}
    ingest.run(ingest.IngestJob(**shared, ingest=job.ingest))  # type: ignore[arg-type]
    extract.run(extract.ExtractJob(**shared, extract=job.extract))  # type: ignore[arg-type]
    asked = asked_scenes(job)
    grid = replace(job.train.grid, prompts=[write_caption(scene, phrasings(scene)[0]) for scene in asked])
    train.run(train.TrainJob(**shared, train=replace(job.train, grid=grid), name=job.name))  # type: ignore[arg-type]
    folder = Path(job.dataset_uri, job.name)
    figures = judge_grids(folder / GRIDS_DIR, asked, job.judge, size=job.extract.resolution, columns=grid.columns)
    (folder / FIGURES).write_text(json.dumps(figures, indent=2) + "\n")
    for step, accuracy in figures.items():
        print(f"step {step:>6}  " + "  ".join(f"{name} {share:.0%}" for name, share in accuracy.items()), flush=True)


def asked_scenes(job: LearningJob) -> list[Scene]:
    """One-object scenes of the same kind as the drawn ones, drawn from other rows."""
    config = replace(job.shapes, pair_share=0.0)
    return [sample_scene(FIRST_PROMPT + number, config) for number in range(job.num_prompts)]


def judge_grids(folder: Path, asked: Sequence[Scene], clip: str, *, size: int, columns: int) -> dict[str, dict[str, float]]:
    """By step, the shares of pictures whose shape, color, background, and all three are right, as the CLIP reads them."""
    from PIL import Image

    from pipelines.evaluate.shapes import ATTRIBUTES, AttributeJudge, attribute_accuracy
    from pipelines.workers.clip import ClipModel
    from pipelines.workers.images import cut_grid

    judge = AttributeJudge(ClipModel(clip))
    figures = {}
    for path in sorted(folder.glob("step-*.png")):
        pictures = cut_grid(Image.open(path).convert("RGB"), len(asked), size=size, columns=columns)
        figures[str(int(path.stem.removeprefix("step-")))] = attribute_accuracy(asked, judge.read(pictures), ATTRIBUTES)
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(LearningJob, run, argv, name="learning")


if __name__ == "__main__":
    sys.exit(main())
