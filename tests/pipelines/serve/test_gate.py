"""What a request must pass before it is read: the gate before an application that counts the bytes of a body."""

import asyncio
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from pipelines.serve.gate import Gate


async def count(scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse(len(await Request(scope, receive).body()))(scope, receive, send)


def gate(app: ASGIApp = count, **options: Any) -> Gate:
    usual = {"keys": [], "host": "draws.lan", "origins": ["https://example.org:444"], "max_body_bytes": 100}
    return Gate(app, **(usual | options))


OWN = ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "10.0.0.7", "Draws.lan:8000", "example.org"]
STRANGE = ["rebound.example.com:8000", "127.0.0.1.example.com", "localhost.example.com", "example", "[", ""]


@pytest.mark.parametrize("host", [*OWN, *STRANGE])
def test_without_keys_only_its_own_names_reach_the_server(host: str) -> None:
    headers = {"Host": host, "Origin": f"http://{host}"}  # as the browser sends for a page of that name
    answer = TestClient(gate()).post("/", headers=headers)
    assert answer.status_code == (200 if host in OWN else 403)
    if host in STRANGE:
        assert answer.json()["error"]["code"] == "host_refused"
    assert TestClient(gate(origins=["*"])).post("/", headers=headers).status_code == 200
    if host:
        assert TestClient(gate(keys=["key"])).post("/", headers=headers).status_code == 200  # by the name of a Service, say


@pytest.mark.parametrize("origin", ["http://[", "null", "example.org", "https://example.org", "http://localhost:1"])
def test_pages_of_other_origins_send_nothing(origin: str) -> None:
    answer = TestClient(gate(), base_url="http://localhost").post("/", headers={"Origin": origin})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_refused")


def test_no_request_outlives_its_client() -> None:
    answer = TestClient(gate(), base_url="http://localhost").post("/", headers={"X-Request-Disconnect-Disabled": "?1"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_header")


def test_bodies_that_are_held_at_once_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.serve.gate.MAX_HELD_BYTES", 100)

    async def ask() -> list[httpx.Response]:
        go_on = asyncio.Event()

        async def hold(scope: Scope, receive: Receive, send: Send) -> None:
            await Request(scope, receive).body()
            await go_on.wait()
            await Response()(scope, receive, send)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(gate(hold)), base_url="http://localhost") as client:
            both = [asyncio.create_task(client.post("/", content=b" " * 60)) for _ in range(2)]
            (refused,), (held,) = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            go_on.set()
            return [await refused, await held, await client.post("/", content=b" " * 60)]

    refused, *taken = asyncio.run(ask())
    assert refused.status_code == 429 and refused.headers["retry-after"] == "10"
    assert [answer.status_code for answer in taken] == [200, 200]
