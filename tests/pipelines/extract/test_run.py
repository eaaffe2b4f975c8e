"""The extract stage on Ray: several resolutions from one decode, each table resumed on its own."""

import hashlib
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from jobs.extract import ExtractJob, run
from pipelines.extract.config import ExtractConfig
from pipelines.extract.run import extract_identity, read_latents, run_extract
from pipelines.shapes.drawing import draw_row
from pipelines.stages.contract import Resources
from pipelines.tables.errors import MissingTableError, StaleTableError
from pipelines.tables.identity import Identity
from pipelines.tables.schema import CAPTIONS, IMAGES, LATENTS, Row
from pipelines.tables.table import Table
from tests.support.without_ray import run_without_ray

CONFIG = ExtractConfig(
    name="tiny",
    autoencoder="zoo://pipeline/autoencoder",
    resolution=64,
    batch_size=2,
    check_rows=2,
    resources=Resources(num_cpus=0.5),
    max_reject_share=0.9,
)
NUM_SHARDS, SHARD_ROWS = 3, 4


def image_row(number: int) -> Row:
    image = Image.fromarray(draw_row(10_000_800 + number)[1]).resize((150, 150))
    buffer = BytesIO()
    image.save(buffer, "PNG")
    content = buffer.getvalue()
    facts = {"format": "PNG", "width": 150, "height": 150, "phash": "0" * 16, "caption": None, "metadata": None}
    return {"id": hashlib.sha256(content).hexdigest(), "image_bytes": content, "source_uri": f"{number}.png", **facts}


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    uri = str(tmp_path / "data")
    images = Table(uri, "images", IMAGES)
    images.claim(Identity("test", {}, {}, {}))
    for shard in range(NUM_SHARDS):
        rows = [image_row(SHARD_ROWS * shard + index) for index in range(SHARD_ROWS)]
        images.write_shard(f"{shard:05d}", pa.Table.from_pylist(rows, IMAGES))
    return uri


def latents_table(uri: str, resolution: int) -> Table:
    return Table(uri, f"latents/tiny-{resolution}", LATENTS)


def stamps(table: Table) -> dict[str, int]:
    return {shard: Path(f"{table.uri}/{shard}.parquet").stat().st_mtime_ns for shard in table.list_shards()}


def test_two_tables_from_one_decode_and_each_resumes_on_its_own(
    dataset: str, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = latents_table(dataset, 64), latents_table(dataset, 128)
    job = ExtractJob(dataset_uri=dataset, extract=CONFIG, resolutions=(64, 128))
    run(job)
    for table, side in ((small, 8), (large, 16)):
        assert table.list_shards() == ["00000", "00001", "00002"]
        manifest = table.require()
        assert manifest.complete and manifest.num_rows == NUM_SHARDS * SHARD_ROWS and manifest.num_rejects == 0
        assert 20 < manifest.figures["psnr_worst.min"] <= manifest.figures["psnr.mean"]
        for shard in table.list_shards():
            rows = table.read_shard(shard).to_pylist()
            assert [row["id"] for row in rows] == Table(dataset, "images", IMAGES).read_shard(shard)["id"].to_pylist()
            assert all((row["height"], row["width"]) == (side, side) for row in rows)
            assert table.read_facts(shard).fingerprint == manifest.fingerprint
        assert "decoded again from their stored latents" in Path(f"{table.uri}/report.html").read_text()
    first_small, first_large = stamps(small), stamps(large)
    before = large.read_shard("00001").to_pylist()
    Path(f"{small.uri}/00000.parquet").unlink()
    Path(f"{large.uri}/00001.parquet").unlink()
    run_without_ray(monkeypatch)
    run_extract(dataset, CONFIG, also=[128])
    run_extract(dataset, CONFIG.at(128))
    again_small, again_large = stamps(small), stamps(large)
    assert [shard for shard in first_small if again_small[shard] != first_small[shard]] == ["00000"]
    assert [shard for shard in first_large if again_large[shard] != first_large[shard]] == ["00001"]
    for row, old in zip(large.read_shard("00001").to_pylist(), before, strict=True):
        assert row["id"] == old["id"]
        assert float((read_latents(row, "float16").float() - read_latents(old, "float16").float()).abs().max()) < 0.01


def test_latents_depend_on_the_images_and_on_nothing_that_is_chosen_later(dataset: str) -> None:
    identity = extract_identity(dataset, CONFIG, {"tiny": "v"})
    assert list(identity.inputs) == ["images"]
    captions = Table(dataset, "captions/a", CAPTIONS)  # a captioner joins
    captions.claim(Identity("caption", {}, {}, dict(identity.inputs)))
    for other in (replace(CONFIG, autoencoder="a copy elsewhere"), replace(CONFIG, check_rows=9, batch_size=7)):
        assert extract_identity(dataset, other, {"tiny": "v"}).fingerprint == identity.fingerprint
    for other in (replace(CONFIG, dtype="bfloat16"), replace(CONFIG, max_latent=9.0), CONFIG.at(128)):
        assert extract_identity(dataset, other, {"tiny": "v"}).fingerprint != identity.fingerprint
    assert extract_identity(dataset, CONFIG, {"tiny": "another encoder"}).fingerprint != identity.fingerprint
    with pytest.raises(MissingTableError, match="no table 'images'"):
        run_extract(f"{dataset}/none", CONFIG)


def test_a_stale_table_of_another_resolution_is_refused_before_anything_is_made(dataset: str) -> None:
    latents_table(dataset, 128).claim(Identity("extract", {"dtype": "bfloat16"}, {}, {}))
    with pytest.raises(StaleTableError, match=r"latents/tiny-128"):
        run_extract(dataset, CONFIG, also=[128])
    assert latents_table(dataset, 64).list_shards() == []
