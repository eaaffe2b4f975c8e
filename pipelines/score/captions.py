"""The score stage: CLIP scores each caption against its image. Raw scores are stored; selection comes later."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pyarrow as pa
import torch

from pipelines.score.config import ScorerConfig
from pipelines.stages.contract import OnProgress, ShardOutput, StageResult
from pipelines.stages.run import run_shards
from pipelines.storage.lease import Leases
from pipelines.tables.identity import Identity, value_settings
from pipelines.tables.rejects import RowRefused, reject
from pipelines.tables.schema import CAPTIONS, IMAGES, IMAGES_PATH, ORIGINAL_CAPTIONER, SCORES, Row, captions_path, scores_path
from pipelines.tables.table import Table
from pipelines.workers.clip import ClipModel, PreparedImage
from pipelines.workers.halving import run_halving
from pipelines.workers.images import decode
from pipelines.workers.models import find_model
from pipelines.workers.prepare import iter_rows, prepare_ahead

CANDIDATE = pa.struct([("captioner", pa.string()), ("caption", pa.string())])
Prepared = tuple[Row, PreparedImage]


def score_identity(dataset_uri: str, config: ScorerConfig, models: dict[str, str]) -> Identity:
    """Everything that the scores depend on; `models`: the version of the CLIP."""
    tables = [Table(dataset_uri, IMAGES_PATH, IMAGES), *_caption_tables(dataset_uri, config)]
    inputs = {table.path: table.require().fingerprint for table in tables}
    return Identity("score", value_settings(config), models, inputs)


def run_score(
    dataset_uri: str, config: ScorerConfig, *, on_progress: OnProgress = lambda _: None, leases: Leases | None = None
) -> StageResult:
    """Score the captions of every image of a dataset into `scores/<name>`: of the shards that all captioners have done.

    Raises as `run_shards`, and MissingTableError if images or a captioner's captions are not there.
    """
    model = find_model(config.model, config.revision)
    identity = score_identity(dataset_uri, config, {config.name: model.version})
    images, captions = Table(dataset_uri, IMAGES_PATH, IMAGES), _caption_tables(dataset_uri, config)
    shards = set(images.list_shards()).intersection(*(table.list_shards() for table in captions))
    return run_shards(
        Table(dataset_uri, scores_path(config.name), SCORES),
        identity,
        sorted(shards),
        read_shard=partial(read_candidates, images, dict(zip(config.captioners, captions, strict=True))),
        make_worker=partial(CaptionScorer, replace(config, model=model.path, revision=model.revision)),
        resources=config.resources,
        max_reject_share=config.max_reject_share,
        on_progress=on_progress,
        leases=leases,
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
                if isinstance(found, RowRefused):
                    rejects.append(reject(row, found))
                elif not all(math.isfinite(caption["clip_score"]) for caption in found["captions"]):
                    refused = RowRefused("bad_score", f"{self.config.model} gives a score that is not finite")
                    rejects.append(reject(row, refused))
                else:
                    rows.append(found)
        return ShardOutput(rows, rejects, {"captions": self.num_captions, "long_captions": self.num_long})

    def _prepared_batches(self, table: pa.Table, rejects: list[Row]) -> Iterator[list[Prepared]]:
        """Decode and resize images in threads while the model runs the batch before."""
        batch: list[Prepared] = []
        size = self.config.batch_size
        rows = prepare_ahead(iter_rows(table), self._prepare, num_ahead=size, num_threads=self.config.prepare_threads)
        for row, ready in rows:
            if isinstance(ready, RowRefused):
                rejects.append(reject(row, ready))
                continue
            batch.append((row, ready))
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _prepare(self, row: Row) -> PreparedImage:
        if not row["candidates"]:
            raise RowRefused("no_caption", "no captioner had a caption for it, and none came with it")
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
        """The parts of a caption that the model sees: its beginning, or all of it in the fewest parts of equal length."""
        limit = self.clip.max_tokens
        if self.config.long_captions == "cut":
            return [tokens[:limit]]
        count = max(1, -(-len(tokens) // limit))
        edges = [index * len(tokens) // count for index in range(count + 1)]
        return [tokens[start:end] for start, end in pairwise(edges)]
