"""The pictures that drawings start from (img2img), and their masks (inpainting), as files that the driver reads."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from pipelines.draw.config import StartConfig
from pipelines.storage.files import read_file
from pipelines.tables.rejects import RowRefused
from pipelines.workers.images import decode


@dataclass(frozen=True)
class PictureFile:
    """An encoded picture, and where it came from."""

    uri: str
    content: bytes

    @cached_property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels, upright. Raises ValueError if it is no picture."""
        try:
            return decode(self.content).size
        except RowRefused as refused:
            raise ValueError(f"{self.uri} cannot be read as a picture: {refused.reason}, {refused.detail}") from refused


@dataclass(frozen=True)
class StartFiles:
    """Pictures to start from and masks, one for all prompts or one for each; no mask: all is drawn anew."""

    strength: float | None
    images: list[PictureFile]
    masks: list[PictureFile]

    @property
    def identity(self) -> dict[str, object]:
        """What pictures drawn from these depend on."""
        return {"strength": self.strength, "images": _hash(self.images), "masks": _hash(self.masks)}

    def arguments(self, prompts: Sequence[int]) -> dict[str, object]:
        """The arguments of `TextToImage` for prompts, given by their numbers."""
        images = [decode(_pick(self.images, number).content) for number in prompts]
        masks = [decode(_pick(self.masks, number).content) for number in prompts] if self.masks else None
        return {"image": images, "mask": masks, "strength": self.strength}

    def facts(self, prompt: int) -> dict[str, str]:
        """Where the picture and the mask of a prompt, given by its number, came from."""
        files = {"image": self.images, "mask": self.masks}
        return {name: _pick(listed, prompt).uri for name, listed in files.items() if listed}


def read_start(config: StartConfig, num_prompts: int, *, has_size: bool) -> StartFiles:
    """Read the pictures that a configuration names.

    Args:
        num_prompts: pictures may be as many.
        has_size: whether the configuration says how large to draw; otherwise all pictures must have one size.

    Raises:
        FileNotFoundError: a picture is not there.
        ValueError: there are neither one nor `num_prompts` of them, one is no picture, or their sizes do not fit.
    """
    images, masks = (
        [] if uris is None else _read(f"start.{name}", [uris] if isinstance(uris, str) else uris, num_prompts)
        for name, uris in (("image", config.image), ("mask", config.mask))
    )
    sizes = {image.size for image in images}
    if not has_size and len(sizes) > 1:
        raise ValueError(f"start.image names pictures of {len(sizes)} sizes: give draw.height and draw.width")
    for number in range(max(len(images), len(masks)) if masks else 0):
        image, mask = _pick(images, number), _pick(masks, number)
        if image.size != mask.size:
            (width, height), (mask_width, mask_height) = image.size, mask.size
            raise ValueError(
                f"start.mask {mask.uri} is {mask_width}x{mask_height}, and its picture {image.uri} {width}x{height}: "
                "they must have the same size"
            )
    return StartFiles(config.strength, images, masks)


def _read(setting: str, uris: list[str], num_prompts: int) -> list[PictureFile]:
    if len(uris) not in (1, num_prompts):
        raise ValueError(f"{setting} names {len(uris)} pictures for {num_prompts} prompts: give one for all, or one to each")
    return [PictureFile(uri, read_file(uri)) for uri in uris]


def _pick(files: list[PictureFile], prompt: int) -> PictureFile:
    return files[prompt % len(files)]


def _hash(files: list[PictureFile]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.content).digest())
    return f"{len(files)}, sha256 {digest.hexdigest()[:16]}"
