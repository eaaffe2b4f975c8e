"""The command: what it says before it starts, and a server on Ray Serve that OpenAI's own client draws with."""

import base64
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from ray.serve.schema import LoggingConfig

from jobs.common.config import parse_config
from jobs.draw import main as draw
from jobs.serve import ServeJob, check_address, is_loopback, main, read_arguments, run, serving, shown_host, start_proxy
from tests.support.http_server import free_port
from tests.support.served import kill_a_painter

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")  # of Ray Serve, when it is imported

CIRCLE = "a large red circle on a white background"


def test_what_is_refused_or_told_before_anything_starts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("SANA_API_KEYS", raising=False)
    assert main(["--require_key", "true"]) == 1
    assert "SANA_API_KEYS holds no key" in capsys.readouterr().err
    monkeypatch.setattr("jobs.serve.start_ray", lambda config: (_ for _ in ()).throw(KeyboardInterrupt))
    for host, keys, warned in (("0.0.0.0", "", True), ("0.0.0.0", "a,b", False), ("127.0.0.1", "", False)):
        monkeypatch.setenv("SANA_API_KEYS", keys)
        run(ServeJob(host=host))
        assert ("whoever reaches it may draw" in capsys.readouterr().err) is warned
    assert is_loopback("::1") and is_loopback("localhost") and not is_loopback("sana.example.org")
    assert [shown_host(host) for host in ("0.0.0.0", "::1", "10.0.0.7")] == ["127.0.0.1", "[::1]", "10.0.0.7"]
    with socket.socket() as taken, pytest.raises(ValueError, match=r"port=\d+ cannot be listened on .*: give another port"):
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        check_address("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ValueError, match="there is no field batchsize: did you mean batch_size"):
        read_arguments({"batchsize": 3})
    for arguments, told in {
        ("--max_replicas=0",): "max_replicas=0 is less than resources.num_actors=1",
        ("--cors_origins=[example.org]",): "must be a scheme and a host",
        ("--limits.max_count=0",): "max_count=0 must be at least 1",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            parse_config(ServeJob, list(arguments), prog="serve", description="")
        assert told in capsys.readouterr().err


@pytest.fixture(scope="module")
def address(local_ray: None) -> Iterator[str]:
    """A server with one replica and a short queue, on the Ray of all tests."""
    from ray import serve

    from pipelines.serve.deploy import APPLICATION, build_app

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    job = parse_config(ServeJob, ["--batch_size=2", "--max_waiting=2"], prog="serve", description="")
    serve.run(build_app(job.to_serve()), name=APPLICATION)
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def assert_same_picture(one: bytes, other: bytes, most: int = 1) -> None:
    """Drawn in the same way, and equal but for rounding, at most `most`: another process or batch may add in another order."""
    images = [Image.open(BytesIO(content)) for content in (one, other)]
    assert images[0].info == images[1].info
    first, second = (np.asarray(image, np.int16) for image in images)
    assert np.abs(first - second).max() <= most


def test_openai_s_client_draws_what_jobs_draw_draws(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
    (name,) = [model.id for model in client.models.list()]
    more = {"seed": 5, "steps": 4}
    answer = client.images.generate(model=name, prompt=CIRCLE, size="64x64", extra_body=more)  # type: ignore[call-overload]
    assert draw([CIRCLE, "--seed=5", "--steps=4", "--out", str(tmp_path)]) == 0
    file = Path(capsys.readouterr().out.strip())
    content = base64.b64decode(answer.data[0].b64_json)
    assert_same_picture(content, file.read_bytes())
    events = client.images.generate(model=name, prompt=CIRCLE, stream=True, partial_images=2, extra_body=more)  # type: ignore[call-overload]
    *previews, last = [(event.type, base64.b64decode(event.b64_json)) for event in events]
    assert [kind for kind, _ in previews] == ["image_generation.partial_image"] * 2 and last[0] == "image_generation.completed"
    assert_same_picture(last[1], content)
    edited = client.images.edit(model=name, image=file.open("rb"), prompt=CIRCLE, extra_body={"seed": "1", "steps": "2"})
    assert edited.data and edited.data[0].b64_json
    with pytest.raises(openai.BadRequestError, match="multiple of 8") as caught:
        client.images.generate(model=name, prompt=CIRCLE, size="63x64")  # type: ignore[call-overload]
    assert caught.value.type == "invalid_request_error"


def test_a_cluster_s_serve_has_one_address(address: str) -> None:
    port, there = free_port(), address.rpartition(":")[2]
    with pytest.raises(ValueError, match=f"port={port}: .* already, .* give --host 127.0.0.1 --port {there}, or"):
        start_proxy("127.0.0.1", port, LoggingConfig())


@pytest.mark.slow
def test_a_full_queue_a_client_that_leaves_and_a_lost_replica(address: str) -> None:
    def ask(seed: int, steps: int = 4, timeout: float = 120.0) -> httpx.Response:
        body = {"prompt": CIRCLE, "seed": seed, "steps": steps}
        return httpx.post(f"{address}/v1/images/generations", json=body, timeout=timeout)

    expected = ask(7).json()["data"][0]["b64_json"]
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda seed: ask(seed, steps=30), range(16)))
    full = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in full)
    assert full[0].json()["error"]["code"] == "queue_full"
    with ThreadPoolExecutor(6) as threads:  # as many as have a place, for minutes of work; all leave
        left = list(threads.map(lambda seed: _leaves(ask, seed), range(6)))
    assert all(left)
    deadline = time.monotonic() + 60
    while (answer := ask(7)).status_code == 429 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert answer.json()["data"][0]["b64_json"] == expected
    with ThreadPoolExecutor(1) as threads:
        waits = threads.submit(ask, 7, 60)
        time.sleep(0.5)
        kill_a_painter()
        assert waits.result().status_code == 200
    assert ask(7).json()["data"][0]["b64_json"] == expected


def _leaves(ask: Any, seed: int) -> bool:
    try:
        ask(seed, steps=100, timeout=1.0)
    except httpx.TimeoutException:
        return True
    return False


@pytest.mark.slow
def test_many_clients_and_a_replica_that_is_killed(local_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """200 requests of 16 clients on two replicas, one of which is killed in the middle: each gets the picture of its seed."""
    from ray import serve

    count, words = 200, ["--steps=4", "--seed=0", "--batch=4", "--count=200"]
    assert draw([CIRCLE, *words, "--out", str(tmp_path)]) == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert len(files) == count
    serve.shutdown()  # of the tests before, which has another port
    job = parse_config(ServeJob, ["--resources.num_actors=2", f"--port={free_port()}"], prog="serve", description="")
    killed = threading.Event()

    def ask(seed: int) -> bytes:
        if seed == count // 3:
            kill_a_painter()
            killed.set()
        body = {"prompt": CIRCLE, "seed": seed, "steps": 4}
        answer = httpx.post(f"{address}/v1/images/generations", json=body, timeout=300)
        assert answer.status_code == 200, answer.text
        return base64.b64decode(answer.json()["data"][0]["b64_json"])

    with serving(job, False) as address, ThreadPoolExecutor(16) as threads:
        drawn = list(threads.map(ask, range(count)))
    serve.shutdown()
    assert killed.is_set()
    for content, file in zip(drawn, files, strict=True):
        assert_same_picture(content, file.read_bytes(), most=2)
