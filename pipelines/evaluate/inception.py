"""FID, KID, precision and recall."""

from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.evaluate.distances import Array, kernel_distance, precision_recall
from pipelines.evaluate.feature_config import InceptionConfig
from pipelines.evaluate.features import NEIGHBORS, FeatureMetric, FeatureSet, frechet, sample_both
from pipelines.tables.schema import Row

if TYPE_CHECKING:
    from torch import Tensor


class Inception(FeatureMetric[InceptionConfig]):
    """The features of Inception V3's last pool, 2048 numbers a picture.

    Figures: `fid`; and if more than the reference's statistics are known, `kid` with its deviation `kid_std` over subsets,
    `precision` and `recall`.
    """

    name: ClassVar = "inception"

    def __init__(self, config: InceptionConfig):
        import torch

        from pipelines.evaluate.inception_v3 import load_inception
        from pipelines.evaluate.resizing import RESIZE
        from pipelines.workers.models import pick_device
        from sana_model.files.places import resolve
        from sana_model.files.tensors import read_weights_file

        self.config, self.device, self.dtype = config, pick_device(config.device), getattr(torch, config.dtype)
        network = load_inception(read_weights_file(resolve(config.model)), config.model)
        self.network = network.to(self.device, self.dtype)
        self.resize = RESIZE[config.resize]

    def prepare(self, row: Row) -> "Tensor":
        return self.resize(super().prepare(row), self.config.size)

    def features(self, rows: list[Row]) -> Array:
        import torch

        with torch.inference_mode():
            images = torch.stack([row["picture"] for row in rows])
            found: Any = self.network(images.to(self.device, self.dtype)).float().cpu().numpy()
        return found

    @classmethod
    def compare(cls, drawn: FeatureSet, real: FeatureSet, config: InceptionConfig) -> dict[str, float]:
        figures = {"fid": frechet(drawn, real)}
        if (both := sample_both(drawn, real, config.max_features)) is not None:
            some, others = both
            figures["kid"], figures["kid_std"] = kernel_distance(others, some)
            figures["precision"], figures["recall"] = precision_recall(others, some, neighbors=NEIGHBORS)
        return figures
