"""Near duplicates by CLIP embedding: images whose unit vectors have at least some cosine.

Up to EXACT_ROWS images are all compared with each other. More are put into K = sqrt(N) clusters: k-means on a sample finds
their centres, every image is in the clusters of its nearest and its second nearest centre, and only images that share a
cluster are compared, exactly.

How it grows, with N embeddings of w numbers (measured at 25,000, 50,000 and 100,000 of 512):
- Time grows as N^1.5: N K products with the centres, and I (2 N)^2 / (2 K) within clusters, where I = 1.6 says how much more
  clusters of unequal size cost. One core computes 50 and 30 billion operations a second of the 2 w of each product: 5 s for
  100,000, and by the formula about 40 core hours for 100 million, spread over tasks of one core. A cluster of M images costs
  M^2 / 2 products in one task, however alike they are: three hours for a million copies.
- The driver holds 96 bytes for each image at its peak (measured at a million; 10 GB for 100 million) and 20 for each pair.
  No embedding passes through it.
- Embeddings pass through Ray's object store once, 2 (2 w + 12) bytes for each image (200 MiB for 100,000; 207 GB for 100
  million, over all nodes): what has no place in its memory Ray puts on the nodes' disks. A task holds ROWS_PER_TASK embeddings,
  and for a moment a second copy: 1 GB.
- Of pairs at 0.95 or more all were found among the clusters of `jobs.benchmark duplicates`, and 99.8 % among 50,000 vectors
  that form no clusters at all.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipelines.score.config import SemanticConfig
from pipelines.score.verdicts import Known, Verdicts, settle
from pipelines.tables.table import Table

EXACT_ROWS = 20_000
SAMPLE_PER_CLUSTER = 64  # embeddings that k-means sees; faiss asks for 39 at least
SAMPLED_SHARE = 4  # k-means sees at most every fourth row of a shard: shards may be of one source each
NUM_ITERATIONS = 10
MAX_THREADS = 4  # of k-means; every other task has one
SHARDS_PER_TASK = 64
MIN_ROWS_PER_TASK, ROWS_PER_TASK = 5_000, 500_000
MIN_TASKS = 16
PAIRS_AT_ONCE = 4_000_000
MIN_HEIGHT = 32  # rows of a cluster that are compared at once with all before them
MAX_PAIRS = 32  # of an image in a cluster, with the best images that it resembles: a thousand copies make no million pairs

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Ranks (P,) int64 of the worse image and of the better one, and their cosine (P,) float32."""


def decide_by_embedding(
    images: Table, embeds: Table, output: Table, config: SemanticConfig, older: list[str], generation: list[str]
) -> Verdicts:
    """The verdicts on the images of a generation, with its reading and its search spread over Ray tasks.

    Args:
        output: the table of verdicts, which has the shards `older`.
    """
    collect = ray.remote(num_cpus=0.25)(_collect)
    old = [collect.remote(images, embeds, output, older[start : start + SHARDS_PER_TASK]) for start in _steps(older)]
    new = [collect.remote(images, embeds, None, generation[start : start + SHARDS_PER_TASK]) for start in _steps(generation)]
    parts = [ray.get(part) for part in [*old, *new]]
    positions, pixels = (np.concatenate([part[column] for part in parts]) for column in range(2))
    num_old = sum(len(part[0]) for part in parts[: len(old)])
    order = Known(positions, pixels, np.arange(len(positions)) >= num_old).by_rank()
    positions = positions[order]
    worse, better, cosines = find_pairs(embeds, positions, num_old, config.min_similarity)
    twins, scores = settle(np.arange(len(positions)), worse, better, cosines)
    found = np.flatnonzero(twins != np.arange(len(positions)))
    return Verdicts.make(positions[found], positions[twins[found]], np.minimum(scores[found], 1))


def find_pairs(embeds: Table, positions: np.ndarray, num_old: int, min_similarity: float) -> Pairs:
    """Pairs of images whose embeddings have a cosine of at least `min_similarity`; a pair may come twice.

    Args:
        positions: (N,) uint64 of the images, from the best to the worst; see `Known`.
        num_old: the first so many images are not compared with each other.
    """
    if not len(positions):
        return _NO_PAIRS
    ranks = np.argsort(positions)
    positions = positions[ranks]
    num_clusters = math.isqrt(len(positions)) if len(positions) > EXACT_ROWS else 1
    centres = ray.put(_find_centres(embeds, positions, num_clusters) if num_clusters > 1 else None)
    rows_at_once = min(max(len(positions) // MIN_TASKS, MIN_ROWS_PER_TASK), ROWS_PER_TASK)
    num_groups = min(max(-(-2 * len(positions) // ROWS_PER_TASK), MIN_TASKS), num_clusters)
    assign: Any = ray.remote(num_cpus=1, num_returns=num_groups + 1)(_assign)
    parts = [
        assign.remote(embeds, positions[start:stop], ranks[start:stop], centres, num_groups)
        for start, stop in _cut(positions, rows_at_once)
    ]
    for part in parts:
        ray.get(part[0])
    search = ray.remote(num_cpus=1)(_search)
    groups = [search.remote([part[1 + group] for part in parts], num_old, min_similarity) for group in range(num_groups)]
    del parts  # Ray lets go of a group's embeddings when its search has ended
    found = [_NO_PAIRS, *(ray.get(group) for group in groups)]
    worse, better, cosines = (np.concatenate(column) for column in zip(*found, strict=True))
    return worse, better, cosines


_NO_PAIRS: Pairs = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))


def _steps(shards: list[str]) -> range:
    return range(0, len(shards), SHARDS_PER_TASK)


def _collect(images: Table, embeds: Table, output: Table | None, shards: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Positions and sizes of the embedded images of some shards; with `output`, without those that are duplicates there."""
    positions, pixels = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for shard in shards:
        ids, known = embeds.read_shard(shard, ["id"])["id"], images.read_shard(shard, ["id", "width", "height"])
        rows = np.arange(len(ids), dtype=np.uint64)
        if output is not None:
            stays = output.read_shard(shard, ["detail"])["detail"].is_null().to_numpy()
            ids, rows = ids.filter(pa.array(stays)), rows[stays]
        places = pc.index_in(ids, value_set=known["id"])
        if places.null_count:
            raise ValueError(
                f"{embeds.shard_uri(shard)} has {places.null_count} images that {images.shard_uri(shard)} lacks: "
                "jobs.verify says which of the two is wrong"
            )
        known = known.take(places)
        positions.append((np.uint64(int(shard)) << np.uint64(32)) + rows)
        pixels.append(pc.multiply(known["width"].cast(pa.int64()), known["height"].cast(pa.int64())).to_numpy())
    return np.concatenate(positions), np.concatenate(pixels)


def _cut(positions: np.ndarray, rows_at_once: int) -> Iterator[tuple[int, int]]:
    """Ranges of sorted positions, each of whole shards, with about so many rows."""
    borders = np.flatnonzero(np.diff(positions >> np.uint64(32), prepend=np.uint64(2**32))).tolist()
    start = 0
    for border in [*borders[1:], len(positions)]:
        if border - start >= rows_at_once or border == len(positions):
            if border > start:
                yield start, border
            start = border


def _read_embeds(embeds: Table, positions: np.ndarray) -> Iterator[np.ndarray]:
    """The embeddings (n, width) float16 of the images at sorted positions, one shard after another.

    Raises ValueError for an embedding whose length is not 1.
    """
    for start, stop in _cut(positions, 1):
        shard = f"{int(positions[start] >> np.uint64(32)):05}"
        table = embeds.read_shard(shard, ["id", "embedding"])
        rows = (positions[start:stop] & np.uint64(2**32 - 1)).astype(np.int64)
        vectors = table["embedding"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)[rows]
        lengths = np.linalg.norm(vectors.astype(np.float32), axis=1)
        wrong = np.flatnonzero(~(np.abs(lengths - 1) < 0.01))  # NaN is wrong too
        if len(wrong):
            row_id = table["id"][int(rows[wrong[0]])]
            raise ValueError(
                f"{embeds.shard_uri(shard)}: the embedding of {row_id} has length {lengths[wrong[0]]:.3f}, and must have 1: "
                "delete the shard, and its stage makes it again"
            )
        yield vectors


def _unit(vectors: np.ndarray) -> np.ndarray:
    """float32 vectors of length 1: float16 is off by up to 0.0005."""
    vectors = vectors.astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _find_centres(embeds: Table, positions: np.ndarray, num_clusters: int) -> np.ndarray:
    """Centres (num_clusters, width) of the clusters, by k-means on a sample that is spread over many shards."""
    generator = np.random.default_rng(0)
    size = min(num_clusters * SAMPLE_PER_CLUSTER, len(positions))
    shards = list(_cut(positions, 1))
    num_shards = min(-(-size * SAMPLED_SHARE * len(shards) // len(positions)), len(shards))
    chosen = np.sort(generator.choice(len(shards), num_shards, replace=False)).tolist()
    rows = np.concatenate([np.arange(*shards[index]) for index in chosen])
    rows = np.sort(generator.choice(rows, min(size, len(rows)), replace=False))
    read = ray.remote(num_cpus=0.25)(_read_sample)
    step = -(-len(rows) // MIN_TASKS)
    parts = [read.remote(embeds, positions[rows[start : start + step]]) for start in range(0, len(rows), step)]
    ray.wait(parts, num_returns=len(parts), fetch_local=False)
    most_cpus = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
    threads = min(max(most_cpus, 1), MAX_THREADS)
    return ray.get(ray.remote(num_cpus=threads)(_train).remote(parts, num_clusters, threads))


def _read_sample(embeds: Table, positions: np.ndarray) -> np.ndarray:
    return np.concatenate(list(_read_embeds(embeds, positions)))


def _train(parts: list[Any], num_clusters: int, threads: int) -> np.ndarray:
    import faiss

    faiss.omp_set_num_threads(threads)
    sample = _unit(np.concatenate(ray.get(parts)))
    kmeans = faiss.Kmeans(
        sample.shape[1], num_clusters, niter=NUM_ITERATIONS, spherical=True, seed=0, min_points_per_centroid=1
    )
    kmeans.train(sample)
    return np.asarray(kmeans.centroids)


def _assign(
    embeds: Table, positions: np.ndarray, ranks: np.ndarray, centres: np.ndarray | None, num_groups: int
) -> Iterator[Any]:
    """Yield 0 when all is read, and then for each group of clusters (ranks, clusters, float16 embeddings) of its images."""
    import faiss

    faiss.omp_set_num_threads(1)
    vectors, clusters = [], []
    if centres is not None:
        index = faiss.IndexFlatIP(centres.shape[1])
        index.add(centres)
    for part in _read_embeds(embeds, positions):
        vectors.append(part)
        clusters.append(np.zeros((len(part), 1), np.int64) if centres is None else index.search(_unit(part), 2)[1])
    yield 0
    rows, nearest = np.concatenate(vectors), np.concatenate(clusters).astype(np.int32)
    for group in range(num_groups):
        chosen, column = np.nonzero(nearest % num_groups == group)
        yield ranks[chosen], nearest[chosen, column], rows[chosen]


def _search(parts: list[Any], num_old: int, min_similarity: float) -> Pairs:
    """The pairs in a group of clusters."""
    ranks, clusters, rows = (np.concatenate(column) for column in zip(*(ray.get(part) for part in parts), strict=True))
    order = np.lexsort((ranks, clusters))
    borders = np.flatnonzero(np.diff(clusters[order], prepend=-1, append=-1)).tolist()
    found = [_NO_PAIRS]
    for start, stop in pairwise(borders):
        members = order[start:stop]
        if ranks[members[-1]] >= num_old:
            found += _pairs_of_cluster(ranks[members], rows[members], num_old, min_similarity)
    worse, better, cosines = (np.concatenate(column) for column in zip(*found, strict=True))
    return worse, better, cosines


def _pairs_of_cluster(ranks: np.ndarray, rows: np.ndarray, num_old: int, min_similarity: float) -> Iterator[Pairs]:
    """Compare every new image of a cluster with all that are better. `ranks` are sorted."""
    import faiss

    faiss.omp_set_num_threads(1)
    threshold = float(np.nextafter(np.float32(min_similarity), np.float32(0)))  # faiss wants more than this
    index = faiss.IndexFlatIP(rows.shape[1])
    height = max(PAIRS_AT_ONCE // len(ranks), MIN_HEIGHT)
    for top in range(0, len(ranks), height):
        block = _unit(rows[top : top + height])
        index.add(block)
        first = int(np.searchsorted(ranks[top : top + height], num_old))
        if first == len(block):
            continue
        limits, cosines, better = index.range_search(block[first:], threshold)
        worse = np.repeat(np.arange(top + first, top + len(block)), limits[1:].astype(np.int64) - limits[:-1].astype(np.int64))
        upper = better < worse
        worse, better, cosines = worse[upper], better[upper], cosines[upper]
        order = np.lexsort((better, worse))
        worse, better, cosines = worse[order], better[order], cosines[order]
        kept = np.arange(len(worse)) - np.searchsorted(worse, worse) < MAX_PAIRS
        yield ranks[worse[kept]], ranks[better[kept]], cosines[kept]
