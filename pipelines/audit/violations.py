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


def maker_of(table: Table) -> str:
    """The job that makes a table, or the jobs that may have made it."""
    return f"jobs.{MADE_BY[table.path.split('/')[0]]}"


def move(table: Table, files: tuple[str, ...], file: str, problem: str, *, afterwards: str = "") -> Violation:
    """Files that are of no use as they are.

    Args:
        files: all that is moved aside. file: the one of them that is bad.
        afterwards: what happens then.
    """
    return Violation(file, problem, f"{REPAIR} moves it aside{afterwards}", Action("aside", table.path, files))


def remake(table: Table, shard: str, file: str, problem: str) -> Violation:
    """A shard that its stage has to make again, with its rejects. `file`: the one of the two that is bad."""
    files = (file_of(table, shard), file_of(table.rejects(), shard))
    return move(table, files, file, problem, afterwards=f", and {maker_of(table)} makes it again")


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
    return Violation(file, problem, f"{REPAIR} lets {maker_of(table)} count anew", Action("recount", table.path, (file,)))
