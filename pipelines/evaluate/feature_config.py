"""Configurations of the metrics that compare two sets of pictures by a model's features."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pipelines.evaluate.metric_config import MetricConfig
from pipelines.tables.schema import check_folder_name

STATISTICS = ".npz"
INCEPTION_WEIGHTS = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"  # 95 MB
)


@dataclass(frozen=True, kw_only=True)
class FeatureConfig(MetricConfig):
    """Features of pictures, and what the pictures are compared with.

    Args:
        reference: "images" (the images table of this dataset), <dataset>/images of another, a folder of pictures, or stored
            statistics: a .npz of pytorch-fid or clean-fid. A path or an fsspec URI.
        reference_name: of the folder under evaluations/ that gets the features of the reference's pictures; None: the last part
            of `reference`.
        max_features: of each set, for the figures that compare all pairs (KID, CMMD, precision and recall): so many are held in
            memory, chosen by their ids. FID takes all of them and holds none.
    """

    NO_VALUE: ClassVar[tuple[str, ...]] = (*MetricConfig.NO_VALUE, "reference", "reference_name", "max_features")

    reference: str | None = None
    reference_name: str | None = None
    max_features: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_features < 10:
            raise ValueError(f"max_features={self.max_features} must be at least 10")
        if self.reference is not None and not self.is_statistics:
            check_folder_name("reference_name", self.table_name)

    @property
    def is_statistics(self) -> bool:
        """Whether the reference is a file of statistics."""
        return self.reference is not None and self.reference.endswith(STATISTICS)

    @property
    def table_name(self) -> str:
        """Of the folder under evaluations/ for the reference's pictures."""
        parts = [part for part in (self.reference or "").split("/") if part]
        last = parts[-2] if len(parts) > 1 and parts[-1] == "images" else (parts or [""])[-1]
        return self.reference_name or last


@dataclass(frozen=True, kw_only=True)
class InceptionConfig(FeatureConfig):
    """FID, KID, precision and recall, by the features of FID's Inception V3.

    Args:
        model: the file of weights: a path or URL.
        resize: the protocol by which pictures become 299x299. "pytorch-fid": as published by Sana, the shorter side to `size`,
            the center, and bilinear without antialias. "clean-fid": bicubic with antialias. "torch-fidelity": as TensorFlow 1.
        size: pixels, for "pytorch-fid" alone: 512 as published, 1024 for models of that size.
    """

    model: str = INCEPTION_WEIGHTS
    batch_size: int = 50
    resize: Literal["pytorch-fid", "clean-fid", "torch-fidelity"] = "pytorch-fid"
    size: int = 512


@dataclass(frozen=True, kw_only=True)
class CmmdConfig(FeatureConfig):
    """CMMD, by the unit features of a CLIP.

    Args:
        model: as published, CLIP ViT-L/14 of OpenAI at 336 pixels.
        max_features: as published, all of 30,000: the figure depends a little on how many there are.
    """

    model: str = "openai/clip-vit-large-patch14-336"
    max_features: int = 30_000


@dataclass(frozen=True, kw_only=True)
class DinoConfig(FeatureConfig):
    """The Fréchet distance by features of DINOv2, and their precision and recall.

    Args:
        model: as published (dgm-eval), DINOv2 ViT-L/14.
    """

    model: str = "facebook/dinov2-large"
