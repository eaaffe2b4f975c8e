"""Aspect-ratio buckets: the sizes to which images are cropped, so that a batch holds images of one size."""

import math
from typing import Literal

Bucket = tuple[int, int]
"""(height, width), pixels."""

# NVlabs' tables (as in diffusers' Sana pipelines), in 1/16 of the resolution; 1024 and 4096 are twice 512 and 2048.
# fmt: off
SIXTEENTHS_512 = (
    (8, 32), (8, 29), (9, 28), (9, 27), (9, 26), (10, 25), (10, 24), (11, 23), (11, 22), (11, 21), (12, 21),
    (12, 20), (13, 19), (13, 18), (14, 18), (14, 17), (15, 17), (15, 16), (16, 16), (16, 15), (17, 15), (17, 14),
    (18, 14), (18, 13), (19, 13), (20, 12), (21, 12), (22, 11), (23, 11), (24, 10), (25, 10), (27, 9), (32, 8),
)
SIXTEENTHS_2048 = (
    (8, 32), (8, 31), (8, 30), (8, 29), (9, 28), (9, 27), (9, 26), (10, 25), (10, 24), (11, 23), (11, 22), (11, 21),
    (12, 21), (12, 20), (13, 19), (13, 18), (14, 18), (14, 17), (15, 17), (15, 16), (16, 16), (16, 15), (17, 15),
    (17, 14), (18, 14), (18, 13), (19, 13), (20, 12), (21, 12), (22, 11), (23, 11), (24, 10), (25, 10), (26, 9),
    (27, 9), (28, 9), (29, 8), (30, 8), (31, 8), (32, 8),
)
# fmt: on
PUBLISHED = {512: SIXTEENTHS_512, 1024: SIXTEENTHS_512, 2048: SIXTEENTHS_2048, 4096: SIXTEENTHS_2048}
MAX_ASPECT_RATIO = 4
MAX_AREA_FACTOR = 1.15
"""Of generated sizes that are more than one for each shorter side: how far their area may be from the square's."""

BucketTable = Literal["diffusers", "nvlabs"]
"""Whose table of sizes.

"diffusers": 33 sizes at 512 and 1024 px, with which NVlabs tests and diffusers draws. "nvlabs": the 40 sizes that NVlabs trains
with at every resolution; where none are published or they do not divide, more sizes than the other table has.
"""


def buckets_for(resolution: int, unit: int, table: BucketTable = "diffusers") -> list[Bucket]:
    """The buckets of a resolution, from the widest to the tallest, the square one among them.

    For 512, 1024, 2048 and 4096 px the published ones; else sizes of about resolution^2 pixels and ratios from 1/4 to 4.
    (The published table for 256 px does not divide by the 32 of f32 latents, and is not used.)

    Args:
        resolution: side of the square bucket, pixels.
        unit: what every side must divide by: the DC-AE's factor times the transformer's patch size.
        table: whose sizes.

    Raises:
        ValueError: a side does not divide by the unit.
    """
    if unit < 1 or resolution < 1 or resolution % unit:
        nearest = max(round(resolution / max(unit, 1)), 1) * unit
        raise ValueError(
            f"resolution={resolution} must be a positive multiple of unit={unit} px, by which the autoencoder and the "
            f"transformer's patches divide it; the nearest is {nearest}"
        )
    if resolution not in PUBLISHED:
        return _generate(resolution, unit) if table == "diffusers" else _generate_all(resolution, unit)
    sixteenths = PUBLISHED[resolution] if table == "diffusers" else SIXTEENTHS_2048
    buckets = [(height * resolution // 16, width * resolution // 16) for height, width in sixteenths]
    check_unit(buckets, unit)
    return buckets


def check_unit(buckets: list[Bucket], unit: int) -> None:
    """Raises ValueError, naming the buckets, unless every side divides by `unit`."""
    bad = [name_bucket(bucket) for bucket in buckets if bucket[0] % unit or bucket[1] % unit]
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(buckets)} buckets do not divide by unit={unit} px (DC-AE factor times patch size): "
            f"{', '.join(bad[:4])}{', ...' if len(bad) > 4 else ''}. Choose another resolution or autoencoder."
        )


def nearest_bucket(height: int, width: int, buckets: list[Bucket]) -> Bucket:
    """The bucket of the nearest ratio, which is the one that crops the least away.

    Nearest by the ratios' quotient; NVlabs goes by their difference, and so takes another for some wide or tall images.
    """
    ratio = math.log(height / width)
    return min(buckets, key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - ratio))


def name_bucket(bucket: Bucket) -> str:
    """ "HxW", as in the `latents` table."""
    return f"{bucket[0]}x{bucket[1]}"


def _generate(resolution: int, unit: int) -> list[Bucket]:
    """One bucket for each shorter side, and its mirror image."""
    side = resolution // unit
    shortest = math.ceil(side / math.sqrt(MAX_ASPECT_RATIO))
    wide = [(short, round(side * side / short)) for short in range(shortest, side)]
    tall = [(long, short) for short, long in reversed(wide)]
    return [(height * unit, width * unit) for height, width in [*wide, (side, side), *tall]]


def _generate_all(resolution: int, unit: int) -> list[Bucket]:
    """Every size whose sides divide, with ratios up to 4, and an area within MAX_AREA_FACTOR of the square's."""
    side = resolution // unit
    sizes = [
        (height, width)
        for height in range(1, 2 * side + 1)
        for width in range(1, 2 * side + 1)
        if max(height, width) <= MAX_ASPECT_RATIO * min(height, width)
        and 1 / MAX_AREA_FACTOR <= height * width / side**2 <= MAX_AREA_FACTOR
    ]
    return [(height * unit, width * unit) for height, width in sorted(sizes, key=lambda size: (size[0] / size[1], size[0]))]
