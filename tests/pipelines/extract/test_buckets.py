"""Buckets are the published ones where there are any, and sound ones elsewhere."""

import importlib

import numpy as np
import pytest

from pipelines.extract.buckets import buckets_for, check_unit, name_bucket, nearest_bucket


@pytest.mark.parametrize(
    ("resolution", "module"),
    [
        (512, "pixart_alpha.pipeline_pixart_alpha"),
        (1024, "pixart_alpha.pipeline_pixart_alpha"),
        (2048, "pixart_alpha.pipeline_pixart_sigma"),
        (4096, "sana.pipeline_sana"),
    ],
)
def test_published_tables(resolution, module):
    table = getattr(importlib.import_module(f"diffusers.pipelines.{module}"), f"ASPECT_RATIO_{resolution}_BIN")
    assert buckets_for(resolution, 32) == [tuple(map(int, size)) for size in table.values()]
    assert len(table) == (33 if resolution <= 1024 else 40)


MISSING_AT_1024 = {(512, 1920), (512, 1984), (1664, 576), (1792, 576), (1856, 512), (1920, 512), (1984, 512)}
"""Sizes that NVlabs trains with at 1024 px, and diffusers' table of 33 lacks (height, width)."""


@pytest.mark.parametrize("resolution", [512, 1024])
def test_the_tables_that_train_have_seven_sizes_more(resolution):
    trained, tested = set(buckets_for(resolution, 32, "nvlabs")), set(buckets_for(resolution, 32))
    scale = 1024 // resolution
    assert len(trained) == 40 and tested < trained
    assert trained - tested == {(height // scale, width // scale) for height, width in MISSING_AT_1024}


@pytest.mark.parametrize(("resolution", "largest"), [(256, 0.04), (512, 0.025), (1024, 0.025), (2048, 0.025)])
def test_the_tables_that_train_cut_less_away(resolution, largest):
    """The mean share of an image that is cut away, over ratios from 1/4.2 to 4.2."""
    ratios = np.exp(np.random.default_rng(0).uniform(-np.log(4.2), np.log(4.2), 2000))

    def mean_cut(buckets) -> float:
        chosen = [nearest_bucket(ratio, 1, buckets) for ratio in ratios]
        quotients = [height / width / ratio for (height, width), ratio in zip(chosen, ratios, strict=True)]
        return float(np.mean([1 - min(quotient, 1 / quotient) for quotient in quotients]))

    trained, other = buckets_for(resolution, 32, "nvlabs"), buckets_for(resolution, 32)
    assert mean_cut(trained) <= min(mean_cut(other), largest)
    assert all(height % 32 == width % 32 == 0 and 1 / 4 <= height / width <= 4 for height, width in trained)
    assert (resolution, resolution) in trained and len(set(trained)) == len(trained) > 20


@pytest.mark.parametrize(
    ("resolution", "unit"), [(64, 8), (64, 32), (32, 32), (128, 32), (256, 32), (256, 8), (768, 32), (640, 64)]
)
def test_generated_tables(resolution, unit):
    buckets = buckets_for(resolution, unit)
    assert (resolution, resolution) in buckets
    assert len(set(buckets)) == len(buckets) <= resolution // unit + 1
    assert sorted(buckets) == sorted((width, height) for height, width in buckets)
    for height, width in buckets:
        assert height % unit == width % unit == 0
        assert 1 / 4 <= height / width <= 4
        assert abs(height * width / resolution**2 - 1) <= 0.125


def test_sides_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"resolution=100 must be a positive multiple of unit=8"):
        buckets_for(100, 8)
    with pytest.raises(ValueError, match=r"unit=64 .*256x928"):
        buckets_for(512, 64)
    published_256 = [(height // 2, width // 2) for height, width in buckets_for(512, 32)]
    with pytest.raises(ValueError, match="buckets do not divide by unit=32"):
        check_unit(published_256, 32)
    check_unit(published_256, 16)


def test_nearest_bucket_crops_the_least():
    buckets = buckets_for(512, 32)
    assert nearest_bucket(1000, 1000, buckets) == (512, 512)
    assert nearest_bucket(100, 10_000, buckets) == (256, 1024)
    assert nearest_bucket(3000, 2000, buckets) == (608, 416)

    def cropped(bucket: tuple[int, int], height: int, width: int) -> float:
        ratio = (bucket[0] / bucket[1]) / (height / width)
        return 1 - min(ratio, 1 / ratio)

    for height, width in np.random.default_rng(0).integers(100, 1000, (200, 2)).tolist():
        chosen = nearest_bucket(height, width, buckets)
        assert cropped(chosen, height, width) == pytest.approx(min(cropped(bucket, height, width) for bucket in buckets))
    assert name_bucket((608, 416)) == "608x416"
