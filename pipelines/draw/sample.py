"""The sample stage: prompts -> pictures, drawn by actors that each hold the whole pipeline."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial, reduce
from io import BytesIO
from operator import or_
from typing import TYPE_CHECKING

import pyarrow as pa
from PIL import Image, ImageOps

from pipelines.draw.config import SampleConfig
from pipelines.draw.control import ControlFiles, read_control
from pipelines.draw.prompts import PromptSet, read_prompt_set
from pipelines.draw.start import StartFiles, read_start
from pipelines.stages.contract import OnProgress, ShardOutput, StageResult
from pipelines.stages.run import run_shards
from pipelines.storage.lease import Leases
from pipelines.tables.errors import WrongInputError
from pipelines.tables.identity import Identity, value_settings
from pipelines.tables.rejects import RowRefused, reject
from pipelines.tables.schema import PROMPT_METADATA, Row, samples_path, samples_schema
from pipelines.tables.table import Table
from pipelines.workers.halving import refuse_out_of_memory, run_halving
from pipelines.workers.models import FoundModel, find_model, pick_device
from sana_model.files.kinds import is_sprint
from sana_model.files.places import resolve
from sana_model.files.png import read_facts, set_facts, to_png

if TYPE_CHECKING:
    import torch

    from sana_model.pipeline import TextToImage

CUT_PROMPTS = "num_cut_prompts"
"""The figure that counts the prompts which are too long for the text encoder."""


def sample_identity(
    config: SampleConfig,
    prompts: Sequence[str],
    models: dict[str, str],
    start: StartFiles | None = None,
    control: ControlFiles | None = None,
    *,
    prompt_metadata: str | None = None,
) -> Identity:
    """Everything that the pictures depend on, and what their rows say of the prompts: `PromptSet.hash`."""
    settings = value_settings(config)
    settings |= settings.pop("draw")
    settings["prompts"] = f"{len(prompts)}, sha256 {hashlib.sha256(repr(prompts).encode()).hexdigest()[:16]}"
    if prompt_metadata is not None:
        settings[PROMPT_METADATA] = prompt_metadata
    if start is not None:
        settings["start"] = start.identity
    if control is not None:
        settings["control"] = control.identity
        models = models | control.models
    return Identity("sample", settings, models, {})


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


def run_sample(
    dataset_uri: str,
    config: SampleConfig,
    *,
    source: PipelineSource | None = None,
    on_progress: OnProgress = lambda _: None,
    leases: Leases | None = None,
    in_process: bool = False,
) -> StageResult:
    """Draw the pictures of each prompt and write them to `samples/<name>`.

    Args:
        source: how to load what `config.pipeline` names; None: by this name.
        in_process: see `run_shards`.

    Raises what `read_prompt_set`, `read_start`, `read_control` and `run_shards` raise.
    """
    prompt_set = read_prompt_set(config.prompts).spread(config.num_prompts)
    prompts = prompt_set.prompts
    if source is not None and config.control is not None:
        raise ValueError(
            f"control steers no checkpoint, such as {config.pipeline}: export it by jobs.export, and draw with that"
        )
    pipeline = source or find_model(config.pipeline)
    sprint = pipeline.is_sprint if isinstance(pipeline, PipelineSource) else is_sprint(resolve(pipeline.path))
    draw = config.draw.for_model(config.pipeline, is_sprint=sprint)
    config = replace(config, draw=draw)
    has_size = config.draw.height is not None and config.draw.width is not None
    start = read_start(config.start, len(prompts), has_size=has_size) if config.start else None
    has_size = has_size or start is not None
    control = read_control(config.control, prompts, has_size=has_size) if config.control else None
    num_shards = -(-len(prompts) * config.images_per_prompt // config.draw.rows_per_shard)
    models = {"pipeline": pipeline.version}
    identity = sample_identity(config, prompts, models, start, control, prompt_metadata=prompt_set.hash)
    return run_shards(
        Table(dataset_uri, samples_path(config.name), samples_schema(identity.config)),
        identity,
        [f"{number:05d}" for number in range(num_shards)],
        read_shard=partial(_read_prompts_shard, prompt_set, config),
        make_worker=partial(Sampler, config, pipeline, start, control),
        resources=config.draw.resources,
        max_reject_share=config.max_reject_share,
        on_progress=on_progress,
        leases=leases,
        in_process=in_process,
    )


def _read_prompts_shard(prompts: PromptSet, config: SampleConfig, shard: str) -> pa.Table:
    """The pictures to draw for a shard: id, prompt, seed, and `number`, the prompt's; with prompt_id and metadata, if known."""
    each, size = config.images_per_prompt, config.draw.rows_per_shard
    rows = range(int(shard) * size, min((int(shard) + 1) * size, len(prompts.prompts) * each))
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

    Raises ValueError for a size that does not divide, and as `TextToImage`.
    """

    def __init__(
        self,
        config: SampleConfig,
        pipeline: FoundModel | PipelineSource,
        start: StartFiles | None = None,
        control: ControlFiles | None = None,
    ):
        import torch

        from sana_model.pipeline import TextToImage

        self.config, self.start, self.control = config.draw, start, control
        self.facts = {"model": config.pipeline, "model_version": pipeline.version}
        device = pick_device(self.config.device)
        dtype = getattr(torch, self.config.dtype) if self.config.dtype else None
        controlnet = control.controlnet.path if control is not None and control.controlnet is not None else None
        if isinstance(pipeline, PipelineSource):
            self.pipeline = pipeline.load(dtype).to(device)
        else:
            self.pipeline = TextToImage.from_pretrained(pipeline.path, dtype=dtype, controlnet=controlnet).to(device)
        if control is not None and self.pipeline.controlnet is None:
            raise ValueError(f"control came, and {config.pipeline} holds no ControlNet: give control.controlnet too")
        self.detector = control.make_detector(device) if control is not None else None
        self.make_control = lru_cache(maxsize=16)(self._make_control)  # a picture may belong to many rows
        if start is None and control is None:
            self.pipeline.image_size(self.config.height, self.config.width)

    def process(self, table: pa.Table) -> ShardOutput:
        """Make one row of samples for each row of `_read_prompts_shard`, or a reject.

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


def read_pictures(table: Table, limit: int = 64) -> tuple[list[str], list[Image.Image]]:
    """Read the prompts and pictures of the first `limit` rows of a samples table."""
    rows: list[Row] = []
    for shard in table.list_shards():
        rows += table.read_shard(shard, ["prompt", "image_bytes"]).slice(0, limit - len(rows)).to_pylist()
        if len(rows) == limit:
            break
    return [row["prompt"] for row in rows], [Image.open(BytesIO(row["image_bytes"])) for row in rows]
