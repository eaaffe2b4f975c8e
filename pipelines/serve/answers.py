"""Answers of the API: pictures as JSON, and as server-sent events."""

import base64
import json
import time
from collections.abc import AsyncIterator
from io import BytesIO
from typing import Any

from PIL import Image

from pipelines.serve.config import ServeConfig
from pipelines.serve.errors import ApiError
from pipelines.serve.orders import Event, Finished, ModelFacts, Order, Preview, Refused


def pictures_json(order: Order, pictures: list[bytes]) -> dict[str, Any]:
    """The answer with all pictures; OpenAI's fields, and each picture's seed."""
    data = [{"b64_json": _text(picture), "seed": seed} for picture, seed in zip(pictures, order.seeds, strict=True)]
    return {"created": int(time.time()), "output_format": "png", "size": _size(pictures[0]), "data": data}


def models_json(config: ServeConfig, facts: ModelFacts, started: int) -> dict[str, Any]:
    """The list of models: the one that is served, and under "sana" what a request may ask of it."""
    limits = config.limits
    sana = {
        "width": facts.width,
        "height": facts.height,
        "multiple_of": facts.unit,
        "steps": facts.num_steps,
        "takes_negative_prompt": facts.guided,
        "max_pixels": limits.max_pixels,
        "max_n": limits.max_count,
        "max_steps": limits.max_steps,
        "max_prompt_length": limits.max_prompt_length,
    }
    model = {"id": config.served_name, "object": "model", "created": started, "owned_by": "sana-on-ray", "sana": sana}
    return {"object": "list", "data": [model]}


async def event_texts(order: Order, kind: str, events: AsyncIterator[Event]) -> AsyncIterator[str]:
    """Server-sent events of what becomes of an order. An error after the first event is an event too.

    Args:
        kind: "image_generation" or "image_edit", as OpenAI's events are called.
    """
    numbers = [0] * len(order.seeds)
    async for event in events:
        if isinstance(event, Preview):
            given = order.settings
            size = f"{given.width}x{given.height}" if given.width and given.height else "auto"
            more = {"partial_image_index": numbers[event.index], "step": event.step, "num_steps": event.num_steps, "size": size}
            numbers[event.index] += 1
            yield _event(f"{kind}.partial_image", order, event, "jpeg", more)
        elif isinstance(event, Finished):
            yield _event(f"{kind}.completed", order, event, "png", {"size": _size(event.content), "usage": None})
        elif isinstance(event, Refused):
            yield sse("error", ApiError.of(event).body())


def sse(name: str, value: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"event: {name}\ndata: {json.dumps(value)}\n\n"


def _event(name: str, order: Order, event: Preview | Finished, file_format: str, more: dict[str, Any]) -> str:
    common = {"type": name, "b64_json": _text(event.content), "created_at": int(time.time()), "output_format": file_format}
    common |= {"quality": "auto", "background": "opaque"}
    return sse(name, common | {"index": event.index, "seed": order.seeds[event.index]} | more)


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _size(picture: bytes) -> str:
    with Image.open(BytesIO(picture)) as opened:  # reads the header alone
        return f"{opened.width}x{opened.height}"
