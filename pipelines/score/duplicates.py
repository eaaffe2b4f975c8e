"""Near duplicates: images that look alike, found by their perceptual hashes across the whole dataset.

Of images within `max_distance` bits of each other the best stays (the largest, then the first); every other is within that
distance of one that stays. Nothing is deleted: the table `image_scores/near_duplicates` has for each image the share of bits
that it has in common with the image that stands for it, and 0 for one that stays. Where images are read, a filter on it (at
most 0.5) leaves the others out.

The images of an earlier run keep their verdict: a new image that resembles one of them is its duplicate, whatever its size. So
shards are written once, and what a run decides about is noted before it begins.

How it grows: the driver holds about 110 bytes for each image (measured at a million; 11 GB for 100 million), every node 8.
Pairs are sought in bands: hashes that differ in at most d bits agree in one of d + 1 parts of their bits, so only hashes that
agree in a part are compared, about N^2 (d + 1) / 2^(64 / (d + 1) + 1) of them: at d = 3, 30 million for a million images (3 s
on one core, sorting included), and 10,000 times as many for 100 million, spread over tasks.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipelines.score.config import NEAR_DUPLICATES, DuplicatesConfig
from pipelines.stages.contract import OnProgress, ShardOutput, StageResult
from pipelines.stages.run import run_shards
from pipelines.storage.files import read_file
from pipelines.storage.lease import Leases, shared
from pipelines.tables.errors import MissingTableError
from pipelines.tables.identity import Identity, value_settings
from pipelines.tables.schema import IMAGE_SCORES, IMAGES, IMAGES_PATH, image_scores_path
from pipelines.tables.table import Table

GENERATIONS = "_generations.json"
HASH_BITS = 64
INFORMATIVE = (8, 56)  # bits set; fewer or more say that an image is nearly plain, and not what is on it
SHARDS_PER_TASK = 64
ROWS_PER_TASK = 2_000_000
PAIRS_AT_ONCE = 4_000_000
MIX = np.uint64(0x9E3779B97F4A7C15)  # odd: times this, the high bits depend on all bits


@dataclass(frozen=True)
class Hashes:
    """Hashes and sizes of many images; a position is shard number * 2^32 + row."""

    positions: np.ndarray  # (N,) uint64
    hashes: np.ndarray  # (N,) uint64
    pixels: np.ndarray  # (N,) int64
    is_new: np.ndarray  # (N,) bool


@dataclass(frozen=True)
class Verdicts:
    """The images that another stands for, by position."""

    positions: np.ndarray  # (M,) uint64, sorted
    twins: np.ndarray  # (M,) uint64, positions
    distances: np.ndarray  # (M,) int32


def run_duplicates(
    dataset_uri: str, config: DuplicatesConfig, *, on_progress: OnProgress = lambda _: None, leases: Leases | None = None
) -> StageResult:
    """Find for every image the image that stands for it, if any, and write `image_scores/near_duplicates`.

    Raises as `run_shards`, and MissingTableError if there are no images.
    """
    images = Table(dataset_uri, IMAGES_PATH, IMAGES)
    output = Table(dataset_uri, image_scores_path(NEAR_DUPLICATES), IMAGE_SCORES)
    identity = Identity("duplicates", value_settings(config), models={}, inputs={IMAGES_PATH: images.require().fingerprint})
    with shared(leases) as held:
        held.take(output.uri)  # before the run notes which shards it decides about
        output.claim(identity)
        generations = _plan_generations(images, output)
        found = set(output.list_shards())
        result: StageResult | None = None
        older: list[str] = []
        for generation in generations:
            shards = [*older, *generation]
            done = set(output.list_shards())
            is_last = generation is generations[-1]
            if is_last or not done.issuperset(generation):
                missing = not done.issuperset(shards)
                verdicts = ray.put(_decide_generation(images, output, older, generation, config)) if missing else None
                result = run_shards(
                    output,
                    identity,
                    shards,
                    read_shard=partial(_read_verdicts, images, verdicts),
                    make_worker=DuplicatesWorker,
                    resources=config.resources,
                    max_reject_share=0.0,
                    on_progress=on_progress,
                    leases=held,
                )
            older = shards
        if result is None:
            raise MissingTableError(f"{images.uri} holds no shard yet: run ingest first")
        return replace(result, found_shards=len(found.intersection(older)))


class DuplicatesWorker:
    """Passes the verdicts on and counts them."""

    def process(self, table: pa.Table) -> ShardOutput:
        return ShardOutput(table, [], {"duplicates": float(table.num_rows - table["detail"].null_count)})


def decide(known: Hashes, max_distance: int, pairs: Iterator[tuple[np.ndarray, np.ndarray]] | None = None) -> Verdicts:
    """Decide which images are duplicates, and of which image.

    Args:
        pairs: of unique hashes at most `max_distance` apart, as `near_pairs` gives them; sought here unless given.
    """
    unique, first, inverse, positions = _rank(known)
    kept, twin = np.ones(len(unique), bool), np.arange(len(unique))
    for later, earlier in _by_rank(unique, first, near_pairs(unique, max_distance) if pairs is None else pairs):
        if kept[later] and kept[earlier]:
            kept[later], twin[later] = False, earlier
    best = first[twin[inverse]]  # the rank of what stands for each
    is_duplicate = best != np.arange(len(positions))
    distances = np.bitwise_count(unique[inverse] ^ unique[twin[inverse]]).astype(np.int32)
    found = np.flatnonzero(is_duplicate)
    found = found[np.argsort(positions[found])]
    return Verdicts(positions[found], positions[best[found]], distances[found])


def _rank(known: Hashes) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Unique hashes, the rank of the best image of each, the unique hash of each rank, and positions by rank."""
    bits = np.bitwise_count(known.hashes)
    telling = np.flatnonzero((bits >= INFORMATIVE[0]) & (bits <= INFORMATIVE[1]))
    order = telling[np.lexsort((known.positions[telling], -known.pixels[telling], known.is_new[telling]))]
    unique, first, inverse = np.unique(known.hashes[order], return_index=True, return_inverse=True)
    return unique, first, inverse, known.positions[order]


def _by_rank(
    unique: np.ndarray, first: np.ndarray, pairs: Iterator[tuple[np.ndarray, np.ndarray]]
) -> Iterator[tuple[int, int]]:
    """Pairs as (worse, better): by the rank of the worse, then the nearest, then the best."""
    parts = list(pairs)
    if not parts:
        return
    one, other = (np.concatenate(ends) for ends in zip(*parts, strict=True))
    is_worse = first[one] > first[other]
    worse, better = np.where(is_worse, one, other), np.where(is_worse, other, one)
    order = np.lexsort((first[better], np.bitwise_count(unique[worse] ^ unique[better]), first[worse]))
    yield from zip(worse[order].tolist(), better[order].tolist(), strict=True)


def near_pairs(unique: np.ndarray, max_distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices of all pairs of different hashes (N,) at most `max_distance` bits apart, each pair once, in parts."""
    for band in range(max_distance + 1 if max_distance else 0):
        yield from _pairs_of_band(unique, np.arange(len(unique)), band, max_distance)


def _pairs_of_band(
    unique: np.ndarray, rows: np.ndarray, band: int, max_distance: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The pairs of hashes in `rows` that agree in this band and in none before it."""
    masks = band_masks(max_distance + 1)
    keys = unique[rows] & masks[band]
    order = np.argsort(keys, kind="stable")
    rows, keys = rows[order], keys[order]
    hashes = unique[rows]
    borders = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1], [True]))) if len(keys) else np.zeros(1, int)
    for start, stop in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        if stop - start < 2:
            continue
        height = max(PAIRS_AT_ONCE // (stop - start), 1)
        for top in range(start, stop, height):
            differences = hashes[top : min(top + height, stop), None] ^ hashes[None, top:stop]
            below, right = np.nonzero(np.bitwise_count(differences) <= max_distance)
            upper = right > below
            below, right = below[upper], right[upper]
            bits = differences[below, right]
            new = np.all([bits & masks[earlier] != 0 for earlier in range(band)], axis=0) if band else np.ones(len(bits), bool)
            if new.any():
                yield rows[top + below[new]], rows[top + right[new]]


def band_masks(num_bands: int) -> np.ndarray:
    """Every num_bands-th bit: the low frequencies, which differ least, are spread over all bands."""
    return np.array([sum(1 << bit for bit in range(band, 64, num_bands)) for band in range(num_bands)], np.uint64)


def _decide_generation(
    images: Table, output: Table, older: list[str], generation: list[str], config: DuplicatesConfig
) -> Verdicts:
    """The verdicts on the images of a generation, with its reading and its search spread over Ray tasks."""
    collect = ray.remote(num_cpus=0.25)(_collect)
    old = [collect.remote(images, output, older[start : start + SHARDS_PER_TASK]) for start in _steps(older)]
    new = [collect.remote(images, None, generation[start : start + SHARDS_PER_TASK]) for start in _steps(generation)]
    parts = [ray.get(part) for part in [*old, *new]]
    positions, hashes, pixels = (np.concatenate([part[column] for part in parts]) for column in range(3))
    num_old = sum(len(part[0]) for part in parts[: len(old)])
    known = Hashes(positions, hashes, pixels, np.arange(len(positions)) >= num_old)
    unique = _rank(known)[0]
    return decide(known, config.max_distance, _find_pairs(unique, config.max_distance))


def _steps(shards: list[str]) -> range:
    return range(0, len(shards), SHARDS_PER_TASK)


def _collect(images: Table, output: Table | None, shards: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions, hashes and sizes of the images of some shards; with `output`, without those that are duplicates there."""
    positions, hashes, pixels = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for shard in shards:
        table = images.read_shard(shard, ["phash", "width", "height"])
        rows = np.arange(table.num_rows, dtype=np.uint64)
        if output is not None:
            stays = output.read_shard(shard, ["detail"])["detail"].is_null().to_numpy()
            table, rows = table.filter(pa.array(stays)), rows[stays]
        positions.append((np.uint64(int(shard)) << np.uint64(32)) + rows)
        hashes.append(np.frombuffer(bytes.fromhex("".join(table["phash"].to_pylist())), ">u8").astype(np.uint64))
        pixels.append(pc.multiply(table["width"].cast(pa.int64()), table["height"].cast(pa.int64())).to_numpy())
    return np.concatenate(positions), np.concatenate(hashes), np.concatenate(pixels)


def _find_pairs(unique: np.ndarray, max_distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`near_pairs`, over Ray tasks: each compares the hashes of a part of a band."""
    num_parts = -(-len(unique) // ROWS_PER_TASK)
    shared = ray.put(unique)
    search = ray.remote(num_cpus=1)(_search)
    bands = range(max_distance + 1 if max_distance else 0)
    tasks = [search.remote(shared, band, part, num_parts, max_distance) for band in bands for part in range(num_parts)]
    for task in tasks:
        yield from ray.get(task)


def _search(unique: np.ndarray, band: int, part: int, num_parts: int, max_distance: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Selects its rows in slices: at no time is there a second copy of all hashes."""
    mask = band_masks(max_distance + 1)[band]
    rows = [np.zeros(0, np.int64)]
    for start in range(0, len(unique), ROWS_PER_TASK):
        keys = (unique[start : start + ROWS_PER_TASK] & mask) * MIX >> np.uint64(32)
        rows.append(np.flatnonzero(keys % np.uint64(num_parts) == part) + start)
    return list(_pairs_of_band(unique, np.concatenate(rows), band, max_distance))


def _read_verdicts(images: Table, verdicts: Any, shard: str) -> pa.Table:
    """A shard of IMAGE_SCORES."""
    ids = images.read_shard(shard, ["id"])["id"].to_pylist()
    found: Verdicts = ray.get(verdicts)
    first = np.uint64(int(shard)) << np.uint64(32)
    low, high = np.searchsorted(found.positions, [first, first + np.uint64(2**32 - 1)])
    rows, twins = (found.positions[low:high] - first).tolist(), found.twins[low:high]
    numbers, places = (twins >> np.uint64(32)).tolist(), (twins & np.uint64(2**32 - 1)).tolist()
    twin_ids = {number: images.read_shard(f"{number:05}", ["id"])["id"] for number in sorted(set(numbers))}
    scores, details = np.zeros(len(ids), np.float32), np.full(len(ids), None)
    scores[rows] = 1 - found.distances[low:high] / HASH_BITS
    for row, number, place in zip(rows, numbers, places, strict=True):
        details[row] = f"{number:05}/{twin_ids[number][place]}"
    return pa.table({"id": ids, "score": scores, "detail": pa.array(details, pa.string())}, IMAGE_SCORES)


def _plan_generations(images: Table, output: Table) -> list[list[str]]:
    """The shards that were there when each run began: each generation is decided as a whole, whatever is killed."""
    try:
        generations: list[list[str]] = json.loads(read_file(f"{output.uri}/{GENERATIONS}"))
    except FileNotFoundError:
        generations = []
    known = {shard for generation in generations for shard in generation}
    if new := [shard for shard in images.list_shards() if shard not in known]:
        generations.append(new)
        output.write_file(GENERATIONS, json.dumps(generations).encode())
    return generations
