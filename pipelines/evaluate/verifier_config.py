"""Configuration of the verifier, a VLM that says whether a picture fits its prompt."""

from dataclasses import dataclass
from typing import Literal

from pipelines.caption.config import CaptionerConfig
from pipelines.evaluate.vlm_config import VlmMetricConfig

PUBLISHED_VERIFIER = "Efficient-Large-Model/NVILA-Lite-2B-Verifier"
"""The verifier of Sana 1.5. It needs its own code, which no engine here runs: serve it, with engine=http and this name."""
PROMPT = "{prompt}"
PUBLISHED_PROMPT = (
    "You are an AI assistant specializing in image analysis and ranking. Your task is to analyze and compare image based on "
    "how well they match the given prompt.\nThe given prompt is:{prompt}. Please consider the prompt and the image to make a "
    "decision and response directly with 'yes' or 'no'.\n"
)


@dataclass(frozen=True, kw_only=True)
class VerifierConfig(VlmMetricConfig):
    """Whether a picture fits its prompt, as a VLM says: yes or no, and how sure it is.

    Args:
        engine: "transformers" runs anywhere, "http" asks an OpenAI-compatible server that tells log-probabilities (vLLM does).
        question: what the VLM is asked; {prompt} stands for the picture's prompt. By default as Sana 1.5 asks.
        num_first_tokens: the likeliest first tokens among which "yes" and "no" are looked for; servers allow 20.
    """

    engine: Literal["transformers", "http"] = "transformers"
    question: str = PUBLISHED_PROMPT
    num_first_tokens: int = 20
    batch_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if PROMPT not in self.question:
            raise ValueError(f"question={self.question!r} has no {PROMPT} in it")
        if self.num_first_tokens < 2:
            raise ValueError(f"num_first_tokens={self.num_first_tokens} must be at least 2")

    @property
    def judge(self) -> CaptionerConfig:
        return self.as_captioner(engine=self.engine, batch_size=self.batch_size)
