"""The score stage: how well each caption of a captioner fits its image, as a CLIP sees it.

It reads the images' embeddings and the captions: no image is decoded, and no other captioner's captions are looked at. Raw
scores are stored; selection comes later.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.score.config import ScorerConfig
from pipelines.score.embeds import to_vectors
from pipelines.stages.contract import OnProgress, ShardOutput, StageResult
from pipelines.stages.run import run_shards
from pipelines.storage.lease import Leases
from pipelines.tables.captions import captions_table, check_scorer, read_captions
from pipelines.tables.identity import Identity, value_settings
from pipelines.tables.rejects import RowRefused, reject
from pipelines.tables.schema import SCORES, Row, image_embeds_path, image_embeds_schema, scores_path
from pipelines.tables.table import Table
from pipelines.workers.halving import run_halving
from pipelines.workers.models import FoundModel, find_model

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.workers.clip import ClipModel

STAGE = "score"


def score_identity(dataset_uri: str, config: ScorerConfig, captioner: str, model: FoundModel) -> Identity:
    """Everything that the scores of a captioner depend on."""
    embeds, captions = _embeds_table(dataset_uri, config), captions_table(dataset_uri, captioner)
    inputs = {table.path: table.require().fingerprint for table in (embeds, captions)}
    return Identity(STAGE, value_settings(config), {config.name: model.version}, inputs, rows_of=captions.path)


def run_score(
    dataset_uri: str,
    config: ScorerConfig,
    captioner: str,
    model: FoundModel | None = None,
    *,
    on_progress: OnProgress = lambda _: None,
    leases: Leases | None = None,
) -> StageResult:
    """Score the captions of a captioner into `scores/<name>/<captioner>`: of the shards that have embeddings and captions.

    Args:
        model: the CLIP of `config` if it was found before; None: it is sought here.

    Raises as `run_shards`, and MissingTableError if the embeddings or the captions are not there.
    """
    embeds, captions = _embeds_table(dataset_uri, config), captions_table(dataset_uri, captioner)
    for table in (captions, embeds):
        table.require()  # before any weights are fetched or hashed
    check_scorer(dataset_uri, config.name, STAGE)
    model = model or find_model(config.model, config.revision)
    return run_shards(
        Table(dataset_uri, scores_path(config.name, captioner), SCORES),
        score_identity(dataset_uri, config, captioner, model),
        sorted(set(embeds.list_shards()).intersection(captions.list_shards())),
        read_shard=partial(read_embedded_captions, embeds, captioner),
        make_worker=partial(CaptionScorer, replace(config, model=model.path, revision=model.revision)),
        resources=config.resources,
        max_reject_share=config.max_reject_share,
        on_progress=on_progress,
        leases=leases,
    )


def _embeds_table(dataset_uri: str, config: ScorerConfig) -> Table:
    return Table(dataset_uri, image_embeds_path(config.name), image_embeds_schema(-1))


def read_embedded_captions(embeds: Table, captioner: str, shard: str) -> pa.Table:
    """id, caption and the image's `embedding` (null if the CLIP refused the image) of each caption of a shard."""
    captions = read_captions(embeds.dataset_uri, captioner, shard)
    rows = embeds.read_shard(shard)
    ids, texts = pa.array(captions, pa.string()), pa.array(captions.values(), pa.string())
    places = pc.index_in(ids, value_set=rows["id"])
    return pa.table({"id": ids, "caption": texts, "embedding": rows["embedding"].take(places)})


class CaptionScorer:
    """Ray Data actor: captions with the embeddings of their images -> scores."""

    def __init__(self, config: ScorerConfig):
        self.config = config

    @cached_property
    def clip(self) -> "ClipModel":
        """Loaded for the first caption: many datasets came without any."""
        from pipelines.workers.clip import ClipModel

        config = self.config
        return ClipModel(config.model, revision=config.revision, dtype=config.dtype, device=config.device)

    def process(self, table: pa.Table) -> ShardOutput:
        """A score for each caption, or a reject; figures: captions, and how many of them were long."""
        embedded = table["embedding"].is_valid()
        path = image_embeds_path(self.config.name)
        unseen = RowRefused(
            "no_embedding", f"{path} lacks the image: the CLIP refused it (see the rejects), or `images` has no such image"
        )
        rejects = [reject({"id": row_id}, unseen) for row_id in table["id"].filter(pc.invert(embedded)).to_pylist()]
        rows: list[Row] = []
        self.num_long = 0
        good = table.filter(embedded)
        pairs = list(zip(good["caption"].to_pylist(), to_vectors(good), strict=True))
        ids = iter(good["id"].to_pylist())
        for start in range(0, len(pairs), self.config.batch_size):
            for score in run_halving(self._score, pairs[start : start + self.config.batch_size]):
                row_id = next(ids)
                if isinstance(score, RowRefused):
                    rejects.append(reject({"id": row_id}, score))
                elif not math.isfinite(score):
                    rejects.append(reject({"id": row_id}, self.clip.not_finite("bad_score")))
                else:
                    rows.append({"id": row_id, "clip_score": score})
        return ShardOutput(rows, rejects, {"captions": len(table), "long_captions": self.num_long})

    def _score(self, batch: Sequence[tuple[str, "Tensor"]]) -> list[float]:
        """The scores of captions and their images' embeddings: one forward pass for all captions, or the parts of long ones."""
        import torch

        captions = self.clip.tokenize([caption for caption, _ in batch])
        self.num_long += sum(len(tokens) > self.clip.max_tokens for tokens in captions)
        image_embeds = torch.stack([vector for _, vector in batch])
        return self.clip.score_tokens(image_embeds, captions, self.config.long_captions).tolist()
