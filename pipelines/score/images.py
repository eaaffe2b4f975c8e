"""Scores of images alone (aesthetic, not safe for work, watermark): one table for each scorer, thresholds come downstream.

A scorer is any image classifier of transformers (its score is the probability of one label), or a head that reads a CLIP's
embeddings of the images (`pipelines.score.heads`), as the LAION aesthetic predictors do.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import pyarrow as pa

from pipelines.score.config import ImageScorerConfig
from pipelines.stages.contract import OnProgress, ReadShard, ShardOutput, ShardWorker, StageResult
from pipelines.stages.run import run_shards
from pipelines.storage.lease import Leases
from pipelines.tables.identity import Identity, value_settings
from pipelines.tables.rejects import RowRefused, reject
from pipelines.tables.schema import (
    IMAGE_SCORES,
    IMAGES,
    IMAGES_PATH,
    Row,
    image_embeds_path,
    image_embeds_schema,
    image_scores_path,
)
from pipelines.tables.table import Table
from pipelines.workers.halving import run_halving
from pipelines.workers.images import decode
from pipelines.workers.models import find_model, pick_device, pretrained
from pipelines.workers.prepare import iter_rows, prepare_ahead
from sana_model.files.places import resolve

if TYPE_CHECKING:
    from torch import Tensor


def run_image_scores(
    dataset_uri: str, config: ImageScorerConfig, *, on_progress: OnProgress = lambda _: None, leases: Leases | None = None
) -> StageResult:
    """Score every image of a dataset into `image_scores/<name>`: a head reads `image_embeds/<clip>`, a classifier the images.

    Raises as `run_shards`, and MissingTableError if there are no images, or no embeddings.
    """
    source, models, read_shard, make_worker = (_of_head if config.head else _of_classifier)(dataset_uri, config)
    return run_shards(
        Table(dataset_uri, image_scores_path(config.name), IMAGE_SCORES),
        Identity("score_images", value_settings(config), models, {source.path: source.require().fingerprint}),
        source.list_shards(),
        read_shard=read_shard,
        make_worker=make_worker,
        resources=config.resources,
        max_reject_share=config.max_reject_share,
        on_progress=on_progress,
        leases=leases,
    )


Scoring = tuple[Table, dict[str, str], ReadShard, Callable[[], ShardWorker]]
"""What is read, the versions of the models, how a shard is read, and the worker."""


def _of_head(dataset_uri: str, config: ImageScorerConfig) -> Scoring:
    from pipelines.score.heads import EmbeddingScorer, Head

    assert config.clip is not None and config.head is not None
    embeds = Table(dataset_uri, image_embeds_path(config.clip), image_embeds_schema(-1))
    width = embeds.require().config["width"]  # before the head is fetched
    head = Head.read(config.head)
    if head.width != width:
        raise ValueError(f"head={config.head} takes embeddings of {head.width} numbers, {embeds.uri} holds {width}")
    with resolve(config.head).open("rb") as file:
        version = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:32]}"
    return embeds, {"head": version}, embeds.read_shard, partial(EmbeddingScorer, head)


def _of_classifier(dataset_uri: str, config: ImageScorerConfig) -> Scoring:
    assert config.model is not None
    images = Table(dataset_uri, IMAGES_PATH, IMAGES)
    images.require()  # before any weights are fetched or hashed
    model = find_model(config.model, config.revision)
    worker = partial(ImageScorer, replace(config, model=model.path, revision=model.revision))
    columns = ["id", "image_bytes", "source_uri"]
    return images, {config.name: model.version}, partial(images.read_shard, columns=columns), worker


class ImageScorer:
    """Ray Data actor: images -> scores of a classifier."""

    def __init__(self, config: ImageScorerConfig):
        self.config = config
        self.model = Classifier(config)

    def process(self, table: pa.Table) -> ShardOutput:
        """A score for each image, or a reject. Threads prepare images while the model runs the batch before."""
        rows: list[Row] = []
        rejects: list[Row] = []
        ready = prepare_ahead(
            iter_rows(table), self._prepare, num_ahead=self.config.batch_size, num_threads=self.config.prepare_threads
        )
        for batch in iter(lambda: list(islice(ready, self.config.batch_size)), []):
            images = [pixels for _, pixels in batch if not isinstance(pixels, RowRefused)]
            scores = iter(run_halving(self._score, images))
            for row, pixels in batch:
                score = pixels if isinstance(pixels, RowRefused) else next(scores)
                if isinstance(score, RowRefused):
                    rejects.append(reject(row, score))
                elif not math.isfinite(score):
                    told = f"{self.config.model} gives a score that is not finite, in {self.config.dtype}"
                    refused = RowRefused("bad_score", f"{told}: take float32, or another copy of its weights")
                    rejects.append(reject(row, refused))
                else:
                    rows.append({"id": row["id"], "score": score})
        return ShardOutput(rows, rejects)

    def _prepare(self, row: Row) -> "Tensor":
        return self.model.processor(images=decode(row["image_bytes"]), return_tensors="pt")["pixel_values"]

    def _score(self, images: list["Tensor"]) -> list[float]:
        import torch

        return self.model.score(torch.cat(images)).tolist()


class Classifier:
    """Any image classifier of transformers: the probability of one label.

    Raises ValueError: the model has no such label.
    """

    def __init__(self, config: ImageScorerConfig):
        import torch
        from transformers import AutoModelForImageClassification
        from transformers.models.auto.image_processing_auto import AutoImageProcessor  # the top-level name wants torchvision

        assert config.model is not None and config.label is not None
        path, options = pretrained(config.model, config.revision)
        self.device = pick_device(config.device)
        self.processor = AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False, **options)
        dtype = getattr(torch, config.dtype)
        model = AutoModelForImageClassification.from_pretrained(path, dtype=dtype, trust_remote_code=False, **options)
        self.model = model.to(self.device).eval()
        labels = {str(name): int(number) for number, name in model.config.id2label.items()}
        number = labels.get(config.label, int(config.label) if config.label.isdecimal() else -1)
        if not 0 <= number < len(labels):
            raise ValueError(f"{config.model} has no label {config.label!r}; it has {', '.join(labels)}")
        self.label = number

    def score(self, pixels: "Tensor") -> "Tensor":
        """Prepared images (B, 3, H, W) -> scores (B,), float32 on the CPU."""
        import torch

        with torch.inference_mode():
            logits = self.model(pixel_values=pixels.to(self.device, self.model.dtype)).logits
            return logits.float().softmax(-1)[:, self.label].cpu()
