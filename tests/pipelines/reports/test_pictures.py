"""Thumbnails."""

import numpy as np
from PIL import Image

from pipelines.reports.pictures import thumbnail
from tests.support.report_world import encode


def test_thumbnails_are_small_and_of_any_kind() -> None:
    large = Image.fromarray(np.random.default_rng(0).integers(0, 255, (1500, 3000, 3), dtype=np.uint8))
    picture = thumbnail(encode(large, "JPEG"), "large")
    assert (picture.width, picture.height) == (320, 160) and len(picture.src) < 100_000
    for mode in ("RGBA", "CMYK", "L", "P", "I;16"):
        image = large.resize((20, 10)).convert("L" if mode == "I;16" else mode).convert(mode)
        assert thumbnail(encode(image, "TIFF"), mode).src.startswith("data:image/png;base64,")
    assert not thumbnail(b"text", "t").src
