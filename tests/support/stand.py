"""A worker without a model, in a module that imports neither torch nor transformers: Ray's actors start in a second."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from pipelines.stages.contract import ShardOutput, ShardWorker
from pipelines.tables.schema import Row


def construct_noted(log: Path, path: str, make: Callable[[], ShardWorker]) -> ShardWorker:
    with log.open("a") as file:
        file.write(f"{path}\n")
    return make()


class Stand:
    """Stands in for a stage's model: makes one row of each row, with values that name the identity that made them."""

    def __init__(self, stage: str, fingerprint: str):
        self.make: Callable[[Row], Row] = getattr(self, f"_{stage}")
        self.mark = fingerprint[:8]

    def process(self, table: pa.Table) -> ShardOutput:
        return ShardOutput([{"id": row["id"], **self.make(row)} for row in table.to_pylist()], [])

    def _caption(self, row: Row) -> Row:
        return {"caption": f"{self.mark} {row['id'][:8]}", "num_tokens": 2, "finish_reason": "stop"}

    def _embed_images(self, row: Row) -> Row:
        return {"embedding": [1.0, *[0.0] * 127]}

    def _score(self, row: Row) -> Row:
        assert row.keys() == {"id", "caption", "embedding"}, "a score is made without looking at an image"
        return {"clip_score": 25.0}

    def _extract(self, row: Row) -> Row:
        """Latents in the shape of the zoo's autoencoder, which decodes some for the report."""
        return {"latents": bytes(2 * 8 * 8 * 8), "channels": 8, "height": 8, "width": 8, "bucket": "64x64"}
