"""The sample stage: prompts -> pictures, drawn by actors that each hold the whole pipeline."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import torch
from PIL import Image

from pipelines.draw.config import SampleConfig
from pipelines.stages.contract import OnProgress, ShardOutput, StageResult
from pipelines.stages.run import run_shards
from pipelines.storage.lease import Leases
from pipelines.tables.errors import WrongInputError
from pipelines.tables.identity import Identity, value_settings
from pipelines.tables.rejects import RowRefused, reject
from pipelines.tables.schema import SAMPLES, Row, samples_path
from pipelines.tables.table import Table
from pipelines.workers.halving import refuse_out_of_memory, run_halving
from pipelines.workers.images import to_png
from pipelines.workers.models import find_model, pick_device
from sana_model.nn.finite import NotFiniteError
from sana_model.pipeline import TextToImage

CUT_PROMPTS = "num_cut_prompts"
"""The figure that counts the prompts which are too long for the text encoder."""


def read_prompts(prompts: list[str] | str) -> list[str]:
    """Strip the given prompts, or read them from a text file with one on each line. Blank prompts are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no prompt is left.
    """
    lines = prompts if isinstance(prompts, list) else Path(prompts).read_text().splitlines()
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ValueError(f"prompts={prompts!r} holds no prompt: give at least one that is not blank")
    return found


def sample_identity(config: SampleConfig, prompts: Sequence[str], models: dict[str, str]) -> Identity:
    """Everything that the pictures depend on."""
    settings = value_settings(config)
    settings |= settings.pop("draw")
    settings["prompts"] = f"{len(prompts)}, sha256 {hashlib.sha256(repr(prompts).encode()).hexdigest()[:16]}"
    return Identity("sample", settings, models, {})


def run_sample(
    dataset_uri: str, config: SampleConfig, *, on_progress: OnProgress = lambda _: None, leases: Leases | None = None
) -> StageResult:
    """Draw a picture for each prompt and write it to `samples/<name>`. Raises what `read_prompts` and `run_shards` raise."""
    prompts = read_prompts(config.prompts)
    pipeline = find_model(config.pipeline)
    size = config.draw.rows_per_shard
    return run_shards(
        Table(dataset_uri, samples_path(config.name), SAMPLES),
        sample_identity(config, prompts, {"pipeline": pipeline.version}),
        [f"{number:05d}" for number in range(-(-len(prompts) // size))],
        read_shard=partial(_read_prompts_shard, prompts, config.draw.seed, size),
        make_worker=partial(Sampler, replace(config, pipeline=pipeline.path)),
        resources=config.draw.resources,
        max_reject_share=0.0,
        on_progress=on_progress,
        leases=leases,
    )


def _read_prompts_shard(prompts: list[str], seed: int, size: int, shard: str) -> pa.Table:
    rows = range(int(shard) * size, min((int(shard) + 1) * size, len(prompts)))
    columns = {"id": [f"{row:06d}" for row in rows], "prompt": [prompts[row] for row in rows]}
    return pa.table(columns | {"seed": [seed + row for row in rows]})


class Sampler:
    """Ray Data actor: prompts -> pictures. Raises ValueError for a size that does not divide, and as `TextToImage`."""

    def __init__(self, config: SampleConfig):
        self.config = config.draw
        device = pick_device(self.config.device)
        dtype = getattr(torch, self.config.dtype) if self.config.dtype else None
        self.pipeline = TextToImage.from_pretrained(config.pipeline, dtype=dtype).to(device)
        self.pipeline.image_size(self.config.height, self.config.width)

    def process(self, table: pa.Table) -> ShardOutput:
        """Make one row of samples for each row with a prompt and a seed, or a reject where the picture's values are not finite.

        Figures: CUT_PROMPTS. Raises WrongInputError if weights of the pipeline are not finite.
        """
        rows: list[Row] = []
        rejects: list[Row] = []
        source = table.to_pylist()
        num_cut = 0
        for start in range(0, len(source), self.config.batch_size):
            batch = source[start : start + self.config.batch_size]
            counts = self.pipeline.text_encoder.count_tokens([row["prompt"] for row in batch])
            num_cut += sum(count > self.pipeline.text_encoder.config.max_tokens for count in counts)
            for row, image in zip(batch, run_halving(self.draw, batch, refuse=_refuse), strict=True):
                if isinstance(image, RowRefused):
                    rejects.append(reject(row, image))
                else:
                    rows.append({**row, "image_bytes": to_png(image)})
        return ShardOutput(rows, rejects, {CUT_PROMPTS: num_cut} if num_cut else {})

    def draw(self, rows: list[Row]) -> list[Image.Image]:
        """Draw one picture for each row's prompt and seed, in one call of the pipeline."""
        config = self.config
        return self.pipeline(
            [row["prompt"] for row in rows],
            config.height,
            config.width,
            num_steps=config.num_steps,
            guidance_scale=config.guidance_scale,
            solver=config.solver,
            seed=[row["seed"] for row in rows],
        )


def _refuse(error: Exception, size: int) -> RowRefused | None:
    """The refusal of a picture that cannot be drawn. Raises WrongInputError where no picture can."""
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
