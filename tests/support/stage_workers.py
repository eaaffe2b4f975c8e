"""Workers for the tests of the stage runner, in a module that Ray's actors can import."""

import os
from pathlib import Path

import pyarrow as pa

from pipelines.stages.contract import ShardOutput
from pipelines.tables.rejects import RowRefused, reject
from pipelines.tables.schema import Row


class Upper:
    """Captions every row with its id in capitals; refuses ids that end in `bad`; dies at `poison` while `armed` exists."""

    def __init__(self, armed: Path | None = None):
        self.armed = armed

    def process(self, table: pa.Table) -> ShardOutput:
        rows: list[Row] = []
        rejects: list[Row] = []
        for row in table.to_pylist():
            if row["id"] == "poison" and self.armed is not None and self.armed.exists():
                raise RuntimeError("killed by the test")
            if row["id"].endswith("bad"):
                rejects.append(reject(row, RowRefused("bad_id", f"{row['id']} ends in bad")))
            else:
                rows.append({"id": row["id"], "caption": row["id"].upper(), "num_tokens": 1, "finish_reason": "stop"})
        return ShardOutput(rows, rejects, {"kept": len(rows)})


def read_ids(ids: dict[str, list[str]], shard: str) -> pa.Table:
    return pa.table({"id": pa.array(ids[shard], pa.string())})


class Dying(Upper):
    """Ends its process at a row `poison`: every time, or once for each file in `lives`."""

    def __init__(self, lives: Path | None = None):
        super().__init__()
        self.lives = lives

    def process(self, table: pa.Table) -> ShardOutput:
        if "poison" in table["id"].to_pylist():
            if self.lives is None:
                os._exit(1)
            if spent := next(self.lives.iterdir(), None):
                spent.unlink()
                os._exit(1)
        return super().process(table)


class Unborn(Upper):
    """Ends its process while it is constructed."""

    def __init__(self) -> None:
        os._exit(1)


class WithoutDevice(Upper):
    """Loses its device for the rest of its process's life, once for each file in `lives`."""

    def __init__(self, lives: Path):
        super().__init__()
        self.lives = lives
        self.lost = False

    def process(self, table: pa.Table) -> ShardOutput:
        if spent := next(self.lives.iterdir(), None):
            spent.unlink()
            self.lost = True
        if self.lost:
            import torch  # here alone: the actors of all other tests start without it

            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return super().process(table)
