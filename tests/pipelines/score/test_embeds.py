"""Embeddings of images: unit vectors in half precision, and what a CLIP cannot embed costs its row only."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipelines.audit.status import find_table
from pipelines.audit.verify import verify_dataset
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.run import run_ingest
from pipelines.score.config import ClipConfig
from pipelines.score.embeds import ImageEmbedder, embeds_table, run_image_embeds, to_vectors
from pipelines.shapes.drawing import draw_row, write_folder
from pipelines.stages.contract import Resources
from pipelines.tables.errors import MissingTableError, StaleTableError
from pipelines.tables.schema import IMAGES, image_embeds_path, image_embeds_schema
from pipelines.tables.table import Table

CONFIG = ClipConfig(name="clip", model="zoo://clip", batch_size=3, resources=Resources(num_cpus=0.5))
FIRST, WIDTH = 10_000_600, 128


def image_of(number: int) -> Image.Image:
    return Image.fromarray(draw_row(FIRST + number)[1])


def table_of(count: int) -> pa.Table:
    contents = []
    for number in range(count):
        buffer = BytesIO()
        image_of(number).save(buffer, "PNG")
        contents.append(buffer.getvalue())
    return pa.table({"id": [f"id{number}" for number in range(count)], "image_bytes": contents, "source_uri": ["x"] * count})


@pytest.fixture(scope="module")
def embedder() -> ImageEmbedder:
    return ImageEmbedder(CONFIG)


def test_vectors_have_length_one_and_are_those_of_the_clip_to_half_precision(embedder: ImageEmbedder) -> None:
    rows, rejects, _ = embedder.process(table_of(7))
    assert isinstance(rows, pa.Table) and rows.schema == image_embeds_schema(WIDTH) and rejects == []
    assert rows["id"].to_pylist() == [f"id{number}" for number in range(7)]
    stored = np.array(rows["embedding"].to_pylist(), np.float32)
    np.testing.assert_allclose(np.linalg.norm(stored, axis=1), 1, atol=2**-11)
    expected = embedder.clip.embed_images([image_of(number) for number in range(7)])
    found = to_vectors(rows)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(7), atol=1e-6, rtol=0)
    torch.testing.assert_close(found, expected, atol=2**-12, rtol=2**-10)
    assert float((found[0] - found[1]).norm()) > 0.01


def test_broken_images_and_vectors_cost_their_rows_only(embedder: ImageEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of(5)
    content = table["image_bytes"].to_pylist()
    content[1] = content[1][:100]
    table = table.set_column(1, "image_bytes", pa.array(content))
    embed, sizes = embedder.clip.model.get_image_features, []
    poison = embedder.clip.prepare_image(image_of(3))["pixel_values"]

    def overflowing(pixel_values: torch.Tensor) -> object:
        sizes.append(len(pixel_values))
        if len(pixel_values) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        features = embed(pixel_values=pixel_values)
        features.pooler_output[(pixel_values == poison).flatten(1).all(1)] = torch.nan
        return features

    monkeypatch.setattr(embedder.clip.model, "get_image_features", overflowing)
    rows, rejects, _ = embedder.process(table.slice(0, 4))
    assert rows["id"].to_pylist() == ["id0", "id2"]  # type: ignore[call-overload]
    assert [(row["id"], row["reject_reason"]) for row in rejects] == [("id1", "truncated"), ("id3", "bad_embedding")]
    rows, rejects, _ = embedder.process(table.slice(2, 3))  # one batch of three, which is halved
    assert rows["id"].to_pylist() == ["id2", "id4"] and sizes[-3:] == [3, 1, 2]  # type: ignore[call-overload]


def test_a_shard_without_a_single_vector_is_written_and_read(tmp_path: Path) -> None:
    table = Table(str(tmp_path), image_embeds_path("clip"), image_embeds_schema(WIDTH))
    table.write_shard("00000", embeds_table([], [], WIDTH))
    rows = table.read_shard("00000")
    assert rows.schema.field("embedding").type.list_size == WIDTH and to_vectors(rows).shape == (0, WIDTH)


def test_the_stage_refuses_what_no_model_can_see_and_resumes_with_the_missing_shard(
    tmp_path: Path, local_ray: None, without_ray: None
) -> None:
    uri = str(tmp_path / "data")
    with pytest.raises(MissingTableError, match="no table 'images'"):
        run_image_embeds(uri, CONFIG)
    write_folder(tmp_path / "raw", FIRST, 6)
    run_ingest(uri, IngestConfig(source=f"{tmp_path}/raw", rows_per_shard=3))
    images = Table(uri, "images", IMAGES)
    broken = images.read_shard("00001").to_pylist()
    broken[0]["image_bytes"] = broken[0]["image_bytes"][:100]  # its decoder was more lenient then
    images.write_shard("00001", pa.Table.from_pylist(broken, IMAGES))
    config = replace(CONFIG, max_reject_share=0.5)
    result = run_image_embeds(uri, config)
    assert (result.num_rows, result.rejects_by_reason, result.num_shards) == (5, {"truncated": 1}, 2)

    found = find_table(uri, "image_embeds/clip")  # as status and verify find it: the width is in the manifest
    assert found is not None and found.table.schema == image_embeds_schema(WIDTH)
    assert list(verify_dataset(uri, paths=["image_embeds/clip"])) == []
    table = found.table
    first, stamp = table.read_shard("00000"), Path(table.shard_uri("00001")).stat().st_mtime_ns
    assert first["id"].to_pylist() == images.read_shard("00000")["id"].to_pylist()
    Path(table.shard_uri("00000")).unlink()
    assert run_image_embeds(uri, replace(config, batch_size=1)).found_shards == 1
    assert Path(table.shard_uri("00001")).stat().st_mtime_ns == stamp
    torch.testing.assert_close(to_vectors(table.read_shard("00000")), to_vectors(first), atol=1e-3, rtol=0)
    assert run_image_embeds(uri, config).was_done
    with pytest.raises(StaleTableError, match=r"config\.dtype: 'float32' -> 'bfloat16'"):
        run_image_embeds(uri, replace(config, dtype="bfloat16"))
