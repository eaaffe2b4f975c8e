"""Ingest end to end on real files: the right rows, the right rejects, and nothing twice however it is stopped and continued."""

import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray import cloudpickle

from jobs.ingest import describe_captions, describe_rejects
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.plan import ShardSize, SharedPlan, pack, write_plan
from pipelines.ingest.readers import SOURCE_ROWS
from pipelines.ingest.run import IngestWorker, ShardReader, _plan_sources, image_id, run_ingest
from pipelines.ingest.sources import Part, find_source, list_parts
from pipelines.reports.images import images_report
from pipelines.storage.lease import LEASE, Leases
from pipelines.storage.swap import LOCK_SUFFIX
from pipelines.tables.errors import DamagedFileError, StaleTableError, TooManyRejectsError
from pipelines.tables.schema import IMAGES, IMAGES_PATH
from pipelines.tables.table import Table
from pipelines.workers.images import ImageLimits, decode
from tests.support.html_page import check_page
from tests.support.without_ray import run_without_ray


def noise_image(seed: int, height: int = 32, width: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_images(root: Path, numbers: range | list[int]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (root / f"{number:03}.png").write_bytes(encode(noise_image(number), "PNG"))


def write_bad_folder(root: Path) -> None:
    """One of each sort that people's folders hold, and two good ones."""
    jpeg = encode(noise_image(0), "JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [noise_image(seed) for seed in (1, 2)]
    deep = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    files = {
        "a_good.jpg": jpeg,
        "b_text.jpg": b"I was a text file once.",
        "c_truncated.jpg": encode(noise_image(3, 128, 128), "JPEG")[:3000],
        "d_cmyk.jpg": encode(noise_image(4).convert("CMYK"), "JPEG"),
        "e_16bit.png": encode(Image.fromarray(deep), "PNG"),
        "f_animated.webp": encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True),
        "g_rotated.jpg": encode(noise_image(5, 32, 64), "JPEG", exif=exif),
        "h_one_pixel.png": encode(noise_image(6, 1, 1), "PNG"),
        "sub/i_duplicate.jpg": jpeg,
        "sub/j_good.png": encode(noise_image(7), "PNG"),
    }
    (root / "sub").mkdir(parents=True)
    for name, content in files.items():
        (root / name).write_bytes(content)
    (root / "a_good.txt").write_text("a caption")
    (root / "sub/j_good.json").write_text('{"caption": "another", "license": "CC0"}')


def read_table(table: Table) -> dict[str, list[dict]]:
    return {shard: table.read_shard(shard).to_pylist() for shard in table.list_shards()}


def images_of(dataset: Path) -> Table:
    return Table(str(dataset), IMAGES_PATH, IMAGES)


def names(rows: list[dict]) -> list[str]:
    return [Path(row["source_uri"]).name for row in rows]


def test_bad_folder_through_the_worker(tmp_path):
    """Rows and rejects exactly, without Ray."""
    write_bad_folder(tmp_path)
    source = find_source(str(tmp_path), "auto")
    table = ShardReader(source, lambda shard: list_parts(source))("00000")
    rows, rejects, figures = IngestWorker(ImageLimits()).process(table)
    assert figures == {"num_captions/.txt": 1, "num_captions/caption": 1}
    found = {Path(row["source_uri"]).name: (row["format"], row["width"], row["height"], row["caption"]) for row in rows}
    assert found == {
        "a_good.jpg": ("JPEG", 48, 32, "a caption"),
        "d_cmyk.jpg": ("JPEG", 48, 32, None),
        "e_16bit.png": ("PNG", 32, 32, None),
        "f_animated.webp": ("WEBP", 48, 32, None),
        "g_rotated.jpg": ("JPEG", 32, 64, None),
        "j_good.png": ("PNG", 48, 32, "another"),
    }
    assert all(row["id"] == image_id(row["image_bytes"]) and len(row["phash"]) == 16 for row in rows)
    assert json.loads(rows[-1]["metadata"]) == {"license": "CC0"}
    assert np.abs(np.asarray(decode(rows[3]["image_bytes"])).astype(int) - np.asarray(noise_image(1))).max() == 0
    refused = {Path(row["source_uri"]).name: row for row in rejects}
    assert {name: row["reject_reason"] for name, row in refused.items()} == {
        "b_text.jpg": "not_an_image",
        "c_truncated.jpg": "truncated",
        "h_one_pixel.png": "too_small",
        "i_duplicate.jpg": "duplicate",
    }
    assert refused["i_duplicate.jpg"]["detail"] == f"the same bytes as {tmp_path}/a_good.jpg"
    assert all(len(row["id"]) == 64 and row["detail"] for row in rejects)
    pa.Table.from_pylist(rows, IMAGES)


def test_worker_refuses_what_was_not_read():
    rows = [{"source_uri": "x.jpg", "error": "unreadable", "detail": "no permission"}]
    kept, [reject], _ = IngestWorker(ImageLimits()).process(pa.Table.from_pylist(rows, SOURCE_ROWS))
    assert kept == []
    assert reject == {"id": None, "source_uri": "x.jpg", "reject_reason": "unreadable", "detail": "no permission"}


def test_plan_slices_files_by_rows_and_bytes():
    def packed(counts: list[int | None], size: int = 100, **config) -> list[list[tuple]]:
        parts = [Part(f"{index}.tar", size) for index in range(len(counts))]
        shards = pack(parts, counts, ShardSize(**{"rows": 1000, "bytes": 2**20} | config))
        return [[(part.path[0], part.start, part.stop) for part in shard] for shard in shards]

    assert packed([1, 1, 1, 1, 1], rows=2) == [
        [("0", 0, None), ("1", 0, None)],
        [("2", 0, None), ("3", 0, None)],
        [("4", 0, None)],
    ]
    assert packed([5, 0, 2], rows=3) == [[("0", 0, 3)], [("0", 3, None), ("2", 0, 1)], [("2", 1, None)]]
    assert packed([1, None, 1], rows=3) == [[("0", 0, None)], [("1", 0, None)], [("2", 0, None)]]
    assert packed([10], bytes=45) == [[("0", 0, 4)], [("0", 4, 8)], [("0", 8, None)]]
    assert packed([1, 1], bytes=45) == [[("0", 0, None)], [("1", 0, None)]]


def test_whole_stage_resumes_grows_and_refuses_another_config(tmp_path, local_ray, monkeypatch):
    source, dataset = tmp_path / "photos", tmp_path / "dataset"
    write_images(source, range(7))
    shutil.copy(source / "000.png", source / "005_again.png")  # of another shard: 000-002, 003-005, 005_again and 006
    config = IngestConfig(source=str(source), rows_per_shard=3)
    seen = []
    result = run_ingest(str(dataset), config, on_progress=lambda progress: seen.append(progress.done_shards))
    assert (result.num_shards, result.num_rows, result.rejects_by_reason) == (3, 7, {"duplicate": 1})
    assert seen[0] == 0 and seen[-1] == 3
    run_without_ray(monkeypatch)
    images = images_of(dataset)
    rows, rejects = read_table(images), read_table(images.rejects())
    assert {shard: names(found) for shard, found in rows.items()} == {
        "00000": ["000.png", "001.png", "002.png"],
        "00001": ["003.png", "004.png", "005.png"],
        "00002": ["006.png"],
    }
    [duplicate] = rejects["00002"]
    assert (duplicate["id"], duplicate["detail"]) == (rows["00000"][0]["id"], "the same bytes as an image of shard 00000")

    for shards in (["00002"], ["00000"], ["00000", "00001", "00002"]):
        for shard in shards:
            os.remove(dataset / f"images/{shard}.parquet")
        again = run_ingest(str(dataset), config)
        assert (again.found_shards, again.num_rows, again.fingerprint) == (3 - len(shards), 7, result.fingerprint)
        assert (read_table(images), read_table(images.rejects())) == (rows, rejects)
    assert run_ingest(str(dataset), config).was_done

    write_images(source / "0_new", [8, 3])  # sorts before the rest; one of them is there already
    (source / "006.png").unlink()  # its shard is done: nothing to do
    grown = run_ingest(str(dataset), config)
    assert (grown.num_shards, grown.found_shards, grown.num_rows, grown.num_rejects) == (4, 3, 8, 2)
    tables = read_table(images)
    grown_rows = tables.pop("00003")
    assert names(grown_rows) == ["008.png"]
    assert tables == rows

    other = encode(noise_image(9), "PNG")
    (source / "0_new/008.png").write_bytes(other)  # a file that changes: what is done holds what was there
    assert run_ingest(str(dataset), config).was_done and read_table(images) == rows | {"00003": grown_rows}
    os.remove(dataset / "images/00003.parquet")  # what is not done yet holds what is there
    run_ingest(str(dataset), config)
    assert [row["id"] for row in read_table(images)["00003"]] == [image_id(other)]

    os.remove(dataset / "images/00002.parquet")
    lost = run_ingest(str(dataset), config)
    assert lost.rejects_by_reason == {"duplicate": 2, "missing_source": 1}

    before = (dataset / "images/_sources.json").read_bytes()
    for changed, field in [
        (replace(config, limits=ImageLimits(min_size=8)), "config.limits.min_size: 16 -> 8"),
        (replace(config, source=str(source / "0_new")), "config.source: "),
        (replace(config, rows_per_shard=4), "config.rows_per_shard: 3 -> 4"),
        (replace(config, caption_keys=("prompt",)), "config.caption_keys: "),
    ]:
        with pytest.raises(StaleTableError, match=field):
            run_ingest(str(dataset), changed)
    assert (dataset / "images/_sources.json").read_bytes() == before
    assert run_ingest(str(dataset), replace(config, max_reject_share=0.9)).was_done


def test_parquet_source_and_too_many_rejects(tmp_path, local_ray, without_ray):
    contents = [encode(noise_image(seed), "PNG") for seed in range(3)] + [b"no image"] * 2
    pq.write_table(pa.table({"image": contents, "text": [f"caption {i}" for i in range(5)]}), tmp_path / "x.parquet")
    config = IngestConfig(source=str(tmp_path / "x.parquet"), max_reject_share=0.2)
    with pytest.raises(TooManyRejectsError, match="2 of 5 rows were refused"):
        run_ingest(str(tmp_path / "dataset"), config)
    result = run_ingest(str(tmp_path / "dataset"), replace(config, max_reject_share=0.5))
    assert result.rejects_by_reason == {"not_an_image": 1, "duplicate": 1}
    assert describe_captions(result) == "3 of 3 images came with a caption, by key: text 3"
    assert describe_rejects(result) == "refused: duplicate 1, not_an_image 1; which, and why, is on "
    assert "found under text (3)" in check_page(images_report(str(tmp_path / "dataset"))).text
    captions = images_of(tmp_path / "dataset").read_shard("00000", ["caption"])["caption"].to_pylist()
    assert captions == ["caption 0", "caption 1", "caption 2"]


def test_refused_before_anything_is_written(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/notes.md").write_text("no image")
    with pytest.raises(ValueError, match=r"holds nothing to ingest .*a folder of images"):
        run_ingest(str(tmp_path / "dataset"), IngestConfig(source=str(tmp_path / "photos")))
    with pytest.raises(ValueError, match="is the dataset itself"):
        run_ingest(str(tmp_path / "photos"), IngestConfig(source=str(tmp_path / "photos")))
    with pytest.raises(ValueError, match="holds nothing to ingest"):
        run_ingest(str(tmp_path / "dataset"), IngestConfig(source=str(tmp_path / "photos"), source_kind="webdataset"))
    with pytest.raises(ValueError, match=r"photo' is not there \(did you mean"):
        run_ingest(str(tmp_path / "dataset"), IngestConfig(source=str(tmp_path / "photo"), source_kind="webdataset"))
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["notes.md"]
    assert {path.name for path in (tmp_path / "dataset").rglob("*") if path.is_file()} <= {f"{LEASE}{LOCK_SUFFIX}"}


def test_a_task_is_not_sent_the_whole_plan(local_ray):
    shards = {f"{shard:05}": [Part(f"{shard}/{file}.jpg", 9, (f"{file}.txt",)) for file in range(1000)] for shard in range(40)}
    shared = SharedPlan(shards)
    assert all(shared(shard) == parts for shard, parts in shards.items())
    reader = ShardReader(find_source("/", "folder"), shared)
    assert len(cloudpickle.dumps(reader)) < 10_000 < len(cloudpickle.dumps(shards)) / 100


def test_a_plan_that_lost_a_shard_is_not_extended(tmp_path):
    write_images(tmp_path / "raw", range(4))
    images, config = images_of(tmp_path / "data"), IngestConfig(source=str(tmp_path / "raw"), rows_per_shard=2)
    with Leases() as leases:
        ticket = leases.take(images.uri).ticket
        _, plan, _ = _plan_sources(images, config, ticket)
        for shard in plan.shards:
            images.write_shard(shard, pa.Table.from_pylist([], IMAGES), ticket=ticket)
        kept, lost = plan.shards.items()
        for shards, told in (([kept], r"does not plan shard 00001"), ([lost], r"it plans 1 shards, and not shard 00000")):
            write_plan(images, replace(plan, shards=dict(shards)), ticket)
            with pytest.raises(DamagedFileError, match=told):
                _plan_sources(images, config, ticket)
        (tmp_path / "data/images/_sources.json").unlink()
        assert _plan_sources(images, config, ticket)[1] == plan, "the source holds what it held"


def test_plan_of_another_version_is_named(tmp_path):
    (tmp_path / "dataset/images").mkdir(parents=True)
    (tmp_path / "dataset/images/_sources.json").write_text('{"shards": {}}')
    with pytest.raises(ValueError, match=r"_sources\.json is not what this version wrote \(KeyError"):
        run_ingest(str(tmp_path / "dataset"), IngestConfig(source=str(tmp_path)))
