"""Near duplicates by perceptual hash: images whose 64-bit hashes differ in a few bits.

How it grows: the driver holds about 110 bytes for each image (measured at a million; 11 GB for 100 million), every node 8.
Pairs are sought in bands: hashes that differ in at most d bits agree in one of d + 1 parts of their bits, so only hashes that
agree in a part are compared, about N^2 (d + 1) / 2^(64 / (d + 1) + 1) of them: at d = 3, 30 million for a million images (3 s
on one core, sorting included), and 10,000 times as many for 100 million, spread over tasks.
"""

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipelines.score.config import DuplicatesConfig
from pipelines.score.verdicts import Known, Verdicts, settle
from pipelines.tables.table import Table

HASH_BITS = 64
INFORMATIVE = (8, 56)  # bits set; fewer or more say that an image is nearly plain, and not what is on it
SHARDS_PER_TASK = 64
ROWS_PER_TASK = 2_000_000
PAIRS_AT_ONCE = 4_000_000
FindPairs = Callable[[np.ndarray, int], Iterator[tuple[np.ndarray, np.ndarray]]]
MIX = np.uint64(0x9E3779B97F4A7C15)  # odd: times this, the high bits depend on all bits


def decide_by_hash(images: Table, output: Table, config: DuplicatesConfig, older: list[str], generation: list[str]) -> Verdicts:
    """The verdicts on the images of a generation, with its reading and its search spread over Ray tasks.

    Args:
        output: the table of verdicts, which has the shards `older`.
    """
    collect = ray.remote(num_cpus=0.25)(_collect)
    old = [collect.remote(images, output, older[start : start + SHARDS_PER_TASK]) for start in _steps(older)]
    new = [collect.remote(images, None, generation[start : start + SHARDS_PER_TASK]) for start in _steps(generation)]
    parts = [ray.get(part) for part in [*old, *new]]
    positions, hashes, pixels = (np.concatenate([part[column] for part in parts]) for column in range(3))
    num_old = sum(len(part[0]) for part in parts[: len(old)])
    known = Known(positions, pixels, np.arange(len(positions)) >= num_old)
    return decide(known, hashes, config.max_distance, _find_pairs)


def decide(known: Known, hashes: np.ndarray, max_distance: int, find_pairs: FindPairs) -> Verdicts:
    """Decide which images are duplicates, and of which image.

    Args:
        hashes: (N,) uint64, of the images.
        find_pairs: takes unique hashes and `max_distance`, and yields what `near_pairs` does.
    """
    unique, first, inverse, positions = _rank(known, hashes)
    parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64)), *find_pairs(unique, max_distance)]
    one, other = (np.concatenate(ends) for ends in zip(*parts, strict=True))
    twins, scores = settle(first, one, other, 1 - np.bitwise_count(unique[one] ^ unique[other]) / np.float32(HASH_BITS))
    best = first[twins[inverse]]  # the rank of what stands for each
    found = np.flatnonzero(best != np.arange(len(positions)))
    return Verdicts.make(positions[found], positions[best[found]], scores[inverse[found]])


def _rank(known: Known, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Unique hashes, the rank of the best image of each, the unique hash of each rank, and positions by rank."""
    order = known.by_rank()
    bits = np.bitwise_count(hashes[order])
    order = order[(bits >= INFORMATIVE[0]) & (bits <= INFORMATIVE[1])]
    unique, first, inverse = np.unique(hashes[order], return_index=True, return_inverse=True)
    return unique, first, inverse, known.positions[order]


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
