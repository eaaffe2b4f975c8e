"""The API in this process: the application over a real painter with the tiny pipeline, without Ray Serve."""

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openai.types import ImageGenPartialImageEvent
from PIL import Image
from starlette.testclient import TestClient

from jobs.draw import main as draw
from pipelines.serve.batches import Ticket, Waiting
from pipelines.serve.captions import KeptCaptions
from pipelines.serve.config import LimitsConfig, ServeConfig
from pipelines.serve.front import PAGE, content_policy, make_app
from pipelines.serve.orders import Abandoned, Order, Preview, Refused, Settings
from pipelines.serve.painter import SanaPainter
from pipelines.serve.previews import LOG, PreviewMaker, preview_steps
from sana_model.files.png import read_facts
from sana_model.pipeline import TextToImage

CIRCLE, SQUARE = "a large red circle on a white background", "a small blue square on a black background"
GENERATIONS, EDITS, VARIATIONS = "/v1/images/generations", "/v1/images/edits", "/v1/images/variations"
CONFIG = ServeConfig(cached_prompts=3, limits=LimitsConfig(max_body_bytes=300_000, max_count=4, max_pixels=256 * 256))


@pytest.fixture(scope="module")
def painter() -> SanaPainter:
    return SanaPainter(CONFIG)


@pytest.fixture
def client(painter: SanaPainter) -> Iterator[TestClient]:
    with TestClient(make_app(CONFIG, painter), base_url="http://localhost") as client:
        yield client


@pytest.fixture(scope="module")
def model() -> TextToImage:
    return TextToImage.from_pretrained("zoo://pipeline")


def pixels(picture: Any) -> np.ndarray:
    """A picture, or the b64_json of an answer, as integers."""
    if isinstance(picture, str):
        picture = Image.open(io.BytesIO(base64.b64decode(picture)))
    return np.asarray(picture.convert("RGB")).astype(int)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def distance(one: Any, other: Any) -> int:
    return int(np.abs(pixels(one) - pixels(other)).max())


def test_a_seed_draws_what_jobs_draw_draws(client: TestClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {"prompt": CIRCLE, "n": 2, "seed": 7, "steps": 3, "size": "96x64", "guidance": 3, "negative_prompt": "blue"}
    answer = client.post(GENERATIONS, json=asked).json()
    words = ["--count=2", "--seed=7", "--steps=3", "--size=96x64", "--guidance=3", "--negative=blue", "--out", str(tmp_path)]
    assert draw([CIRCLE, *words]) == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert answer["size"] == "96x64" and [one["seed"] for one in answer["data"]] == [7, 8]
    for one, file in zip(answer["data"], files, strict=True):
        content = base64.b64decode(one["b64_json"])
        assert read_facts(content) == read_facts(file)
        assert distance(one["b64_json"], Image.open(file)) <= 1  # prompts are encoded one by one here
    several = client.post(GENERATIONS, json={"prompt": CIRCLE, "steps": 2}).json()["data"]
    assert several[0]["seed"] != client.post(GENERATIONS, json={"prompt": CIRCLE, "steps": 2}).json()["data"][0]["seed"]


def test_pictures_of_one_size_and_of_equal_settings_are_drawn_together(painter: SanaPainter, model: TextToImage) -> None:
    batches: list[list[int]] = []
    drawer = painter._drawer
    whole = drawer.draw

    def watched(batch: list[Ticket]) -> Any:
        batches.append([ticket.seed for ticket in batch])
        return whole(batch)

    small = Settings(height=64, width=64, num_steps=2, guidance_scale=4.5, negative_prompt="")
    settings = [small, replace(small, width=96), small, small, replace(small, num_steps=3), small, small]
    orders = [Order(prompt=[CIRCLE, SQUARE][n % 2], seeds=[n], settings=each) for n, each in enumerate(settings)]

    async def ask() -> list[Any]:
        return await asyncio.gather(*map(painter.draw, orders))

    drawer.draw = watched  # type: ignore[method-assign]
    drawn = asyncio.run(ask())
    drawer.draw = whole  # type: ignore[method-assign]
    assert batches == [[0, 2, 3, 5], [1], [4], [6]]
    for order, (content,) in zip(orders, drawn, strict=True):
        given = order.settings
        alone = model([order.prompt], given.height, given.width, num_steps=given.num_steps, seed=order.seeds)[0]
        assert distance(Image.open(io.BytesIO(content)), alone) <= 2  # batches of another size round otherwise


def test_edits_and_variations(client: TestClient, model: TextToImage) -> None:
    start = model([CIRCLE], seed=0, num_steps=2)[0]
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    clear = Image.new("RGBA", (64, 64), (9, 9, 9, 255))
    clear.paste((0, 0, 0, 0), (0, 0, 32, 64))  # as OpenAI's clients mark what is to be drawn anew
    form: dict[str, Any] = {"prompt": SQUARE, "seed": "5", "steps": "2", "n": "", "size": "auto"}
    expected = model([SQUARE], image=start, mask=mask, seed=5, num_steps=2)[0]
    for sent in (mask, clear, mask.convert("RGBA")):  # the page's canvas makes the last one: opaque everywhere
        answer = client.post(EDITS, data=form, files={"image": png(start), "mask": png(sent)})
        assert answer.status_code == 200, answer.text
        assert distance(answer.json()["data"][0]["b64_json"], expected) <= 1
    expected = model([""], image=start, strength=0.5, seed=5, num_steps=4)[0]
    for path in (VARIATIONS, EDITS):
        answer = client.post(path, data={"seed": "5", "steps": "4", "strength": "0.5"}, files={"image": png(start)})
        assert distance(answer.json()["data"][0]["b64_json"], expected) <= 1
    facts = read_facts(base64.b64decode(answer.json()["data"][0]["b64_json"]))
    assert facts["settings"]["strength"] == 0.5 and facts["image"] == "upload"


def test_events_of_a_stream(client: TestClient) -> None:
    asked = {"prompt": CIRCLE, "seed": 3, "steps": 8, "n": 2}
    answer = client.post(GENERATIONS, json={**asked, "stream": True, "partial_images": 3})
    assert answer.headers["content-type"].startswith("text/event-stream")
    parts = [part.split("\n") for part in answer.text.removesuffix("\n\n").split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in parts]
    assert [name.removeprefix("event: ") for name, _ in parts] == [event["type"] for event in events]
    ignored = {"output_compression": 100, "safety_identifier": "someone", "style": "vivid"}
    plain = client.post(GENERATIONS, json={**asked, **ignored}).json()["data"]
    for index, picture in enumerate(plain):
        *previews, last = [event for event in events if event["index"] == index]
        assert [event["type"] for event in previews] == ["image_generation.partial_image"] * 3
        assert [(event["partial_image_index"], event["step"]) for event in previews] == [(0, 2), (1, 4), (2, 6)]
        assert last["type"] == "image_generation.completed" and last["b64_json"] == picture["b64_json"]
        assert (last["size"], last["quality"], last["background"]) == ("64x64", "auto", "opaque")
        assert all(ImageGenPartialImageEvent.model_validate(event).size == "auto" for event in previews)
        mean_errors = [np.abs(pixels(event["b64_json"]) - pixels(picture["b64_json"])).mean() for event in previews]
        assert mean_errors[-1] < 6 and mean_errors[-1] < mean_errors[0]  # nearer and nearer to the picture


def test_steps_of_previews() -> None:
    assert preview_steps(20, 100) == set(range(19)) and preview_steps(20, 0) == set() and preview_steps(2, 3) == {0}
    assert preview_steps(20, 3) == {3, 9, 15}


def test_previews_cost_no_picture(model: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int, bytes]] = []
    logged: list[str] = []
    monkeypatch.setattr(LOG, "exception", logged.append)
    maker = PreviewMaker(model.autoencoder, 2, [1, 1], lambda *event: told.append(event))
    latents = torch.zeros(2, model.autoencoder.config.latent_channels, 1, 200)
    maker(0, latents[:1])  # half of a batch for which memory did not suffice
    assert not told
    maker(0, latents)  # 1600x8 pixels, averaged over 4x4 latents
    assert [(place, step) for place, step, _ in told] == [(0, 1), (1, 1)]
    assert Image.open(io.BytesIO(told[0][2])).size == (400, 8)
    for broken in (latents[:, :1], latents[:, :1], latents):
        maker(0, broken)
    assert len(told) == 2 and len(logged) == 1


def test_a_replica_whose_gpu_is_broken_says_so(painter: SanaPainter, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(text: str) -> None:
        def draw(batch: list[Ticket]) -> Any:
            raise RuntimeError(text)

        monkeypatch.setattr(painter._drawer, "draw", draw)
        settings = Settings(height=64, width=64, num_steps=1, guidance_scale=4.5, negative_prompt="")
        refused = await painter.draw(Order(prompt=CIRCLE, seeds=[0], settings=settings))
        assert isinstance(refused, Refused) and refused.code == "drawing_failed"
        await painter.check_health()

    monkeypatch.setattr(painter, "_broken", None)  # so that it is whole again afterwards
    asyncio.run(fail("a bug"))
    with pytest.raises(RuntimeError, match=r"can draw no more: CUDA error: an illegal memory access$"):
        asyncio.run(fail("CUDA error: an illegal memory access\nand so on"))


WRONG: dict[str, tuple[Any, int, str | None, str]] = {
    "no JSON": (b"{", 400, "invalid_json", "the body is not JSON"),
    "deep": (b"[" * 100_000, 400, "invalid_json", "recursion"),
    "no UTF-8": (b'{"prompt": "\xff"}', 400, "invalid_json", "utf-8"),
    "list": ([], 400, None, "must be a JSON object, and a list came"),
    "no prompt": ({}, 400, "missing_required_parameter", "prompt is missing"),
    "long": ({"prompt": "a" * 100_000}, 400, "string_above_max_length", "prompt has 100000 characters, more than 4000"),
    "half a letter": (b'{"prompt": "\\ud800"}', 400, "invalid_value", "surrogate"),
    "huge": ({"prompt": "a", "size": "99999999x99999999"}, 400, "invalid_value", "more than 65536 pixels"),
    "size": ({"prompt": "a", "size": "big"}, 400, "invalid_value", "such as 1024x768"),
    "multiple": ({"prompt": "a", "size": "63x64"}, 400, None, "multiple of 8; the nearest is 64"),
    "zero": ({"prompt": "a", "size": "0x64"}, 400, None, "positive multiple of 8"),
    "many": ({"prompt": "a", "n": 5}, 400, "invalid_value", "n=5 is more than 4"),
    "none": ({"prompt": "a", "n": 0}, 400, "invalid_value", "greater than or equal to 1"),
    "steps": ({"prompt": "a", "steps": 1000}, 400, "invalid_value", "steps=1000 is more than 100"),
    "seed": ({"prompt": "a", "seed": 2**63 - 1, "n": 2}, 400, "invalid_value", "largest seed"),
    "guidance": (b'{"prompt": "a", "guidance": NaN}', 400, "invalid_value", "finite"),
    "url": ({"prompt": "a", "response_format": "url"}, 400, "invalid_value", "keeps no pictures"),
    "unknown": ({"prompt": "a", "cfg": 1}, 400, "unknown_parameter", "unknown parameter 'cfg': the known ones are prompt"),
    "unknown half of a letter": (b'{"\\ud800": 1}', 400, "unknown_parameter", "unknown parameter '\\ud800'"),
    "model": ({"prompt": "a", "model": "dall-e-3"}, 404, "model_not_found", "this server has zoo://pipeline"),
    "body": (b" " * 300_001, 413, "request_too_large", "300000 bytes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_drawn_is_answered_clearly(case: str, client: TestClient) -> None:
    body, status, code, text = WRONG[case]
    content = body if isinstance(body, bytes) else json.dumps(body)
    answer = client.post(GENERATIONS, content=content, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code) and text in error["message"]
    assert error["type"] == "invalid_request_error"


def test_wrong_forms_paths_and_kinds_of_bodies(client: TestClient, painter: SanaPainter) -> None:
    small = png(Image.new("RGB", (8, 8)))
    for files, text in (
        ({}, "multipart/form-data"),
        ({"picture": small}, "a file came as 'picture'"),
        ({"image": b"no picture"}, "image cannot be taken: not_an_image"),
        ({"image": small, "mask": png(Image.new("L", (16, 8)))}, "the mask is 16x8 and its picture 8x8"),
    ):
        answer = client.post(EDITS, data={"prompt": "a"}, files=files)
        assert answer.status_code in (400, 415) and text in answer.json()["error"]["message"]
    chunks = (b" " * 100_000 for _ in range(4))  # no Content-Length tells the size
    assert client.post(GENERATIONS, content=chunks, headers={"Content-Type": "application/json"}).status_code == 413
    roomy = TestClient(make_app(replace(CONFIG, limits=LimitsConfig()), painter), base_url="http://localhost")
    answer = roomy.post(GENERATIONS, content=b" " * (2**20 + 1), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413 and "the JSON body has more than 1048576 bytes" in answer.json()["error"]["message"]
    assert client.post(GENERATIONS, data={"prompt": "a"}).status_code == 415
    assert client.get("/v2").json()["error"]["message"] == "GET /v2: Not Found"
    assert client.get(GENERATIONS).status_code == 405


def test_keys_and_pages_of_other_servers(painter: SanaPainter) -> None:
    asked = {"prompt": CIRCLE, "steps": 1}
    client = TestClient(make_app(CONFIG, painter, ["first", "second"]))
    for header in ({}, {"Authorization": "Bearer thirst"}, {"Authorization": "second"}):
        answer = client.post(GENERATIONS, json=asked, headers=header)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert client.get("/v1/models", headers=header).status_code == 401
    assert client.get("/").status_code == client.get("/healthz").status_code == 200
    for key in ("first", "second"):
        assert client.post(GENERATIONS, json=asked, headers={"Authorization": f"Bearer {key}"}).status_code == 200
    strange, page = {"Origin": "https://example.org"}, {"Origin": "http://localhost"}
    ask_first = {**strange, "Access-Control-Request-Method": "POST"}
    closed = TestClient(make_app(CONFIG, painter), base_url="http://localhost")
    assert closed.post(GENERATIONS, json=asked, headers=strange).status_code == 403
    assert closed.options(GENERATIONS, headers=ask_first).status_code == 403
    assert closed.post(GENERATIONS, json=asked, headers=page).status_code == 200
    opened = TestClient(make_app(replace(CONFIG, cors_origins=["https://example.org/"]), painter), base_url="http://localhost")
    assert opened.options(GENERATIONS, headers=ask_first).status_code == 200
    answer = opened.post(GENERATIONS, json=asked, headers=strange)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://example.org"


def test_a_client_that_goes_away_frees_its_place(painter: SanaPainter) -> None:
    ended: list[type] = []
    drawer = painter._drawer
    whole = drawer.draw

    def watched(batch: list[Ticket]) -> Any:
        try:
            return whole(batch)
        except BaseException as error:
            ended.append(type(error))
            raise

    settings = Settings(height=64, width=64, num_steps=100, guidance_scale=4.5, negative_prompt="")

    async def leave() -> list[bytes]:
        events = painter.stream(Order(prompt=CIRCLE, seeds=[0, 1], settings=settings, num_previews=100))
        waits = asyncio.create_task(painter.draw(Order(prompt=CIRCLE, seeds=[2] * 4, settings=settings)))
        async for event in events:
            if isinstance(event, Preview):
                break
        waits.cancel()
        await events.aclose()  # type: ignore[attr-defined]
        drawn = await painter.draw(Order(prompt=CIRCLE, seeds=[3], settings=replace(settings, num_steps=2)))
        assert isinstance(drawn, list)
        return drawn

    drawer.draw = watched  # type: ignore[method-assign]
    assert len(asyncio.run(leave())) == 1
    drawer.draw = whole  # type: ignore[method-assign]
    assert ended == [Abandoned] and painter._waiting.tickets == []


def test_captions_are_kept_and_forgotten_in_turn(model: TextToImage) -> None:
    encode = model.text_encoder.encode
    texts = [CIRCLE, SQUARE, "a star"]
    kept = KeptCaptions(model.text_encoder, 2)
    try:
        embeds, mask = kept(texts)
        assert (kept.hits, kept.misses) == (0, 3)
        for text, row, real in zip(texts, embeds, mask, strict=True):
            assert torch.equal(row[real], encode([text])[0][0]) and not row[~real].any()
        kept([SQUARE, "a star", CIRCLE, "a star", SQUARE])
        assert (kept.hits, kept.misses) == (3, 5)
    finally:
        del model.text_encoder.encode


def test_the_longest_waiting_settings_come_first() -> None:
    loop = asyncio.new_event_loop()
    wide, square = (Settings(height=64, width=width, num_steps=2, guidance_scale=4.5, negative_prompt="") for width in (96, 64))
    tickets = [
        Ticket(Order(prompt="", seeds=[seed], settings=settings), 0, loop.create_future())
        for seed, settings in enumerate([wide, square, wide, wide, square])
    ]
    waiting = Waiting()
    waiting.add(tickets)
    waiting.abandon([tickets[2]])
    assert not waiting.is_full(3) and waiting.is_full(2)
    assert [[ticket.seed for ticket in waiting.take(2)] for _ in range(3)] == [[0, 3], [1, 4], []]
    loop.close()


def test_the_page_loads_nothing_from_elsewhere(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.text == PAGE and "//" not in PAGE.replace("// ", "")
    policy = answer.headers["content-security-policy"]
    assert policy == content_policy(PAGE) and policy.count("'sha256-") == 2 and "default-src 'none'" in policy
    assert PAGE.count("<label") >= 12 and all(f'for="{name}"' in PAGE for name in ("prompt", "seed", "file", "brush"))
