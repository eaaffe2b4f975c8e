"""Compares what was read: a shard with its input, a table with its manifest, the shards of the images with each other."""

from collections import Counter
from collections.abc import Iterable, Iterator

import pyarrow as pa

from pipelines.audit.seen_ids import SeenIds
from pipelines.audit.violations import Violation, file_of, recount, remake
from pipelines.ingest.plan import PLAN
from pipelines.tables.identity import MANIFEST, Manifest
from pipelines.tables.table import Table


def check_ids(table: Table, shard: str, kept: set[str], refused: set[str], given: set[str], source: str) -> Iterator[Violation]:
    """Compare the ids of a shard with those of the shard that it was made from.

    Args:
        kept, refused: ids in the shard and in its rejects.
        given: ids in the same shard of the table `source`.
    """
    file = file_of(table, shard)
    if lost := given - kept - refused:
        yield remake(table, shard, file, f"lacks {some(lost)} of {source}, which its rejects lack too")
    if alien := (kept | refused) - given:
        yield remake(table, shard, file, f"or its rejects hold {some(alien)} that {source} has not in this shard")
    if both := kept & refused:
        yield remake(table, shard, file, f"holds {some(both)}, refused at the same time")


def check_counts(
    table: Table, manifest: Manifest, names: list[str], num_rows: int, reasons: Counter[str]
) -> Iterator[Violation]:
    """Compare the manifest of a table whose shards are all whole with what was counted."""
    if len(names) != manifest.num_shards:
        problem = f"tells of {manifest.num_shards:,} shards, there are {len(names):,}"
        yield Violation(f"{table.path}/{MANIFEST}", problem, "run its stage again: it makes what is missing, and counts anew")
        return
    pairs = [
        ("rows", manifest.num_rows, num_rows),
        ("rejects", manifest.num_rejects, reasons.total()),
        *(
            (f"rejects for {name}", manifest.rejects_by_reason.get(name, 0), reasons[name])
            for name in sorted(manifest.rejects_by_reason.keys() | reasons.keys())
        ),
    ]
    if manifest.num_bytes is not None:
        pairs.append(("bytes", manifest.num_bytes, table.count_bytes(names)))
    for what, told, read in pairs:
        if told != read:
            yield recount(table, f"tells of {told:,} {what}, there are {read:,}")


def find_duplicates(images: Table, seen: SeenIds, bad: set[str]) -> Iterator[Violation]:
    """Ids that occur in more than one shard.

    Of sealed shards the later one is made again, which refuses the image. One of two shards of an earlier version may be a copy
    of the other, and nothing says which: both are added to `bad`, so that no other table is blamed for what it has not.
    """
    for head, shards in seen.suspects():
        first: dict[str, str] = {}
        for shard in shards:
            ids = {row_id for row_id in images.read_shard(shard, ["id"])["id"].to_pylist() if row_id.startswith(head)}
            for row_id in ids & first.keys():
                file, other = file_of(images, shard), file_of(images, first[row_id])
                problem = f"holds {row_id[:16]}… which {other.rpartition('/')[2]} holds too"
                bad.update((file, other))
                if images.is_sealed(shard) and images.is_sealed(first[row_id]):
                    yield remake(images, shard, file, problem)
                else:
                    yield Violation(
                        file, problem, f"see by source_uri and {PLAN} which of the two is right, and move the other away"
                    )
            first = dict.fromkeys(ids, shard) | first


def difference(found: pa.Schema, wanted: pa.Schema) -> str:
    """How the columns of a file differ from those of its table."""
    here, there = ({one.name: str(one) for one in schema} for schema in (found, wanted))
    names = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    differences = [f"{here.get(name, f'no {name}')} in place of {there.get(name, 'nothing')}" for name in names]
    return ", ".join(differences) or "in another order"


def some(ids: Iterable[object], limit: int = 3) -> str:
    """The number of ids, and the first few of them, as text."""
    listed = sorted(" of ".join(row_id) if isinstance(row_id, tuple) else str(row_id) for row_id in ids)
    shown = ", ".join(row_id if len(row_id) <= 16 else f"{row_id[:16]}…" for row_id in listed[:limit])
    more = f" and {len(listed) - limit:,} more" if len(listed) > limit else ""
    return f"{len(listed):,} id{'s' * (len(listed) != 1)} ({shown}{more})"
