"""Near duplicates by both methods: growing, being killed and losing shards change no verdict, and the page shows the pairs."""

import io
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from PIL import Image, ImageFilter

from pipelines.ingest.config import IngestConfig
from pipelines.ingest.run import run_ingest
from pipelines.reports.image_scores import duplicates_report
from pipelines.score.config import NEAR_DUPLICATES, SEMANTIC_DUPLICATES, DuplicatesConfig, SemanticConfig
from pipelines.score.duplicates import run_duplicates
from pipelines.score.verdicts import GENERATIONS, VERDICTS
from pipelines.stages.contract import StageResult
from pipelines.storage.errors import LeaseHeldError
from pipelines.storage.lease import LEASE, hold
from pipelines.tables.errors import DamagedShardError, MissingTableError, StaleTableError
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
from pipelines.workers.clip import ClipModel
from pipelines.workers.images import decode
from tests.support.html_page import check_page
from tests.support.without_ray import run_without_ray


def picture(seed: int, scale: int = 2, quality: int = 90) -> bytes:
    """Blurred noise: the same for a seed, at any size."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1))
    buffer = io.BytesIO()
    image.resize((32 * scale, 32 * scale), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def embed_images(dataset: Path) -> None:
    """Write the missing shards of the table of embeddings, without the image of noise, as if the CLIP had refused it."""
    images = Table(str(dataset), IMAGES_PATH, IMAGES)
    model = ClipModel("zoo://clip")
    embeds = Table(str(dataset), image_embeds_path("tiny"), image_embeds_schema(128))
    embeds.claim(Identity("embed_images", {"width": 128}, {}, {IMAGES_PATH: images.require().fingerprint}))
    for shard in sorted({*images.list_shards()} - {*embeds.list_shards()}):
        rows = images.read_shard(shard)
        vectors = model.embed_images([decode(content) for content in rows["image_bytes"].to_pylist()]).numpy()
        lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float16).ravel()), 128)
        accepted = pc.invert(pc.ends_with(rows["source_uri"], "e_refused.jpg"))
        embeds.write_shard(shard, pa.table({"id": rows["id"], "embedding": lists}).cast(embeds.schema).filter(accepted))


def verdicts_of(dataset: Path, scorer: str, source: str) -> dict[str, tuple[float, str | None]]:
    """Score, and the name of the twin, by the image's name. Checks that the table has the rows of its source."""
    images, table = Table(str(dataset), IMAGES_PATH, IMAGES), Table(str(dataset), image_scores_path(scorer), IMAGE_SCORES)
    names, places, found = {}, {}, {}
    for shard in images.list_shards():
        for row in images.read_shard(shard, ["id", "source_uri"]).to_pylist():
            names[row["id"]], places[row["id"]] = Path(row["source_uri"]).stem, shard
    assert table.list_shards() == images.list_shards()
    for shard in table.list_shards():
        rows = table.read_shard(shard).to_pylist()
        assert [row["id"] for row in rows] == Table(str(dataset), source, IMAGES).read_shard(shard, ["id"])["id"].to_pylist()
        for row in rows:
            twin = row["detail"].split("/") if row["detail"] else None
            assert twin is None or places[twin[1]] == twin[0]
            found[names[row["id"]]] = (row["score"], names[twin[1]] if twin else None)
    return found


@dataclass(frozen=True)
class Method:
    """A method, its table, whose rows that table has, how a setting is changed, and what the page says of a pair."""

    config: DuplicatesConfig | SemanticConfig
    scorer: str
    source: str
    other: DuplicatesConfig | SemanticConfig
    difference: str
    told: str


METHODS = {
    "hash": Method(
        DuplicatesConfig(),
        NEAR_DUPLICATES,
        IMAGES_PATH,
        DuplicatesConfig(max_distance=5),
        r"config\.max_distance: 3 -> 5",
        r"\d of 64 bits differ",
    ),
    "semantic": Method(
        SemanticConfig(clip="tiny"),
        SEMANTIC_DUPLICATES,
        image_embeds_path("tiny"),
        SemanticConfig(clip="tiny", min_similarity=0.9),
        r"config\.min_similarity: 0\.95 -> 0\.9",
        r"cosine [01]\.\d{3}",
    ),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_stage_grows_resumes_and_shows(
    tmp_path: Path, local_ray: None, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, dataset = tmp_path / "photos", tmp_path / "dataset"
    folder = dataset / image_scores_path(method.scorer)
    source.mkdir()
    for name, content in {
        "a": picture(0, 2),
        "b": picture(1, 2),
        "c": picture(2, 2),
        "d_large_a": picture(0, 6),
        "e_refused": picture(3, 2),
    }.items():
        (source / f"{name}.jpg").write_bytes(content)
    ingest = IngestConfig(source=str(source), rows_per_shard=2)
    by_embedding = method.scorer == SEMANTIC_DUPLICATES
    num_rows = 4 if by_embedding else 5

    def grow() -> StageResult:
        run_ingest(str(dataset), ingest)
        if by_embedding:
            embed_images(dataset)
        return run_duplicates(str(dataset), method.config)

    assert grow().num_rows == num_rows
    run_without_ray(monkeypatch)
    first = verdicts_of(dataset, method.scorer, method.source)
    assert {name: twin for name, (_, twin) in first.items() if twin} == {"a": "d_large_a"}
    assert first["a"][0] >= 1 - 3 / 64 and first["b"] == (0, None) and len(first) == num_rows

    (source / "z_larger_a.jpg").write_bytes(picture(0, 8))
    (source / "z_other_c.jpg").write_bytes(picture(2, 3, quality=60))
    grown = grow()
    assert (grown.num_shards, grown.found_shards) == (4, 3)
    second = verdicts_of(dataset, method.scorer, method.source)
    assert {name: second[name] for name in first} == first
    assert {name: twin for name, (_, twin) in second.items() if twin and name not in first} == {
        "z_larger_a": "d_large_a",
        "z_other_c": "c",
    }
    for shards in (["00000"], ["00001", "00003"]):
        for shard in shards:
            os.remove(folder / f"{shard}.parquet")
        if len(shards) == 2:  # as earlier versions left it, which kept no verdicts
            os.remove(folder / f"{VERDICTS.format(0)}.parquet")
        assert run_duplicates(str(dataset), method.config).found_shards == 4 - len(shards)
        assert verdicts_of(dataset, method.scorer, method.source) == second
    assert run_duplicates(str(dataset), method.config).was_done
    with pytest.raises(StaleTableError, match=method.difference):
        run_duplicates(str(dataset), method.other)
    page = duplicates_report(str(dataset), method.scorer)
    check_page(page)
    assert len(re.findall(method.told, page)) == 3

    os.remove(folder / "00000.parquet")
    (folder / f"{VERDICTS.format(0)}.parquet").write_bytes(b"cut")
    with pytest.raises(DamagedShardError, match=r"_verdicts-00000\.parquet is damaged .* jobs\.repair"):
        run_duplicates(str(dataset), method.config)


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


def test_a_shard_of_embeddings_that_is_gone_is_named(tmp_path: Path) -> None:
    Table(str(tmp_path), IMAGES_PATH, IMAGES).claim(Identity("ingest", {}, {}, {}))
    embeds = Table(str(tmp_path), image_embeds_path("tiny"), image_embeds_schema(4))
    embeds.claim(Identity("embed_images", {"width": 4}, {}, {}))
    for shard in ("00000", "00002"):
        embeds.write_shard(shard, pa.Table.from_pylist([], embeds.schema))
    output = Table(str(tmp_path), image_scores_path(SEMANTIC_DUPLICATES), IMAGE_SCORES)
    output.write_json(GENERATIONS, {"generations": [["00000", "00001", "00002"]]})
    with pytest.raises(MissingTableError, match=r"image_embeds/tiny has no shard 00001, which it had .* jobs\.embed_images"):
        run_duplicates(str(tmp_path), SemanticConfig(clip="tiny"))


def test_config() -> None:
    with pytest.raises(ValueError, match="max_distance=8"):
        DuplicatesConfig(max_distance=8)
    with pytest.raises(ValueError, match=r"min_similarity=0\.4 must be above 0\.5"):
        SemanticConfig(clip="tiny", min_similarity=0.4)
