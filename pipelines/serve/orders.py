"""What the front and the replicas tell each other: orders of pictures, and the answers."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from pipelines.draw.config import DrawConfig
from pipelines.draw.start import PictureFile, StartFiles

Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What pictures that are drawn together share. `starts`: from pictures; `masked`: into their masks."""

    height: int | None
    width: int | None
    num_steps: int | None
    guidance_scale: float
    negative_prompt: str
    starts: bool = False
    masked: bool = False
    strength: float | None = None

    def to_draw(self) -> DrawConfig:
        """The configuration of the sampler, as `jobs.draw` has it."""
        return DrawConfig(
            height=self.height,
            width=self.width,
            num_steps=self.num_steps,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt,
        )


@dataclass(frozen=True, kw_only=True)
class Order:
    """The pictures of one request: one for each seed.

    num_previews: estimates of each picture that are wanted while it is drawn.
    """

    prompt: str
    seeds: list[int]
    settings: Settings
    image: PictureFile | None = None
    mask: PictureFile | None = None
    num_previews: int = 0

    def start(self) -> StartFiles | None:
        """The picture to start from and its mask."""
        if self.image is None:
            return None
        return StartFiles(self.settings.strength, [self.image], [] if self.mask is None else [self.mask])


@dataclass(frozen=True)
class Accepted:
    """The order is in the queue of a replica."""


@dataclass(frozen=True)
class Preview:
    """An estimate of picture `index` after `step` of `num_steps` steps, as JPEG, at most PREVIEW_SIDE pixels wide and high."""

    index: int
    step: int
    num_steps: int
    content: bytes


@dataclass(frozen=True)
class Finished:
    """Picture `index`, as PNG that says how it was drawn."""

    index: int
    content: bytes


@dataclass(frozen=True)
class Refused:
    """Nothing more is drawn for an order. In words of OpenAI's errors; `retry_after` in seconds."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after: int | None = None


Event = Accepted | Preview | Finished | Refused


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a client may want to know of the model. `unit`: width and height must be multiples of it."""

    height: int
    width: int
    unit: int
    num_steps: int
    guided: bool
    """Whether it takes a negative prompt: Sana-Sprint does not."""


class Abandoned(Exception):
    """Nobody waits for any picture of a batch any more."""


class Painter(Protocol):
    """Draws orders; what comes of one ends with Refused, or with as many Finished as it has seeds."""

    async def draw(self, order: Order) -> list[bytes] | Refused: ...

    def stream(self, order: Order) -> AsyncIterator[Event]: ...

    async def describe(self) -> ModelFacts | Refused: ...
