"""The Fréchet distance by DINOv2's features, which follows people's judgement better than FID (arXiv 2306.04675)."""

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

from pipelines.evaluate.distances import Array, precision_recall
from pipelines.evaluate.feature_config import DinoConfig
from pipelines.evaluate.features import NEIGHBORS, FeatureMetric, FeatureSet, frechet, sample_both
from pipelines.tables.schema import Row

if TYPE_CHECKING:
    from torch import Tensor

SIDE = 224  # pixels
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)  # of ImageNet


class Dino(FeatureMetric[DinoConfig]):
    """The class token of DINOv2 after its last norm, of the picture scaled to 224x224 bicubically, as dgm-eval does.

    Figures: `fd_dinov2`; and if more than the reference's statistics are known, `precision_dinov2` and `recall_dinov2`.
    """

    name: ClassVar = "dino"

    def __init__(self, config: DinoConfig):
        import torch
        from transformers import AutoModel

        from pipelines.workers.models import pick_device, pretrained

        self.device, self.dtype = pick_device(config.device), getattr(torch, config.dtype)
        path, options = pretrained(config.model, config.revision)
        model = AutoModel.from_pretrained(path, dtype=self.dtype, trust_remote_code=False, **options)
        if model.config.model_type != "dinov2":
            raise ValueError(f"{config.model} is a {model.config.model_type}: the dino metric needs a DINOv2 of transformers")
        self.model = model.to(self.device).eval()

    def prepare(self, row: Row) -> "Tensor":
        import torch

        image = super().prepare(row).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        return torch.from_numpy(((np.asarray(image, np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1).copy())

    def features(self, rows: list[Row]) -> Array:
        import torch

        with torch.inference_mode():
            images = torch.stack([row["picture"] for row in rows])
            found: Any = self.model(pixel_values=images.to(self.device, self.dtype)).pooler_output.float().cpu().numpy()
        return found

    @classmethod
    def compare(cls, drawn: FeatureSet, real: FeatureSet, config: DinoConfig) -> dict[str, float]:
        figures = {"fd_dinov2": frechet(drawn, real)}
        if (both := sample_both(drawn, real, config.max_features)) is not None:
            some, others = both
            precision, recall = precision_recall(others, some, neighbors=NEIGHBORS)
            figures |= {"precision_dinov2": precision, "recall_dinov2": recall}
        return figures
