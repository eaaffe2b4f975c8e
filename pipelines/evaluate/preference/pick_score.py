"""PickScore: which picture people would pick for its prompt."""

from typing import TYPE_CHECKING, ClassVar

from pipelines.evaluate.metric import Metric
from pipelines.evaluate.preference.config import PickScoreConfig
from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import Row

if TYPE_CHECKING:
    from pipelines.workers.clip import PreparedImage


class PickScore(Metric[PickScoreConfig]):
    """Kirstain et al. 2023 (arXiv 2305.01569): the cosine of picture and prompt times the model's logit scale.

    Figure: `pick_score`, the mean; about 20 for the published model.
    """

    name: ClassVar = "pick_score"
    more_models: ClassVar = ("processor",)

    def __init__(self, config: PickScoreConfig):
        from pipelines.workers.clip import ClipModel

        self.clip = ClipModel(
            config.model,
            revision=config.revision,
            dtype=config.dtype,
            device=config.device,
            processor=(config.processor, config.processor_revision),
        )

    def prepare(self, row: Row) -> "PreparedImage":
        return self.clip.prepare_image(super().prepare(row))

    def judge(self, rows: list[Row]) -> list[Row | RowRefused]:
        images = self.clip.embed_prepared([row["picture"] for row in rows])
        texts = self.clip.embed_texts([row["prompt"] for row in rows])
        scores = self.clip.logit_scale * (images * texts).sum(-1)
        return [{"pick_score": score} for score in scores.tolist()]
