"""CMMD: the distance of two sets of pictures by CLIP's features, which needs fewer pictures than FID (arXiv 2401.09603)."""

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

from pipelines.evaluate.distances import Array, gaussian_distance
from pipelines.evaluate.feature_config import CmmdConfig
from pipelines.evaluate.features import FeatureMetric, FeatureSet
from pipelines.tables.schema import Row

if TYPE_CHECKING:
    from pipelines.workers.clip import PreparedImage


class Cmmd(FeatureMetric[CmmdConfig]):
    """Unit features of CLIP's image tower, of the center square, scaled bicubically to the model's size. Figure: `cmmd`.

    The reference's statistics alone do not suffice: it must be pictures, or features of clean-fid's file for KID.
    """

    name: ClassVar = "cmmd"

    def __init__(self, config: CmmdConfig):
        from pipelines.workers.clip import ClipModel

        self.clip = ClipModel(config.model, revision=config.revision, dtype=config.dtype, device=config.device)
        self.side = int(self.clip.model.config.vision_config.image_size)
        processor: Any = self.clip.image_processor
        self.mean, self.std = (np.asarray(values, np.float32) for values in (processor.image_mean, processor.image_std))

    def prepare(self, row: Row) -> "PreparedImage":
        import torch

        image = super().prepare(row)
        short = min(image.size)
        left, top = (image.width - short) // 2, (image.height - short) // 2
        square = image.crop((left, top, left + short, top + short)).resize((self.side,) * 2, Image.Resampling.BICUBIC)
        values = (np.asarray(square, np.float32) / 255 - self.mean) / self.std
        return {"pixel_values": torch.from_numpy(values.transpose(2, 0, 1)[None].copy())}

    def features(self, rows: list[Row]) -> Array:
        found: Array = self.clip.embed_prepared([row["picture"] for row in rows]).numpy()
        return found

    @classmethod
    def compare(cls, drawn: FeatureSet, real: FeatureSet, config: CmmdConfig) -> dict[str, float]:
        some, others = drawn.sample(config.max_features), real.sample(config.max_features)
        if others is None:
            raise ValueError(f"evaluate.cmmd.reference={config.reference} holds statistics alone: CMMD needs pictures")
        assert some is not None
        if not len(some) or not len(others):
            return {}
        return {"cmmd": gaussian_distance(others, some)}
