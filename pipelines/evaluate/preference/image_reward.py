"""ImageReward: how people would rank a picture for its prompt."""

from typing import TYPE_CHECKING, ClassVar

from pipelines.evaluate.metric import Metric
from pipelines.evaluate.preference.config import ImageRewardConfig
from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import Row

if TYPE_CHECKING:
    from torch import Tensor


class ImageReward(Metric[ImageRewardConfig]):
    """Xu et al. 2023 (arXiv 2304.05977): 0 is the mean of its training data, 1 its standard deviation.

    Figure: `image_reward`, the mean. Prompts over 35 tokens are cut, as published.
    """

    name: ClassVar = "image_reward"
    more_models: ClassVar = ("tokenizer",)

    def __init__(self, config: ImageRewardConfig):
        import torch
        from transformers import AutoTokenizer

        from pipelines.evaluate.preference.blip import load_image_reward
        from pipelines.workers.models import pick_device, pretrained
        from sana_model.files.places import resolve
        from sana_model.nn.plain_text import PlainText

        self.device = pick_device(config.device)
        self.dtype = getattr(torch, config.dtype)
        self.model = load_image_reward(resolve(config.model)).to(self.device, self.dtype)
        path, options = pretrained(config.tokenizer, config.tokenizer_revision)
        self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **options)
        self.plain = PlainText(self.tokenizer)

    def prepare(self, row: Row) -> "Tensor":
        return self.model.prepare_image(super().prepare(row))

    def judge(self, rows: list[Row]) -> list[Row | RowRefused]:
        import torch

        from pipelines.evaluate.preference.blip import MAX_TOKENS

        tokens = self.plain.rows([row["prompt"] for row in rows], max_length=MAX_TOKENS)
        ids = torch.full((len(rows), MAX_TOKENS), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for index, own in enumerate(tokens):
            ids[index, : len(own)], mask[index, : len(own)] = torch.tensor(own), 1
        pixels = torch.stack([row["picture"] for row in rows])
        with torch.inference_mode():
            scores = self.model(pixels.to(self.device, self.dtype), ids.to(self.device), mask.to(self.device))
        return [{"image_reward": score} for score in scores.tolist()]
