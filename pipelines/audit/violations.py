"""What can be wrong in a dataset, and what `jobs.repair` would do about it.

A file is blamed only for what it shows by itself, or against an input that is whole. Where two files contradict each other and
nothing says which of them is right, there is no action: a person decides.
"""

from dataclasses import dataclass
from typing import Literal

from pipelines.storage.files import read_file
from pipelines.tables.hashed_json import mend
from pipelines.tables.identity import MANIFEST
from pipelines.tables.schema import MADE_BY
from pipelines.tables.table import Table

Kind = Literal["aside", "mend", "recount"]
REPAIR = "python -m jobs.repair"


@dataclass(frozen=True)
class Action:
    """What `jobs.repair` would do: move files aside, mend the only flipped bit of one, or let a table be counted anew.

    `files` are relative to the dataset; those that do not exist are passed over.
    """

    kind: Kind
    table: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Violation:
    """Something wrong in a dataset.

    Args:
        file: relative to the dataset.
        remedy: what a user can do.
        action: what `jobs.repair` would do; None if nothing is safe.
    """

    file: str
    problem: str
    remedy: str
    action: Action | None = None

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}: {self.remedy}"


def file_of(table: Table, shard: str) -> str:
    return f"{table.path}/{shard}.parquet"


def remake(table: Table, shard: str, file: str, problem: str) -> Violation:
    """A shard that its stage has to make again, with its rejects. `file`: the one of the two that is bad."""
    files = (file_of(table, shard), file_of(table.rejects(), shard))
    maker = MADE_BY[table.path.split("/")[0]]
    return Violation(
        file, problem, f"{REPAIR} moves it aside, and jobs.{maker} makes it again", Action("aside", table.path, files)
    )


def mend_or_move(table: Table, name: str, problem: str, *, afterwards: str, also: tuple[str, ...] = ()) -> Violation:
    """A damaged JSON file in a table's folder.

    Args:
        afterwards: what happens once it was moved aside.
        also: files in the table's folder and in that of its rejects, relative to the dataset, that are of no use without it.
    """
    file = f"{table.path}/{name}"
    if mend(read_file(f"{table.uri}/{name}")) is not None:
        return Violation(file, problem, f"one bit was flipped, {REPAIR} mends it", Action("mend", table.path, (file,)))
    return Violation(
        file, problem, f"put it back, or {REPAIR} moves it aside: {afterwards}", Action("aside", table.path, (file, *also))
    )


def recount(table: Table, problem: str) -> Violation:
    """A manifest whose counts are not those of the shards, which are whole."""
    file = f"{table.path}/{MANIFEST}"
    maker = MADE_BY[table.path.split("/")[0]]
    return Violation(file, problem, f"{REPAIR} lets jobs.{maker} count anew", Action("recount", table.path, (file,)))
