"""Scores of images alone (aesthetic, not safe for work, watermark): one table for each scorer, thresholds come downstream.

A scorer is any image classifier of transformers (its score is the probability of one label), or a CLIP with a linear head
over its image embedding, as the LAION aesthetic predictors are.
"""

import hashlib
import math
import re
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, Protocol

import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForImageClassification, CLIPVisionModelWithProjection
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # the top-level name wants torchvision

from pipelines.score.config import ImageScorerConfig
from pipelines.stages.contract import OnProgress, ShardOutput, StageResult
from pipelines.stages.run import run_shards
from pipelines.storage.lease import Leases
from pipelines.tables.identity import Identity, value_settings
from pipelines.tables.rejects import RowRefused, reject
from pipelines.tables.schema import IMAGE_SCORES, IMAGES, IMAGES_PATH, Row, image_scores_path
from pipelines.tables.table import Table
from pipelines.workers.halving import run_halving
from pipelines.workers.images import decode
from pipelines.workers.models import find_model, pick_device, pretrained
from pipelines.workers.prepare import iter_rows, prepare_ahead
from sana_model.files.places import resolve
from sana_model.files.tensors import read_weights_file


def run_image_scores(
    dataset_uri: str, config: ImageScorerConfig, *, on_progress: OnProgress = lambda _: None, leases: Leases | None = None
) -> StageResult:
    """Score every image of a dataset into `image_scores/<name>`.

    Raises as `run_shards`, and MissingTableError if there are no images.
    """
    model = find_model(config.model, config.revision)
    images = Table(dataset_uri, IMAGES_PATH, IMAGES)
    models = {config.name: model.version}
    if config.head:
        with resolve(config.head).open("rb") as file:
            models["head"] = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:32]}"
    identity = Identity("score_images", value_settings(config), models, {IMAGES_PATH: images.require().fingerprint})
    return run_shards(
        Table(dataset_uri, image_scores_path(config.name), IMAGE_SCORES),
        identity,
        images.list_shards(),
        read_shard=partial(images.read_shard, columns=["id", "image_bytes", "source_uri"]),
        make_worker=partial(ImageScorer, replace(config, model=model.path, revision=model.revision)),
        resources=config.resources,
        max_reject_share=config.max_reject_share,
        on_progress=on_progress,
        leases=leases,
    )


class ImageModel(Protocol):
    """A model that gives each image one number; its transformers `processor` prepares an RGB image for it."""

    processor: Any

    def score(self, pixels: Tensor) -> Tensor:
        """Prepared images (B, 3, H, W) -> scores (B,), float32 on the CPU."""
        ...


class ImageScorer:
    """Ray Data actor: images -> scores."""

    def __init__(self, config: ImageScorerConfig):
        self.config = config
        self.model: ImageModel = ClipHead(config) if config.head else Classifier(config)

    def process(self, table: pa.Table) -> ShardOutput:
        """A score for each image, or a reject. Threads prepare images while the model runs the batch before."""
        rows: list[Row] = []
        rejects: list[Row] = []
        ready = prepare_ahead(
            iter_rows(table), self._prepare, num_ahead=self.config.batch_size, num_threads=self.config.prepare_threads
        )
        for batch in iter(lambda: list(islice(ready, self.config.batch_size)), []):
            images = [pixels for _, pixels in batch if not isinstance(pixels, RowRefused)]
            scores = iter(run_halving(self._score, images) if images else [])
            for row, pixels in batch:
                score = pixels if isinstance(pixels, RowRefused) else next(scores)
                if isinstance(score, RowRefused):
                    rejects.append(reject(row, score))
                elif not math.isfinite(score):
                    refused = RowRefused("bad_score", f"{self.config.model} gives a score that is not finite")
                    rejects.append(reject(row, refused))
                else:
                    rows.append({"id": row["id"], "score": score})
        return ShardOutput(rows, rejects)

    def _prepare(self, row: Row) -> Tensor:
        return self.model.processor(images=decode(row["image_bytes"]), return_tensors="pt")["pixel_values"]

    def _score(self, images: list[Tensor]) -> list[float]:
        return self.model.score(torch.cat(images)).tolist()


class Classifier:
    """Any image classifier of transformers: the probability of one label.

    Raises ValueError: the model has no such label.
    """

    def __init__(self, config: ImageScorerConfig):
        path, options = pretrained(config.model, config.revision)
        self.device = pick_device(config.device)
        self.processor = AutoImageProcessor.from_pretrained(path, **options, backend="pil")
        dtype = getattr(torch, config.dtype)
        model = AutoModelForImageClassification.from_pretrained(path, dtype=dtype, **options)
        self.model = model.to(self.device).eval()
        labels = {str(name): int(number) for number, name in model.config.id2label.items()}
        assert config.label is not None
        number = labels.get(config.label, int(config.label) if config.label.isdecimal() else -1)
        if not 0 <= number < len(labels):
            raise ValueError(f"{config.model} has no label {config.label!r}; it has {', '.join(labels)}")
        self.label = number

    @torch.inference_mode()
    def score(self, pixels: Tensor) -> Tensor:
        """Prepared images (B, 3, H, W) -> scores (B,), float32 on the CPU."""
        logits = self.model(pixel_values=pixels.to(self.device, self.model.dtype)).logits
        return logits.float().softmax(-1)[:, self.label].cpu()


class ClipHead:
    """A CLIP's image tower whose unit embedding goes through linear layers, kept as "layers.<n>.weight" and "layers.<n>.bias".

    So are the aesthetic predictors of LAION (christophschuhmann/improved-aesthetic-predictor): from 768 to 1 in five layers,
    with nothing between them but dropout.

    Raises ValueError: the file holds no such layers, or they do not end in one number.
    """

    def __init__(self, config: ImageScorerConfig):
        assert config.head is not None
        path, options = pretrained(config.model, config.revision)
        self.device = pick_device(config.device)
        self.processor = AutoImageProcessor.from_pretrained(path, **options, backend="pil")
        dtype = getattr(torch, config.dtype)
        model: torch.nn.Module = CLIPVisionModelWithProjection.from_pretrained(path, dtype=dtype, **options)
        self.model = model.to(self.device, dtype).eval()
        self.dtype = dtype
        weights = read_weights_file(resolve(config.head))
        numbers = sorted(int(name.split(".")[1]) for name in weights if re.fullmatch(r"layers\.\d+\.weight", name))
        if not numbers or len(weights[f"layers.{numbers[-1]}.weight"]) != 1:
            raise ValueError(
                f"{config.head} is no head: it needs layers.<n>.weight, the last of one row; it holds {', '.join(weights)}"
            )
        self.layers = [
            tuple(weights[f"layers.{number}.{part}"].float().to(self.device) for part in ("weight", "bias"))
            for number in numbers
        ]

    @torch.inference_mode()
    def score(self, pixels: Tensor) -> Tensor:
        """Prepared images (B, 3, H, W) -> scores (B,), float32 on the CPU."""
        embeds = self.model(pixel_values=pixels.to(self.device, self.dtype)).image_embeds.float()
        hidden = F.normalize(embeds, dim=-1)
        for weight, bias in self.layers:
            hidden = F.linear(hidden, weight, bias)
        return hidden[:, 0].cpu()
