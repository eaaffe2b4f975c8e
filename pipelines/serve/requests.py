"""Requests of OpenAI's API for images, checked and turned into orders."""

import json
import secrets
from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

from PIL import Image, ImageChops
from pydantic import BaseModel, Field, ValidationError

from pipelines.draw.config import DrawConfig, read_size
from pipelines.draw.start import PictureFile
from pipelines.serve.config import ServeConfig
from pipelines.serve.errors import ApiError
from pipelines.serve.orders import Order, Settings
from pipelines.tables.rejects import RowRefused
from pipelines.workers.images import ImageLimits, open_image, to_png, to_rgb, upright_alpha

MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1
"""Whole numbers of 64 bits, as the sampler's tables hold them."""

Quality = Literal["auto", "standard", "high", "medium", "low", "hd"]
"""Of OpenAI's models; here `steps` says how carefully a picture is drawn."""


class GenerationRequest(BaseModel):
    """The body of /v1/images/generations. OpenAI's parameters, and after `partial_images` our own."""

    prompt: str
    model: str | None = None
    n: Annotated[int | None, Field(ge=1)] = None
    size: str | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    quality: Quality | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    output_compression: Annotated[int | None, Field(ge=0, le=100)] = None
    style: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    stream: bool | None = None
    partial_images: Annotated[int | None, Field(ge=0)] = None
    seed: Annotated[int | None, Field(ge=MIN_SEED, le=MAX_SEED)] = None
    steps: Annotated[int | None, Field(ge=1)] = None
    guidance: Annotated[float | None, Field(allow_inf_nan=False)] = None
    negative_prompt: str = ""


class EditRequest(GenerationRequest):
    """The fields of /v1/images/edits and /v1/images/variations, without their pictures, which need no words."""

    prompt: str = ""
    strength: Annotated[float | None, Field(ge=0, le=1)] = None
    input_fidelity: Literal["high", "low"] | None = None


Request = TypeVar("Request", bound=GenerationRequest)

HINTS = {
    "response_format": "this server keeps no pictures that a URL could name: use b64_json",
    "output_format": "pictures are PNG files, which hold their settings: use png",
    "background": "the model draws no transparency: use auto or opaque",
}


def check_request(kind: type[Request], values: object) -> Request:
    """The request that a body describes. Raises ApiError that names the first parameter that will not do."""
    if not isinstance(values, dict):
        raise ApiError(400, f"the body must be a JSON object, and a {type(values).__name__} came")
    unknown = next((name for name in values if name not in kind.model_fields), None)
    if unknown is not None:
        text = f"unknown parameter {_shorten(unknown)}: the known ones are {', '.join(kind.model_fields)}"
        raise ApiError(400, text, "unknown_parameter", unknown[:80].encode(errors="replace").decode())
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = str(first["loc"][0]) if first["loc"] else None
        if first["type"] == "missing":
            raise ApiError(400, f"{param} is missing", "missing_required_parameter", param) from None
        text = HINTS.get(str(param), first["msg"])
        raise ApiError(400, f"{param}={_shorten(first['input'])}: {text}", "invalid_value", param) from None


def read_json(body: bytes) -> object:
    """The body of a request. Raises ApiError if it is no JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 too
        raise ApiError(400, f"the body is not JSON: {error}", "invalid_json") from None


def make_order(
    request: GenerationRequest, config: ServeConfig, image: PictureFile | None = None, mask: PictureFile | None = None
) -> Order:
    """The order that a request stands for. Raises ApiError for what is over the limits."""
    limits = config.limits
    if request.model not in (None, "", config.served_name):
        text = f"model={_shorten(request.model)} is not here: this server has {config.served_name}"
        raise ApiError(404, text, "model_not_found", "model")
    if request.size in (None, "", "auto"):
        width = height = None
    else:
        try:
            width, height = read_size(request.size)
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_value", "size") from None
        assert width is not None and height is not None
        if width * height > limits.max_pixels:
            text = f"size={_shorten(request.size)} has more than {limits.max_pixels} pixels, this server's limit"
            raise ApiError(400, text, "invalid_value", "size")
    for name, most in {"n": limits.max_count, "steps": limits.max_steps}.items():
        if (getattr(request, name) or 1) > most:
            text = f"{name}={getattr(request, name)} is more than {most}, this server's limit"
            raise ApiError(400, text, "invalid_value", name)
    for name in ("prompt", "negative_prompt"):
        if (length := len(getattr(request, name))) > limits.max_prompt_length:
            text = f"{name} has {length} characters, more than {limits.max_prompt_length}, this server's limit"
            raise ApiError(400, text, "string_above_max_length", name)
        if any("\ud800" <= letter <= "\udfff" for letter in getattr(request, name)):  # JSON can spell halves of a letter
            raise ApiError(400, f"{name} is no Unicode text: it holds half of a surrogate pair", "invalid_value", name)
    count = request.n or 1
    seed = secrets.randbelow(2**31) if request.seed is None else request.seed
    if seed + count - 1 > MAX_SEED:
        raise ApiError(400, f"seed={seed} and n={count} go beyond the largest seed, {MAX_SEED}", "invalid_value", "seed")
    return Order(
        prompt=request.prompt,
        seeds=[seed + index for index in range(count)],
        settings=Settings(
            height=height,
            width=width,
            num_steps=request.steps,
            guidance_scale=DrawConfig.guidance_scale if request.guidance is None else request.guidance,
            negative_prompt=request.negative_prompt,
            starts=image is not None,
            masked=mask is not None,
            strength=request.strength if isinstance(request, EditRequest) else None,
        ),
        image=image,
        mask=mask,
        num_previews=(request.partial_images or 0) if request.stream else 0,
    )


def read_pictures(
    files: Mapping[str, PictureFile], config: ServeConfig, *, takes_mask: bool
) -> tuple[PictureFile, PictureFile | None]:
    """The picture of an edit and its mask, as `jobs.draw` takes them: white is drawn anew.

    OpenAI's clients mark by transparency what is to be drawn anew, in the mask or in the picture itself; that is taken too.

    Raises ApiError for files that are no pictures, or too large.
    """
    if (unknown := files.keys() - {"image", "mask"}) or (not takes_mask and "mask" in files):
        name = unknown.pop() if unknown else "mask"
        text = f"a file came as {name!r}: give image{' and mask' if takes_mask else ''}"
        raise ApiError(400, text, "unknown_parameter", name)
    if "image" not in files:
        raise ApiError(400, "image is missing: send a picture as a file of the form", "missing_required_parameter", "image")
    alphas = {name: _read_alpha(name, file, config) for name, file in files.items()}
    marks = "mask" if "mask" in files else "image"
    alpha = alphas[marks]
    if alpha is None or not takes_mask:
        return files["image"], files.get("mask")
    return files["image"], PictureFile(files[marks].uri, to_png(ImageChops.invert(alpha)))


def _read_alpha(name: str, file: PictureFile, config: ServeConfig) -> Image.Image | None:
    """Decode all of a picture, and keep only its alpha channel; None if it is opaque. Raises ApiError."""
    limits = ImageLimits(
        min_size=1, max_pixels=config.limits.max_picture_pixels, max_bytes=config.limits.max_body_bytes, max_aspect_ratio=100
    )
    try:
        image = open_image(file.content, limits)
        to_rgb(image)
        return upright_alpha(image)
    except RowRefused as refused:
        raise ApiError(400, f"{name} cannot be taken: {refused}", "invalid_image", name) from None


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
