"""The sample stage: prompts -> pictures, drawn by actors that each hold the whole pipeline."""

import hashlib
from collections.abc import Sequence
from functools import partial
from io import BytesIO

import pyarrow as pa
from PIL import Image

from pipelines.draw.config import SampleConfig
from pipelines.draw.control import ControlFiles
from pipelines.draw.prompts import PromptSet
from pipelines.draw.sampler import PipelineSource, Sampler, find_drawing, rows_to_draw
from pipelines.draw.start import StartFiles
from pipelines.stages.contract import OnProgress, StageResult
from pipelines.stages.run import run_shards
from pipelines.storage.lease import Leases
from pipelines.tables.identity import Identity, value_settings
from pipelines.tables.schema import PROMPT_METADATA, Row, samples_path, samples_schema
from pipelines.tables.table import Table


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
    if config.lora:
        settings["lora"] = [lora.scale for lora in config.lora]
    if start is not None:
        settings["start"] = start.identity
    if control is not None:
        settings["control"] = control.identity
        models = models | control.models
    return Identity("sample", settings, models, {})


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

    Raises what `find_drawing` and `run_shards` raise.
    """
    drawing = find_drawing(config, source)
    config, prompts, start, control = drawing.config, drawing.prompts, drawing.start, drawing.control
    num_shards = -(-len(prompts.prompts) * config.images_per_prompt // config.draw.rows_per_shard)
    models = {"pipeline": drawing.pipeline.version}
    models |= {f"lora {number}": lora.version for number, lora in enumerate(drawing.loras)}
    identity = sample_identity(config, prompts.prompts, models, start, control, prompt_metadata=prompts.hash)
    return run_shards(
        Table(dataset_uri, samples_path(config.name), samples_schema(identity.config)),
        identity,
        [f"{number:05d}" for number in range(num_shards)],
        read_shard=partial(_read_prompts_shard, prompts, config),
        make_worker=partial(Sampler, config, drawing.pipeline, start, control, drawing.loras),
        resources=config.draw.resources,
        max_reject_share=config.max_reject_share,
        on_progress=on_progress,
        leases=leases,
        in_process=in_process,
    )


def _read_prompts_shard(prompts: PromptSet, config: SampleConfig, shard: str) -> pa.Table:
    """The pictures to draw for a shard."""
    size = config.draw.rows_per_shard
    return rows_to_draw(prompts, config, int(shard) * size, size)


def read_pictures(table: Table, limit: int = 64) -> tuple[list[str], list[Image.Image]]:
    """Read the prompts and pictures of the first `limit` rows of a samples table."""
    rows: list[Row] = []
    for shard in table.list_shards():
        rows += table.read_shard(shard, ["prompt", "image_bytes"]).slice(0, limit - len(rows)).to_pylist()
        if len(rows) == limit:
            break
    return [row["prompt"] for row in rows], [Image.open(BytesIO(row["image_bytes"])) for row in rows]
