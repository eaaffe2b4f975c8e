"""What the ablations on the Shapes world share: how pictures are judged, intervals over seeds, and the printed tables."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np

from jobs.common.text_table import format_table
from pipelines.evaluate.distances import Moments, frechet_distance
from pipelines.evaluate.shapes import ATTRIBUTES, AttributeJudge, attribute_accuracy
from pipelines.shapes.scenes import Scene

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.workers.clip import ClipModel

JUDGED = (*ATTRIBUTES, "fill", "size", "position")
RIGHT, DISTANCE = "all", "fid"
Figures = dict[str, float]
"""The share of pictures that show each attribute as asked, under RIGHT all of them, and the Fréchet distance under DISTANCE."""
Curves = Mapping[str, Mapping[int, Sequence[Figures]]]
"""By variant and step: the figures of each seed, the same seeds in the same order everywhere."""


class PictureJudge:
    """Judges pictures of one-object prompts by a CLIP of the Shapes world: their attributes, and how far they are from images.

    The distance is Fréchet's, between the CLIP's unit embeddings of the pictures and those whose moments are `reference`.
    """

    def __init__(self, clip: "ClipModel", reference: Moments):
        self.clip, self.reference = clip, reference
        self.reader = AttributeJudge(clip)

    def judge(self, asked: Sequence[Scene], images: "Sequence[Image.Image]") -> Figures:
        """The figures of RGB pictures, one for each scene that was asked for; at least two."""
        embeds = self.clip.embed_images(images)
        drawn, real = Moments().add(embeds.numpy()), self.reference
        distance = frechet_distance(drawn.mean, drawn.covariance, real.mean, real.covariance)
        return {**attribute_accuracy(asked, self.reader.read_embeds(embeds), JUDGED), DISTANCE: distance}


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with half of its 95 % interval, by Student's t; the interval is None for a single seed."""

    mean: float
    half: float | None

    @classmethod
    def over(cls, values: Sequence[float]) -> "Estimate":
        from scipy.stats import t

        count = len(values)
        if count < 2:
            return cls(values[0], None)
        return cls(float(np.mean(values)), float(t.ppf(0.975, count - 1) * np.std(values, ddof=1) / sqrt(count)))

    def text(self, form: str, scale: float = 1.0) -> str:
        """Such as 12.3 ± 0.4, each number in the format `form`, after a multiplication by `scale`."""
        half = "" if self.half is None else f" ± {self.half * scale:{form.lstrip('+')}}"
        return f"{self.mean * scale:{form}}{half}"


def run_variants(variants: Iterable[str], seeds: Iterable[int], train: Callable[[str, int], Mapping[int, Figures]]) -> Curves:
    """Train each variant with each seed; `train` returns the figures of one training by step."""
    curves: dict[str, dict[int, list[Figures]]] = {name: {} for name in variants}
    for seed in seeds:
        for name, by_step in curves.items():
            for step, figures in train(name, seed).items():
                by_step.setdefault(step, []).append(figures)
    return curves


def print_curves(curves: Curves) -> None:
    """Print what the pictures of each variant show over the steps, all of it at the last step, and how variants differ."""
    last = max(next(iter(curves.values())))
    for title, name, form, scale in (
        ("all six attributes right, %", RIGHT, ".1f", 100),
        ("Fréchet distance", DISTANCE, ".3f", 1),
    ):
        steps = list(next(iter(curves.values())))
        rows = [
            [variant, *(Estimate.over([seed[name] for seed in points[step]]).text(form, scale) for step in steps)]
            for variant, points in curves.items()
        ]
        print(f"\n{title}, after so many steps")
        print(format_table(["", *map(str, steps)], rows))
    print(f"\nright after {last} steps, %")
    rows = [
        [variant, *(Estimate.over([seed[name] for seed in points[last]]).text(".1f", 100) for name in (*JUDGED, RIGHT))]
        for variant, points in curves.items()
    ]
    print(format_table(["", *JUDGED, RIGHT], rows))
    first, *others = curves
    print(f"\ndifference from {first} after {last} steps, seed by seed")
    rows = []
    for variant in others:
        pairs = list(zip(curves[variant][last], curves[first][last], strict=True))
        gained, moved = ([ours[name] - base[name] for ours, base in pairs] for name in (RIGHT, DISTANCE))
        rows.append([variant, Estimate.over(gained).text("+.1f", 100), Estimate.over(moved).text("+.3f")])
    print(format_table(["", "all right, points", "Fréchet distance"], rows))
