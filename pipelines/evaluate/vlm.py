"""What the metrics that ask a VLM about pictures share."""

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from pipelines.evaluate.metric import Metric
from pipelines.evaluate.vlm_config import VlmMetricConfig
from pipelines.tables.schema import Row

if TYPE_CHECKING:
    from PIL import Image

Config = TypeVar("Config", bound=VlmMetricConfig)


class VlmMetric(Metric[Config]):
    """A metric that asks a VLM, by any of the captioners' engines."""

    def __init__(self, config: Config):
        from pipelines.caption.asking import make_asker

        self.config = config
        self.asker = make_asker(config.judge)

    @classmethod
    def find_models(cls, config: Config) -> tuple[Config, dict[str, str]]:
        from pipelines.caption.run import find_models

        judge, versions = find_models(config.judge)
        return replace(config, model=judge.model, revision=judge.revision), versions

    def prepare(self, row: Row) -> "Image.Image":
        image: Image.Image = super().prepare(row)
        image.thumbnail((self.config.max_image_size,) * 2)
        return image
