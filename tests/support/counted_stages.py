"""Stages whose models are replaced by what costs nothing, and that note in a file whenever a worker is constructed."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.caption import run as caption
from pipelines.extract import run as extract
from pipelines.ingest import run as ingest
from pipelines.score import captions as score
from pipelines.stages.contract import ShardOutput, ShardWorker, StageResult
from pipelines.stages.run import run_shards
from pipelines.tables.identity import Identity
from pipelines.tables.schema import Row
from pipelines.tables.table import Table

MODULES = (ingest, caption, score, extract)


def count_workers(patch: pytest.MonkeyPatch, log: Path) -> None:
    """From now on a line of `log` is the stage of a worker that was constructed. Ingest keeps its own worker."""
    log.touch()
    for module in MODULES:
        patch.setattr(module, "run_shards", partial(_run_counted, log))


def _run_counted(
    log: Path, output: Table, identity: Identity, shards: list[str], *, make_worker: Callable[[], ShardWorker], **settings: Any
) -> StageResult:
    stage = identity.stage
    make = make_worker if stage == "ingest" else partial(Stand, stage, identity.fingerprint)
    return run_shards(output, identity, shards, make_worker=partial(_note, log, stage, make), **settings)


def _note(log: Path, stage: str, make: Callable[[], ShardWorker]) -> ShardWorker:
    with log.open("a") as file:
        file.write(f"{stage}\n")
    return make()


class Stand:
    """Stands in for a stage's model: a row for each row, whose values tell by which identity they were made."""

    def __init__(self, stage: str, fingerprint: str):
        self.make: Callable[[Row], Row] = getattr(self, f"_{stage}")
        self.mark = fingerprint[:8]

    def process(self, table: pa.Table) -> ShardOutput:
        return ShardOutput([{"id": row["id"], **self.make(row)} for row in table.to_pylist()], [])

    def _caption(self, row: Row) -> Row:
        return {"caption": f"{self.mark} {row['id'][:8]}", "num_tokens": 2, "finish_reason": "stop"}

    def _score(self, row: Row) -> Row:
        return {"captions": [{**candidate, "clip_score": 25.0} for candidate in row["candidates"]]}

    def _extract(self, row: Row) -> Row:
        """As the autoencoder of the zoo would have them, which decodes some for the report."""
        shape = {"latents": bytes(2 * 8 * 8 * 8), "channels": 8, "height": 8, "width": 8, "bucket": "64x64"}
        return {**shape, "captions": row["captions"]}
