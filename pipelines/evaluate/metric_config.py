"""What the configurations of all metrics share."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pipelines.stages.contract import Resources

FIGURES = "metrics.json"
"""The file of a metric's figures, beside its table."""
FIGURES_SETTINGS = "metrics_settings.json"
"""The file of `Metric.figure_settings`, beside FIGURES."""


@dataclass(frozen=True, kw_only=True)
class MetricConfig:
    """A metric's model, and how it runs. A subclass gives `model` a default.

    Args:
        model: a local folder or file, a hub id, or a zoo://, hf:// or fsspec URI.
        revision: of a hub id.
        dtype: of the weights.
        batch_size: pictures in one call of the model; changes no value, and is halved where memory is not enough.
        prepare_threads: that decode and resize, ahead of the model.
        device: "cpu" or "cuda"; None picks the first GPU that Ray gave the actor, otherwise the CPU.
        resources: what Ray reserves for the metric's actors.
        max_reject_share: the metric fails when a larger share of the pictures is refused.
    """

    NO_VALUE: ClassVar[tuple[str, ...]] = (
        *("revision", "batch_size", "prepare_threads", "device", "resources", "max_reject_share"),
    )

    model: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_size: int = 64
    prepare_threads: int = 4
    device: str | None = None
    resources: Resources = field(default_factory=Resources)
    max_reject_share: float = 0.0

    def __post_init__(self) -> None:
        for name in ("batch_size", "prepare_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
