"""The score stage: CLIP says how well each of an image's captions fits it. Raw scores are kept; selection comes later."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from typing import Literal

import pyarrow as pa
import torch

from pipelines.batches import run_halving
from pipelines.clip import ClipModel, PreparedImage
from pipelines.images import BadImageError, decode
from pipelines.models import model_version, pinned
from pipelines.prepare import iter_rows, prepare_ahead
from pipelines.schema import CAPTIONS, IMAGES, IMAGES_PATH, ORIGINAL_CAPTIONER, SCORES, captions_path, scores_path
from pipelines.stage import OnProgress, Resources, Row, ShardOutput, StageResult, reject, run_shards
from pipelines.tables import Identity, Table

CANDIDATE = pa.struct([("captioner", pa.string()), ("caption", pa.string())])
Prepared = tuple[Row, PreparedImage]


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """A CLIP (any transformers CLIP or SigLIP) and the captioners whose captions compete.

    A score is 100 times the cosine of image and caption, with SigLIP too. Its cosines lie lower than CLIP's: the published
    thresholds (25, and 22 for the best) are CLIP ViT-L/14's.

    Args:
        name: of the table under scores/.
        model: a local folder, a hub id, or a zoo://, hf:// or fsspec URI.
        revision: of a hub id.
        captioners: names of the tables under captions/. The caption that came with an image competes too, as "original".
        dtype: of the weights.
        long_captions: what is done with a caption over the model's limit (77 tokens for CLIP, 64 for SigLIP): "cut": its
            beginning is scored, as the published code does; "chunks": its score is the mean over as few equal parts as fit.
        batch_size: images in one call of the model; changes no value, and is halved where memory is not enough.
        prepare_threads: that decode and resize, ahead of the model.
        device: "cpu", "cuda"; None: the first GPU that Ray gave the actor, or else the CPU.
        resources: of the stage's actors.
        max_reject_share: the job fails when a larger share of the images is refused.
    """

    name: str
    model: str
    captioners: tuple[str, ...]
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    long_captions: Literal["cut", "chunks"] = "cut"
    batch_size: int = 64
    prepare_threads: int = 4
    device: str | None = None
    resources: Resources = field(default_factory=Resources)
    max_reject_share: float = 0.1

    def __post_init__(self) -> None:
        if len(set(self.captioners)) < len(self.captioners) or ORIGINAL_CAPTIONER in self.captioners:
            raise ValueError(
                f"captioners={list(self.captioners)} must differ from each other and from {ORIGINAL_CAPTIONER!r}: "
                "what came with the images competes anyway"
            )


def score_identity(dataset_uri: str, config: ScorerConfig) -> Identity:
    """What the scores depend on."""
    values = asdict(config)
    settings = {name: values[name] for name in ("model", "dtype", "long_captions")} | {"captioners": list(config.captioners)}
    tables = [Table(dataset_uri, IMAGES_PATH, IMAGES), *_caption_tables(dataset_uri, config)]
    inputs = {table.path: table.require().fingerprint for table in tables}
    return Identity("score", settings, {config.name: model_version(config.model, config.revision)}, inputs)


def run_score(dataset_uri: str, config: ScorerConfig, *, on_progress: OnProgress = lambda _: None) -> StageResult:
    """Score the captions of every image of a dataset into `scores/<name>`: of the shards that all captioners have done.

    Raises as `run_shards`, and MissingTableError if images or a captioner's captions are not there.
    """
    config = pinned(config)
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
        """A row of scored captions for each image, or a reject; figures: captions, and how many of them were long."""
        rows: list[Row] = []
        rejects: list[Row] = []
        self.num_captions = self.num_long = 0
        for batch in self._prepared_batches(table, rejects):
            for (row, _), found in zip(batch, run_halving(self._score, batch), strict=True):
                if isinstance(found, BadImageError):
                    rejects.append(reject(row, found.reason, found.detail))
                elif not all(math.isfinite(caption["clip_score"]) for caption in found["captions"]):
                    rejects.append(reject(row, "bad_score", f"{self.config.model} gives a score that is not finite"))
                else:
                    rows.append(found)
        return ShardOutput(rows, rejects, {"captions": self.num_captions, "long_captions": self.num_long})

    def _prepared_batches(self, table: pa.Table, rejects: list[Row]) -> Iterator[list[Prepared]]:
        """Images decoded and resized in threads, while the model has the batch before."""
        batch: list[Prepared] = []
        size = self.config.batch_size
        rows = prepare_ahead(iter_rows(table), self._prepare, num_ahead=size, num_threads=self.config.prepare_threads)
        for row, ready in rows:
            if isinstance(ready, BadImageError):
                rejects.append(reject(row, ready.reason, ready.detail))
                continue
            batch.append((row, ready))
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _prepare(self, row: Row) -> PreparedImage:
        if not row["candidates"]:
            raise BadImageError("no_caption", "no captioner had a caption for it, and none came with it")
        return self.clip.prepare_image(decode(row["image_bytes"]))

    def _score(self, batch: list[Prepared]) -> list[Row]:
        """One forward pass for each image, and one for each caption, or part of a long one."""
        captions = self.clip.tokenize([candidate["caption"] for row, _ in batch for candidate in row["candidates"]])
        image_of = [index for index, (row, _) in enumerate(batch) for _ in row["candidates"]]
        parts = [self._parts(tokens) for tokens in captions]
        caption_of = [index for index, own in enumerate(parts) for _ in own]
        text_embeds = self.clip.embed_tokens([part for own in parts for part in own])
        image_embeds = self.clip.embed_prepared([image for _, image in batch])
        cosines = (image_embeds[[image_of[index] for index in caption_of]] * text_embeds).sum(-1)
        sums = torch.zeros(len(captions)).index_add_(0, torch.tensor(caption_of), cosines)
        scores = iter((100 * sums / torch.tensor([len(own) for own in parts])).tolist())
        self.num_captions += len(captions)
        self.num_long += sum(len(tokens) > self.clip.max_tokens for tokens in captions)
        return [
            {"id": row["id"], "captions": [{**candidate, "clip_score": next(scores)} for candidate in row["candidates"]]}
            for row, _ in batch
        ]

    def _parts(self, tokens: list[int]) -> list[list[int]]:
        """What the model sees of a caption: its beginning, or all of it in as few and as equal parts as there can be."""
        limit = self.clip.max_tokens
        if self.config.long_captions == "cut":
            return [tokens[:limit]]
        count = max(1, -(-len(tokens) // limit))
        edges = [index * len(tokens) // count for index in range(count + 1)]
        return [tokens[start:end] for start, end in pairwise(edges)]
