"""`python -m jobs.learning --config jobs/configs/learning.yaml`: does the recipe learn? A fresh transformer on drawn scenes."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import extract, ingest, train
from jobs.common.job import JobConfig, run_job
from pipelines.extract.config import ExtractConfig
from pipelines.ingest.config import IngestConfig
from pipelines.shapes.grammar import phrasings, write_caption
from pipelines.shapes.scenes import Scene, ShapesConfig, sample_scene
from pipelines.train.config import TrainConfig

if TYPE_CHECKING:
    from PIL.Image import Image

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
    from pipelines.train.loop.record import GRIDS_DIR

    write_folder(job.ingest.source, FIRST_SCENE, job.num_images, job.shapes, captioned=True)
    shared = {"dataset_uri": job.dataset_uri, "ray": job.ray, "tracking": job.tracking}
    ingest.run(ingest.IngestJob(**shared, ingest=job.ingest))  # type: ignore[arg-type]
    extract.run(extract.ExtractJob(**shared, extract=job.extract))  # type: ignore[arg-type]
    asked = sample_asked(job.shapes, FIRST_PROMPT, job.num_prompts)
    grid = replace(job.train.grid, prompts=[write_caption(scene, phrasings(scene)[0]) for scene in asked])
    train.run(train.TrainJob(**shared, train=replace(job.train, grid=grid), name=job.name))  # type: ignore[arg-type]
    folder = Path(job.dataset_uri, job.name)
    figures = judge_grids(folder / GRIDS_DIR, asked, job.judge, size=job.extract.resolution, columns=grid.columns)
    (folder / FIGURES).write_text(json.dumps(figures, indent=2) + "\n")
    for step, accuracy in figures.items():
        print(f"step {step:>6}  " + "  ".join(f"{name} {share:.0%}" for name, share in accuracy.items()), flush=True)


def sample_asked(shapes: ShapesConfig, first: int, count: int) -> list[Scene]:
    """The one-object scenes of rows `first` to `first + count`, of the same kind as the drawn ones."""
    config = replace(shapes, pair_share=0.0)
    return [sample_scene(first + number, config) for number in range(count)]


def judge_grids(folder: Path, asked: Sequence[Scene], clip: str, *, size: int, columns: int) -> dict[str, dict[str, float]]:
    """By step, the shares of pictures whose shape, color, background, and all three are right, as the CLIP reads them."""
    from pipelines.evaluate.shapes import ATTRIBUTES, AttributeJudge, attribute_accuracy
    from pipelines.workers.clip import ClipModel

    judge = AttributeJudge(ClipModel(clip))
    return {
        str(step): attribute_accuracy(asked, judge.read(pictures), ATTRIBUTES)
        for step, pictures in read_grids(folder, len(asked), size=size, columns=columns)
    }


def read_grids(folder: Path, count: int, *, size: int, columns: int) -> "Iterator[tuple[int, list[Image]]]":
    """The step and the `count` RGB pictures of each grid that a training drew in a local folder, in the order of the steps."""
    from PIL import Image

    from pipelines.workers.images import cut_grid

    for path in sorted(folder.glob("step-*.png")):
        grid = Image.open(path).convert("RGB")
        yield int(path.stem.removeprefix("step-")), cut_grid(grid, count, size=size, columns=columns)


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(LearningJob, run, argv, name="learning")


if __name__ == "__main__":
    sys.exit(main())
