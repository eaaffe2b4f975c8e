"""Which images stay, and which image stands for each of the others: decided from pairs of images that look alike."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.tables.sealed import SealedFile, write_sealed

GENERATIONS = "_generations.json"
VERDICTS = "_verdicts-{:05}"  # by the number of the generation
PAIRS_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class Known:
    """The images about which a run decides, and the older ones that stay. A position is shard number * 2^32 + row."""

    positions: np.ndarray  # (N,) uint64
    pixels: np.ndarray  # (N,) int64
    is_new: np.ndarray  # (N,) bool

    def by_rank(self) -> np.ndarray:
        """Indices (N,) from the best image to the worst: older images first, then the largest, then the first."""
        return np.lexsort((self.positions, -self.pixels, self.is_new))


@dataclass(frozen=True)
class Verdicts:
    """The images for which another one stands."""

    positions: np.ndarray  # (M,) uint64, sorted
    twins: np.ndarray  # (M,) uint64: the position of the image that stands for each
    scores: np.ndarray  # (M,) float32: how alike the two are; 1: the same

    @classmethod
    def make(cls, positions: np.ndarray, twins: np.ndarray, scores: np.ndarray) -> "Verdicts":
        """Verdicts from rows in any order."""
        order = np.argsort(positions)
        return cls(positions[order], twins[order], scores[order].astype(np.float32))

    def to_bytes(self, folder: str, name: str) -> memoryview:
        """A sealed Parquet file, to be written as `name` in `folder`."""
        columns = {"position": self.positions, "twin": self.twins, "score": self.scores}
        return write_sealed(pa.table(columns), PAIRS_AT_ONCE, folder=folder, name=name)

    @classmethod
    def from_bytes(cls, content: bytes, folder: str, name: str) -> "Verdicts":
        """The inverse of `to_bytes`. Raises pyarrow.ArrowException, OSError or ValueError for damaged content."""
        table = SealedFile(io.BytesIO(content), folder=folder, name=name).read()
        return cls(*(table[name].to_numpy() for name in ("position", "twin", "score")))


def settle(ranks: np.ndarray, one: np.ndarray, other: np.ndarray, likeness: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Decide which of N items stay, and which of these stands for each of the others.

    Items are judged from the best to the worst. One stays unless it is paired with an item that stays and is better; of
    several such items the most alike stands for it, and of equally alike ones the best.

    Args:
        ranks: (N,) of the items, all different; a lower rank is better.
        one: (P,) an item of each pair. A pair may occur twice.
        other: (P,) the other item of each pair.
        likeness: (P,) of the two items; more is more alike.

    Returns:
        twins: (N,) int64, the item that stands for each; its own index for one that stays.
        scores: (N,) float32, the likeness of each item and its twin; 1 for one that stays.
    """
    is_worse = ranks[one] > ranks[other]
    worse, better = np.where(is_worse, one, other), np.where(is_worse, other, one)
    order = np.lexsort((ranks[better], -likeness, ranks[worse]))
    twins, scores = np.arange(len(ranks)), np.ones(len(ranks), np.float32)
    stays = bytearray(b"\1") * len(ranks)
    for start in range(0, len(order), PAIRS_AT_ONCE):  # Python's integers take four times the memory
        part = order[start : start + PAIRS_AT_ONCE]
        for pair, low, high in zip(part.tolist(), worse[part].tolist(), better[part].tolist(), strict=True):
            if stays[low] and stays[high]:
                stays[low] = 0
                twins[low], scores[low] = high, likeness[pair]
    return twins, scores


def to_generations(content: Any) -> list[list[str]]:
    """The shards of each generation, from the content of GENERATIONS. Raises ValueError, KeyError or TypeError."""
    generations: list[list[str]] = content["generations"] if isinstance(content, dict) else content  # once it was a list
    return [[str(shard) for shard in generation] for generation in generations]
