"""Configuration of captioners: a VLM, its prompt, its sampling, the engine that runs it, and checks of its captions."""

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pipelines.stages.contract import Resources
from pipelines.tables.schema import ORIGINAL_CAPTIONER, check_folder_name

DEFAULT_PROMPT = "Describe the image."
ORIGINAL = "{caption}"
"""Placeholder in a prompt for the caption that came with the image."""
Policy = Literal["flag", "reject", "off"]
FAULTS = ("refusal", "prompt_echo", "repetition", "cut_off", "boilerplate", "wrong_script", "over_budget", "same_caption")
"""Most severe first: a caption with several faults is rejected for the first."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sampling of captions. Temperature 0 is greedy; otherwise each image has its own seed."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1:
            raise ValueError(f"{self}: temperature must be >= 0, top_p in (0, 1], max_new_tokens >= 1")


@dataclass(frozen=True, kw_only=True)
class VllmConfig:
    """Settings of the `vllm` engine.

    Args:
        tensor_parallel_size: GPUs that share one copy of the model.
        gpu_memory_utilization: share of a GPU's memory for weights and KV cache.
        content_format: of messages in the model's chat template: "openai" where it takes lists of parts, as most do, "string"
            where it takes text alone.
        prefix_caching: keep the keys and values of what prompts have in common.
        batch_size: rows that are handed to the engine at a time; it batches by itself, this only bounds what a death repeats.
        max_concurrent_batches: handed over side by side.
        engine_args: any other of vLLM's engine arguments, such as {quantization: fp8}.
        env: environment variables of the engine's process.
    """

    NO_VALUE: ClassVar = (
        "tensor_parallel_size",
        "gpu_memory_utilization",
        "prefix_caching",
        "batch_size",
        "max_concurrent_batches",
        "env",
    )

    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    content_format: Literal["openai", "string"] = "openai"
    prefix_caching: bool = True
    batch_size: int = 32
    max_concurrent_batches: int = 8
    engine_args: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(self.tensor_parallel_size, self.batch_size, self.max_concurrent_batches) < 1:
            raise ValueError(
                f"tensor_parallel_size={self.tensor_parallel_size}, batch_size={self.batch_size} and "
                f"max_concurrent_batches={self.max_concurrent_batches} must be at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class HttpConfig:
    """An OpenAI-compatible endpoint. Its key, if it wants one, is taken from the environment.

    Args:
        base_url: with its version: http://host:8000/v1.
        api_key_variable: of the environment; sent as a bearer token where it is set.
        concurrency: requests at a time of each actor.
        timeout: of a request, seconds.
        max_attempts: at one request that fails, before it is asked whether the server or the row is at fault.
        patience: seconds that a request is asked again in all while the server says that it is busy (429, 503 ...), before the
            job ends; no row is refused for that.
        backoff: seconds before the second attempt; doubled for each one after it, up to `max_backoff`, with jitter. A server's
            Retry-After goes before it.
        max_backoff: seconds; a longer Retry-After is not waited for.
        image_format: images are sent as "png", which loses nothing, or "jpeg", which is smaller.
        extra: more fields of the request's body, for what a server has of its own.
    """

    NO_VALUE: ClassVar = (
        "base_url",
        "api_key_variable",
        "concurrency",
        "timeout",
        "max_attempts",
        "patience",
        "backoff",
        "max_backoff",
    )

    base_url: str = "http://localhost:8000/v1"
    api_key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 16
    timeout: float = 120.0
    max_attempts: int = 6
    patience: float = 600.0
    backoff: float = 1.0
    max_backoff: float = 60.0
    image_format: Literal["png", "jpeg"] = "png"
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_variable):
            raise ValueError("http.api_key_variable must be the name of an environment variable: the key itself stands there")
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"http.base_url={self.base_url!r} must be a URL such as http://localhost:8000/v1")
        if (
            min(self.concurrency, self.max_attempts) < 1
            or min(self.timeout, self.max_backoff) <= 0
            or min(self.backoff, self.patience) < 0
        ):
            raise ValueError(
                f"http.concurrency={self.concurrency} and http.max_attempts={self.max_attempts} must be at least 1, "
                f"http.timeout={self.timeout:g} and http.max_backoff={self.max_backoff:g} above 0, "
                f"http.backoff={self.backoff:g} and http.patience={self.patience:g} at least 0"
            )


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """For each fault of a caption: flag it, reject it, or do not look for it ("off"). Empty captions are always rejected.

    Args:
        refusal: the model excuses itself ("I'm sorry", "As an AI").
        prompt_echo: the caption begins with the prompt.
        repetition: the model went round in circles.
        cut_off: it had to end before its caption did.
        boilerplate: an opening that says nothing ("The image shows"); "strip" takes it away.
        wrong_script: over a fifth of the letters are not of `script`.
        over_budget: more than `token_budget` tokens: the text encoder does not read the rest.
        same_caption: it stands on `same_caption_min` images of a shard or more, and on over `same_caption_share` of them.
        script: first word of its letters' Unicode names: LATIN, CYRILLIC, CJK, ARABIC ...
        token_budget: of the text encoder.
        budget_tokenizer: counts the tokens: a local folder, hub id or URI, best the text encoder's own. None: as the captioner
            counts.
        same_caption_min: images.
        same_caption_share: of a shard's captions.
    """

    refusal: Policy = "reject"
    prompt_echo: Policy = "reject"
    repetition: Policy = "reject"
    cut_off: Policy = "flag"
    boilerplate: Literal["flag", "reject", "strip", "off"] = "flag"
    wrong_script: Policy = "flag"
    over_budget: Policy = "flag"
    same_caption: Policy = "flag"
    script: str = "LATIN"
    token_budget: int = 300
    budget_tokenizer: str | None = None
    same_caption_min: int = 10
    same_caption_share: float = 0.05

    def __post_init__(self) -> None:
        if self.token_budget < 1 or self.same_caption_min < 2 or not 0 <= self.same_caption_share <= 1:
            raise ValueError(
                f"token_budget={self.token_budget} must be at least 1, same_caption_min={self.same_caption_min} at least 2, "
                f"same_caption_share={self.same_caption_share} in [0, 1]"
            )

    def policies(self) -> dict[str, str]:
        """The policies by fault, without those that are "off"."""
        found = {name: getattr(self, name) for name in FAULTS}
        return {name: policy for name, policy in found.items() if policy != "off"}


@dataclass(frozen=True, kw_only=True)
class CaptionerConfig:
    """A VLM with its prompt.

    Args:
        name: of the table under captions/, and of the captioner in scores and selection.
        model: a local folder, a hub id, or a zoo://, hf:// or fsspec URI; for `http` the name that the server knows it by.
        revision: of a hub id; for `http` a note of what the server runs.
        trust_remote_code: run the Python files that lie beside the weights. Only for a pinned revision that you have read.
        prompt: what the model is asked about each image. "{caption}" in it stands for the caption that the image came with.
        sampling: greedy unless told otherwise.
        max_image_size: longer sides are shrunk to so many pixels before the model's processor sees the image.
        context_length: tokens of prompt, image and caption together; None: the model's own. A row that is longer is refused.
        engine: "transformers" runs any AutoModelForImageTextToText anywhere; "vllm" is for GPU clusters; "http" asks an
            OpenAI-compatible server.
        dtype: of the weights (not of a server's).
        batch_size: images in one call of a transformers model, halved where they do not fit into memory; changes no value.
        device: "cpu", "cuda"; None: the first GPU that Ray gave the actor, or else the CPU. For `transformers`.
        vllm: settings of this engine.
        http: settings of this engine.
        quality: which faults to look for in captions, and what to do about each.
        resources: of the stage's actors; for `vllm` of each copy of the model.
        max_reject_share: the job fails when a larger share of the images is refused.
    """

    NO_VALUE: ClassVar = ("name", "revision", "batch_size", "device", "vllm", "http", "resources", "max_reject_share")

    name: str
    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    prompt: str = DEFAULT_PROMPT
    sampling: SamplingConfig = SamplingConfig()
    max_image_size: int = 1024
    context_length: int | None = None
    engine: Literal["transformers", "vllm", "http"] = "transformers"
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    batch_size: int = 16
    device: str | None = None
    vllm: VllmConfig = VllmConfig()
    http: HttpConfig = HttpConfig()
    quality: QualityConfig = field(default_factory=QualityConfig)
    resources: Resources = field(default_factory=Resources)
    max_reject_share: float = 0.1

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError(f"captioner {self.name!r}: prompt={self.prompt!r} is empty; say what to describe")
        check_folder_name("name", self.name)
        if self.name == ORIGINAL_CAPTIONER:
            raise ValueError(f"name={self.name!r} is the name of the captions that came with the images: give another")
        if self.batch_size < 1 or self.max_image_size < 1 or (self.context_length is not None and self.context_length < 2):
            raise ValueError(
                f"captioner {self.name!r}: batch_size={self.batch_size} and max_image_size={self.max_image_size} must be at "
                f"least 1, context_length={self.context_length} at least 2"
            )
        if self.engine == "vllm" and self.resources.num_gpus % self.vllm.tensor_parallel_size:
            raise ValueError(
                f"captioner {self.name!r}: resources.num_gpus={self.resources.num_gpus:g} must be a multiple of "
                f"vllm.tensor_parallel_size={self.vllm.tensor_parallel_size}: they are those of one copy of the model"
            )

        if self.engine == "vllm" and "://" in self.model and not self.model.startswith(("zoo://", "hf://")):
            raise ValueError(
                f"captioner {self.name!r}: vllm loads a hub id, or a folder that every node sees; copy {self.model} to one"
            )

    @property
    def columns(self) -> list[str]:
        """The columns of `images` that captioning reads."""
        return ["id", "image_bytes", "source_uri", *(["caption"] if ORIGINAL in self.prompt else [])]
