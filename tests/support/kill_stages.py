"""A program that runs one stage, for tests that kill it: `python -m tests.support.kill_stages STAGE DATASET_URI SOURCE`."""

import sys
import time

import pyarrow as pa
import ray

from pipelines.stages.contract import Resources, ShardOutput, StageResult
from pipelines.stages.run import run_shards
from pipelines.tables.identity import Identity
from pipelines.tables.schema import (
    CAPTION_EMBEDS,
    CAPTIONS,
    IMAGES,
    IMAGES_PATH,
    LATENTS,
    SCORES,
    caption_embeds_path,
    captions_path,
    image_embeds_path,
    image_embeds_schema,
    latents_path,
    scores_path,
)
from pipelines.tables.table import Table
from tests.support.stage_workers import Upper

ROWS_PER_SHARD = 128
CHEAP = {f"{shard:05d}": [f"{shard}-{row}" + ("bad" if row % 7 == 3 else "") for row in range(10)] for shard in range(12)}
PATHS = {
    "cheap": (captions_path("cheap"), CAPTIONS),
    "ingest": (IMAGES_PATH, IMAGES),
    "caption": (captions_path("tiny"), CAPTIONS),
    "embed_images": (image_embeds_path("clip"), image_embeds_schema(-1)),
    "score": (scores_path("clip", "tiny"), SCORES),
    "extract": (latents_path("tiny", 64), LATENTS),
    "embed_captions": (caption_embeds_path("tiny", "tiny"), CAPTION_EMBEDS),
}
TWO = Resources(num_actors=2, num_cpus=1)


class Slow(Upper):
    """`Upper` that takes a second for a shard, so that there is something to kill."""

    def process(self, table: pa.Table) -> ShardOutput:
        time.sleep(1.0)
        return super().process(table)


def read_cheap(shard: str) -> pa.Table:
    return pa.table({"id": CHEAP[shard]})


def stage_table(stage: str, dataset_uri: str) -> Table:
    path, schema = PATHS[stage]
    return Table(dataset_uri, path, schema)


def run_stage(stage: str, dataset_uri: str, source: str) -> StageResult:
    """Run a stage. Each imports its models here, so that the cheap stage starts fast."""
    if stage == "cheap":
        return run_shards(
            stage_table(stage, dataset_uri),
            Identity("cheap", {}, {}, {}),
            list(CHEAP),
            read_shard=read_cheap,
            make_worker=Slow,
            resources=TWO,
            max_reject_share=0.5,
        )
    if stage == "ingest":
        from pipelines.ingest.config import IngestConfig
        from pipelines.ingest.run import run_ingest

        return run_ingest(dataset_uri, IngestConfig(source=source, rows_per_shard=ROWS_PER_SHARD, resources=TWO))
    if stage == "caption":
        from pipelines.caption.config import CaptionerConfig, SamplingConfig
        from pipelines.caption.run import run_caption

        sampling = SamplingConfig(max_new_tokens=48)
        options = {"dtype": "float32", "batch_size": 64, "sampling": sampling, "resources": TWO}
        return run_caption(dataset_uri, CaptionerConfig(name="tiny", model="zoo://captioner-a", **options))  # type: ignore[arg-type]
    if stage == "embed_images":
        from pipelines.score.config import ClipConfig
        from pipelines.score.embeds import run_image_embeds

        return run_image_embeds(dataset_uri, ClipConfig(name="clip", model="zoo://clip", resources=TWO))
    if stage == "score":
        from pipelines.score.captions import run_score
        from pipelines.score.config import ScorerConfig

        scorer = ScorerConfig(name="clip", model="zoo://clip", captioners=("tiny",), resources=TWO)
        return run_score(dataset_uri, scorer, "tiny")
    if stage == "extract":
        from pipelines.extract.run import ExtractConfig, run_extract

        autoencoder = "zoo://pipeline/autoencoder"
        config = ExtractConfig(name="tiny", autoencoder=autoencoder, resolution=64, resources=TWO)
        return run_extract(dataset_uri, config)
    from pipelines.extract.config import EmbedConfig
    from pipelines.extract.embed_captions import run_embed_captions

    encoder = "zoo://pipeline/text_encoder"
    embedder = EmbedConfig(name="tiny", text_encoder=encoder, captioners=("tiny",), compute_dtype="float32", resources=TWO)
    return run_embed_captions(dataset_uri, embedder, "tiny")


def main(stage: str, dataset_uri: str, source: str) -> None:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    result = run_stage(stage, dataset_uri, source)
    print(f"{result.num_rows} rows, {result.num_rejects} rejects, {result.found_shards} shards found")


if __name__ == "__main__":
    main(*sys.argv[1:])
