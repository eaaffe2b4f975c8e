"""Configuration of the sample stage, which draws pictures."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pipelines.stages.contract import Resources
from pipelines.tables.schema import check_folder_name


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """How pictures are drawn.

    Args:
        height: of the pictures, in pixels; None takes the size that the model was trained for, or that of `start`.
        width: as height.
        num_steps: steps of the solver.
        guidance_scale: classifier-free guidance weight; 1 turns guidance off.
        solver: "flow_dpm_solver" (14 to 20 steps), "flow_euler" (28 to 50), or "scm" (Sana-Sprint, 1 to 4).
        seed: picture i is drawn from seed + i, whatever its batch.
        negative_prompt: text to guide away from, for all pictures.
        guidance_interval: noise levels between which guidance acts, from 0 (clean) to 1 (noise).
        batch_size: pictures in one call of the model; changes values by rounding only.
        rows_per_shard: pictures in a shard: as many are lost, at most, when an actor dies.
        dtype: of the weights; None keeps the checkpoint's. float16 gives the text encoder bfloat16, whose range it needs.
        device: "cpu" or "cuda"; None picks the first GPU that Ray gave the actor, otherwise the CPU.
        resources: what Ray reserves for the stage's actors.
    """

    NO_VALUE: ClassVar = ("batch_size", "device", "resources")
    SINCE: ClassVar = ("negative_prompt", "guidance_interval")

    height: int | None = None
    width: int | None = None
    num_steps: int = 20
    guidance_scale: float = 4.5
    solver: Literal["flow_dpm_solver", "flow_euler", "scm"] = "flow_dpm_solver"
    seed: int = 0
    negative_prompt: str = ""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    batch_size: int = 16
    rows_per_shard: int = 1000
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str | None = None
    resources: Resources = field(default_factory=Resources)

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale={self.guidance_scale} must be a finite number; 1 turns guidance off")
        for name in ("num_steps", "batch_size", "rows_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """Pictures to start from, in place of noise alone (img2img), and which part of them is drawn anew (inpainting).

    Args:
        image: path or URI of a picture, or a list with one for each prompt.
        mask: path or URI of a gray picture of the same size, or a list: white is drawn anew, black stays as it is. None: all
            is drawn anew.
        strength: how much is drawn anew, from 0 (the picture stays) to 1 (it has no influence); None: 0.6, or 1 with a mask.
    """

    image: str | list[str]
    mask: str | list[str] | None = None
    strength: float | None = None

    def __post_init__(self) -> None:
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise ValueError(f"strength={self.strength} must be from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Prompts, and the pipeline that draws their pictures.

    Args:
        name: of the table written under samples/.
        pipeline: a folder, or a zoo://, hf:// or fsspec URI; ours, diffusers' SanaPipeline, or an NVlabs .pth.
        prompts: the prompts, or a single one, or the path or URI of a text file with one on each line.
        images_per_prompt: pictures of each prompt, one after another.
        start: pictures to start from; None: every picture begins as noise.
        draw: how the pipeline draws.
    """

    NO_VALUE: ClassVar = ("name", "start")  # the hashes of the pictures to start from stand for `start`
    SINCE: ClassVar = ("images_per_prompt",)

    name: str
    pipeline: str
    prompts: list[str] | str
    images_per_prompt: int = 1
    start: StartConfig | None = None
    draw: DrawConfig = field(default_factory=DrawConfig)

    def __post_init__(self) -> None:
        check_folder_name("name", self.name)
        if self.images_per_prompt < 1:
            raise ValueError(f"images_per_prompt={self.images_per_prompt} must be at least 1")
