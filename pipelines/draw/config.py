"""Configuration of the sample stage, which draws pictures."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pipelines.stages.contract import Resources


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """How pictures are drawn.

    Args:
        height, width: pixels; the size that the model was made for unless given.
        num_steps: of the solver.
        guidance_scale: of classifier-free guidance; 1 turns it off.
        solver: "flow_dpm_solver" (14 to 20 steps) or "flow_euler" (28 to 50).
        seed: picture i is drawn from seed + i, whatever its batch.
        batch_size: pictures in one call of the model; changes no value but rounding.
        rows_per_shard: pictures that are lost, at most, when an actor dies.
        dtype: of the weights; None: the checkpoint's.
        device: "cpu", "cuda"; None: the first GPU that Ray gave the actor, or else the CPU.
        resources: of the stage's actors.
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


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Prompts, and what draws their pictures.

    Args:
        name: of the table under samples/.
        pipeline: a folder, or a zoo://, hf:// or fsspec URI; ours, diffusers' SanaPipeline, or an NVlabs .pth.
        prompts: the prompts, or a text file with one on each line.
        draw: how the pipeline draws.
    """

    NO_VALUE: ClassVar = ("name",)

    name: str
    pipeline: str
    prompts: list[str] | str
    draw: DrawConfig = field(default_factory=DrawConfig)
