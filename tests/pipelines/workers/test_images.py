"""Every kind of picture becomes upright 8-bit sRGB, and what is no picture is refused with a reason."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipelines.tables.rejects import RowRefused
from pipelines.workers.images import (
    ORIENTATION_TAG,
    TRANSPOSE,
    ImageLimits,
    decode,
    image_grid,
    open_image,
    perceptual_hash,
    resize_and_crop,
)


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def gradient(height: int = 40, width: int = 60) -> Image.Image:
    """Red grows to the right, green downwards."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(
        np.stack([x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), 0 * x + 90], -1).astype(np.uint8)
    )


def difference(image: Image.Image, expected: Image.Image) -> float:
    return float(np.abs(np.asarray(image, dtype=np.int32) - np.asarray(expected, dtype=np.int32)).mean())


def refusal(image_bytes: bytes, limits: ImageLimits | None = None) -> str:
    with pytest.raises(RowRefused) as caught:
        decode(image_bytes, limits)
    assert caught.value.detail
    return caught.value.reason


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM"])
def test_formats(format):
    content = encode(gradient(), format)
    assert open_image(content).format == format
    image = decode(content)
    assert (image.mode, image.size) == ("RGB", (60, 40))
    assert difference(image, gradient()) < 20


def test_16_bit_is_scaled_and_not_clipped():
    values = np.linspace(0, 65535, 32 * 32).reshape(32, 32).round().astype(np.uint16)
    expected = np.repeat((values / 257).round().astype(np.uint8)[..., None], 3, -1)
    whole = Image.fromarray(values.astype(np.int32))
    for content in (encode(Image.fromarray(values), "PNG"), encode(Image.fromarray(values), "TIFF"), encode(whole, "TIFF")):
        np.testing.assert_array_equal(np.asarray(decode(content)), expected)


def test_float_is_scaled_within_0_to_1_and_refused_beyond():
    values = np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32)
    assert np.asarray(decode(encode(Image.fromarray(values), "TIFF"))).max() == 255
    assert refusal(encode(Image.fromarray(values * 7), "TIFF")) == "unsupported_pixels"
    assert refusal(encode(Image.fromarray(values * np.nan), "TIFF")) == "unsupported_pixels"


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_few_colours(mode):
    image = gradient().convert(mode)
    assert difference(decode(encode(image, "PNG")), image.convert("RGB")) == 0


def test_cmyk():
    assert difference(decode(encode(gradient().convert("CMYK"), "JPEG", quality=95)), gradient()) < 6


def test_transparent_becomes_white():
    for mode in ("RGBA", "LA"):
        image = Image.new("RGBA", (32, 32), (255, 0, 0, 0)).convert(mode)
        assert np.asarray(decode(encode(image, "PNG"))).min() == 255
    half = decode(encode(Image.new("RGBA", (32, 32), (0, 0, 0, 128)), "PNG"))
    assert half.getpixel((5, 5)) == (127, 127, 127)
    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.putpixel((3, 3), 1)
    image = decode(encode(palette, "PNG", transparency=0))
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((3, 3)) == (0, 200, 0)


@pytest.mark.parametrize("format", ["WEBP", "GIF", "PNG"])
def test_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    content = encode(frames[0], format, save_all=True, append_images=frames[1:], duration=100)
    r, g, b = decode(content).getpixel((10, 10))
    assert r > 250 and g < 5 and b < 5


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(format, orientation):
    upright = gradient()
    inverse = {Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270, Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90}
    undo = TRANSPOSE.get(orientation)
    stored = upright if undo is None else upright.transpose(inverse.get(undo, undo))
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    image = decode(encode(stored, format, exif=exif))
    assert image.size == upright.size
    assert difference(image, upright) < 6


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_means_upright():
    image = decode(encode(gradient(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff garbage"))
    assert image.size == (60, 40)


def test_colour_profile_is_turned_to_srgb():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = decode(encode(gradient(), "PNG", icc_profile=swap_red_and_green(srgb)))
    r, g, b = gradient().split()
    assert difference(swapped, Image.merge("RGB", (g, r, b))) < 3
    foreign = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for profile in (srgb, foreign, b"no profile at all"):
        assert difference(decode(encode(gradient(), "PNG", icc_profile=profile)), gradient()) == 0


def swap_red_and_green(profile: bytes) -> bytes:
    """An sRGB profile with the names of two primaries exchanged in its tag table, and described as another."""
    table = profile.replace(b"rXYZ", b"????", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"????", b"gXYZ", 1)
    return table.replace("sRGB".encode("utf-16-be"), "other".encode("utf-16-be")[:8])


def test_refused_by_the_header():
    limits = ImageLimits(min_size=16, max_pixels=10_000, max_aspect_ratio=3)
    assert refusal(b"", limits) == "not_an_image"
    assert refusal(b"a text that was renamed to .jpg", limits) == "not_an_image"
    assert refusal(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", limits) == "unsupported_format"
    assert refusal(encode(gradient(1, 2), "PNG"), limits) == "too_small"
    assert refusal(encode(gradient(20, 61), "PNG"), limits) == "extreme_aspect_ratio"
    assert refusal(encode(gradient(101, 100), "PNG"), limits) == "too_large"
    assert decode(encode(gradient(100, 100), "PNG"), limits).size == (100, 100)


def huge_png(side: int) -> bytes:
    """A PNG of a few bytes that would unfold into side^2 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_000, 60_000])
def test_decompression_bomb_is_refused_before_decoding(side):
    """By our limit, and beyond Pillow's by Pillow's."""
    assert refusal(huge_png(side), ImageLimits()) == "too_large"
    with pytest.raises(ValueError, match="max_pixels=1000000000 must be"):
        ImageLimits(max_pixels=10**9)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_cut_off_files(format):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = encode(noise, format)
    assert refusal(content[: len(content) * 2 // 3]) in ("truncated", "not_an_image", "corrupt")
    if format in ("JPEG", "PNG"):
        assert refusal(content[: len(content) * 2 // 3]) == "truncated"


def test_damaged_inside():
    content = bytearray(encode(gradient(200, 200), "PNG"))
    content[len(content) // 2] ^= 0xFF
    assert refusal(bytes(content)) in ("corrupt", "truncated")


def test_resize_and_crop_takes_the_middle():
    image = Image.new("RGB", (300, 100), "red")
    image.paste((0, 0, 255), (100, 0, 200, 100))
    cropped = np.asarray(resize_and_crop(image, 50, 50))
    assert cropped.shape == (50, 50, 3)
    assert (cropped[:, 3:-3] == (0, 0, 255)).all()  # the filter mixes a little red in at the borders
    assert resize_and_crop(gradient(33, 77), 16, 64).size == (64, 16)
    assert difference(resize_and_crop(gradient(), 40, 60), gradient()) == 0


def test_resize_is_antialiased():
    """A fine checkerboard becomes gray, and not a pattern of some of its pixels."""
    board = Image.fromarray((np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    small = np.asarray(resize_and_crop(board, 32, 32), dtype=np.int32)
    assert np.abs(small - 127).max() < 8


def test_perceptual_hash_is_near_for_alike_and_far_for_others():
    rng = np.random.default_rng(0)
    blurred = [Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((200, 160)) for _ in range(6)]

    def distance(first: Image.Image, second: Image.Image) -> int:
        return (int(perceptual_hash(first), 16) ^ int(perceptual_hash(second), 16)).bit_count()

    for image in blurred:
        assert len(perceptual_hash(image)) == 16
        assert distance(image, decode(encode(image.resize((100, 80)), "JPEG", quality=50))) <= 6
        assert all(distance(image, other) > 14 for other in blurred if other is not image)
    plain = [perceptual_hash(Image.new("RGB", (64, 64), color)) for color in ("white", "gray", "black")]
    assert all(int(one, 16).bit_count() <= 1 for one in plain)


def test_a_grid_holds_every_picture() -> None:
    images = [Image.new("RGB", (10, 8), color) for color in ("red", "green", "blue")]
    grid = image_grid(images, columns=2)
    assert grid.size == (22, 18)
    assert [grid.getpixel(place) for place in ((0, 0), (12, 0), (0, 10))] == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
    with pytest.raises(ValueError, match="empty"):
        image_grid([])
