"""Write tables as this program wrote them before each captioner had a table of its own."""

import json
from typing import Any

import pyarrow as pa

from pipelines.tables.identity import MANIFEST
from pipelines.tables.table import Table

CONTEST = pa.list_(
    pa.struct([pa.field("captioner", pa.string()), pa.field("caption", pa.string()), pa.field("clip_score", pa.float32())])
)
OLD_SCORES = pa.schema([pa.field("id", pa.string(), nullable=False), pa.field("captions", CONTEST, nullable=False)])
OLD_MANIFEST: dict[str, Any] = {
    "fingerprint": "f" * 64,
    "models": {"clip": "sha256:clip"},
    "inputs": {},
    "schema_version": 1,
    "complete": True,
    "num_shards": 1,
    "num_rows": 1,
    "num_rejects": 0,
    "rejects_by_reason": {},
    "figures": {},
    "versions": {},
    "license": None,
    "begun": "2026-10-01T00:00:00+00:00",
    "updated": "2026-10-01T00:00:00+00:00",
}


def write_old_scores(dataset_uri: str, clip: str) -> Table:
    """Write `scores/<clip>`, which held the scores of all captioners; its only shard has one row."""
    table = Table(dataset_uri, f"scores/{clip}", OLD_SCORES)
    row = {"id": "0" * 64, "captions": [{"captioner": "a", "caption": "one", "clip_score": 25.0}]}
    table.write_shard("00000", pa.Table.from_pylist([row], OLD_SCORES))
    table.rejects().write_shard("00000", pa.Table.from_pylist([], table.rejects().schema))
    write_old_manifest(table, "score", {"captioners": ["a"], "model": "zoo://clip"})
    return table


def write_old_manifest(table: Table, stage: str, config: dict[str, Any]) -> None:
    """Write a manifest with the fields of that time: it has no `rows_of`, and the version of its form is 1."""
    content = OLD_MANIFEST | {"stage": stage, "config": config}
    table.write_file(MANIFEST, json.dumps(content).encode())
