"""What the configurations of the metrics that ask a VLM share."""

from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines.caption.config import CaptionerConfig, HttpConfig, SamplingConfig
from pipelines.evaluate.metric_config import MetricConfig


@dataclass(frozen=True, kw_only=True)
class VlmMetricConfig(MetricConfig):  # no ABC: jsonargparse would list none of its settings in --help
    """A VLM that is asked about each picture. A subclass makes `judge`.

    Args:
        model: the VLM, any that can caption: a local folder, hub id or URI; for engine=http the name that the server knows it
            by.
        max_new_tokens: of an answer, whose first word counts.
        max_image_size: pixels; longer sides are shrunk to it.
        http: settings of this engine.
        dtype: of the weights.
    """

    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    max_new_tokens: int = 8
    max_image_size: int = 1024
    http: HttpConfig = field(default_factory=HttpConfig)
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.judge  # it checks the engine's settings

    @property
    def judge(self) -> CaptionerConfig:
        """The VLM as `caption` runs it."""
        raise NotImplementedError

    def as_captioner(self, **own: Any) -> CaptionerConfig:
        """Make `judge`, with the settings of `own` that each metric has for itself: engine, batch size."""
        return CaptionerConfig(
            name="judge",
            model=self.model,
            revision=self.revision,
            sampling=SamplingConfig(max_new_tokens=self.max_new_tokens),
            max_image_size=self.max_image_size,
            dtype=self.dtype,
            device=self.device,
            http=self.http,
            resources=self.resources,
            **own,
        )
