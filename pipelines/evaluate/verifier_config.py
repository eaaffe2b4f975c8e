"""Configuration of the verifier, a VLM that says whether a picture fits its prompt."""

from dataclasses import dataclass, field
from typing import Literal

from pipelines.caption.config import CaptionerConfig, HttpConfig, SamplingConfig
from pipelines.evaluate.metric_config import MetricConfig

PUBLISHED_VERIFIER = "Efficient-Large-Model/NVILA-Lite-2B-Verifier"
"""The verifier of Sana 1.5. It needs its own code, which no engine here runs: serve it, with engine=http and this name."""
PROMPT = "{prompt}"
PUBLISHED_PROMPT = (
    "You are an AI assistant specializing in image analysis and ranking. Your task is to analyze and compare image based on "
    "how well they match the given prompt.\nThe given prompt is:{prompt}. Please consider the prompt and the image to make a "
    "decision and response directly with 'yes' or 'no'.\n"
)


@dataclass(frozen=True, kw_only=True)
class VerifierConfig(MetricConfig):
    """Whether a picture fits its prompt, as a VLM says: yes or no, and how sure it is.

    Args:
        model: the VLM, any that can caption: a local folder, hub id or URI; for engine=http the name that the server knows it
            by.
        engine: "transformers" runs anywhere, "http" asks an OpenAI-compatible server that tells log-probabilities (vLLM does).
        question: what the VLM is asked; {prompt} stands for the picture's prompt. By default as Sana 1.5 asks.
        max_new_tokens: of an answer, whose first word counts.
        max_image_size: pixels; longer sides are shrunk to it.
        num_first_tokens: the likeliest first tokens among which "yes" and "no" are looked for; servers allow 20.
        http: settings of this engine.
        dtype: of the weights.
    """

    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    engine: Literal["transformers", "http"] = "transformers"
    question: str = PUBLISHED_PROMPT
    max_new_tokens: int = 8
    max_image_size: int = 1024
    num_first_tokens: int = 20
    http: HttpConfig = field(default_factory=HttpConfig)
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    batch_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if PROMPT not in self.question:
            raise ValueError(f"question={self.question!r} has no {PROMPT} in it")
        if self.num_first_tokens < 2:
            raise ValueError(f"num_first_tokens={self.num_first_tokens} must be at least 2")
        assert self.judge  # it checks the engine's settings

    @property
    def judge(self) -> CaptionerConfig:
        """The VLM as `caption` runs it."""
        return CaptionerConfig(
            name="judge",
            model=self.model,
            revision=self.revision,
            sampling=SamplingConfig(max_new_tokens=self.max_new_tokens),
            max_image_size=self.max_image_size,
            engine=self.engine,
            dtype=self.dtype,
            batch_size=self.batch_size,
            device=self.device,
            http=self.http,
            resources=self.resources,
        )
