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
        height: of the pictures, in pixels; None takes the size that the model was trained for.
        width: as height.
        num_steps: steps of the solver.
        guidance_scale: classifier-free guidance weight; 1 turns guidance off.
        solver: "flow_dpm_solver" (14 to 20 steps) or "flow_euler" (28 to 50).
        seed: picture i is drawn from seed + i, whatever its batch.
        batch_size: pictures in one call of the model; changes values by rounding only.
        rows_per_shard: pictures in a shard: as many are lost, at most, when an actor dies.
        dtype: of the weights; None keeps the checkpoint's. float16 gives the text encoder bfloat16, whose range it needs.
        device: "cpu" or "cuda"; None picks the first GPU that Ray gave the actor, otherwise the CPU.
        resources: what Ray reserves for the stage's actors.
    """

    NO_VALUE: ClassVar = ("batch_size", "device", "resources")

    height: int | None = None
    width: int | None = None
    num_steps: int = 20
    guidance_scale: float = 4.5
    solver: Literal["flow_dpm_solver", "flow_euler"] = "flow_dpm_solver"
    seed: int = 0
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
class SampleConfig:
    """Prompts, and the pipeline that draws their pictures.

    Args:
        name: of the table written under samples/.
        pipeline: a folder, or a zoo://, hf:// or fsspec URI; ours, diffusers' SanaPipeline, or an NVlabs .pth.
        prompts: the prompts, or the path of a text file with one on each line.
        draw: how the pipeline draws.
    """

    NO_VALUE: ClassVar = ("name",)

    name: str
    pipeline: str
    prompts: list[str] | str
    draw: DrawConfig = field(default_factory=DrawConfig)

    def __post_init__(self) -> None:
        check_folder_name("name", self.name)
