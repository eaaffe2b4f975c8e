"""Where the pictures that a metric judges come from: a samples table, a table of images, or a folder of files."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.stages.contract import ReadShard
from pipelines.storage.files import NUM_THREADS, find_files, read_file
from pipelines.tables.schema import IMAGES, IMAGES_PATH, SAMPLES, samples_path
from pipelines.tables.table import Table

PICTURE_FILES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
Choose = Callable[[str, list[str]], list[bool]]
"""Name of a shard and the ids of its pictures -> which of them to judge."""
FILES_PER_SHARD = 250
"""Pictures of a folder that are in memory at a time, as files."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures to judge, in shards.

    Args:
        name: of the folder under evaluations/.
        shards: their names.
        read_shard: the columns id, prompt, image_bytes, and maybe metadata (a JSON object) and others, of a shard.
        inputs: the fingerprint of the table that holds them, by its path in the dataset.
        settings: what identifies pictures that are in no table of the dataset.
    """

    name: str
    shards: list[str]
    read_shard: ReadShard
    inputs: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def sampled_pictures(dataset_uri: str, name: str) -> Pictures:
    """The drawn pictures of `samples/<name>`. Raises MissingTableError if there are none."""
    samples = Table(dataset_uri, samples_path(name), SAMPLES)
    inputs = {samples.path: samples.require().fingerprint}
    return Pictures(name=name, shards=samples.list_shards(), read_shard=samples.read_shard, inputs=inputs)


def table_pictures(dataset_uri: str, name: str, images_uri: str) -> Pictures:
    """The images of a table `images`, of this dataset or of another; a caption is the prompt.

    Raises MissingTableError if it is not there.
    """
    home = images_uri.removesuffix(f"/{IMAGES_PATH}")
    images = Table(home, IMAGES_PATH, IMAGES)
    fingerprint = images.require().fingerprint
    own = home == dataset_uri.rstrip("/")
    return Pictures(
        name=name,
        shards=images.list_shards(),
        read_shard=partial(_read_images, images),
        inputs={IMAGES_PATH: fingerprint} if own else {},
        settings={} if own else {"images": fingerprint},
    )


def chosen_pictures(pictures: Pictures, choose: Choose, settings: Mapping[str, Any]) -> Pictures:
    """Those of the pictures that `choose` takes. `settings`: what identifies the choice."""
    return replace(
        pictures,
        read_shard=partial(_read_chosen, pictures.read_shard, choose),
        settings={**pictures.settings, **settings},
    )


def _read_chosen(read_shard: ReadShard, choose: Choose, shard: str) -> pa.Table:
    rows = read_shard(shard)
    return rows.filter(pa.array(choose(shard, rows["id"].to_pylist()), pa.bool_()))


def _read_images(images: Table, shard: str) -> pa.Table:
    rows = images.read_shard(shard, ["id", "caption", "image_bytes", "metadata"])
    return rows.append_column("prompt", pc.fill_null(rows["caption"], "")).drop_columns(["caption"])


def folder_pictures(name: str, folder: str) -> Pictures:
    """The picture files of a folder (any fsspec URI), with those in its subfolders; their prompts are empty.

    Files are known by their names and sizes. Raises FileNotFoundError if there are none.
    """
    found = find_files(folder)
    files = {path: size for path, size in sorted(found.items()) if PurePosixPath(path).suffix.lower() in PICTURE_FILES}
    if not files:
        raise FileNotFoundError(f"{folder} holds no pictures ({', '.join(PICTURE_FILES)})")
    listing = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
    paths = list(files)
    parts = {f"{at // FILES_PER_SHARD:05d}": paths[at : at + FILES_PER_SHARD] for at in range(0, len(paths), FILES_PER_SHARD)}
    return Pictures(
        name=name,
        shards=list(parts),
        read_shard=partial(_read_files, folder.rstrip("/"), parts),
        settings={"files": f"{len(files)}, sha256 {listing[:16]}"},
    )


def _read_files(folder: str, parts: Mapping[str, Sequence[str]], shard: str) -> pa.Table:
    paths = parts[shard]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        contents = list(pool.map(lambda path: read_file(f"{folder}/{path}"), paths))
    return pa.table({"id": paths, "prompt": [""] * len(paths), "image_bytes": pa.array(contents, pa.binary())})
