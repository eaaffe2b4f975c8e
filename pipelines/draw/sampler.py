"""What draws the pictures of a configuration's prompts: its models and pictures as they were found, and the worker."""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from operator import or_
from typing import TYPE_CHECKING

import pyarrow as pa
from PIL import Image, ImageOps

from pipelines.draw.config import DrawConfig, SampleConfig
from pipelines.draw.control import ControlFiles, read_control
from pipelines.draw.prompts import PromptSet, read_prompt_set
from pipelines.draw.start import StartFiles, read_start
from pipelines.stages.contract import ShardOutput
from pipelines.tables.errors import WrongInputError
from pipelines.tables.rejects import RowRefused, reject
from pipelines.tables.schema import Row
from pipelines.workers.halving import refuse_out_of_memory, run_halving
from pipelines.workers.models import FoundModel, find_place, pick_device
from sana_model.files.kinds import is_sprint
from sana_model.files.places import resolve
from sana_model.files.png import read_facts, set_facts, to_png

if TYPE_CHECKING:
    import torch

    from sana_model.pipeline import TextToImage
    from sana_model.solver import OnEstimate, OnStep

CUT_PROMPTS = "num_cut_prompts"
"""The figure that counts the prompts which are too long for the text encoder."""


@dataclass(frozen=True, kw_only=True)
class PipelineSource:
    """A pipeline that is not loaded by its path, such as that of a training's checkpoint.

    version: differs whenever its weights do.
    is_sprint: whether it is Sana-Sprint.
    load: called on an actor with the dtype of the weights, or None for their own.
    """

    version: str
    is_sprint: bool
    load: Callable[["torch.dtype | None"], "TextToImage"]


@dataclass(frozen=True)
class Drawing:
    """A configuration with what its names stand for.

    config: with the solver and the number of steps of the model. loras: the adapters' files, as `config.lora` names them.
    """

    config: SampleConfig
    prompts: PromptSet
    pipeline: FoundModel | PipelineSource
    loras: list[FoundModel]
    start: StartFiles | None
    control: ControlFiles | None


def find_drawing(config: SampleConfig, source: PipelineSource | None = None, *, with_versions: bool = True) -> Drawing:
    """Find the models, read the prompts and the pictures to start from, and look at the control pictures.

    Args:
        source: how to load what `config.pipeline` names; None: by this name.
        with_versions: find the versions of the pipeline and the adapters too, which reads all of their files.

    Raises what `read_prompt_set`, `find_place`, `read_start` and `read_control` raise; ValueError for control, a
    memory mode or a precision of a `source`.
    """
    prompts = read_prompt_set(config.prompts).spread(config.num_prompts)
    if source is not None and config.control is not None:
        raise ValueError(
            f"control steers no checkpoint, such as {config.pipeline}: export it by jobs.export, and draw with that"
        )
    if source is not None and (config.draw.memory != "fast" or config.draw.precision is not None):
        raise ValueError(
            f"draw.memory={config.draw.memory}, draw.precision={config.draw.precision}: a training's checkpoint, such as "
            f"{config.pipeline}, is drawn with as it is; export it by jobs.export, and draw with that"
        )
    pipeline = source or find_place(config.pipeline, with_version=with_versions)
    sprint = pipeline.is_sprint if isinstance(pipeline, PipelineSource) else is_sprint(resolve(pipeline.path))
    loras = [find_place(lora.path, with_version=with_versions) for lora in config.lora]
    draw = config.draw.for_model(config.pipeline, is_sprint=sprint)
    has_size = draw.height is not None and draw.width is not None
    start = read_start(config.start, len(prompts.prompts), has_size=has_size) if config.start else None
    has_size = has_size or start is not None
    control = read_control(config.control, prompts.prompts, has_size=has_size) if config.control else None
    return Drawing(replace(config, draw=draw), prompts, pipeline, loras, start, control)


def steps_of_batch(config: SampleConfig) -> int:
    """The steps of one batch: with a picture to start from as many as `cut_sigmas` leaves."""
    from sana_model.pictures import default_strength
    from sana_model.solver import steps_taken

    steps, start = config.draw.num_steps or 0, config.start
    if start is None:
        return steps
    strength = default_strength(with_mask=start.mask is not None) if start.strength is None else start.strength
    return steps_taken(steps, strength)


def rows_to_draw(prompts: PromptSet, config: SampleConfig, first: int, count: int) -> pa.Table:
    """The pictures from number `first` on, `count` at most: id, prompt, seed, and `number`, the prompt's; with prompt_id and
    metadata, if known."""
    each = config.images_per_prompt
    rows = range(first, min(first + count, len(prompts.prompts) * each))
    numbers = [row // each for row in rows]
    columns = {"id": [f"{row:06d}" for row in rows], "prompt": [prompts.prompts[number] for number in numbers]}
    if prompts.ids is not None and prompts.metadata is not None:
        columns["prompt_id"] = [prompts.ids[number] for number in numbers]
        columns["metadata"] = [prompts.metadata[number] for number in numbers]
    return pa.table(columns | {"seed": [config.draw.seed + row for row in rows], "number": numbers})


class Sampler:
    """Ray Data actor: prompts -> pictures, whose PNGs say how they were drawn.

    Args:
        pipeline: the configured one, as the driver found it, or how it is loaded.
        start, control: the pictures to start from, and the control pictures, if there are any.
        loras: the files of the adapters that the configuration names.

    Raises ValueError for a size that does not divide, and as `TextToImage`.
    """

    def __init__(
        self,
        config: SampleConfig,
        pipeline: FoundModel | PipelineSource,
        start: StartFiles | None = None,
        control: ControlFiles | None = None,
        loras: Sequence[FoundModel] = (),
    ):
        import torch

        from sana_model.pipeline import TextToImage

        self.config, self.start, self.control = config.draw, start, control
        self.on_step: OnStep | None = None  # called after each step of each batch, if somebody sets it
        self.on_estimate: OnEstimate | None = None  # likewise
        self.facts = {"model": config.pipeline} | ({"model_version": pipeline.version} if pipeline.version else {})
        device = pick_device(self.config.device)
        dtype = getattr(torch, self.config.dtype) if self.config.dtype else None
        controlnet = control.controlnet.path if control is not None and control.controlnet is not None else None
        if isinstance(pipeline, PipelineSource):
            self.pipeline = pipeline.load(dtype).to(device)
        else:
            self.pipeline = TextToImage.from_pretrained(
                pipeline.path,
                dtype=dtype,
                controlnet=controlnet,
                device=device,
                memory=self.config.memory,
                precision=self.config.precision,
            )
        for lora, found in zip(config.lora, loras, strict=True):
            self.pipeline.load_lora(found.path, scale=lora.scale)
        if control is not None and self.pipeline.controlnet is None:
            raise ValueError(f"control came, and {config.pipeline} holds no ControlNet: give control.controlnet too")
        self.detector = control.make_detector(device) if control is not None else None
        self.make_control = lru_cache(maxsize=16)(self._make_control)  # a picture may belong to many rows
        if start is None and control is None:
            self.pipeline.image_size(self.config.height, self.config.width)

    def with_settings(self, config: DrawConfig, start: StartFiles | None) -> "Sampler":
        """The same models, drawing with other settings and from other pictures."""
        other = copy(self)
        other.config, other.start = config, start
        return other

    def process(self, table: pa.Table) -> ShardOutput:
        """Make one row of samples for each row of `rows_to_draw`, or a reject.

        Rejects are pictures whose values are not finite, and prompts whose control picture cannot be used. Figures:
        CUT_PROMPTS. Raises WrongInputError if weights of the pipeline are not finite.
        """
        rows: list[Row] = []
        rejects: list[Row] = []
        source = table.to_pylist()
        num_cut = 0
        for start in range(0, len(source), self.config.batch_size):
            batch, refused = self._with_controls(source[start : start + self.config.batch_size])
            rejects += refused
            counts = self.pipeline.text_encoder.count_tokens([row["prompt"] for row in batch]) if batch else []
            num_cut += sum(count > self.pipeline.text_encoder.config.max_tokens for count in counts)
            for row, image in zip(batch, run_halving(self.draw, batch, refuse=_refuse), strict=True):
                number, _ = row.pop("number"), row.pop("control")
                if isinstance(image, RowRefused):
                    rejects.append(reject(row, image))
                    continue
                given = [pictures.facts(number) for pictures in (self.start, self.control) if pictures is not None]
                set_facts(image, reduce(or_, [read_facts(image), self.facts, *given]))
                rows.append({**row, "image_bytes": to_png(image)})
        return ShardOutput(rows, rejects, {CUT_PROMPTS: num_cut} if num_cut else {})

    def _with_controls(self, batch: list[Row]) -> tuple[list[Row], list[Row]]:
        """The rows with their control pictures (None: nothing steers), and the rejects of those whose picture is no good."""
        rows: list[Row] = []
        rejects: list[Row] = []
        for row in batch:
            try:
                rows.append({**row, "control": None if self.control is None else self.make_control(row["number"])})
            except RowRefused as refused:
                rejects.append(reject(row, refused))
        return rows, rejects

    def _make_control(self, number: int) -> Image.Image:
        """The control picture of a prompt, given by its number. Detectors see the size that is drawn. Raises RowRefused."""
        from sana_model.pictures import GuidePictures

        assert self.control is not None
        picture = self.control.of(number).read()
        if self.detector is None:
            return picture
        if self.start is None:
            given = GuidePictures([picture], self.pipeline.autoencoder)
            height, width = self.pipeline.image_size(self.config.height, self.config.width, given)
            picture = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
        return self.detector(picture)

    def draw(self, rows: list[Row]) -> list[Image.Image]:
        """Draw one picture for each row's prompt and seed, in one call of the pipeline."""
        config = self.config
        given = self.start.arguments([row["number"] for row in rows]) if self.start else {}
        if self.control is not None:
            given |= {"control_image": [row["control"] for row in rows], "control_scale": self.control.config.scale}
        return self.pipeline(
            [row["prompt"] for row in rows],
            config.height,
            config.width,
            num_steps=config.num_steps,
            guidance_scale=config.guidance_scale,
            guidance_interval=config.guidance_interval,
            negative_prompt=config.negative_prompt,
            solver=config.solver,
            seed=[row["seed"] for row in rows],
            on_step=self.on_step,
            on_estimate=self.on_estimate,
            **given,
        )


def _refuse(error: Exception, size: int) -> RowRefused | None:
    """The refusal of a picture that cannot be drawn. Raises WrongInputError where no picture can."""
    from sana_model.nn.finite import NotFiniteError

    if not isinstance(error, NotFiniteError):
        return refuse_out_of_memory(error, size)
    if error.bad_weights:
        raise WrongInputError(str(error)) from error
    return RowRefused("not_finite", str(error))
