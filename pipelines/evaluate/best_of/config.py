"""Configuration of the best-of stage, which keeps the best of several pictures of a prompt."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipelines.evaluate.config import MetricsConfig
from pipelines.evaluate.metric_config import MetricConfig
from pipelines.evaluate.registry import METRICS
from pipelines.tables.schema import check_folder_name

JUDGES = tuple(name for name in METRICS if name not in ("inception", "cmmd", "dino", "reconstruction"))
"""The metrics that say how good a single picture is; the others compare sets of pictures, or judge an autoencoder."""


@dataclass(frozen=True, kw_only=True)
class BestOfConfig(MetricsConfig):
    """How the best pictures of each prompt are chosen among its candidates.

    Args:
        name: of the table under samples/ that gets the pictures that are kept.
        keep: pictures that are kept of each prompt.
        judge: the metric that chooses; its settings are in the section of its name.
        choice: "best": those that the judge puts first. "tournament": in pairs of neighbours, round after round, until `keep`
            are left, as Sana 1.5 does; the numbers of candidates and of kept pictures are then powers of two.
        metrics: names of further metrics, which judge all candidates too: the judge's own figure alone flatters the gain.
    """

    name: str
    keep: int = 1
    judge: str = "clip_score"
    choice: Literal["best", "tournament"] = "best"

    def __post_init__(self) -> None:
        check_folder_name("name", self.name)
        super().__post_init__()
        for setting, name in [("judge", self.judge), *(("metrics", name) for name in self.metrics)]:
            if name not in JUDGES:
                why = "judges no single picture" if name in METRICS else "is no metric"
                raise ValueError(f"{setting}: {name} {why}: take one of {', '.join(JUDGES)}")
        if self.keep < 1:
            raise ValueError(f"keep={self.keep} must be at least 1")

    @property
    def chosen(self) -> Mapping[str, MetricConfig]:
        """The settings of the judge and of the further metrics, by name, the judge first."""
        return {name: getattr(self, name) for name in dict.fromkeys((self.judge, *self.metrics))}

    def check(self, num_candidates: int) -> None:
        """Raise ValueError if the pictures to keep cannot be chosen among so many of each prompt."""
        if num_candidates < self.keep or num_candidates < 2:
            raise ValueError(
                f"keep={self.keep} of sample.images_per_prompt={num_candidates}: draw more pictures of each prompt, at least 2"
            )
        if self.choice == "tournament" and not (_is_power_of_two(num_candidates) and _is_power_of_two(self.keep)):
            raise ValueError(
                f"choice=tournament keeps {self.keep} of sample.images_per_prompt={num_candidates}: both must be powers of two"
            )


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
