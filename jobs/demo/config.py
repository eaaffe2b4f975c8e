"""Configuration of the demo."""

from dataclasses import dataclass, field

from jobs.pipeline import StagesJob
from pipelines.caption.config import CaptionerConfig
from pipelines.score.candidates import Candidates
from pipelines.shapes.scenes import ShapesConfig
from pipelines.storage.files import is_local


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Configuration of the drawn scenes that stand in for photographs.

    Args:
        shapes: which scenes there are.
        num_images: how many are drawn.
        num_prompts: prompts of the evaluation before and after training; every other one has a color that is new to the model.
    """

    shapes: ShapesConfig = field(default_factory=ShapesConfig)
    num_images: int = 1000
    num_prompts: int = 48


@dataclass(frozen=True, kw_only=True)
class DemoJob(StagesJob):
    """Configuration of the demo: the stages on drawn scenes or your own images, with pictures from before and after training.

    Args:
        images: a folder of your own images (or tars, or Parquet) to read in place of `ingest.source`; unless given, scenes of
            the Shapes world are drawn there.
        world: the drawn scenes.
        late_captioner: describes the images of the finished dataset at the end, to show what that costs.
    """

    late_captioner: CaptionerConfig
    images: str | None = None
    world: WorldConfig = field(default_factory=WorldConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.late_captioner.name in (*self.scorer.captioners, *(captioner.name for captioner in self.captioners)):
            raise ValueError(f"late_captioner.name={self.late_captioner.name} is a captioner's already")
        if self.train.init is None:
            raise ValueError("train.init=None: the demo continues the training of a pipeline, such as zoo://pipeline")
        if self.images is None and is_local(self.ingest.source) and not is_local(self.dataset_uri):
            raise ValueError(
                f"ingest.source={self.ingest.source} is on one machine, and dataset_uri={self.dataset_uri} is for several: let "
                f"the scenes be drawn where all see them, such as --ingest.source {self.dataset_uri.rstrip('/')}-raw"
            )

    @property
    def candidates(self) -> Candidates:
        """The captions that compete in the training."""
        data = self.train.data
        return Candidates(self.dataset_uri, data.captioners, data.clip)
