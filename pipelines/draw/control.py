"""Control pictures, by which a ControlNet steers drawings: the driver finds them, the workers read them."""

import hashlib
import posixpath
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
from PIL import Image

from pipelines.draw.config import ControlConfig
from pipelines.ingest.text_tables import LIST_ERROR, read_table
from pipelines.storage.files import list_folder, list_sizes, read_file
from pipelines.tables.rejects import RowRefused
from pipelines.workers.images import EXTENSIONS, decode, open_image, upright_size
from pipelines.workers.models import FoundModel, find_model

if TYPE_CHECKING:
    import torch

    from sana_model.controls import Detector

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
"""File names of tables with the columns `prompt` and `control.column`."""
NUM_READERS = 16
NO_PICTURE = "no_control_picture"
"""The reason of rejects whose control picture is not there."""


@dataclass(frozen=True)
class ControlPicture:
    """A prompt's picture as the driver found it: sha256 of its bytes and size (width, height), or why it cannot be used."""

    uri: str
    digest: str = ""
    size: tuple[int, int] | None = None
    refused: RowRefused | None = None

    def read(self) -> Image.Image:
        """The picture, upright, in RGB. Raises RowRefused if it cannot be used, or is another one than the driver found."""
        if self.refused is not None:
            raise self.refused
        content = read_file(self.uri)
        if hashlib.sha256(content).hexdigest() != self.digest:
            raise RowRefused("control_picture_changed", f"{self.uri} was changed after this job began: run it again")
        return decode(content)


@dataclass(frozen=True)
class ControlFiles:
    """The control pictures of a drawing, one for all prompts or one for each, and the models that they need.

    controlnet: None: the pipeline's own. detector_model: of depth or outlines; None: there is none.
    """

    config: ControlConfig
    pictures: list[ControlPicture]
    controlnet: FoundModel | None
    detector_model: FoundModel | None

    @property
    def identity(self) -> dict[str, Any]:
        """What pictures drawn with these depend on, besides the models."""
        digest = hashlib.sha256("\n".join(picture.digest for picture in self.pictures).encode()).hexdigest()
        pictures = f"{len(self.pictures)}, sha256 {digest[:16]}"
        return {"pictures": pictures, "scale": self.config.scale, **self.config.detector_settings}

    @property
    def models(self) -> dict[str, str]:
        """The versions of the models, by their part."""
        found = {"controlnet": self.controlnet, "detector": self.detector_model}
        return {name: model.version for name, model in found.items() if model is not None}

    def of(self, prompt: int) -> ControlPicture:
        """The picture of a prompt, given by its number."""
        return self.pictures[prompt % len(self.pictures)]

    def facts(self, prompt: int) -> dict[str, Any]:
        """What a drawn picture says about its control: where the picture came from, and what was made of it."""
        given = {"controlnet": self.config.controlnet}
        known = {name: value for name, value in given.items() if value is not None}
        return {"control": {"image": self.of(prompt).uri, **known, **self.config.detector_facts}}

    def make_detector(self, device: "torch.device") -> "Detector | None":
        """What turns a picture into a control picture; None: it is one. Raises as the detectors of `sana_model.controls`."""
        from sana_model.controls import CannyDetector, DepthDetector, OutlineDetector

        config, model = self.config, self.detector_model
        if config.detector == "canny":
            return CannyDetector(*config.canny)
        if model is None:
            return None
        if config.detector == "hed":
            return OutlineDetector(model.path, thickness=config.scribble, device=device)
        return DepthDetector(model.path, revision=model.revision, gives_distance=config.depth_is_distance, device=device)


def read_control(config: ControlConfig, prompts: Sequence[str], *, has_size: bool) -> ControlFiles:
    """Find the control pictures that a configuration names, and look at each.

    A picture of one prompt that is not there, or cannot be read, costs that prompt; so does a prompt that a table lacks.

    Args:
        has_size: whether something else says how large to draw; otherwise all pictures must have one size.

    Raises:
        FileNotFoundError: the only picture, the folder, the table or a model is not there.
        ValueError: there are neither one nor as many pictures as prompts, the only one is no picture, a table has not the
            columns, or the pictures have several sizes.
    """
    uris = _find_pictures(config, prompts)
    if len(uris) not in (1, len(prompts)):
        raise ValueError(
            f"control.image names {len(uris)} pictures for {len(prompts)} prompts: give one for all, or one to each"
        )
    with ThreadPoolExecutor(NUM_READERS) as pool:
        pictures = list(pool.map(partial(_look, is_only=len(uris) == 1), uris))
    sizes = {picture.size for picture in pictures if picture.size is not None}
    if not has_size and len(sizes) > 1:
        raise ValueError(f"control.image names pictures of {len(sizes)} sizes: give draw.height and draw.width")
    if config.detector == "canny":
        from sana_model.files.opencv import import_cv2

        import_cv2()  # whoever lacks it is told before a worker starts
    named = {"depth": config.depth_model, "hed": config.hed_weights}.get(config.detector or "")
    return ControlFiles(
        config,
        pictures,
        None if config.controlnet is None else find_model(config.controlnet),
        None if named is None else find_model(named),
    )


def _look(uri: str | None, *, is_only: bool) -> ControlPicture:
    """Look at a picture; None: a prompt has none. What is wrong with the only one is raised as an error."""
    if uri is None:
        return ControlPicture("", refused=RowRefused(NO_PICTURE, "the table of control pictures has no row with this prompt"))
    try:
        content = read_file(uri)
        image = open_image(content)
    except FileNotFoundError as error:
        if is_only:
            raise
        return ControlPicture(uri, refused=RowRefused(NO_PICTURE, str(error)))
    except RowRefused as refused:
        if is_only:
            raise ValueError(f"{uri} cannot be read as a picture: {refused.reason}, {refused.detail}") from refused
        return ControlPicture(uri, refused=RowRefused(refused.reason, f"{uri}: {refused.detail}"))
    return ControlPicture(uri, hashlib.sha256(content).hexdigest(), upright_size(image))


def _find_pictures(config: ControlConfig, prompts: Sequence[str]) -> Sequence[str | None]:
    """Paths or URIs of the pictures that `control.image` names; None for a prompt that its table lacks."""
    if not isinstance(config.image, str):
        return config.image
    if config.image.lower().endswith(TABLES):
        return _pictures_of_table(config.image, config.column, prompts)
    if config.image.lower().endswith(EXTENSIONS):
        return [config.image]
    folder = config.image.rstrip("/")
    names = [name for name in list_sizes(folder) if name.lower().endswith(EXTENSIONS)]
    if not names and list_folder(folder):
        raise ValueError(f"control.image={config.image} is a folder without pictures")
    return [f"{folder}/{name}" for name in names] or [config.image]


def _pictures_of_table(uri: str, column: str, prompts: Sequence[str]) -> list[str | None]:
    """The picture of each prompt. Raises ValueError if the table cannot be read, or gives a prompt two pictures."""
    found: dict[str, str] = {}
    for number, row in enumerate(_rows(uri), 1):
        if LIST_ERROR in row:
            raise ValueError(f"{uri}: row {number} cannot be read: {row[LIST_ERROR]}")
        missing = [name for name in ("prompt", column) if name not in row]
        if missing:
            raise ValueError(f"{uri} has the columns {', '.join(row)} and no {' and no '.join(missing)}: see control.column")
        prompt, picture = str(row["prompt"] or "").strip(), str(row[column] or "").strip()
        if prompt and picture and found.setdefault(prompt, picture) != picture:
            raise ValueError(f"{uri} gives the prompt {prompt!r} two pictures, {found[prompt]} and {picture}")
    folder = posixpath.dirname(uri)
    return [_beside(folder, found[prompt]) if prompt in found else None for prompt in prompts]


def _rows(uri: str) -> Iterable[dict[str, Any]]:
    content = read_file(uri)
    if not uri.lower().endswith(".parquet"):
        return read_table(BytesIO(content), uri)
    try:
        return pq.read_table(BytesIO(content)).to_pylist()
    except (OSError, ValueError) as error:
        raise ValueError(f"{uri} cannot be read as Parquet: {error}") from error


def _beside(folder: str, picture: str) -> str:
    """The place of a picture that a table names: as it is if it is a URI or absolute, otherwise below the table's folder."""
    is_whole = "://" in picture or Path(picture).is_absolute() or not folder
    return picture if is_whole else f"{folder}/{picture}"
