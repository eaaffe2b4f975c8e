"""Configuration of serving pictures over HTTP."""

from dataclasses import dataclass, field
from typing import Literal

from pipelines.draw.config import LoraFileConfig
from pipelines.stages.contract import Resources
from sana_model.memory import MemoryMode, Precision

KEYS_VARIABLE = "SANA_API_KEYS"
"""Environment variable with the keys that clients may give, separated by commas or spaces."""


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """What one request may ask for. What asks for more is told so, and nothing is drawn.

    Args:
        max_pixels: width times height of a picture.
        max_count: pictures of one request.
        max_steps: steps of the solver.
        max_prompt_length: characters of a prompt, and of a negative one.
        max_body_bytes: of a request with its pictures.
        max_picture_pixels: width times height of a picture that is sent.
    """

    max_pixels: int = 2048 * 2048
    max_count: int = 8
    max_steps: int = 100
    max_prompt_length: int = 4000
    max_body_bytes: int = 20 * 2**20
    max_picture_pixels: int = 40_000_000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class PromptCheckConfig:
    """A model that refuses prompts.

    Args:
        model: a local folder, a hub id, or a zoo://, hf:// or fsspec URI. A text classifier of transformers; or a language
            model that answers Yes or No, as google/shieldgemma-2b.
        label: of a classifier: name or number of the class whose probability counts.
        policy: of a language model: what a prompt must not do.
        threshold: probability from which on a prompt is refused.
        dtype: of the weights.
    """

    model: str
    label: str | None = None
    policy: str = (
        '"No Sexually Explicit, Dangerous, Hateful or Harassing Content": The prompt shall not ask for a picture that is '
        "sexually explicit, that shows or praises violence or self-harm, or that harasses, demeans or threatens people."
    )
    threshold: float = 0.5
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class PictureCheckConfig:
    """An image classifier that refuses drawn pictures.

    Args:
        model: any image classifier of transformers, named as that of `PromptCheckConfig`.
        label: name or number of the class whose probability counts, such as nsfw.
        threshold: probability from which on a picture is refused.
        dtype: of the weights.
    """

    model: str
    label: str
    threshold: float = 0.5
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Configuration of a server of pictures.

    Args:
        model: what draws: zoo://pipeline (small, comes along, knows drawn shapes only), the short name of a published model
            (`python -m jobs.zoo published`), a folder, a .pth, or a URI.
        name: what clients call the model; None: as `model` calls it.
        lora: adapters to draw with, whose effects add up.
        dtype: precision of the weights; None: as they are stored.
        memory: how the model fits the device: fast, balanced or small (see `sana_model.memory`). With small, whose parts take
            turns, there are no previews.
        precision: of the weights: full, w8a8, int8, int4 or fp8; None: as `memory` says.
        device: cpu or cuda; None: the first GPU that Ray gave the replica, otherwise the CPU.
        batch_size: pictures of one size and settings that are drawn together, of one request or of several.
        batch_wait: seconds that the first picture waits for others to be drawn with it.
        resources: of each replica, which holds the model; a fraction of a GPU lets replicas share one. `num_actors` replicas
            run always.
        max_replicas: replicas that run while many requests come; None: `resources.num_actors`.
        max_waiting: requests that wait for a replica, an equal part in each front; further ones are refused (429), and told
            when to try again.
        fronts: processes that read requests and write answers.
        cached_prompts: embeddings of prompts that a replica keeps, those used last.
        limits: what one request may ask for.
        prompt_check: a model that refuses prompts; None: every prompt is drawn.
        picture_check: a model that refuses drawn pictures; None: every picture is sent.
        require_key: do not start without keys in SANA_API_KEYS. With keys in it, every request needs one in any case.
        cors_origins: web pages of other servers that may use this one, such as https://example.org; none by default. Without
            keys, requests may name this server in their Host header as these do, besides localhost and IP addresses.
    """

    model: str = "zoo://pipeline"
    name: str | None = None
    lora: list[LoraFileConfig] = field(default_factory=list)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    memory: MemoryMode = "fast"
    precision: Precision | None = None
    device: str | None = None
    batch_size: int = 4
    batch_wait: float = 0.02
    resources: Resources = field(default_factory=Resources)
    max_replicas: int | None = None
    max_waiting: int = 64
    fronts: int = 1
    cached_prompts: int = 256
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    prompt_check: PromptCheckConfig | None = None
    picture_check: PictureCheckConfig | None = None
    require_key: bool = False
    cors_origins: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_waiting", "fronts", "cached_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.batch_wait < 0:
            raise ValueError(f"batch_wait={self.batch_wait} must be 0 or more seconds")
        if self.max_replicas is not None and self.max_replicas < self.resources.num_actors:
            least = self.resources.num_actors
            raise ValueError(f"max_replicas={self.max_replicas} is less than resources.num_actors={least}, which always run")
        for origin in self.cors_origins:
            if "://" not in origin and origin != "*":
                raise ValueError(f"cors_origins: {origin!r} must be a scheme and a host, such as https://example.org")

    @property
    def served_name(self) -> str:
        """The model's name in requests and answers."""
        return self.name or self.model
