"""The plan says which samples of a source belong to which shard. It is kept in `images/_sources.json`, and only extended.

A later run with more files at the source appends shards; it never renames or repeats one. A file that was deleted or changed
matters only to shards that are not made yet.
"""

import hashlib
import json
import pickle
from collections import Counter, defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from pipelines.ingest.config import Kind
from pipelines.ingest.download import retryable_reasons
from pipelines.ingest.lists import slice_lists
from pipelines.ingest.memory import SHARD_FULL
from pipelines.ingest.not_taken import NO_IMAGE
from pipelines.ingest.readers import NUM_THREADS, count_samples
from pipelines.ingest.sources import Part, Source, find_parts
from pipelines.storage.lease import Ticket
from pipelines.tables.table import Table
from sana_model.files.redact import redact_uri

PLAN = "_sources.json"
MAX_SHARDS = 100_000  # names have five digits
SHARDS_PER_PIECE = 16  # a task fetches one piece for its shard; 100,000 shards make few enough pieces


@dataclass(frozen=True, kw_only=True)
class ShardSize:
    """The largest number of rows, and of bytes of image files, in a shard of `images` (and so of every table)."""

    rows: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """The parts of files that make each shard. `retried`: shards whose failed downloads were planned again as new shards."""

    kind: Kind
    first_listing: str
    """Hash of the files that the plan began with. Shards of plans that began differently hold different images."""
    shards: dict[str, list[Part]]
    retried: tuple[str, ...] = ()


class SharedPlan:
    """The parts of some shards, for tasks on any machine. They lie in Ray's object store in pieces, so that a task that reads
    one shard does not receive the whole plan, which may name millions of files.
    """

    def __init__(self, shards: Mapping[str, list[Part]]):
        import ray

        pieces: defaultdict[int, dict[str, bytes]] = defaultdict(dict)
        for shard, parts in shards.items():
            pieces[int(shard) // SHARDS_PER_PIECE][shard] = pickle.dumps(parts)
        self.pieces = {number: ray.put(piece) for number, piece in pieces.items()}

    def __call__(self, shard: str) -> list[Part]:
        import ray

        return pickle.loads(ray.get(self.pieces[int(shard) // SHARDS_PER_PIECE])[shard])


def read_plan(images: Table) -> Plan | None:
    """Read the plan of a dataset; None if it has none. Raises DamagedFileError."""
    try:
        return images.read_json(PLAN, to_plan)
    except FileNotFoundError:
        return None


def to_plan(content: dict[str, Any]) -> Plan:
    """The plan from the content of its file. Raises ValueError, KeyError or TypeError if it is none, or has lost a shard."""
    shards = {shard: [_read_part(part) for part in parts] for shard, parts in content["shards"].items()}
    if lost := next((name for number, shard in enumerate(shards) if (name := f"{number:05}") != shard), None):
        raise ValueError(f"it plans {len(shards)} shards, and not shard {lost}")
    return Plan(content["kind"], content["first_listing"], shards, tuple(content["retried"]))


def write_plan(images: Table, plan: Plan, ticket: Ticket | None) -> None:
    """Raises as `Table.write_json`. `ticket`: of the lease of the images."""
    images.write_json(PLAN, asdict(plan), indent=None, ticket=ticket)


def extend_plan(plan: Plan | None, source: Source, size: ShardSize, exclude: str, ticket: Ticket) -> tuple[Plan, Counter[str]]:
    """Append shards for the files at the source that the plan does not know yet, whose samples are counted for it.

    Returns the plan, and how many files of the source are not taken, by kind.

    Args:
        ticket: of the lease of the images, into whose folder lists are copied.

    Raises ValueError if there would be too many shards.
    """
    known = {part.path for parts in plan.shards.values() for part in parts} if plan else set()
    found, not_taken = find_parts(source, exclude, known)
    new = [part for part in found if part.path not in known]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        counts = list(pool.map(partial(count_samples, source, ticket=ticket), new))
    if empty := counts.count(0):
        not_taken[NO_IMAGE] += empty
    plan = plan or Plan(source.kind, _hash_listing(new), {})
    return _append(plan, pack(new, counts, size)), not_taken


def plan_retries(plan: Plan, source: Source, images: Table, size: ShardSize) -> Plan:
    """Append shards for the images that finished shards could not download, for reasons that may have passed.

    Existing shards stay as they are, and so do the tables that are aligned to them. Where a shard was full, the new ones are
    planned with as many rows as it had room for.
    """
    done = [shard for shard in images.list_shards() if shard in plan.shards and shard not in plan.retried]
    reasons = retryable_reasons(source.download)
    rows_per_shard = size.rows
    refused: dict[Part, set[str]] = {}
    for shard in done:
        rejects = images.rejects().read_shard(shard, ["source_uri", "reject_reason"]).to_pylist()
        if uris := {row["source_uri"] for row in rejects if row["reject_reason"] in reasons}:
            refused |= dict.fromkeys(plan.shards[shard], uris)
        if any(row["reject_reason"] == SHARD_FULL for row in rejects):
            rows_per_shard = min(rows_per_shard, max(images.read_facts(shard).num_rows, 1))
    failed = [
        replace(part, start=index, stop=index + 1)
        for part, index, row in slice_lists(source, refused)
        if row["url"] and redact_uri(source.resolve(part.path, row["url"])) in refused[part]
    ]
    packed = [failed[start : start + rows_per_shard] for start in range(0, len(failed), rows_per_shard)]
    return replace(_append(plan, packed), retried=(*plan.retried, *done))


def _append(plan: Plan, new: list[list[Part]]) -> Plan:
    shards = dict(plan.shards)
    for parts in new:
        shards[f"{len(shards):05}"] = parts
    if len(shards) > MAX_SHARDS:
        raise ValueError(f"{len(shards)} shards are more than {MAX_SHARDS}: raise rows_per_shard and bytes_per_shard")
    return replace(plan, shards=shards)


def pack(parts: list[Part], counts: list[int | None], size: ShardSize) -> list[list[Part]]:
    """Fill shards with whole files or slices of them, in order. A file that could not be counted gets its own shard."""
    shards: list[list[Part]] = []
    rows, filled = size.rows, size.bytes  # of the last shard; full at first, so that a shard is begun
    for part, count in zip(parts, counts, strict=True):
        if count is None:
            shards.append([part])
            rows = size.rows
            continue
        start = 0
        while start < count:
            row_size = max(part.size // count, 1)
            if rows >= size.rows or filled + row_size > size.bytes:
                shards.append([])
                rows = filled = 0
            fitting = max((size.bytes - filled) // row_size, 1)
            stop = min(start + min(size.rows - rows, fitting), count)
            shards[-1].append(replace(part, start=start, stop=None if stop == count else stop))
            rows, filled, start = rows + stop - start, filled + (stop - start) * row_size, stop
    return shards


def _hash_listing(parts: list[Part]) -> str:
    return hashlib.sha256(json.dumps([asdict(part) for part in parts]).encode()).hexdigest()[:16]


def _read_part(part: dict[str, Any]) -> Part:
    return Part(**part | {"sidecars": tuple(part["sidecars"])})
