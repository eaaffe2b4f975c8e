"""The embed_images stage: a CLIP turns each image into a unit vector, once for all that is compared with it.

Scores of captions, heads that rate images and the search for near duplicates read these vectors; none of them decodes an image.
"""

from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipelines.score.config import ClipConfig
from pipelines.stages.contract import OnProgress, ShardOutput, StageResult
from pipelines.stages.run import run_shards
from pipelines.storage.lease import Leases
from pipelines.tables.identity import Identity, value_settings
from pipelines.tables.rejects import RowRefused, reject
from pipelines.tables.schema import IMAGES, IMAGES_PATH, Row, image_embeds_path, image_embeds_schema
from pipelines.tables.table import Table
from pipelines.workers.halving import run_halving
from pipelines.workers.images import decode
from pipelines.workers.models import FoundModel, find_model
from pipelines.workers.prepare import iter_rows, prepare_ahead

if TYPE_CHECKING:
    import torch

    from pipelines.workers.clip import PreparedImage


def embeds_identity(dataset_uri: str, config: ClipConfig, model: FoundModel) -> Identity:
    """Everything that the embeddings depend on."""
    from pipelines.workers.clip import embedding_width

    settings = value_settings(config) | {"width": embedding_width(model.address)}
    inputs = {IMAGES_PATH: Table(dataset_uri, IMAGES_PATH, IMAGES).require().fingerprint}
    return Identity("embed_images", settings, {config.name: model.version}, inputs)


def run_image_embeds(
    dataset_uri: str,
    config: ClipConfig,
    model: FoundModel | None = None,
    *,
    on_progress: OnProgress = lambda _: None,
    leases: Leases | None = None,
) -> StageResult:
    """Embed every image of a dataset into `image_embeds/<name>`.

    Args:
        model: the CLIP of `config` if it was found before; None: it is sought here.

    Raises as `run_shards`, and MissingTableError if there are no images.
    """
    images = Table(dataset_uri, IMAGES_PATH, IMAGES)
    images.require()  # before any weights are fetched or hashed
    model = model or find_model(config.model, config.revision)
    identity = embeds_identity(dataset_uri, config, model)
    return run_shards(
        Table(dataset_uri, image_embeds_path(config.name), image_embeds_schema(identity.config["width"])),
        identity,
        images.list_shards(),
        read_shard=partial(images.read_shard, columns=["id", "image_bytes", "source_uri"]),
        make_worker=partial(ImageEmbedder, replace(config, model=model.path, revision=model.revision)),
        resources=config.resources,
        max_reject_share=config.max_reject_share,
        on_progress=on_progress,
        leases=leases,
    )


class ImageEmbedder:
    """Ray Data actor: images -> unit vectors."""

    def __init__(self, config: ClipConfig):
        from pipelines.workers.clip import ClipModel

        self.config = config
        self.clip = ClipModel(config.model, revision=config.revision, dtype=config.dtype, device=config.device)

    def process(self, table: pa.Table) -> ShardOutput:
        """A vector for each image, or a reject. Threads decode and resize while the model runs the batch before."""
        ids: list[str] = []
        vectors: list[torch.Tensor] = []
        rejects: list[Row] = []
        size = self.config.batch_size
        ready = prepare_ahead(iter_rows(table), self._prepare, num_ahead=size, num_threads=self.config.prepare_threads)
        for batch in iter(lambda: list(islice(ready, size)), []):
            good = [image for _, image in batch if not isinstance(image, RowRefused)]
            embedded = iter(run_halving(self._embed, good))
            for row, image in batch:
                vector = image if isinstance(image, RowRefused) else next(embedded)
                if not isinstance(vector, RowRefused) and not bool(vector.isfinite().all()):
                    vector = self.clip.not_finite("bad_embedding")
                if isinstance(vector, RowRefused):
                    rejects.append(reject(row, vector))
                else:
                    ids.append(row["id"])
                    vectors.append(vector)
        return ShardOutput(embeds_table(ids, vectors, self.clip.width), rejects)

    def _prepare(self, row: Row) -> "PreparedImage":
        return self.clip.prepare_image(decode(row["image_bytes"]))

    def _embed(self, images: list["PreparedImage"]) -> list["torch.Tensor"]:
        return list(self.clip.embed_prepared(images))


def embeds_table(ids: list[str], vectors: list["torch.Tensor"], width: int) -> pa.Table:
    """Rows of `image_embeds`: `vectors` are of shape (width,)."""
    import torch

    schema = image_embeds_schema(width)
    values = torch.stack(vectors).half().numpy().ravel() if vectors else np.zeros(0, np.float16)
    column = pa.FixedSizeListArray.from_arrays(pa.array(values), type=schema.field("embedding").type)
    return pa.Table.from_arrays([pa.array(ids, pa.string()), column], schema=schema)


def to_vectors(rows: pa.Table) -> "torch.Tensor":
    """The unit vectors (N, width) of rows of `image_embeds`, in float32."""
    import torch

    column = rows["embedding"].combine_chunks()
    values = torch.from_numpy(column.flatten().to_numpy().astype(np.float32)).view(len(column), column.type.list_size)
    return torch.nn.functional.normalize(values, dim=-1)  # float16 shifted the lengths a little
