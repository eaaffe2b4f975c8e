"""A picture's own facts, read back as the configuration that draws it again."""

import posixpath
from pathlib import Path
from types import NoneType
from typing import Any

from PIL import Image

from pipelines.storage.files import read_file
from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import SAMPLES, samples_path
from pipelines.tables.table import Table, absolute_uri
from pipelines.workers.images import open_image
from sana_model.files.png import read_facts

DRAW_SETTINGS = ("height", "width", "num_steps", "guidance_scale", "guidance_interval", "negative_prompt", "solver")
"""Settings of a drawing that `DrawConfig` has by the same names."""


FACTS: dict[str, Any] = {
    "prompt": str,
    "seed": (int, NoneType),
    "model": (str, NoneType),
    "settings": (dict, NoneType),
    "control": (dict, NoneType),
    "lora": (list, NoneType),
}
"""What a picture's facts are, at least."""


def read_picture(address: str) -> bytes:
    """Read a PNG file, or a picture of a samples table.

    Args:
        address: path or URI of the file; or `<dataset>/samples/<name>#<id>`.

    Raises FileNotFoundError if there is no such file, table or row.
    """
    uri, _, wanted = address.partition("#")
    if not wanted or Path(address).is_file():
        return read_file(address)
    folder, name = posixpath.split(absolute_uri(uri))
    dataset_uri, group = posixpath.split(folder)
    if group != "samples":
        raise ValueError(f"{address} is no picture of a samples table: write <dataset>/samples/<name>#<id>")
    table = Table(dataset_uri, samples_path(name), SAMPLES)
    for shard in table.list_shards():
        rows = table.read_shard(shard, ["id", "image_bytes"])
        for index, row_id in enumerate(rows["id"].to_pylist()):
            if row_id == wanted:
                return rows["image_bytes"][index].as_py()
    raise FileNotFoundError(f"{table.uri} has no picture {wanted!r}: its ids are the pictures' numbers, such as 000000")


def facts_of(address: str) -> dict[str, Any]:
    """What a picture says about its drawing (see `read_facts`).

    Raises FileNotFoundError as `read_picture`; ValueError if it is no picture, or does not say how it was drawn.
    """
    content = read_picture(address)
    try:
        open_image(content).load()
        facts = read_facts(content)
    except RowRefused as refused:
        raise ValueError(f"{address} cannot be read as a picture: {refused.reason}, {refused.detail}") from refused
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's, for damaged ones
        raise ValueError(f"{address}: {error}") from error
    for name, kinds in FACTS.items():
        if not isinstance(facts.get(name), kinds):
            raise ValueError(f"{address} was not drawn by this project: its facts say {name}={facts.get(name)!r:.60}")
    return facts


def settings_of(address: str) -> dict[str, Any]:
    """The settings of `jobs.sample` that draw a picture again, by their dotted names.

    A picture that began with another one, or was steered by one, needs that one again: its path is among the settings if the
    picture knows it. None stands for what a YAML file may say, and the picture had not.

    Raises as `facts_of`; and ValueError if its noise came from a generator without a seed.
    """
    facts = facts_of(address)
    if facts.get("seed") is None:
        raise ValueError(f"{address} was drawn from a generator's noise, not from a seed: it cannot be drawn again")
    drawn = facts.get("settings") or {}
    found = {
        "sample.prompts": [facts["prompt"]],
        "sample.pipeline": facts.get("model"),
        "sample.images_per_prompt": 1,
        "sample.draw.seed": facts["seed"],
        "sample.draw.dtype": facts.get("dtype"),
        **{f"sample.draw.{name}": drawn[name] for name in DRAW_SETTINGS if name in drawn},
    }
    if drawn.get("strength") is not None:
        found |= {"sample.start.strength": drawn["strength"]}
        found |= {f"sample.start.{name}": facts[name] for name in ("image", "mask") if name in facts}
    known = {name: value for name, value in found.items() if value is not None}
    plain = {"sample.start": drawn.get("strength"), "sample.control": drawn.get("control_scale")}
    known |= {name: None for name, value in plain.items() if value is None}
    known["sample.lora"] = [{name: lora[name] for name in ("path", "scale")} for lora in facts.get("lora") or []]
    if drawn.get("control_scale") is not None:
        known |= {"sample.control.scale": drawn["control_scale"]}
        known |= {f"sample.control.{name}": value for name, value in (facts.get("control") or {}).items()}
    return known
