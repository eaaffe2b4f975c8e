"""Run stages with workers that load no model, and note in a file each worker that is constructed."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipelines.caption import run as caption
from pipelines.extract import run as extract
from pipelines.ingest import run as ingest
from pipelines.score import captions as score
from pipelines.score import embeds
from pipelines.stages.contract import ShardWorker, StageResult
from pipelines.stages.run import run_shards
from pipelines.tables.identity import Identity
from pipelines.tables.table import Table
from tests.support.stand import Stand, construct_noted

MODULES = (ingest, caption, embeds, score, extract)


def count_workers(patch: pytest.MonkeyPatch, log: Path) -> None:
    """Write the table of each constructed worker to `log`, a line each. Ingest keeps its own worker."""
    log.touch()
    for module in MODULES:
        patch.setattr(module, "run_shards", partial(_run_counted, log))


def _run_counted(
    log: Path, output: Table, identity: Identity, shards: list[str], *, make_worker: Callable[[], ShardWorker], **settings: Any
) -> StageResult:
    stage = identity.stage
    make = make_worker if stage == "ingest" else partial(Stand, stage, identity.fingerprint)
    return run_shards(output, identity, shards, make_worker=partial(construct_noted, log, output.path, make), **settings)
