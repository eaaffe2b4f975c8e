"""The score stage: CLIP says how well each of an image's captions fits it. Raw scores are kept; selection comes later."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Literal

import pyarrow as pa
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from pipelines.images import BadImageError, decode
from pipelines.models import local_model, model_version, pick_device
from pipelines.schema import CAPTIONS, IMAGES, IMAGES_PATH, ORIGINAL_CAPTIONER, SCORES, captions_path, scores_path
from pipelines.stage import OnProgress, Resources, Row, ShardOutput, StageResult, reject, run_shards
from pipelines.tables import Identity, Table

CANDIDATE = pa.struct([("captioner", pa.string()), ("caption", pa.string())])


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """A CLIP (any transformers CLIP or SigLIP) and the captioners whose captions compete.

    Args:
        name: of the table under scores/.
        model: a local folder, a hub id, or a zoo://, hf:// or fsspec URI.
        revision: of a hub id.
        captioners: names of the tables under captions/. The caption that came with an image competes too, as "original".
        dtype: of the weights.
        batch_size: images in one call of the model; changes no value.
        device: "cpu", "cuda"; None: the first GPU that Ray gave the actor, or else the CPU.
        resources: of the stage's actors.
        max_reject_share: the job fails when a larger share of the images is refused.
    """

    name: str
    model: str
    captioners: tuple[str, ...]
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_size: int = 64
    device: str | None = None
    resources: Resources = field(default_factory=Resources)
    max_reject_share: float = 0.1


def score_identity(dataset_uri: str, config: ScorerConfig) -> Identity:
    """What the scores depend on."""
    values = asdict(config)
    settings = {name: values[name] for name in ("model", "dtype")} | {"captioners": list(config.captioners)}
    tables = [Table(dataset_uri, IMAGES_PATH, IMAGES), *_caption_tables(dataset_uri, config)]
    inputs = {table.path: table.require().fingerprint for table in tables}
    return Identity("score", settings, {config.name: model_version(config.model, config.revision)}, inputs)


def run_score(dataset_uri: str, config: ScorerConfig, *, on_progress: OnProgress = lambda _: None) -> StageResult:
    """Score the captions of every image of a dataset into `scores/<name>`: of the shards that all captioners have done.

    Raises as `run_shards`, and MissingTableError if images or a captioner's captions are not there.
    """
    identity = score_identity(dataset_uri, config)
    images, captions = Table(dataset_uri, IMAGES_PATH, IMAGES), _caption_tables(dataset_uri, config)
    shards = set(images.list_shards()).intersection(*(table.list_shards() for table in captions))
    return run_shards(
        Table(dataset_uri, scores_path(config.name), SCORES),
        identity,
        sorted(shards),
        read_shard=partial(read_candidates, images, dict(zip(config.captioners, captions, strict=True))),
        make_worker=partial(CaptionScorer, config),
        resources=config.resources,
        max_reject_share=config.max_reject_share,
        on_progress=on_progress,
    )


def _caption_tables(dataset_uri: str, config: ScorerConfig) -> list[Table]:
    return [Table(dataset_uri, captions_path(name), CAPTIONS) for name in config.captioners]


def read_candidates(images: Table, captions: dict[str, Table], shard: str) -> pa.Table:
    """id, image_bytes, source_uri and `candidates` of a shard: every caption that an image has, the original one first."""
    table = images.read_shard(shard, ["id", "image_bytes", "source_uri", "caption"])
    candidates: dict[str, list[Row]] = {row_id: [] for row_id in table["id"].to_pylist()}
    for row in table.select(["id", "caption"]).to_pylist():
        if row["caption"]:
            candidates[row["id"]].append({"captioner": ORIGINAL_CAPTIONER, "caption": row["caption"]})
    for captioner, captions_table in captions.items():
        for row in captions_table.read_shard(shard, ["id", "caption"]).to_pylist():
            candidates[row["id"]].append({"captioner": captioner, "caption": row["caption"]})
    column = pa.array([candidates[row_id] for row_id in table["id"].to_pylist()], pa.list_(CANDIDATE))
    return table.drop_columns(["caption"]).append_column("candidates", column)


class CaptionScorer:
    """Ray Data actor: images with their captions -> scores."""

    def __init__(self, config: ScorerConfig):
        self.config = config
        self.clip = ClipModel(config.model, revision=config.revision, dtype=config.dtype, device=config.device)

    def process(self, table: pa.Table) -> ShardOutput:
        """A row of scored captions for each image, or a reject."""
        rows: list[Row] = []
        rejects: list[Row] = []
        source = table.to_pylist()
        for start in range(0, len(source), self.config.batch_size):
            batch, images = [], []
            for row in source[start : start + self.config.batch_size]:
                try:
                    if not row["candidates"]:
                        raise BadImageError("no_caption", "no captioner had a caption for it, and none came with it")
                    images.append(decode(row["image_bytes"]))
                    batch.append(row)
                except BadImageError as error:
                    rejects.append(reject(row, error.reason, error.detail))
            rows += self._score(batch, images) if batch else []
        return ShardOutput(rows, rejects)

    def _score(self, batch: list[Row], images: list[Image.Image]) -> list[Row]:
        captions = [candidate["caption"] for row in batch for candidate in row["candidates"]]
        owners = torch.tensor([index for index, row in enumerate(batch) for _ in row["candidates"]])
        image_embeds, text_embeds = self.clip.embed_images(images), self.clip.embed_texts(captions)
        scores = iter((100 * (image_embeds[owners] * text_embeds).sum(-1)).tolist())
        return [
            {"id": row["id"], "captions": [{**candidate, "clip_score": next(scores)} for candidate in row["candidates"]]}
            for row in batch
        ]


class ClipModel:
    """Any transformers CLIP or SigLIP: images and texts to unit vectors, on the CPU in float32.

    A text over the model's limit (77 tokens for CLIP) is cut there, as the published code does.
    """

    def __init__(self, model: str, *, revision: str | None = None, dtype: str = "float32", device: str | None = None):
        path = local_model(model)
        options = {"revision": revision} if revision else {}
        self.device = pick_device(device)
        self.model = AutoModel.from_pretrained(path, dtype=getattr(torch, dtype), **options).to(self.device).eval()
        processor = AutoProcessor.from_pretrained(path, **options)
        self.image_processor, self.tokenizer = processor.image_processor, processor.tokenizer
        self.max_tokens = self.model.config.text_config.max_position_embeddings
        # SigLIP learned with every text padded to its full length.
        self.padding = "max_length" if self.model.config.model_type.startswith("siglip") else True

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB images to unit vectors (B, D)."""
        pixels = self.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        return _unit(self.model.get_image_features(pixel_values=pixels.to(self.device, self.model.dtype)))

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to unit vectors (B, D)."""
        tokens = self.tokenizer(
            list(texts), padding=self.padding, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        inputs = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask") if name in tokens}
        return _unit(self.model.get_text_features(**inputs))


def _unit(features: object) -> Tensor:
    """Tensors as transformers 4 returned them, or the output object of transformers 5."""
    pooled = features if isinstance(features, Tensor) else features.pooler_output  # type: ignore[attr-defined]
    return F.normalize(pooled.float(), dim=-1).cpu()
