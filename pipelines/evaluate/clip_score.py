"""CLIP score: how well each picture fits its prompt."""

from typing import TYPE_CHECKING, ClassVar

from pipelines.evaluate.config import ClipScoreConfig
from pipelines.evaluate.metric import Metric
from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import Row

if TYPE_CHECKING:
    from pipelines.workers.clip import PreparedImage


class ClipScore(Metric[ClipScoreConfig]):
    """100 times the cosine of picture and prompt; its figure `clip_score` is the mean.

    The published way (Sana, and torchmetrics): CLIP ViT-L/14, prompts cut to 77 tokens, one prompt a picture. Sana's code
    multiplies with the model's logit scale, which is 100 for every CLIP of OpenAI.
    """

    name: ClassVar = "clip_score"

    def __init__(self, config: ClipScoreConfig):
        from pipelines.workers.clip import ClipModel

        self.config = config
        self.clip = ClipModel(config.model, revision=config.revision, dtype=config.dtype, device=config.device)

    def prepare(self, row: Row) -> "PreparedImage":
        return self.clip.prepare_image(super().prepare(row))

    def judge(self, rows: list[Row]) -> list[Row | RowRefused]:
        import torch

        images = self.clip.embed_prepared([row["picture"] for row in rows])
        tokens = self.clip.tokenize([row["prompt"] for row in rows])
        scores = self.clip.score_tokens(images, tokens, self.config.long_captions)
        finite = torch.isfinite(scores).tolist()
        return [
            {"clip_score": score} if good else self.clip.not_finite("bad_score")
            for score, good in zip(scores.tolist(), finite, strict=True)
        ]
