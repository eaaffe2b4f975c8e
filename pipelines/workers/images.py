"""Pictures as pure functions: bytes to RGB, resize and crop, perceptual hash, arrays for the models.

Every stage decodes here, so that an image looks the same to the captioners, to CLIP and to the DC-AE.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import ClassVar

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from pipelines.tables.rejects import RowRefused
from pipelines.workers.whole import check_whole
from sana_model.pixels import to_8_bits

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""Formats that are decoded, by Pillow's names. Pillow knows more, but some (EPS) start other programs."""
REFUSED_EXTENSIONS = (".heic", ".heif", ".svg", ".psd", ".eps", ".ico", ".tga", ".pcx", ".jxl")
# fmt: off
EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm",
    ".pgm", *REFUSED_EXTENSIONS,
)
# fmt: on
"""File names that count as images. Those that cannot be decoded are refused, not passed over."""
PILLOW_MAX_PIXELS = 2 * 89_478_485
"""Pillow refuses larger images by itself."""
MAX_JPEG_SCANS = 200
"""A progressive JPEG has about ten; each costs a pass over the whole image, and a few hundred KB can hold thousands."""
USUAL_JPEG_SCANS = 20
MAX_SCANNED_PIXELS = 2_000_000_000
"""Scans times pixels of a JPEG that has more than USUAL_JPEG_SCANS: about 5 seconds."""
MIN_DECODE_BYTES = 2**26
# By their first bytes, at an offset: formats that people have, and that are not decoded.
SIGNATURES = (
    (4, b"ftyphei", "HEIC"),
    (4, b"ftyphev", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftypmsf1", "HEIF"),
    (0, b"%!PS-Adobe", "EPS or PostScript"),
    (0, b"\xc5\xd0\xd3\xc6", "EPS"),
    (0, b"%PDF-", "PDF"),
    (0, b"8BPS", "PSD"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"\0\0\2\0", "CUR or TGA"),
    (0, b"\x0a\x05\x01", "PCX"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
)
TEXT_SIGNATURES = ((b"<svg", "SVG"), (b"<!doctype svg", "SVG"))
HEAD = 1024  # bytes looked through for the beginning of a text format
ORIENTATION_TAG = 0x0112
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that undoes each EXIF orientation."""
HASH_SIDE, HASH_SAMPLES = 8, 32


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """Limits of images, checked on the header before anything is decoded.

    Args:
        min_size: of the shorter side, pixels.
        max_bytes: of the file; larger ones are not even fetched where their size is known before.
        max_pixels: width times height; a decoded pixel takes 3 to 4 bytes. At most 178956970.
        max_aspect_ratio: longer by shorter side. The widest bucket has 4: what is longer loses its ends.
        decode_seconds: CPU seconds that decoding may take, before the image is refused as made to be slow.
        decode_bytes: of memory that decoding may take.
    """

    NO_VALUE: ClassVar = ("decode_seconds", "decode_bytes")

    min_size: int = 16
    max_bytes: int = 64 * 2**20
    max_pixels: int = 80_000_000
    max_aspect_ratio: float = 6.0
    decode_seconds: float = 30.0
    decode_bytes: int = 3 * 2**30

    def __post_init__(self) -> None:
        if not 0 < self.max_pixels <= PILLOW_MAX_PIXELS:
            raise ValueError(
                f"max_pixels={self.max_pixels} must be between 1 and {PILLOW_MAX_PIXELS}, which is Pillow's own limit"
            )
        if self.min_size < 1 or self.max_bytes < 1:
            raise ValueError(f"min_size={self.min_size}, max_bytes={self.max_bytes}: both must be at least 1")
        if self.max_aspect_ratio < 1:
            raise ValueError(f"max_aspect_ratio={self.max_aspect_ratio} must be at least 1 (it is longer by shorter side)")
        least = MIN_DECODE_BYTES + 2 * self.max_bytes
        if self.decode_seconds <= 0 or self.decode_bytes < least:
            raise ValueError(
                f"decode_seconds={self.decode_seconds} must be positive, decode_bytes={self.decode_bytes} at least {least} "
                f"for max_bytes={self.max_bytes}"
            )


def decode(image_bytes: bytes, limits: ImageLimits | None = None) -> Image.Image:
    """Bytes to an RGB image, upright.

    EXIF orientation is applied, an embedded colour profile turned to sRGB, transparency put on white, 16 bits scaled to 8;
    of an animation the first frame is taken.

    Args:
        limits: None for images that `ingest` let in.

    Raises:
        RowRefused: not_an_image, unsupported_format, too_many_bytes, too_large, too_small, extreme_aspect_ratio, truncated,
            corrupt or unsupported_pixels.
    """
    return to_rgb(open_image(image_bytes, limits))


def open_image(image_bytes: bytes, limits: ImageLimits | None = None) -> Image.Image:
    """Read the header (format, size) and check the limits; nothing is decoded. Raises as `decode`."""
    if limits is not None and len(image_bytes) > limits.max_bytes:
        raise too_many_bytes(len(image_bytes), limits.max_bytes)
    try:
        with _decoding():
            image = Image.open(BytesIO(image_bytes), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise _unidentified(image_bytes) from error
    if limits is not None:
        _check_limits(*image.size, limits)
        check_whole(image_bytes, image.format)
    if image.format in ("JPEG", "MPO"):
        _check_scans(image_bytes.count(b"\xff\xda"), image.width * image.height)
    return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) that an opened image has after `to_rgb`; nothing is decoded."""
    return image.size[::-1] if _orientation(image) in (5, 6, 7, 8) else image.size


def _check_scans(scans: int, pixels: int) -> None:
    if scans > MAX_JPEG_SCANS or (scans > USUAL_JPEG_SCANS and scans * pixels > MAX_SCANNED_PIXELS):
        raise RowRefused("too_large", f"{scans} scans over {pixels} pixels: a JPEG made to be slow")


def too_many_bytes(size: int, max_bytes: int) -> RowRefused:
    return RowRefused("too_many_bytes", f"{size} bytes, over max_bytes={max_bytes}")


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened image of any mode to RGB, as `decode` says and raising as it does."""
    with _decoding():
        image.load()
    transpose = TRANSPOSE.get(_orientation(image))  # after loading: Pillow turns TIFF by itself, and then says 1
    profile = image.info.get("icc_profile")
    try:
        image = to_8_bits(image)
    except ValueError as error:
        raise RowRefused("unsupported_pixels", str(error)) from error
    try:
        rgb = _onto_white(image, profile) if image.has_transparency_data else _to_srgb(image, profile)
    except ValueError as error:
        raise RowRefused("unsupported_pixels", f"mode {image.mode} ({error})") from error
    return rgb if transpose is None else rgb.transpose(transpose)


def upright_alpha(image: Image.Image) -> Image.Image | None:
    """The alpha channel, mode L, of an image that `to_rgb` has taken, upright as that makes it; None if all of it is opaque."""
    transpose = TRANSPOSE.get(_orientation(image))
    image = to_8_bits(image)
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    if alpha.getextrema() == (255, 255):
        return None
    return alpha if transpose is None else alpha.transpose(transpose)


@contextmanager
def _decoding() -> Iterator[None]:
    """Turn errors of a decoder into RowRefused. Hostile bytes make Pillow raise errors of nearly every type."""
    try:
        yield
    except UnidentifiedImageError:
        raise
    except (Image.DecompressionBombError, MemoryError) as error:
        raise RowRefused("too_large", str(error) or "out of memory") from error
    except Exception as error:
        text = str(error) or type(error).__name__
        lower = text.lower()
        if "decompressed data too large" in lower or "too much memory" in lower:  # text chunks of PNG
            raise RowRefused("too_large", text) from error
        cut_off = isinstance(error, EOFError) or any(word in lower for word in ("truncated", "unexpected end", "eof"))
        raise RowRefused("truncated" if cut_off else "corrupt", text) from error


def _unidentified(image_bytes: bytes) -> RowRefused:
    for offset, signature, name in SIGNATURES:
        if image_bytes.startswith(signature, offset):
            return RowRefused("unsupported_format", f"{name}: convert it to JPEG, PNG or WebP")
    head = image_bytes[:HEAD].lower()
    for word, name in TEXT_SIGNATURES:
        if word in head and b"<html" not in head:
            return RowRefused("unsupported_format", f"{name}: draw it into a PNG")
    # The bytes themselves are not shown: a list may have named a file that whoever reads the rejects must not see.
    return RowRefused("not_an_image", f"{len(image_bytes)} bytes in none of the formats {', '.join(FORMATS)}")


def resize_and_crop(
    image: Image.Image, height: int, width: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """Scale so that the image covers (height, width), with anti-aliasing, and cut out the middle.

    The part that will remain is scaled to the very size, so no side is first rounded to whole pixels.
    """
    scale = max(height / image.height, width / image.width)
    kept_height, kept_width = min(height / scale, image.height), min(width / scale, image.width)
    left, top = (image.width - kept_width) / 2, (image.height - kept_height) / 2
    box = (left, top, left + kept_width, top + kept_height)
    return image.resize((width, height), resample, box=box)


def perceptual_hash(image: Image.Image) -> str:
    """64 bits as 16 hex digits; small Hamming distances mean images that look alike.

    The signs of the lowest 8x8 frequencies (DCT) of the image at 32x32 in gray, against their median: pHash.
    """
    gray = image.convert("L").resize((HASH_SAMPLES, HASH_SAMPLES), Image.Resampling.BOX)
    basis = _low_cosines()
    frequencies = basis @ np.asarray(gray, dtype=np.float64) @ basis.T
    frequencies = frequencies.round(3)  # a plain image's are zero but for noise
    bits = frequencies > np.median(frequencies)
    return np.packbits(bits).tobytes().hex()


@cache
def _low_cosines() -> np.ndarray:
    """The first rows of the DCT-II: (HASH_SIDE, HASH_SAMPLES)."""
    samples = (np.arange(HASH_SAMPLES) + 0.5) / HASH_SAMPLES
    return np.cos(np.pi * np.arange(HASH_SIDE)[:, None] * samples)


def _check_limits(width: int, height: int, limits: ImageLimits) -> None:
    if width * height > limits.max_pixels:
        raise RowRefused("too_large", f"{width}x{height} has more than max_pixels={limits.max_pixels}")
    short, long = sorted((width, height))
    if short < limits.min_size:
        raise RowRefused("too_small", f"{width}x{height} has a side under min_size={limits.min_size}")
    if long > short * limits.max_aspect_ratio:
        detail = f"{width}x{height} is longer than max_aspect_ratio={limits.max_aspect_ratio:g}"
        raise RowRefused("extreme_aspect_ratio", detail)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 (upright) if the EXIF data is missing or broken."""
    try:
        with _decoding():
            return image.getexif().get(ORIENTATION_TAG, 1)
    except RowRefused:
        return 1


def _onto_white(image: Image.Image, profile: bytes | None) -> Image.Image:
    rgba = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, (255, 255, 255))
    canvas.paste(_to_srgb(rgba.convert("RGB"), profile), mask=rgba.getchannel("A"))
    return canvas


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert to RGB, by the embedded colour profile if there is one that fits."""
    if image.mode == "LAB":
        return _convert_profile(image, ImageCms.createProfile("LAB"))
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    if not profile:
        return image.convert("RGB")
    try:
        embedded = ImageCms.ImageCmsProfile(BytesIO(profile))
        if image.mode == "RGB" and "sRGB" in ImageCms.getProfileDescription(embedded):
            return image
        return _convert_profile(image, embedded)
    except (ImageCms.PyCMSError, OSError, ImportError):  # a broken or foreign profile, or a Pillow without lcms
        return image.convert("RGB")


def _convert_profile(image: Image.Image, profile: ImageCms.ImageCmsProfile | ImageCms.core.CmsProfile) -> Image.Image:
    converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert converted is not None  # that is for inPlace
    return converted


def to_png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def image_grid(images: Sequence[Image.Image], columns: int = 8, *, gap: int = 2) -> Image.Image:
    """Images of one size in rows, on white. Raises ValueError if there is none."""
    if not images:
        raise ValueError("images=[] is empty: a grid needs one picture at least")
    width, height = images[0].size
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * (width + gap), index // columns * (height + gap)))
    return grid


def cut_grid(grid: Image.Image, count: int, *, size: int, columns: int = 8, gap: int = 2) -> list[Image.Image]:
    """The first `count` pictures that `image_grid` put together, each of `size` x `size` px."""
    columns = min(columns, count)
    corners = [(index % columns * (size + gap), index // columns * (size + gap)) for index in range(count)]
    return [grid.crop((x, y, x + size, y + size)) for x, y in corners]
