"""Functions for the tests of the row stage, in a module that Ray's workers can import."""

import pyarrow as pa
import ray

from pipelines.stages.contract import ShardOutput
from pipelines.tables.errors import DamagedShardError
from pipelines.tables.rejects import RowRefused, reject
from pipelines.tables.schema import Row

IDS = {"00000": ["a", "b", "c-bad"], "00001": [], "00002": ["d"], "00003": [f"e{number}" for number in range(40)]}


def read_ids(shard: str) -> pa.Table:
    return pa.table({"id": pa.array(IDS[shard], pa.string())})


def read_damaged(shard: str) -> pa.Table:
    raise DamagedShardError(f"{shard} is damaged: delete it")


def make_row(row: Row) -> Row:
    return {"id": row["id"], "ballast": "x" * 1000}


def shuffle(dataset: ray.data.Dataset) -> ray.data.Dataset:
    """Stand in for a model that returns rows in any order, across shards."""
    return dataset.random_shuffle(seed=0).map(capitals)


def shuffle_and_lose(dataset: ray.data.Dataset) -> ray.data.Dataset:
    return shuffle(dataset).filter(lambda row: row["id"] != "e7")


def shuffle_and_repeat(dataset: ray.data.Dataset) -> ray.data.Dataset:
    return shuffle(dataset).flat_map(lambda row: [row, row])


def capitals(row: Row) -> Row:
    return {name: row[name] for name in ("shard", "place", "shard_rows", "id")} | {"text": row["id"].upper()}


class Finish:
    def finish(self, rows: list[Row]) -> ShardOutput:
        kept = [
            {"id": row["id"], "caption": row["text"], "num_tokens": row["place"], "finish_reason": "stop", "flags": []}
            for row in rows
            if not row["id"].endswith("bad")
        ]
        refused = [reject(row, RowRefused("bad_id", row["text"])) for row in rows if row["id"].endswith("bad")]
        return ShardOutput(kept, refused, {"rows": float(len(rows))})
