"""Images as real data holds them, and some made to do harm, each with the result that decoding must give."""

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

Pixels = Callable[[np.ndarray], bool]
"""Tells whether decoded pixels, (H, W, 3) int64, are right."""

CUT = ("truncated", "corrupt", "not_an_image")
HEIGHT, WIDTH = 40, 60


@dataclass(frozen=True)
class Hostile:
    """A file and its expected result: a row of this format and size, or a reject with one of these reasons."""

    name: str
    content: bytes
    reasons: tuple[str, ...] = ()
    size: tuple[int, int] = (WIDTH, HEIGHT)
    format: str = ""
    pixels: Pixels | None = None


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def gradient(height: int = HEIGHT, width: int = WIDTH, blue: int = 90) -> Image.Image:
    """Draw a picture in which red grows to the right and green downwards."""
    y, x = np.mgrid[:height, :width]
    red, green = x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1)
    return Image.fromarray(np.stack([red, green, 0 * x + blue], -1).astype(np.uint8))


def noise(height: int = 64, width: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def near(expected: Image.Image, tolerance: float) -> Pixels:
    """Return the mean absolute difference, in levels of 255."""
    wanted = np.asarray(expected.convert("RGB"), dtype=np.int64)
    return lambda pixels: pixels.shape == wanted.shape and float(np.abs(pixels - wanted).mean()) <= tolerance


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, color: int = 2, interlaced: bool = False) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + b"".join(chunks) + png_chunk(b"IEND", b"")


def png_with(chunk: bytes) -> bytes:
    """Insert one more chunk after the header of a good PNG."""
    content = encode(gradient(), "PNG")
    return content[:33] + chunk + content[33:]


def interlaced_png() -> bytes:
    """Write an interlaced PNG (Adam7), which Pillow can read but not write."""
    pixels = np.asarray(gradient())
    data = b""
    for x, y, dx, dy in ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)):
        for row in pixels[y::dy, x::dx]:
            data += b"\0" + row.tobytes()
    return png(WIDTH, HEIGHT, png_chunk(b"IDAT", zlib.compress(data)), interlaced=True)


def tiff(tags: list[tuple[int, int, int, int]], data: bytes) -> bytes:
    """Write a little-endian TIFF with one directory; `data` begins at byte 8. Tags: (tag, type, count, value)."""
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


def lab_tiff() -> bytes:
    """Write a TIFF in Lab color with L = 128 of 255 and no color: a middle gray."""
    pixels = bytes([128, 0, 0]) * (WIDTH * HEIGHT)
    bits = struct.pack("<3H", 8, 8, 8)
    tags = [
        (256, 3, 1, WIDTH),
        (257, 3, 1, HEIGHT),
        (258, 3, 3, 8 + len(pixels)),
        (259, 3, 1, 1),
        (262, 3, 1, 8),
        (273, 4, 1, 8),
        (277, 3, 1, 3),
        (278, 3, 1, HEIGHT),
        (279, 4, 1, len(pixels)),
    ]
    return tiff(tags, pixels + bits)


def huge_tile_tiff() -> bytes:
    """Write a small image that claims to hold one tile of 65520 x 65520."""
    numbers = [(256, 32), (257, 32), (258, 8), (259, 8), (262, 1), (277, 1), (322, 65520), (323, 65520), (324, 8), (325, 4)]
    return tiff([(tag, 4, 1, value) for tag, value in numbers], b"\0\0\0\0")


def jpeg_segments(content: bytes) -> Iterator[int]:
    """Find where each JPEG marker begins, up to the scan."""
    position = 2
    while content[position + 1] != 0xDA:
        yield position
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    yield position


def png_chunks(content: bytes) -> Iterator[int]:
    position = 8
    while position < len(content):
        yield position
        position += 12 + int.from_bytes(content[position : position + 4], "big")


def cut_files() -> Iterator[Hostile]:
    """Cut each format at and within every part of its header, and in the middle of its pixels."""
    jpeg, webp, lossless = encode(noise(), "JPEG"), encode(noise(), "WEBP"), encode(noise(), "WEBP", lossless=True)
    gif, tiff_file, bmp = encode(noise(), "GIF"), encode(noise(), "TIFF"), encode(noise(), "BMP")
    progressive, image = encode(noise(), "JPEG", progressive=True), encode(noise(), "PNG")
    cuts: dict[str, tuple[bytes, list[int]]] = {
        "jpg": (jpeg, [1, 2, *(at + more for at in jpeg_segments(jpeg) for more in (0, 3, 9)), len(jpeg) // 2]),
        "png": (image, [4, 8, *(at + more for at in png_chunks(image) for more in (0, 6, 12)), len(image) // 2]),
        "webp": (webp, [4, 10, 12, 16, 20, 26, 30, len(webp) // 2]),
        "lossless.webp": (lossless, [18, 22, 25, len(lossless) // 2]),
        "gif": (gif, [3, 6, 9, 13, 400, 13 + 768, 13 + 768 + 5, len(gif) // 2]),
        "tiff": (tiff_file, [2, 4, 7, 8, len(tiff_file) // 2]),
        "bmp": (bmp, [1, 10, 14, 30, 54, len(bmp) // 2]),
    }
    for ending, (content, places) in cuts.items():
        for place in sorted(set(places)):
            if place < len(content) - 12:  # a PNG that lacks but its last mark is whole
                yield Hostile(f"cut_{place:05}.{ending}", content[:place], CUT)
    yield Hostile("progressive_cut.jpg", progressive[: len(progressive) // 2], ("truncated",))
    smooth = {ending: encode(gradient(200, 300), format) for ending, format in (("jpg", "JPEG"), ("png", "PNG"))}
    for ending, content in smooth.items():  # a download that got its size first, and broke off
        yield Hostile(f"zeros.{ending}", content[: len(content) // 2] + bytes(10_000), ("truncated", "corrupt"))


def turned() -> Iterator[Hostile]:
    """Write all eight EXIF orientations; the decoded picture is the same upright gradient each time."""
    upright = gradient()
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }
    for orientation, image in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield Hostile(f"turned_{orientation}.jpg", encode(image, "JPEG", exif=exif, quality=95), pixels=near(upright, 6))


def depths_and_colors() -> Iterator[Hostile]:
    """Write pictures that are not 8-bit RGB."""
    picture = gradient()
    gray16 = np.linspace(0, 65535, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH)
    gray = Image.fromarray((gray16 / 257).round().astype(np.uint8))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    clear = Image.new("RGBA", (WIDTH, HEIGHT), (255, 0, 0, 0))
    palette = Image.new("P", (WIDTH, HEIGHT), 0)
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.paste(1, (0, 0, 30, HEIGHT))
    half = Image.new("RGB", (WIDTH, HEIGHT), "white")
    half.paste((0, 200, 0), (0, 0, 30, HEIGHT))
    frames = [gradient(), gradient(blue=255)]
    animated = {"save_all": True, "append_images": frames[1:], "duration": 50}
    deep = png_chunk(
        b"IDAT", zlib.compress(b"".join(b"\0" + struct.pack(">HHH", 65535, 32896, 0) * WIDTH for _ in range(HEIGHT)))
    )
    flat = Image.new("RGB", (WIDTH, HEIGHT), (255, 128, 0))
    yield Hostile("gray.jpg", encode(gray, "JPEG", quality=95), pixels=near(gray, 3))
    yield Hostile("gray_alpha.png", encode(clear.convert("LA"), "PNG"), pixels=lambda pixels: pixels.min() == 255)
    yield Hostile("clear.png", encode(clear, "PNG"), pixels=lambda pixels: pixels.min() == 255)
    yield Hostile("clear.webp", encode(clear, "WEBP"), pixels=lambda pixels: pixels.min() == 255)
    yield Hostile("bilevel.png", encode(picture.convert("1"), "PNG"), pixels=near(picture.convert("1"), 0))
    yield Hostile(
        "bilevel.tiff", encode(picture.convert("1"), "TIFF", compression="group4"), pixels=near(picture.convert("1"), 0)
    )
    yield Hostile("palette.png", encode(picture.convert("P"), "PNG"), pixels=near(picture.convert("P"), 0))
    yield Hostile("palette_clear.png", encode(palette, "PNG", transparency=0), pixels=near(half, 0))
    yield Hostile("palette_alphas.png", encode(palette, "PNG", transparency=b"\0\xff"), pixels=near(half, 0))
    yield Hostile("palette_clear.gif", encode(palette, "GIF", transparency=0), pixels=near(half, 0))
    yield Hostile("cmyk.jpg", encode(picture.convert("CMYK"), "JPEG", quality=95), pixels=near(picture, 6))
    foreign = encode(picture.convert("CMYK"), "JPEG", quality=95, icc_profile=srgb)
    yield Hostile("cmyk_rgb_profile.jpg", foreign, pixels=near(picture, 6))
    inks = Image.new("CMYK", (WIDTH, HEIGHT), (128, 0, 0, 0))  # without the profile its red would be 127
    yield Hostile("cmyk_profile.tiff", encode(inks, "TIFF", icc_profile=cmyk_profile()),
                  pixels=near(Image.new("RGB", (WIDTH, HEIGHT), (188, 255, 255)), 3))  # fmt: skip
    yield Hostile("16_bit.png", encode(Image.fromarray(gray16.round().astype(np.uint16)), "PNG"), pixels=near(gray, 0))
    yield Hostile("16_bit.tiff", encode(Image.fromarray(gray16.round().astype(np.uint16)), "TIFF"), pixels=near(gray, 0))
    yield Hostile("16_bit_color.png", png(WIDTH, HEIGHT, deep, depth=16), pixels=near(flat, 0))
    floats = (gray16 / 65535).astype(np.float32)
    yield Hostile("float.tiff", encode(Image.fromarray(floats), "TIFF"), pixels=near(gray, 1))
    yield Hostile("float_beyond.tiff", encode(Image.fromarray(floats * 9), "TIFF"), ("unsupported_pixels",))
    yield Hostile("float_nan.tiff", encode(Image.fromarray(floats * np.nan), "TIFF"), ("unsupported_pixels",))
    yield Hostile("lab.tiff", lab_tiff(), pixels=lambda pixels: bool((np.abs(pixels - 119) < 4).all()))
    yield Hostile("interlaced.png", interlaced_png(), pixels=near(picture, 0))
    yield Hostile("animated.gif", encode(frames[0], "GIF", **animated), pixels=near(frames[0], 20))
    yield Hostile("animated.webp", encode(frames[0], "WEBP", lossless=True, **animated), pixels=near(frames[0], 0))
    yield Hostile("animated.apng", encode(frames[0], "PNG", **animated), pixels=near(frames[0], 0))
    yield Hostile("two.mpo.jpg", encode(frames[0], "MPO", quality=95, save_all=True, append_images=frames[1:]), format="MPO",
                  pixels=near(frames[0], 6))  # fmt: skip
    yield Hostile(
        "pages.tiff", encode(gradient(), "TIFF", save_all=True, append_images=[gradient(blue=255)]), pixels=near(frames[0], 0)
    )
    yield Hostile("progressive.jpg", encode(picture, "JPEG", progressive=True, quality=95), pixels=near(picture, 6))
    yield Hostile("profile.png", encode(picture, "PNG", icc_profile=srgb), pixels=near(picture, 0))
    yield Hostile("broken_profile.png", encode(gradient(blue=91), "PNG", icc_profile=b"\0" * 128 + b"junk"),
                  pixels=near(gradient(blue=91), 0))  # fmt: skip
    yield Hostile("cut_profile.jpg", encode(gradient(blue=92), "JPEG", icc_profile=srgb[:200], quality=95),
                  pixels=near(gradient(blue=92), 6))  # fmt: skip
    yield Hostile("avif.avif", encode(picture, "AVIF", quality=95), pixels=near(picture, 8))
    yield Hostile("plain.bmp", encode(picture, "BMP"), format="BMP", pixels=near(picture, 0))
    yield Hostile("plain.jp2", encode(picture, "JPEG2000"), format="JPEG2000", pixels=near(picture, 8))


def cmyk_profile() -> bytes:
    """Write the smallest CMYK output profile that lcms accepts: a 2^4 table from CMYK to XYZ, by 1 - ink - black."""
    corners = [(c, m, y, k) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    to_xyz = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
    table = b""
    for c, m, y, k in corners:
        xyz = to_xyz @ (np.array([1 - c, 1 - m, 1 - y]) * (1 - k))
        table += struct.pack(">3H", *np.clip(xyz * 32768, 0, 65535).round().astype(int))
    identity = b"".join(struct.pack(">i", 65536 * (row == column)) for row in range(3) for column in range(3))
    lut = b"mft2" + bytes(4) + bytes([4, 3, 2, 0]) + identity + struct.pack(">HH", 2, 2)
    lut += struct.pack(">HH", 0, 65535) * 4 + table + struct.pack(">HH", 0, 65535) * 3
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    described = b"desc" + bytes(4) + struct.pack(">I", 5) + b"inks\0" + bytes(78)
    offset, tags, body = 128 + 4 + 12 * 3, b"", b""
    for name, data in ((b"desc", described), (b"wtpt", white), (b"A2B0", lut)):
        data += bytes(-len(data) % 4)
        tags += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    header = struct.pack(">I4sI4s4s4s", offset + len(body), b"lcms", 0x02400000, b"prtr", b"CMYK", b"XYZ ")
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header + bytes(128 - len(header)) + struct.pack(">I", 3) + tags + body


def bombs_and_shapes() -> Iterator[Hostile]:
    """Write small files that decode to a lot of memory, and images beyond the size limits."""
    pixels = png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    text = b"Comment\0\1\0\0\0" + zlib.compress(b"x" * 200_000_000)
    jpeg = encode(gradient(), "JPEG")
    scan = next(place for place in jpeg_segments(jpeg) if jpeg[place + 1] == 0xDA)
    yield Hostile("wide_bomb.png", png(12_000, 12_000, pixels), ("too_large",))
    yield Hostile("wider_bomb.png", png(2**31 - 1, 2**31 - 1, pixels), ("too_large", "corrupt"))
    yield Hostile("no_size.png", png(0, 0, pixels), ("corrupt", "too_small", "not_an_image"))
    yield Hostile("text_bomb.png", png_with(png_chunk(b"iTXt", text)), ("too_large",))
    yield Hostile("ztxt_bomb.png", png_with(png_chunk(b"zTXt", b"Comment\0\0" + text[12:])), ("too_large",))
    profile = png_chunk(b"iCCP", b"x\0\0" + text[12:])
    yield Hostile("profile_bomb.png", png_with(profile), ("too_large",))
    yield Hostile("scan_bomb.jpg", jpeg[:scan] + jpeg[scan:-2] * 3000 + jpeg[-2:], ("too_large",))
    canvas = struct.pack("<I4sII", 10, b"\2\0\0\0", 0, 0)
    huge_canvas = b"VP8X" + canvas[:8] + (16_382).to_bytes(3, "little") * 2
    frame = b"RIFF" + struct.pack("<I", 4 + len(huge_canvas)) + b"WEBP" + huge_canvas
    yield Hostile("canvas_bomb.webp", frame, ("too_large", *CUT))
    yield Hostile(
        "screen_bomb.gif", b"GIF89a" + struct.pack("<HH", 65535, 65535) + encode(gradient(), "GIF")[10:], ("too_large",)
    )
    yield Hostile("tile_bomb.tiff", huge_tile_tiff(), ("corrupt", "truncated", "too_large", "not_an_image"))
    yield Hostile("1x1.png", encode(gradient(1, 1), "PNG"), ("too_small",))
    yield Hostile("1x20000.png", encode(gradient(20_000, 1), "PNG"), ("too_small",))
    yield Hostile("65500x1.jpg", encode(gradient(1, 65_500), "JPEG"), ("too_small",))
    yield Hostile("2000x20.png", encode(gradient(20, 2000), "PNG"), ("extreme_aspect_ratio",))
    yield Hostile("16x16.png", encode(gradient(16, 16), "PNG"), size=(16, 16))
    yield Hostile("too_many_bytes.bmp", encode(Image.new("RGB", (1200, 1200)), "BMP"), ("too_many_bytes",))


def impostors() -> Iterator[Hostile]:
    """Write files that are not what their name says, and files in formats that are not decoded."""
    picture = gradient(blue=30)
    jpeg = encode(picture, "JPEG", quality=95)
    exif = Image.Exif()
    exif[0x010E] = "long " * 12_000
    svg = b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="40" height="40"/>'
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 40\n(pwned) (w) file closefile\nshowpage\n%%EOF\n"
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    unsupported, nothing = ("unsupported_format",), ("not_an_image",)
    yield Hostile("png_named.jpg", encode(picture, "PNG"), format="PNG", pixels=near(picture, 0))
    yield Hostile("jpeg_named.png", jpeg, format="JPEG", pixels=near(picture, 6))
    yield Hostile("empty.jpg", b"", nothing)
    yield Hostile("zeros.jpg", bytes(5000), nothing)
    yield Hostile("page.jpg", b"<!DOCTYPE html><html><body>403 Forbidden <svg></svg></body></html>", nothing)
    yield Hostile("text.png", "Ein Bild, sagte man.".encode("utf-16"), nothing)
    yield Hostile("archive.jpg", b"PK\3\4" + bytes(200), nothing)
    yield Hostile("drawing.svg", svg, unsupported)
    yield Hostile("drawing_named.png", svg + b" ", unsupported)
    yield Hostile("photo.heic", heic, unsupported)
    yield Hostile("photo_named.jpg", heic + b"\0", unsupported)
    yield Hostile("program.eps", eps, unsupported)
    yield Hostile("program_named.jpg", eps + b"\n", unsupported)
    yield Hostile("layers.psd", b"8BPS\0\1" + bytes(200), unsupported)
    yield Hostile("icon.ico", encode(picture, "ICO"), unsupported)
    yield Hostile("old.pcx", encode(picture, "PCX"), unsupported)
    yield Hostile("old.tga", encode(picture, "TGA"), unsupported)
    yield Hostile("new.jxl", b"\xff\x0a" + bytes(100), unsupported)
    yield Hostile("pages_named.jpg", b"%PDF-1.7\n" + bytes(100), unsupported)
    yield Hostile("garbage_after.jpg", jpeg + b"GARBAGE" * 3000, format="JPEG", pixels=near(picture, 6))
    yield Hostile("huge_exif.jpg", encode(picture, "JPEG", exif=exif, quality=95), format="JPEG", pixels=near(picture, 6))
    yield Hostile("broken_exif.jpg", encode(picture, "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff garbage", quality=94),
                  format="JPEG", pixels=near(picture, 6))  # fmt: skip
    flipped = bytearray(encode(noise(), "PNG"))
    flipped[len(flipped) // 2] ^= 0xFF
    yield Hostile("flipped_bit.png", bytes(flipped), ("corrupt", "truncated"))


def all_hostile() -> list[Hostile]:
    return [*cut_files(), *turned(), *depths_and_colors(), *bombs_and_shapes(), *impostors()]
