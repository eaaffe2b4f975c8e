"""Near duplicates: every pair is found, the best stays, and growing or being killed changes no verdict."""

import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageFilter

from pipelines.ingest.config import IngestConfig
from pipelines.ingest.run import run_ingest
from pipelines.reports.image_scores import duplicates_report
from pipelines.score.config import NEAR_DUPLICATES, DuplicatesConfig
from pipelines.score.duplicates import GENERATIONS, Hashes, band_masks, decide, near_pairs, run_duplicates
from pipelines.storage.errors import LeaseHeldError
from pipelines.storage.lease import LEASE, hold
from pipelines.tables.errors import StaleTableError
from pipelines.tables.identity import Identity
from pipelines.tables.schema import IMAGE_SCORES, IMAGES, IMAGES_PATH, image_scores_path
from pipelines.tables.table import Table
from tests.support.html_page import check_page


def clustered(count: int, seed: int = 0) -> np.ndarray:
    """Hashes of which many lie within a few bits of each other."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, count // 4, dtype=np.uint64)[rng.integers(0, count // 4, count)]
    for _ in range(5):
        bit = np.uint64(1) << rng.integers(0, 64, count).astype(np.uint64)
        hashes ^= np.where(rng.random(count) < 0.5, bit, np.uint64(0))
    return hashes


def known(hashes: np.ndarray, pixels: np.ndarray | None = None, is_new: np.ndarray | None = None) -> Hashes:
    count = len(hashes)
    return Hashes(
        np.arange(count, dtype=np.uint64),
        hashes,
        np.ones(count, np.int64) if pixels is None else pixels,
        np.ones(count, bool) if is_new is None else is_new,
    )


@pytest.mark.parametrize("max_distance", [0, 1, 3, 4, 7])
def test_pairs_against_all_comparisons(max_distance: int) -> None:
    unique = np.unique(clustered(600))
    distances = np.bitwise_count(unique[:, None] ^ unique[None])
    wanted = {(i, j) for i, j in np.argwhere(distances <= max_distance).tolist() if i < j}
    parts = [np.stack(part, axis=1) for part in near_pairs(unique, max_distance)]
    found = [tuple(sorted(pair)) for part in parts for pair in part.tolist()]
    assert len(found) == len(set(found)) and set(found) == (wanted if max_distance else set())
    assert max_distance < 3 or len(wanted) > 100
    masks = band_masks(max_distance + 1)
    assert int(np.bitwise_or.reduce(masks)) == 2**64 - 1 and np.bitwise_count(masks).sum() == 64


def test_the_best_stays_and_every_other_is_near_it() -> None:
    rng = np.random.default_rng(1)
    hashes, pixels = clustered(500, 1), rng.integers(1, 5, 500)
    verdicts = decide(known(hashes, pixels), 3)
    refused = dict(zip(verdicts.positions.tolist(), verdicts.twins.tolist(), strict=True))
    kept = [place for place in range(500) if place not in refused]
    assert 20 < len(refused) < 480
    for place, twin in refused.items():
        assert twin not in refused
        assert (hashes[place] ^ hashes[twin]).item().bit_count() <= 3
        assert (-pixels[twin], twin) < (-pixels[place], place)
    apart = np.bitwise_count(hashes[kept][:, None] ^ hashes[kept][None]) + 64 * np.eye(len(kept), dtype=int)
    assert apart.min() > 3
    assert verdicts.distances.tolist() == [(hashes[p] ^ hashes[t]).item().bit_count() for p, t in refused.items()]


def test_old_images_stay_and_plain_ones_say_nothing() -> None:
    telling = 0x0F0F0F0F0F0F0F0F
    hashes = np.array([telling, telling ^ 1, 0, 0, 1], np.uint64)
    pixels = np.array([1, 100, 5, 5, 5])
    is_new = np.array([False, True, True, True, True])
    verdicts = decide(known(hashes, pixels, is_new), 3)
    assert (verdicts.positions.tolist(), verdicts.twins.tolist(), verdicts.distances.tolist()) == ([1], [0], [1])


def picture(seed: int, scale: int = 2, quality: int = 90) -> bytes:
    """Blurred noise: the same for a seed, at any size."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1))
    buffer = io.BytesIO()
    image.resize((32 * scale, 32 * scale), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def verdicts_of(dataset: Path) -> dict[str, tuple[float, str | None]]:
    """Score, and the name of the twin, by the image's name."""
    images, table = (
        Table(str(dataset), IMAGES_PATH, IMAGES),
        Table(str(dataset), image_scores_path(NEAR_DUPLICATES), IMAGE_SCORES),
    )
    assert table.list_shards() == images.list_shards()
    names, places, found = {}, {}, {}
    for shard in images.list_shards():
        for row in images.read_shard(shard, ["id", "source_uri"]).to_pylist():
            names[row["id"]], places[row["id"]] = Path(row["source_uri"]).stem, shard
    for shard in table.list_shards():
        rows = table.read_shard(shard).to_pylist()
        assert [row["id"] for row in rows] == images.read_shard(shard, ["id"])["id"].to_pylist()
        for row in rows:
            twin = row["detail"].split("/") if row["detail"] else None
            assert twin is None or places[twin[1]] == twin[0]
            found[names[row["id"]]] = (row["score"], names[twin[1]] if twin else None)
    return found


def test_stage_grows_resumes_and_shows(tmp_path: Path, local_ray: None) -> None:
    source, dataset = tmp_path / "photos", tmp_path / "dataset"
    source.mkdir()
    for name, content in {
        "a": picture(0, 2),
        "b": picture(1, 2),
        "c": picture(2, 2),
        "d_large_a": picture(0, 6),
        "e": picture(3, 2),
    }.items():
        (source / f"{name}.jpg").write_bytes(content)
    ingest = IngestConfig(source=str(source), rows_per_shard=2)
    run_ingest(str(dataset), ingest)
    config = DuplicatesConfig()
    result = run_duplicates(str(dataset), config)
    first = verdicts_of(dataset)
    assert {name: twin for name, (_, twin) in first.items() if twin} == {"a": "d_large_a"}
    assert first["a"][0] >= 1 - 3 / 64 and first["b"] == (0, None)
    assert result.num_rows == 5

    (source / "z_larger_a.jpg").write_bytes(picture(0, 8))
    (source / "z_other_c.jpg").write_bytes(picture(2, 3, quality=60))
    run_ingest(str(dataset), ingest)
    grown = run_duplicates(str(dataset), config)
    assert (grown.num_shards, grown.found_shards) == (4, 3)
    second = verdicts_of(dataset)
    assert {name: second[name] for name in first} == first
    assert {name: twin for name, (_, twin) in second.items() if twin and name not in first} == {
        "z_larger_a": "d_large_a",
        "z_other_c": "c",
    }
    for shards in (["00000"], ["00003"], ["00001", "00003"]):
        for shard in shards:
            os.remove(dataset / f"image_scores/{NEAR_DUPLICATES}/{shard}.parquet")
        assert run_duplicates(str(dataset), config).found_shards == 4 - len(shards)
        assert verdicts_of(dataset) == second
    assert run_duplicates(str(dataset), config).was_done
    with pytest.raises(StaleTableError, match=r"config\.max_distance: 3 -> 5"):
        run_duplicates(str(dataset), DuplicatesConfig(max_distance=5))
    page = duplicates_report(str(dataset))
    check_page(page)
    assert page.count("of 64 bits differ") == 3


def test_what_a_run_decides_about_is_noted_under_its_lease(tmp_path: Path) -> None:
    images = Table(str(tmp_path), IMAGES_PATH, IMAGES)
    images.claim(Identity("ingest", {}, {}, {}))
    images.write_shard("00000", pa.Table.from_pylist([], IMAGES))
    folder = tmp_path / f"image_scores/{NEAR_DUPLICATES}"
    with hold(str(folder)):
        record = (folder / LEASE).read_bytes()
    (folder / LEASE).write_bytes(record)  # of another job in this process
    with pytest.raises(LeaseHeldError):
        run_duplicates(str(tmp_path), DuplicatesConfig())
    assert not (folder / GENERATIONS).exists()


def test_config() -> None:
    with pytest.raises(ValueError, match="max_distance=8"):
        DuplicatesConfig(max_distance=8)
