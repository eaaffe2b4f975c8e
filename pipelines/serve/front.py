"""The front: OpenAI's API for images and the web page, as an ASGI application over a painter."""

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from pipelines.draw.start import PictureFile
from pipelines.serve.answers import event_texts, models_json, pictures_json
from pipelines.serve.config import ServeConfig
from pipelines.serve.errors import ApiError
from pipelines.serve.gate import Gate
from pipelines.serve.orders import Accepted, ModelFacts, Order, Painter, Refused
from pipelines.serve.requests import (
    EditRequest,
    GenerationRequest,
    check_request,
    make_order,
    read_json,
    read_pictures,
)

PAGE = Path(__file__).with_name("page.html").read_text()
MAX_FIELDS = 40
"""Of a form."""
MAX_TEXT_BYTES = 2**20
"""Of a JSON body, which is read while other requests wait, and of a field of a form."""
DECODERS = 2
"""Requests whose pictures are decoded at once: a small file may hold a picture that needs half a GB."""


def make_app(config: ServeConfig, painter: Painter, keys: Iterable[str] = (), host: str = "localhost") -> FastAPI:
    """The application. `keys` and `host`: see `Gate`."""
    origins = [origin.rstrip("/") for origin in config.cors_origins]
    middleware = [
        Middleware(Gate, keys=list(keys), host=host, origins=origins, max_body_bytes=config.limits.max_body_bytes),
    ]
    if origins:
        headers = ["Authorization", "Content-Type"]
        cors = Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=headers)
        middleware.insert(0, cors)
    app = FastAPI(title="Sana", docs_url=None, redoc_url=None, openapi_url=None, middleware=middleware)
    front = _Front(config, painter)
    app.get("/")(show_page)
    app.get("/healthz")(front.healthz)
    app.get("/v1/models")(front.models)
    app.post("/v1/images/generations")(front.generations)
    app.post("/v1/images/edits")(front.edits)
    app.post("/v1/images/variations")(front.variations)
    app.exception_handler(ApiError)(_answer_error)
    app.exception_handler(HTTPException)(_answer_http)
    app.exception_handler(Exception)(_answer_fault)
    return app


async def show_page() -> Response:
    """The web page. Its script and style may do nothing but talk to this server."""
    return HTMLResponse(PAGE, headers={"Content-Security-Policy": content_policy(PAGE), "Referrer-Policy": "no-referrer"})


def content_policy(page: str) -> str:
    """The Content-Security-Policy that admits the page's own script and style, by their hashes, and nothing else."""

    def hashes(tag: str) -> str:
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; img-src data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class _Front:
    """The handlers of the API."""

    def __init__(self, config: ServeConfig, painter: Painter):
        self._config, self._painter = config, painter
        self._facts: ModelFacts | None = None
        self._started = int(time.time())
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decodes")

    async def healthz(self) -> Response:
        """200 once a replica has told what its model is."""
        await self._describe()
        return JSONResponse({"status": "ok"})

    async def models(self) -> Response:
        return JSONResponse(models_json(self._config, await self._describe(), self._started))

    async def _describe(self) -> ModelFacts:
        if self._facts is None:
            described = await self._painter.describe()
            if isinstance(described, Refused):
                raise ApiError.of(described)
            self._facts = described
        return self._facts

    async def generations(self, request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"Content-Type is {kind[:80]!r}: send JSON as application/json", "unsupported_media_type")
        body = await request.body()
        if len(body) > MAX_TEXT_BYTES:
            raise ApiError.too_large("JSON body", MAX_TEXT_BYTES)
        checked = check_request(GenerationRequest, read_json(body))
        return await self._answer(make_order(checked, self._config), checked, "image_generation")

    async def edits(self, request: Request) -> Response:
        return await self._edit(request, takes_mask=True)

    async def variations(self, request: Request) -> Response:
        return await self._edit(request, takes_mask=False)

    async def _edit(self, request: Request, *, takes_mask: bool) -> Response:
        fields, files = await _read_form(request)
        checked = check_request(EditRequest, fields)
        read = partial(read_pictures, files, self._config, takes_mask=takes_mask)
        image, mask = await asyncio.get_running_loop().run_in_executor(self._decoders, read)
        return await self._answer(make_order(checked, self._config, image, mask), checked, "image_edit")

    async def _answer(self, order: Order, request: GenerationRequest, kind: str) -> Response:
        if not request.stream:
            drawn = await self._painter.draw(order)
            if isinstance(drawn, Refused):
                raise ApiError.of(drawn)
            return JSONResponse(pictures_json(order, drawn))
        events = self._painter.stream(order)
        first = await anext(events)
        if isinstance(first, Refused):
            raise ApiError.of(first)
        assert isinstance(first, Accepted)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would hold events back
        return StreamingResponse(event_texts(order, kind, events), media_type="text/event-stream", headers=headers)


async def _read_form(request: Request) -> tuple[dict[str, str], dict[str, PictureFile]]:
    """The fields and the files of a form; fields without a value are left out. Raises ApiError."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(415, "send pictures as multipart/form-data", "unsupported_media_type")
    fields: dict[str, str] = {}
    files: dict[str, PictureFile] = {}
    try:
        async with request.form(max_files=2, max_fields=MAX_FIELDS, max_part_size=MAX_TEXT_BYTES) as form:
            for name, value in form.multi_items():
                name = name.removesuffix("[]")
                if name in fields or name in files:
                    raise ApiError(400, f"{name} came twice: this server takes one", "invalid_value", name)
                if isinstance(value, UploadFile):
                    files[name] = PictureFile(value.filename or name, await value.read())
                elif value:
                    fields[name] = value
    except HTTPException as error:
        raise ApiError(400, f"the form cannot be read: {error.detail}", "invalid_form") from None
    return fields, files


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers())


async def _answer_fault(request: Request, error: Exception) -> Response:
    """What nobody expected; the log has the traceback."""
    told = ApiError(500, "the server failed; its log says why")
    return JSONResponse(told.body(), told.status)


async def _answer_http(request: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)
    told = ApiError(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}")
    return JSONResponse(told.body(), told.status, error.headers)
