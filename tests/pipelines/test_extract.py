"""The extract stage's actor: what is stored is what the autoencoder makes of the image in its bucket."""

from dataclasses import replace
from io import BytesIO

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipelines.extract import ExtractConfig, LatentEncoder, read_latents
from pipelines.shapes import draw_row
from sana_model.autoencoder import DCAutoencoder

CONFIG = ExtractConfig(name="tiny", autoencoder="zoo://pipeline/autoencoder", resolution=64, scorer="clip", batch_size=2)
CAPTIONS = [{"captioner": "a", "caption": "one", "clip_score": 20.0}, {"captioner": "b", "caption": "two", "clip_score": 26.0}]


def table_of(images: list[Image.Image]) -> pa.Table:
    rows = []
    for number, image in enumerate(images):
        buffer = BytesIO()
        image.save(buffer, "PNG")
        rows.append({"id": f"id{number}", "image_bytes": buffer.getvalue(), "source_uri": "x", "captions": CAPTIONS})
    return pa.Table.from_pylist(rows)


def scene(row: int) -> Image.Image:
    return Image.fromarray(draw_row(10_000_700 + row)[1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_stored_latents_are_those_of_the_autoencoder(dtype: str) -> None:
    images = [scene(row) for row in range(5)]
    rows, rejects, _ = LatentEncoder(replace(CONFIG, dtype=dtype)).process(table_of(images))  # type: ignore[arg-type]
    assert rejects == [] and [row["id"] for row in rows] == [f"id{number}" for number in range(5)]
    autoencoder = DCAutoencoder.from_pretrained(CONFIG.autoencoder, dtype=torch.float32).eval()
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = autoencoder.encode(pixels)
    found = torch.stack([read_latents(row, dtype) for row in rows])  # type: ignore[arg-type]
    assert found.dtype == getattr(torch, dtype) and found.shape == (5, 8, 8, 8)
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.01)
    assert 0.8 < float(found.float().std()) < 1.2  # scaled
    assert all(row["bucket"] == "64x64" and row["captions"] == CAPTIONS for row in rows)


def test_each_image_goes_to_the_bucket_of_its_shape_and_order_is_kept() -> None:
    images = [scene(0), Image.new("RGB", (300, 100), "red"), scene(1), Image.new("RGB", (90, 270), "blue"), scene(2)]
    rows, _, _ = LatentEncoder(CONFIG).process(table_of(images))
    assert [row["id"] for row in rows] == [f"id{number}" for number in range(5)]
    for row in rows:
        height, width = (int(side) for side in row["bucket"].split("x"))
        assert (row["height"], row["width"]) == (height // 8, width // 8)
        assert len(row["latents"]) == 2 * row["channels"] * row["height"] * row["width"]
    assert rows[0]["bucket"] == "64x64"
    assert rows[1]["width"] > 2 * rows[1]["height"] and rows[3]["height"] > 2 * rows[3]["width"]


def test_images_without_a_good_caption_are_refused() -> None:
    encoder = LatentEncoder(replace(CONFIG, min_best_score=27.0))
    rows, rejects, _ = encoder.process(table_of([scene(0)]))
    assert rows == [] and rejects[0]["reject_reason"] == "low_score" and "26.0" in rejects[0]["detail"]
    assert len(LatentEncoder(replace(CONFIG, min_best_score=26.0)).process(table_of([scene(0)]))[0]) == 1
