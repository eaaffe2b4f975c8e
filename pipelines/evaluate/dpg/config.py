"""Configuration of DPG-Bench."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pipelines.caption.config import CaptionerConfig, HttpConfig, SamplingConfig, VllmConfig
from pipelines.evaluate.metric_config import MetricConfig

PUBLISHED_JUDGE = "damo/mplug_visual-question-answering_coco_large_en"
"""The judge of the published results, of modelscope. No engine here runs it: serve it, and set engine=http and this name."""
QUESTION = "{question}"
QUESTIONS_URL = "https://raw.githubusercontent.com/TencentQQGYLab/ELLA/main/dpg_bench/dpg_bench.csv"


@dataclass(frozen=True, kw_only=True)
class DpgConfig(MetricConfig):
    """DPG-Bench: questions about each picture, answered by a VLM; a question counts only if those that it depends on do.

    Figures of different judges cannot be compared. The published results are those of PUBLISHED_JUDGE.

    Args:
        model: the judge, any VLM that can caption: a local folder, hub id or URI; for engine=http the name that the server
            knows it by.
        engine: "transformers" runs anywhere, "vllm" is for GPUs, "http" asks an OpenAI-compatible server.
        questions: the published dpg_bench.csv, a path or URI.
        prompt: what the judge is asked; {question} stands for the question.
        max_new_tokens: of an answer, whose first word counts.
        max_image_size: pixels; longer sides are shrunk to it.
        question_batch_size: questions in one call of a transformers model; changes no value.
        vllm: settings of this engine.
        http: settings of this engine.
        dtype: of the weights.
    """

    NO_VALUE: ClassVar = (*MetricConfig.NO_VALUE, "questions", "question_batch_size")

    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    engine: Literal["transformers", "vllm", "http"] = "transformers"
    questions: str = "dpg_bench.csv"
    prompt: str = "{question} Answer with yes or no only."
    max_new_tokens: int = 8
    max_image_size: int = 1024
    question_batch_size: int = 16
    vllm: VllmConfig = field(default_factory=VllmConfig)
    http: HttpConfig = field(default_factory=HttpConfig)
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    batch_size: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if QUESTION not in self.prompt:
            raise ValueError(f"prompt={self.prompt!r} has no {QUESTION} in it")
        assert self.judge  # it checks the engine's settings

    @property
    def judge(self) -> CaptionerConfig:
        """The judge as `caption` runs it."""
        return CaptionerConfig(
            name="judge",
            model=self.model,
            revision=self.revision,
            sampling=SamplingConfig(max_new_tokens=self.max_new_tokens),
            max_image_size=self.max_image_size,
            engine=self.engine,
            dtype=self.dtype,
            batch_size=self.question_batch_size,
            device=self.device,
            vllm=self.vllm,
            http=self.http,
            resources=self.resources,
        )
