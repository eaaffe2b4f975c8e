"""LAION's aesthetic predictor: how beautiful a picture is."""

from typing import TYPE_CHECKING, ClassVar

from pipelines.evaluate.metric import Metric
from pipelines.evaluate.preference.config import AestheticConfig
from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import Row

if TYPE_CHECKING:
    from pipelines.workers.clip import PreparedImage


class Aesthetic(Metric[AestheticConfig]):
    """A head on CLIP's embedding of the picture; the prompt does not count. Figure: `aesthetic`, the mean."""

    name: ClassVar = "aesthetic"

    def __init__(self, config: AestheticConfig):
        from pipelines.score.heads import Head
        from pipelines.workers.clip import ClipModel

        self.head = Head.read(config.head)
        self.clip = ClipModel(config.model, revision=config.revision, dtype=config.dtype, device=config.device)
        if self.head.width != self.clip.width:
            told = f"takes embeddings of {self.head.width} numbers, model={config.model} gives {self.clip.width}"
            raise ValueError(f"head={config.head} {told}")

    @classmethod
    def find_models(cls, config: AestheticConfig) -> tuple[AestheticConfig, dict[str, str]]:
        from pipelines.workers.models import find_model

        found, versions = super().find_models(config)
        return found, {**versions, "head": find_model(config.head).version}

    def prepare(self, row: Row) -> "PreparedImage":
        return self.clip.prepare_image(super().prepare(row))

    def judge(self, rows: list[Row]) -> list[Row | RowRefused]:
        scores = self.head.score(self.clip.embed_prepared([row["picture"] for row in rows]))
        return [{"aesthetic": score} for score in scores.tolist()]
