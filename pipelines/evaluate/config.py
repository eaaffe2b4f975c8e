"""Configuration of the evaluate stage: which pictures, which metrics, and the settings of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipelines.evaluate.dpg.config import DpgConfig
from pipelines.evaluate.feature_config import CmmdConfig, DinoConfig, InceptionConfig
from pipelines.evaluate.geneval.config import GenEvalConfig
from pipelines.evaluate.metric_config import MetricConfig
from pipelines.evaluate.preference.config import AestheticConfig, HpsConfig, ImageRewardConfig, PickScoreConfig
from pipelines.evaluate.reconstruction_config import ReconstructionConfig
from pipelines.evaluate.registry import METRICS
from pipelines.evaluate.verifier_config import VerifierConfig
from pipelines.tables.schema import check_folder_name


@dataclass(frozen=True, kw_only=True)
class ClipScoreConfig(MetricConfig):
    """CLIP score: 100 times the cosine of picture and prompt, by any transformers CLIP or SigLIP.

    Args:
        model: as published, CLIP ViT-L/14 of OpenAI.
        long_captions: what is done with a prompt over the model's limit (77 tokens for CLIP): "cut": its beginning counts, as
            published; "chunks": its score is the mean over as few equal parts as fit.
    """

    model: str = "openai/clip-vit-large-patch14"
    long_captions: Literal["cut", "chunks"] = "cut"


@dataclass(frozen=True, kw_only=True)
class ShapesJudgeConfig(MetricConfig):
    """Which attributes a picture of the drawn Shapes world shows, as a CLIP reads them that knows this world.

    Args:
        model: a CLIP that was trained on drawn scenes.
    """

    model: str = "zoo://clip"


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """The settings of every metric, each in the section of its name.

    Args:
        metrics: names of the metrics to run, one after the other.
        clip_score: settings of the CLIP score.
        inception: settings of FID, KID, precision and recall.
        cmmd: settings of CMMD.
        dino: settings of the Fréchet distance by DINOv2.
        geneval: settings of GenEval: objects, their number, colors and places.
        dpg: settings of DPG-Bench: a VLM answers questions about the pictures.
        image_reward: settings of ImageReward.
        hps: settings of HPSv2.1.
        pick_score: settings of PickScore.
        aesthetic: settings of LAION's aesthetic predictor.
        verifier: settings of the VLM that says whether a picture fits its prompt.
        reconstruction: settings of the judgement of an autoencoder, which gives the pictures back.
        shapes: settings of the judge of the Shapes world.
    """

    metrics: tuple[str, ...] = ()
    clip_score: ClipScoreConfig = field(default_factory=ClipScoreConfig)
    inception: InceptionConfig = field(default_factory=InceptionConfig)
    cmmd: CmmdConfig = field(default_factory=CmmdConfig)
    dino: DinoConfig = field(default_factory=DinoConfig)
    geneval: GenEvalConfig = field(default_factory=GenEvalConfig)
    dpg: DpgConfig = field(default_factory=DpgConfig)
    image_reward: ImageRewardConfig = field(default_factory=ImageRewardConfig)
    hps: HpsConfig = field(default_factory=HpsConfig)
    pick_score: PickScoreConfig = field(default_factory=PickScoreConfig)
    aesthetic: AestheticConfig = field(default_factory=AestheticConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    shapes: ShapesJudgeConfig = field(default_factory=ShapesJudgeConfig)

    def __post_init__(self) -> None:
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise ValueError(f"metrics={list(self.metrics)}: there is no metric {unknown[0]!r}; there are {', '.join(METRICS)}")
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"metrics={list(self.metrics)} must differ from each other")

    @property
    def chosen(self) -> Mapping[str, MetricConfig]:
        """The settings of each metric that runs, by its name, in order."""
        return {name: getattr(self, name) for name in self.metrics}

    @property
    def not_reserved(self) -> Sequence[str]:
        """The sections whose resources a job need not find when it starts: those of metrics that do not run."""
        return [name for name in METRICS if name not in self.chosen]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(MetricsConfig):
    """Which pictures are judged, and how. A metric that fails does not stop those after it.

    Args:
        name: of the table under samples/, and of the folder under evaluations/ that gets a table for each metric.
        metrics: names of the metrics to run, one after the other; each has its settings in the section of its name: clip_score,
            inception, cmmd, dino, geneval, dpg, image_reward, hps, pick_score, aesthetic, verifier, reconstruction, shapes.
    """

    name: str
    metrics: tuple[str, ...] = ("clip_score",)

    def __post_init__(self) -> None:
        check_folder_name("name", self.name)
        if not self.metrics:
            raise ValueError(f"metrics=[] names none: give some of {', '.join(METRICS)}")
        super().__post_init__()

    @property
    def not_reserved(self) -> Sequence[str]:
        """All sections of metrics: each is held against what Ray has when its metric runs, so that none stops the others."""
        return list(METRICS)
