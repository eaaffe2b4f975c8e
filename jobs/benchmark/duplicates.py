"""Near duplicates by embeddings: seconds, memory and recall as rows grow, and which changed pictures are found."""

import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps

from jobs.benchmark.config import DuplicatesConfig
from jobs.benchmark.memory import MIB, watch_memory
from jobs.common.ray import RayConfig, start_ray
from jobs.common.text_table import format_table
from pipelines.score.config import SEMANTIC_DUPLICATES, SemanticConfig
from pipelines.tables.identity import Identity
from pipelines.tables.schema import (
    IMAGE_SCORES,
    IMAGES,
    IMAGES_PATH,
    image_embeds_path,
    image_embeds_schema,
    image_scores_path,
)
from pipelines.tables.table import Table

CLIP = "clip"  # of the table of embeddings
COLUMNS = {
    "rows": 9,
    "seconds": 9,
    "CPU s": 8,
    "driver": 8,
    "workers": 9,
    "object store": 14,
    "found": 8,
    "recall": 8,
}
LIMITS = (0.9, 0.95, 0.97, 0.99)
CHECKED_ROWS = 2000
CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG, quality 50": lambda image: compress(image, 50),
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC),
    "cropped by 10 %": lambda image: ImageOps.crop(image, image.width // 20),
    "mirrored": ImageOps.mirror,
}


def benchmark_duplicates(config: DuplicatesConfig) -> None:
    """Print how the search grows with the number of rows, and the shares of changed pictures that it and the hash find."""
    if config.rows:
        print(f"{config.width} numbers an embedding; peaks in MiB, processes without what they share")
        print("".join(name.rjust(width) for name, width in COLUMNS.items()), flush=True)
    for count in config.rows:
        with tempfile.TemporaryDirectory() as folder, start_ray(RayConfig(num_cpus=config.num_cpus)):
            _measure_search(folder, planted_embeds(count, config.width))
    pictures = _read_pictures(Path(config.pictures)) if config.pictures else _draw_pictures(300)
    print(f"\n{len(pictures)} pictures, {config.clip}: share that counts as a near duplicate")
    print(_compare_changes(pictures, config.clip))


def planted_embeds(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Unit vectors (count, width) float16: clusters of about 300, and for a fifth of all the cosine to another is 0.9 to 1."""
    generator = np.random.default_rng(seed)
    plane = generator.standard_normal((min(64, width), width)) / np.sqrt(width)  # real embeddings have few directions
    num_others, num_clusters = count - count // 5, max(count // 300, 1)
    centres = generator.standard_normal((num_clusters, len(plane)))[generator.integers(0, num_clusters, num_others)]
    others = (centres + 0.6 * generator.standard_normal(centres.shape)) @ plane + 6 * plane[0]
    others = _unit(others + 2 * generator.standard_normal(others.shape) / np.sqrt(width))
    originals = others[generator.integers(0, num_others, count // 5)]
    away = generator.standard_normal(originals.shape)
    away = _unit(away - (away * originals).sum(1, keepdims=True) * originals)
    cosines = generator.uniform(0.9, 1, (count // 5, 1))
    copies = cosines * originals + np.sqrt(1 - cosines**2) * away
    return generator.permutation(np.concatenate([others, copies])).astype(np.float16)


def write_embeds(dataset_uri: str, vectors: np.ndarray, rows_per_shard: int = 1000) -> Table:
    """Write images without content and their embeddings (N, width), as tables of a dataset; returns that of the embeddings."""
    images = Table(dataset_uri, IMAGES_PATH, IMAGES)
    embeds = Table(dataset_uri, image_embeds_path(CLIP), image_embeds_schema(vectors.shape[1]))
    claimed = images.claim(Identity("ingest", {}, {}, {}))
    embeds.claim(Identity("embed_images", {"width": vectors.shape[1]}, {}, {IMAGES_PATH: claimed.fingerprint}))
    row = {"image_bytes": b"", "format": "PNG", "width": 64, "height": 64, "phash": "0" * 16, "source_uri": ""}
    for number, start in enumerate(range(0, len(vectors), rows_per_shard)):
        part = vectors[start : start + rows_per_shard]
        ids = [f"{index:064x}" for index in range(start, start + len(part))]
        images.write_shard(f"{number:05}", pa.Table.from_pylist([row | {"id": name} for name in ids], IMAGES))
        lists = pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), part.shape[1])
        embeds.write_shard(f"{number:05}", pa.table({"id": ids, "embedding": lists}).cast(embeds.schema))
    return embeds


def compress(image: Image.Image, quality: int) -> Image.Image:
    """The image after a JPEG of this quality."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def _measure_search(folder: str, vectors: np.ndarray) -> None:
    from pipelines.score.duplicates import run_duplicates

    write_embeds(folder, vectors)
    config = SemanticConfig(clip=CLIP)
    start = time.monotonic()
    with watch_memory() as peaks:
        run_duplicates(folder, config)
    seconds = time.monotonic() - start
    table = Table(folder, image_scores_path(SEMANTIC_DUPLICATES), IMAGE_SCORES)
    found = np.concatenate([table.read_shard(shard)["detail"].is_valid().to_numpy() for shard in table.list_shards()])
    recall = _recall(vectors.astype(np.float32), found, config.min_similarity)
    times = (f"{taken:.1f}" for taken in (seconds, sum(peaks.cpu_seconds.values())))
    memory = (f"{peak / MIB:.0f}" for peak in (peaks.driver, peaks.workers, peaks.object_store))
    cells = [str(len(vectors)), *times, *memory, str(found.sum()), f"{recall:.1%}"]
    print("".join(cell.rjust(width) for cell, width in zip(cells, COLUMNS.values(), strict=True)), flush=True)


def _recall(vectors: np.ndarray, found: np.ndarray, min_similarity: float) -> float:
    """The share of near duplicates that were found, from some rows that are compared with all. All images have one size."""
    checked = np.sort(np.random.default_rng(0).choice(len(vectors), min(CHECKED_ROWS, len(vectors)), replace=False))
    missed = 0
    for rows in np.array_split(checked[~found[checked]], 20):
        is_alike = vectors[rows] @ vectors.T >= min_similarity
        missed += int((is_alike & ~found & (np.arange(len(vectors)) < rows[:, None])).any(1).sum())
    num_found = int(found[checked].sum())
    return num_found / max(num_found + missed, 1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _draw_pictures(count: int) -> list[Image.Image]:
    from pipelines.shapes.drawing import draw_row
    from pipelines.shapes.scenes import ShapesConfig

    return [Image.fromarray(draw_row(index, ShapesConfig(image_size=256))[1]) for index in range(count)]


def _read_pictures(folder: Path) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted(folder.iterdir()) if path.suffix in (".jpg", ".jpeg", ".png")]


def _compare_changes(pictures: list[Image.Image], clip: str) -> str:
    """A line for each change, and one for pictures that have nothing to do with each other."""
    from pipelines.score.config import DuplicatesConfig
    from pipelines.workers.clip import ClipModel
    from pipelines.workers.images import perceptual_hash

    model, max_distance = ClipModel(clip), DuplicatesConfig().max_distance

    def look(images: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
        parts = [model.embed_images(images[start : start + 32]).numpy() for start in range(0, len(images), 32)]
        return np.concatenate(parts), np.array([int(perceptual_hash(image), 16) for image in images], np.uint64)

    embeds, hashes = look(pictures)
    columns = ["", f"hash, {max_distance} bits", *(f"cosine {limit}" for limit in LIMITS)]
    rows = []
    for name, change in CHANGES.items():
        changed, changed_hashes = look([change(picture) for picture in pictures])
        cosines, bits = (embeds * changed).sum(1), np.bitwise_count(hashes ^ changed_hashes)
        rows.append([name, f"{(bits <= max_distance).mean():.1%}", *(f"{(cosines >= limit).mean():.1%}" for limit in LIMITS)])
    cosines = (embeds @ embeds.T - 2 * np.eye(len(pictures))).max(1)
    bits = (np.bitwise_count(hashes[:, None] ^ hashes[None]) + 64 * np.eye(len(pictures), dtype=int)).min(1)
    shares = [f"{(cosines >= limit).mean():.1%}" for limit in LIMITS]
    return format_table(columns, [*rows, ["alike to another picture", f"{(bits <= max_distance).mean():.1%}", *shares]])
