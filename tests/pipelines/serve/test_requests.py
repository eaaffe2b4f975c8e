"""Pictures of requests: how they are read, and how many at once."""

import asyncio
import threading
import time
from io import BytesIO
from typing import Any, cast

import httpx
import numpy as np
import pytest
from PIL import Image, ImageChops, ImageOps

from pipelines.draw.start import PictureFile
from pipelines.serve.config import ServeConfig
from pipelines.serve.errors import ApiError
from pipelines.serve.front import DECODERS, make_app
from pipelines.serve.orders import Painter
from pipelines.serve.requests import read_pictures


def test_a_mask_of_transparency_is_as_upright_as_its_picture() -> None:
    lying = Image.new("RGBA", (16, 8))
    lying.paste((9, 9, 9, 255), (0, 0, 4, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # of a camera that was turned
    buffer = BytesIO()
    lying.save(buffer, "PNG", exif=exif)
    _, mask = read_pictures({"image": PictureFile("image", buffer.getvalue())}, ServeConfig(), takes_mask=True)
    assert mask is not None
    expected = ImageChops.invert(ImageOps.exif_transpose(Image.open(buffer)).getchannel("A"))
    assert expected.size == (8, 16)
    assert np.array_equal(np.asarray(Image.open(BytesIO(mask.content))), np.asarray(expected))


def test_few_pictures_are_decoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = threading.Lock()
    now = most = 0

    def read(*given: Any, **options: Any) -> Any:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        raise ApiError(400, "read")

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(make_app(ServeConfig(), cast(Painter, None)))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            files = {"image": b"picture"}
            return await asyncio.gather(*(client.post("/v1/images/variations", files=files) for _ in range(3 * DECODERS)))

    monkeypatch.setattr("pipelines.serve.front.read_pictures", read)
    assert {answer.json()["error"]["message"] for answer in asyncio.run(ask())} == {"read"}
    assert most == DECODERS
