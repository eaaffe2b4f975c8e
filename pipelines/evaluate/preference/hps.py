"""HPSv2.1: how much people would like a picture for its prompt."""

from typing import TYPE_CHECKING, ClassVar

from pipelines.evaluate.metric import Metric
from pipelines.evaluate.preference.config import HpsConfig
from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import Row

if TYPE_CHECKING:
    from torch import Tensor


class Hps(Metric[HpsConfig]):
    """Wu et al. 2023 (arXiv 2306.09341): the cosine of picture and prompt, by a fine-tuned CLIP ViT-H-14.

    Figure: `hps`, the mean, about 0.3 for the published model; tables often show 100 times that. Pictures that are not square
    are padded with black, as published.
    """

    name: ClassVar = "hps"
    more_models: ClassVar = ("processor",)

    def __init__(self, config: HpsConfig):
        from pipelines.evaluate.preference.open_clip import OpenClip

        self.clip = OpenClip(
            config.model,
            (config.processor, config.processor_revision),
            dtype=config.dtype,
            device=config.device,
        )

    def prepare(self, row: Row) -> "Tensor":
        return self.clip.prepare_image(super().prepare(row))["pixel_values"]

    def judge(self, rows: list[Row]) -> list[Row | RowRefused]:
        images = self.clip.embed_prepared([{"pixel_values": row["picture"]} for row in rows])
        texts = self.clip.embed_texts([row["prompt"] for row in rows])
        return [{"hps": score} for score in (images * texts).sum(-1).tolist()]
