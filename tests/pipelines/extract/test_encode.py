"""The extract stage's actor: what is stored is what the autoencoder makes of the image in its bucket."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipelines.extract.config import ExtractConfig
from pipelines.extract.encode import Cropped, LatentEncoder, find_encoder
from pipelines.extract.run import read_latents
from pipelines.shapes.drawing import draw_row
from pipelines.stages.contract import ShardOutput
from pipelines.tables.schema import LATENTS, Row
from pipelines.workers.images import decode, resize_and_crop
from sana_model.nn.autoencoder import DCAutoencoder

CONFIG = ExtractConfig(name="tiny", autoencoder="zoo://pipeline/autoencoder", resolution=64, batch_size=2)


@pytest.fixture(scope="module")
def encoder() -> LatentEncoder:
    return LatentEncoder(CONFIG)


def table_of(images: list[Image.Image]) -> pa.Table:
    rows: list[Row] = []
    for number, image in enumerate(images):
        buffer = BytesIO()
        image.save(buffer, "PNG")
        rows.append({"id": f"id{number}", "image_bytes": buffer.getvalue(), "source_uri": "x"})
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
    assert all(row["bucket"] == "64x64" and row.keys() == set(LATENTS.names) for row in rows)


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


def test_what_waits_for_its_bucket_is_bounded(encoder: LatentEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [scene(0), Image.new("RGB", (260, 64), "blue"), scene(1), Image.new("RGB", (64, 260), "red")]
    expected = latents_of(encoder.process(table_of(images)).rows)
    monkeypatch.setattr("pipelines.extract.encode.MAX_WAITING_BYTES", 64 * 64 * 3)
    sizes: list[int] = []
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda batch: (sizes.append(len(batch)), encode(batch))[1])
    found = latents_of(encoder.process(table_of(images)).rows)
    assert sizes == [1, 1, 1, 1] and list(found) == list(expected)
    for row_id, latents in found.items():
        torch.testing.assert_close(latents, expected[row_id], atol=2e-3, rtol=1e-2)


def reasons(rejects: list[Row]) -> list[tuple[str, str]]:
    return [(row["id"], row["reject_reason"]) for row in rejects]


def latents_of(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    return {row["id"]: read_latents(row, CONFIG.dtype) for row in rows}


def test_interpolation_is_as_published_or_as_configured() -> None:
    assert [CONFIG.at(side).resolved_interpolation for side in (512, 1024, 2048, 4096)] == [
        "bicubic",
        "bicubic",
        "lanczos",
        "bicubic",
    ]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8))
    found = {}
    for name, resample in (("bicubic", Image.Resampling.BICUBIC), ("lanczos", Image.Resampling.LANCZOS)):
        encoder = LatentEncoder(replace(CONFIG, interpolation=name, dtype="bfloat16"))  # type: ignore[arg-type]
        (row,) = encoder.process(table_of([image])).rows
        pixels = torch.from_numpy(np.asarray(resize_and_crop(image, 64, 64, resample)).copy()).permute(2, 0, 1)[None]
        expected = encoder.autoencoder.encode(pixels / 127.5 - 1).detach()[0]
        found[name] = read_latents(row, "bfloat16")  # type: ignore[arg-type]
        torch.testing.assert_close(found[name].float(), expected, atol=0.02, rtol=0.02)
    assert not torch.equal(found["bicubic"], found["lanczos"])


def test_images_too_small_for_their_bucket_are_refused() -> None:
    encoder = LatentEncoder(replace(CONFIG, max_upscale=1.5))
    images = [
        scene(0),
        Image.new("RGB", (43, 43), "red"),
        Image.new("RGB", (42, 42), "red"),
        Image.new("RGB", (300, 20), "red"),
    ]
    rows, rejects, _ = encoder.process(table_of(images))
    assert [row["id"] for row in rows] == ["id0", "id1"]
    assert reasons(rejects) == [("id2", "too_small_for_bucket"), ("id3", "too_small_for_bucket")]
    assert rejects[0]["detail"] == "42x42 must grow 1.52 times to fill its bucket of 64x64; max_upscale=1.5"


def test_some_images_of_a_shard_are_decoded_again(encoder: LatentEncoder) -> None:
    images = [scene(row) for row in range(7)]
    rows, _, figures = encoder.process(table_of(images))
    found = latents_of(rows)
    values = torch.stack(list(found.values())).float()
    assert figures["latents_std"] == pytest.approx(float(values.std(correction=0)), rel=1e-4)
    measured = []
    for number in (0, 2, 4, 6):  # four of seven, spread evenly
        with torch.no_grad():
            decoded = encoder.autoencoder.decode(found[f"id{number}"].float()[None])[0].clamp(-1, 1)
        pixels = torch.from_numpy(np.asarray(images[number]).copy()).permute(2, 0, 1) / 127.5 - 1
        measured.append(float(10 * torch.log10(4 / (decoded - pixels).square().mean())))
    assert figures["psnr"] == pytest.approx(np.mean(measured), abs=0.01)
    assert figures["psnr_worst"] == pytest.approx(min(measured), abs=0.01)
    assert figures["psnr"] > 20
    assert "psnr" not in LatentEncoder(replace(CONFIG, check_rows=0)).process(table_of(images[:1])).figures
    assert encoder.process(table_of(images).slice(0, 0)) == ShardOutput([], [], {})


def test_latents_that_are_not_finite_or_far_out_are_refused(encoder: LatentEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [scene(row) for row in range(5)]
    poison = torch.from_numpy(np.asarray(images[3]).copy()).permute(2, 0, 1) / 127.5 - 1
    encode = encoder.autoencoder.encode

    def overflowing(image: torch.Tensor, **options: object) -> torch.Tensor:
        """As half precision does on some images: 66,000 is finite here, and infinite once it is stored."""
        latents = encode(image, **options)
        latents[(image == poison).flatten(1).all(1), 0, 0, 0] = 66_000.0
        return latents

    monkeypatch.setattr(encoder.autoencoder, "encode", overflowing)
    rows, rejects, figures = encoder.process(table_of(images))
    assert [row["id"] for row in rows] == ["id0", "id1", "id2", "id4"]
    assert reasons(rejects) == [("id3", "bad_latents")]
    told = "1 of 512 values of the autoencoder's encoder are not finite, with compute_dtype=float32, dtype=float16"
    assert rejects[0]["detail"] == f"{told}: take float32 or bfloat16 for both"
    assert 0.5 < figures["latents_std"] < 2
    monkeypatch.undo()
    largest = max(float(latents.abs().max()) for latents in latents_of(rows).values())
    strict = LatentEncoder(replace(CONFIG, max_latent=largest * 0.99))
    refused = strict.process(table_of(images)).rejects
    assert refused and {row["reject_reason"] for row in refused} == {"bad_latents"}
    assert f"max_latent={largest * 0.99:g}" in refused[0]["detail"]


def test_batches_that_do_not_fit_are_halved_and_a_lone_image_is_refused(
    encoder: LatentEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [*(scene(row) for row in range(5)), Image.new("RGB", (260, 64), "blue")]
    expected = latents_of(encoder.process(table_of(images)).rows)
    encode = encoder.autoencoder.encode

    def small_memory(image: torch.Tensor, **options: object) -> torch.Tensor:
        if len(image) > 1 or image.shape[3] > 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return encode(image, **options)

    monkeypatch.setattr(encoder.autoencoder, "encode", small_memory)
    rows, rejects, _ = encoder.process(table_of(images))
    assert reasons(rejects) == [("id5", "out_of_memory")]
    found = latents_of(rows)
    assert list(found) == [f"id{number}" for number in range(5)]
    for row_id, latents in found.items():
        torch.testing.assert_close(latents, expected[row_id], atol=2e-3, rtol=1e-2)


def test_the_next_batch_is_decoded_while_the_model_has_this_one(
    encoder: LatentEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [scene(row) for row in range(6)]
    table = table_of(images)
    place = {content: number for number, content in enumerate(table["image_bytes"].to_pylist())}
    begun = [threading.Event() for _ in images]
    calls = iter(range(3))
    encode = encoder.encode

    def decoding(content: bytes) -> Image.Image:
        begun[place[content]].set()
        return decode(content)

    def waiting(batch: Sequence[Cropped]) -> list[torch.Tensor]:
        following = 2 * next(calls) + 2
        assert following >= len(images) or begun[following].wait(60)
        return encode(batch)

    monkeypatch.setattr("pipelines.extract.encode.decode", decoding)
    monkeypatch.setattr(encoder, "encode", waiting)
    assert len(encoder.process(table).rows) == 6


def test_several_resolutions_from_one_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []

    def counting(content: bytes) -> Image.Image:
        decoded.append(content)
        return decode(content)

    config = replace(CONFIG, max_upscale=1.0)
    images = [*(scene(row).resize((160, 160)) for row in range(3)), scene(4)]
    table = table_of(images)
    alone = {side: LatentEncoder(config.at(side)).process(table) for side in (64, 128)}
    monkeypatch.setattr("pipelines.extract.encode.decode", counting)
    together = LatentEncoder(config, also=[128]).process_all(table, [64, 128])
    assert len(decoded) == 4
    assert reasons(together[64].rejects) == [] and reasons(together[128].rejects) == [("id3", "too_small_for_bucket")]
    for side in (64, 128):
        assert together[side].rejects == alone[side].rejects
        found, expected = latents_of(together[side].rows), latents_of(alone[side].rows)
        assert list(found) == list(expected)
        for row_id, latents in found.items():
            torch.testing.assert_close(latents, expected[row_id], atol=2e-3, rtol=1e-2)
    assert (config.at(128).batch_size, config.at(32).batch_size, config.at(128).path) == (1, 8, "latents/tiny-128")


def test_the_version_of_an_autoencoder_is_that_of_its_encoder_whatever_its_layout_and_decoder(tmp_path: Path) -> None:
    """A decoder that was trained further makes no latents stale."""

    def version(layout: str, change: Callable[[DCAutoencoder], object] = lambda model: None, **settings: float) -> str:
        model = DCAutoencoder.from_pretrained("zoo://pipeline/autoencoder", **settings)
        with torch.no_grad():
            change(model)
        place = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(place, layout=layout)
        return find_encoder(str(place)).version

    first = find_encoder("zoo://pipeline/autoencoder")
    assert first.path == "zoo://pipeline/autoencoder" and first.version.startswith("encoder sha256:")
    for layout in ("sana", "diffusers"):
        assert version(layout) == version(layout, lambda model: next(model.decoder.parameters()).add_(0.1)) == first.version
        changed = version(layout, lambda model: list(model.encoder.parameters())[-1].view(-1)[0].add_(0.001))
        assert changed != first.version and version(layout, scaling_factor=0.5) != first.version


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"max_upscale=0 must be positive"):
        replace(CONFIG, max_upscale=0)
    with pytest.raises(ValueError, match=r"batch_size=0 must be at least 1"):
        replace(CONFIG, batch_size=0)
