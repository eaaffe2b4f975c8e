"""An image that was made to do harm costs its row, and no other: not the time, the memory or the process of the stage."""

import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from PIL import Image

from pipelines.ingest.decoder import Decoder
from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import Row
from pipelines.workers.images import ImageLimits, open_image, perceptual_hash, to_rgb
from tests.support.hostile_images import encode, gradient, noise, png, png_chunk, png_with

LIMITS = ImageLimits(max_bytes=32 * 2**20, decode_seconds=0.1, decode_bytes=144 * 2**20)
GOOD = [encode(noise(), "PNG"), encode(gradient(200, 300), "JPEG"), encode(gradient(), "WEBP"), encode(gradient(), "JPEG2000")]


def described(image_bytes: bytes) -> Row:
    opened = open_image(image_bytes)
    image = to_rgb(opened)
    return {"format": opened.format, "width": image.width, "height": image.height, "phash": perceptual_hash(image)}


def describe(decoder: Decoder, *images: bytes) -> list[Row | str]:
    return [answer.reason if isinstance(answer, RowRefused) else answer for answer in decoder.describe(images)]


def scans(height: int, width: int, count: int) -> bytes:
    """A progressive JPEG that repeats its last scan."""
    content = encode(Image.new("RGB", (width, height), (9, 99, 200)), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * (count - content.count(b"\xff\xda")) + content[-2:]


def gif_with(blocks: bytes) -> bytes:
    content = encode(gradient(), "GIF")
    start = 13 + 3 * (2 << (content[10] & 7))
    return content[:start] + blocks + content[start:]


def jpeg_with(segments: bytes) -> bytes:
    content = encode(gradient(), "JPEG")
    return content[:2] + segments + content[2:]


def tiff_of_tags(count: int, size: int) -> bytes:
    """A directory whose tags all claim the same bytes: as Exif it unfolds, if all are read, to count times size."""
    start = 8 + 2 + 12 * count + 4
    tags = b"".join(struct.pack("<HHII", 33000 + number, 7, size, start) for number in range(count))
    return b"II*\0" + struct.pack("<IH", 8, count) + tags + bytes(4) + bytes(size)


def bmp(height: int, width: int, data: bytes, compression: int = 1) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, compression, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024) + header + bytes(1024) + data


def jp2(**changes: int) -> bytes:
    """A JPEG 2000 whose header claims other sizes. Places are those of the SIZ segment."""
    content = bytearray(encode(gradient(), "JPEG2000"))
    start = content.index(b"\xff\x4f\xff\x51") + 2
    places = {"width": 6, "height": 10, "tile_width": 22, "tile_height": 26}
    for name, value in changes.items():
        content[start + places[name] : start + places[name] + 4] = struct.pack(">I", value)
    return bytes(content)


KEPT, SLOW, LARGE, BROKEN = ("kept",), ("too_slow",), ("too_large",), ("corrupt", "truncated")
SIDE = 3000  # pixels, of what would take more memory than LIMITS allow
BOMBS: dict[str, tuple[Callable[[], bytes], tuple[str, ...]]] = {
    "190 scans, large": (lambda: scans(3600, 3600, 190), LARGE),
    "190 scans, small": (lambda: scans(64, 64, 190), KEPT),
    "millions of PNG chunks": (lambda: png_with(png_chunk(b"abCd", b"") * 2_000_000), SLOW),
    "millions of fill bytes": (lambda: jpeg_with(b"\xff" * 30_000_000), SLOW),
    "millions of lines of comments": (lambda: b"P6\n" + b"#c\n" * 8_000_000 + b"60 40\n255\n" + bytes(7200), SLOW),
    "millions of GIF extensions": (lambda: gif_with(b"!\xfe\1c\0" * 4_000_000), (*SLOW, *LARGE)),
    "pixels with alpha": (lambda: encode(Image.new("RGBA", (SIDE, SIDE), (9, 99, 200, 5)), "PNG", compress_level=1), LARGE),
    "pixels of WebP": (
        lambda: encode(Image.new("RGBA", (SIDE, SIDE), (9, 9, 9, 5)), "WEBP", lossless=True, method=0), (*LARGE, *BROKEN)
    ),
    "pixels of JPEG 2000": (lambda: encode(Image.new("RGB", (SIDE, SIDE)), "JPEG2000"), (*LARGE, *BROKEN)),
    "JPEG 2000 of one huge tile": (lambda: jp2(tile_width=2**31, tile_height=2**31), KEPT),
    "JPEG 2000 of tiny tiles": (lambda: jp2(width=8000, height=8000, tile_width=1, tile_height=1), BROKEN),
    "Exif whose tags share their bytes": (lambda: encode(gradient(), "WEBP", exif=tiff_of_tags(1000, 3_000_000)), KEPT),
    "a PNG that goes on": (lambda: png(60, 40, png_chunk(b"IDAT", zlib.compress(bytes(100_000_000), 1))), KEPT),
    "jumps of BMP": (lambda: bmp(8000, 8000, b"\0\2\xff\0" * 2_000_000 + b"\0\1"), (*LARGE, *BROKEN)),
}  # fmt: skip


def test_bombs_cost_their_row() -> None:
    """All in one run, with a good image after each, whose answer must not change."""
    decoder = Decoder(LIMITS)
    images, expected = [], []
    for number, (make, reasons) in enumerate(BOMBS.values()):
        images += [make(), GOOD[number % len(GOOD)]]
        expected += [reasons, described(GOOD[number % len(GOOD)])]
    answers = describe(decoder, *images)
    assert answers[1::2] == expected[1::2]
    reasons = [answer if isinstance(answer, str) else "kept" for answer in answers[::2]]
    wrong = [(name, reason) for (name, (_, right)), reason in zip(BOMBS.items(), reasons, strict=True) if reason not in right]
    assert not wrong
    decoder.close()


@pytest.fixture
def decoder() -> Decoder:
    decoder = Decoder(ImageLimits(decode_seconds=0.1))
    assert describe(decoder, *GOOD) == [described(image) for image in GOOD]
    return decoder


def pid(decoder: Decoder) -> int:
    assert decoder.child is not None
    return decoder.child.pid


def test_what_ends_the_child(decoder: Decoder) -> None:
    """Killed by something else: another child is asked, and the image is not to blame. A crash: the image is."""
    for number, expected in (
        (signal.SIGKILL, described(GOOD[0])),
        (signal.SIGTERM, described(GOOD[0])),
        (signal.SIGSEGV, "corrupt"),
    ):
        os.kill(pid(decoder), number)
        assert describe(decoder, GOOD[0], GOOD[1]) == [expected, described(GOOD[1])]
    before = pid(decoder)
    os.kill(before, signal.SIGSTOP)  # it hangs, without using the CPU
    assert describe(decoder, GOOD[0], GOOD[1]) == ["too_slow", described(GOOD[1])]
    assert pid(decoder) != before and not psutil.pid_exists(before)


def test_who_breaks_off_gets_no_answer_of_before(decoder: Decoder) -> None:
    for _ in decoder.describe([GOOD[0], GOOD[1], GOOD[2]]):
        break
    assert describe(decoder, GOOD[3]) == [described(GOOD[3])]
    assert describe(decoder) == []


def test_a_child_that_does_not_start_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.ingest.decoder.CODE", "import sys; sys.exit(3)")
    with pytest.raises(RuntimeError, match=r"does not start \(exit code 3"):
        describe(Decoder(LIMITS), GOOD[0])


def test_the_child_has_no_credentials_and_ends_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import sys; from pipelines.ingest.decoder import Decoder; from pipelines.workers.images import ImageLimits\n"
        "decoder = Decoder(ImageLimits()); list(decoder.describe([b'x']))\n"
        "print(decoder.child.pid, flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "AWS_SECRET_ACCESS_KEY": "hunter2", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert b"hunter2" not in Path(f"/proc/{child}/environ").read_bytes()
        parent.kill()
    deadline = time.monotonic() + 20
    while psutil.pid_exists(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not psutil.pid_exists(child)
