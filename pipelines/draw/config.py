"""Configuration of the sample stage, which draws pictures."""

import math
import re
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from pipelines.stages.contract import Resources
from pipelines.tables.schema import check_folder_name
from sana_model.memory import MemoryMode, Precision
from sana_model.zoo.published import HED_WEIGHTS


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """How pictures are drawn.

    Args:
        height: of the pictures, in pixels; None takes the size that the model was trained for, or that of `start`.
        width: as height.
        num_steps: steps of the solver; None: 20, or 2 for Sana-Sprint.
        guidance_scale: classifier-free guidance weight; 1 turns guidance off.
        solver: "flow_dpm_solver" (14 to 20 steps), "flow_euler" (28 to 50), or "scm" (Sana-Sprint, 1 to 4);
            None: "flow_dpm_solver", or "scm" for Sana-Sprint.
        seed: picture i is drawn from seed + i, whatever its batch.
        negative_prompt: text to guide away from, for all pictures.
        guidance_interval: noise levels between which guidance acts, from 0 (clean) to 1 (noise).
        batch_size: pictures in one call of the model; changes values by rounding only.
        rows_per_shard: pictures in a shard: as many are lost, at most, when an actor dies.
        dtype: of the weights; None keeps the checkpoint's. float16 gives the text encoder bfloat16, whose range it needs.
        memory: how the models fit the device: "fast", all of them on it in full precision; "balanced"; "small", one at a time,
            in 8 and 4 bits (see `sana_model.memory`).
        precision: of the weights: "w8a8", "int8", "int4", "fp8" or "full"; None: as `memory` says.
        device: "cpu" or "cuda"; None picks the first GPU that Ray gave the actor, otherwise the CPU.
        resources: what Ray reserves for the stage's actors.
    """

    NO_VALUE: ClassVar = ("batch_size", "device", "resources")
    SINCE: ClassVar = ("negative_prompt", "guidance_interval", "memory", "precision")

    height: int | None = None
    width: int | None = None
    num_steps: int | None = None
    guidance_scale: float = 4.5
    solver: Literal["flow_dpm_solver", "flow_euler", "scm"] | None = None
    seed: int = 0
    negative_prompt: str = ""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    batch_size: int = 16
    rows_per_shard: int = 1000
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    memory: MemoryMode = "fast"
    precision: Precision | None = None
    device: str | None = None
    resources: Resources = field(default_factory=Resources)

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale={self.guidance_scale} must be a finite number; 1 turns guidance off")
        for name in ("num_steps", "batch_size", "rows_per_shard"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")

    def for_model(self, pipeline: str, *, is_sprint: bool) -> "DrawConfig":
        """The same with the solver and the number of steps of a model. Raises ValueError for a setting it cannot take."""
        solver = self.solver or ("scm" if is_sprint else "flow_dpm_solver")
        if (solver == "scm") != is_sprint:
            needed = "draw.solver=scm, with 1 to 4 steps" if is_sprint else "draw.solver=flow_dpm_solver or flow_euler"
            kind = "is Sana-Sprint" if is_sprint else "is not Sana-Sprint"
            raise ValueError(f"draw.solver={solver}: {pipeline} {kind} and needs {needed}; leave it out to get its own")
        if is_sprint and (self.negative_prompt or tuple(self.guidance_interval) != (0.0, 1.0)):
            raise ValueError(
                f"{pipeline} is Sana-Sprint, which guides within the model: leave out draw.negative_prompt and "
                "draw.guidance_interval"
            )
        num_steps = self.num_steps or (2 if is_sprint else 20)
        return replace(self, solver=solver, num_steps=num_steps)


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
class ControlConfig:
    """Control pictures, by which a ControlNet steers the drawing.

    Args:
        image: path or URI of a picture for all prompts; or a list with one for each; or a folder, whose pictures, sorted by
            name, belong to the prompts in their order; or a table (.csv, .tsv, .jsonl, .parquet) with a column `prompt`.
        column: of such a table, with the path or URI of the prompt's picture; a relative one begins at the table's folder.
        controlnet: a folder, a .pth, or a URI; None: the pipeline's own.
        scale: how strongly it steers; 0: not at all.
        detector: what makes the control of a picture: "canny" (edges), "depth" or "hed" (outlines); None: it is one already.
        canny: the two thresholds of "canny", see `CannyDetector`.
        depth_model: of "depth": any model of transformers for depth estimation, by folder, hub id or URI.
        depth_is_distance: whether large values of `depth_model` are far away, as those of metric depth are.
        hed_weights: of "hed": path or URI of `ControlNetHED.pth`.
        scribble: width in pixels of the lines that "hed" draws, as the published ControlNets were trained; None: soft lines.
    """

    image: str | list[str]
    column: str = "control"
    controlnet: str | None = None
    scale: float = 1.0
    detector: Literal["canny", "depth", "hed"] | None = None
    canny: tuple[int, int] = (100, 200)
    depth_model: str | None = None
    depth_is_distance: bool = False
    hed_weights: str = HED_WEIGHTS
    scribble: int | None = 2

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"scale={self.scale} must be a finite number; 0 steers nothing")
        if (self.detector == "depth") != (self.depth_model is not None):
            raise ValueError('detector="depth" and depth_model, a model for depth estimation, come together')
        if not 0 <= self.canny[0] <= self.canny[1]:
            raise ValueError(f"canny={self.canny} must be two thresholds, the lower one first")
        if self.scribble is not None and self.scribble < 0:
            raise ValueError(f"scribble={self.scribble} must be 0 or more pixels, or null for soft lines")

    @property
    def detector_settings(self) -> dict[str, Any]:
        """The settings of the detector that count, without its model."""
        counts = {"canny": ("canny",), "depth": ("depth_is_distance",), "hed": ("scribble",)}
        names = ("detector", *counts[self.detector]) if self.detector else ()
        values = {name: getattr(self, name) for name in names}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @property
    def detector_facts(self) -> dict[str, Any]:
        """The same with its model, as it was configured."""
        names = {"depth": "depth_model", "hed": "hed_weights"}
        model = {name: getattr(self, name) for detector, name in names.items() if detector == self.detector}
        return self.detector_settings | model


@dataclass(frozen=True, kw_only=True)
class LoraFileConfig:
    """An adapter to draw with: LoRA, LoHa or LoKr, of this project, diffusers, peft, SimpleTuner or OneTrainer.

    Args:
        path: of its .safetensors, or the folder that holds it; local or a URI.
        scale: how strongly it acts; 1: as it was trained.
    """

    path: str
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"scale={self.scale} must be a finite number; 0 has no effect")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Prompts, and the pipeline that draws their pictures.

    Args:
        name: of the table written under samples/.
        pipeline: a folder, or a zoo://, hf:// or fsspec URI; ours, diffusers' SanaPipeline, or an NVlabs .pth. Or the short
            name of a published model (`python -m jobs.zoo published`). Or a checkpoint of a training here:
            <training>/checkpoints/step-001000, or <training>/checkpoints/best.
        prompts: the prompts, or a single one; or the path or URI of a file: text with one on each line, JSON lines, JSON, CSV
            or TSV with a field `prompt`, or a folder of .txt files; or the name of a published set: geneval, dpg-bench,
            partiprompts, imagereward (shipped), mjhq-30k (of the hub), coco-30k, drawbench (of a file that you give).
        num_prompts: draw only so many of them, spread evenly over all; None: all.
        images_per_prompt: pictures of each prompt, one after another.
        start: pictures to start from; None: every picture begins as noise.
        control: control pictures for a ControlNet; None: nothing steers.
        lora: adapters to draw with, whose effects add up.
        max_reject_share: the job fails when a larger share of the pictures cannot be drawn.
        draw: how the pipeline draws.
    """

    # The hashes of their files stand for `start`, `control` and `lora`, that of the prompts that are drawn for `num_prompts`.
    NO_VALUE: ClassVar = ("name", "num_prompts", "start", "control", "lora", "max_reject_share")
    SINCE: ClassVar = ("images_per_prompt",)

    name: str
    pipeline: str
    prompts: list[str] | str
    num_prompts: int | None = None
    images_per_prompt: int = 1
    start: StartConfig | None = None
    control: ControlConfig | None = None
    lora: list[LoraFileConfig] = field(default_factory=list)
    max_reject_share: float = 0.0
    draw: DrawConfig = field(default_factory=DrawConfig)

    def __post_init__(self) -> None:
        check_folder_name("name", self.name)
        for name in ("num_prompts", "images_per_prompt"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


def read_size(size: str | None) -> tuple[int | None, int | None]:
    """(width, height) of "1024x768" or "1024"; of None, None. Raises ValueError for anything else."""
    if size is None:
        return None, None
    match = re.fullmatch(r"(\d+)(?:\s*[xX×*]\s*(\d+))?", size.strip())
    if match is None:
        raise ValueError(f"size={size!r} must be width x height in pixels, such as 1024x768, or one number for a square")
    return int(match[1]), int(match[2] or match[1])
