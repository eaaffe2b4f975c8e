"""The `http` engine against `transformers serve`, through a proxy that answers wrongly when told to."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.caption.config import CaptionerConfig, HttpConfig, QualityConfig, SamplingConfig
from pipelines.caption.http_engine import HttpCaptioner
from pipelines.caption.run import run_caption
from pipelines.caption.transformers_engine import TransformersCaptioner
from pipelines.stages.contract import ShardOutput
from pipelines.tables.errors import StageError
from pipelines.tables.schema import Row
from pipelines.workers.models import pretrained
from tests.support.caption_world import BROKEN, captions, image_row, refused, scene, write_images
from tests.support.http_server import free_port
from tests.support.http_world import FaultyProxy, transformers_server
from tests.support.without_ray import run_without_ray

MODEL, _ = pretrained("zoo://captioner-a")
CONFIG = CaptionerConfig(
    name="http",
    model=MODEL,
    prompt="Describe the image.{caption}",
    engine="http",
    dtype="float32",
    sampling=SamplingConfig(max_new_tokens=48),
    quality=QualityConfig(same_caption_min=1000),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with transformers_server(MODEL, tmp_path_factory.mktemp("server") / "log") as url:
        yield url


@pytest.fixture
def proxy(server: str) -> Iterator[FaultyProxy]:
    with FaultyProxy(server).running() as proxy:
        yield proxy


def config(proxy: FaultyProxy, **settings: object) -> CaptionerConfig:
    http = HttpConfig(base_url=proxy.url, backoff=0.01, timeout=60, concurrency=2)
    return replace(CONFIG, http=replace(http, **settings))


def table(rows: list[Row]) -> pa.Table:
    return pa.Table.from_pylist([{name: row[name] for name in CONFIG.columns} for row in rows])


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [image_row(number, scene(number)) for number in range(6)]


@pytest.fixture(scope="module")
def expected(rows: list[Row]) -> ShardOutput:
    return TransformersCaptioner(replace(CONFIG, engine="transformers", batch_size=8)).process(table(rows))


def test_a_server_says_what_the_transformers_engine_says(proxy: FaultyProxy, rows: list[Row], expected: ShardOutput) -> None:
    assert HttpCaptioner(config(proxy)).process(table(rows)) == expected
    assert len(expected.rows) == 6 and len(proxy.seen) == 6 and proxy.most_inside <= 2


@pytest.mark.parametrize("fault", ["429", "500", "502", "503", "garbage", "not_gzip", "error", "drop"])
def test_a_fault_that_passes_changes_nothing(proxy: FaultyProxy, rows: list[Row], expected: ShardOutput, fault: str) -> None:
    proxy.faults.extend([fault] * 2)
    made = HttpCaptioner(config(proxy)).process(table(rows[:1]))
    assert made.rows == expected.rows[:1] and made.rejects == []
    assert len(proxy.seen) == 3


def test_a_server_that_is_slow_once_is_asked_again(proxy: FaultyProxy, rows: list[Row], expected: ShardOutput) -> None:
    captioner = HttpCaptioner(config(proxy, timeout=60))
    proxy.faults.append("slow")  # for a second, then it hangs up
    assert captioner.process(table(rows[:1])).rows == expected.rows[:1]


def test_retry_after_goes_before_the_back_off(proxy: FaultyProxy, rows: list[Row]) -> None:
    proxy.faults.append("429")
    proxy.retry_after = "1"
    HttpCaptioner(config(proxy, backoff=0.0)).process(table(rows[:1]))
    (first, _), (second, _) = proxy.seen
    assert second - first >= 1.0


def test_a_row_that_the_server_refuses_costs_that_row(proxy: FaultyProxy, rows: list[Row], expected: ShardOutput) -> None:
    bad = [rows[0], image_row(1, BROKEN), image_row(2, scene(2), " purple"), rows[3]]
    proxy.faults.append("too_long")
    proxy.poison = b"purple"
    made = HttpCaptioner(config(proxy, concurrency=1, max_attempts=2)).process(table(bad))
    # To the third it answers 500, however often; asked about something else, it answers.
    assert [(row["id"], row["reject_reason"]) for row in made.rejects] == [
        ("id0000", "prompt_too_long"),
        ("id0001", "not_an_image"),
        ("id0002", "server_error"),
    ]
    assert made.rows == [expected.rows[3]]


@pytest.mark.parametrize("fault", ["429", "503"])
def test_no_row_is_blamed_for_a_limit_on_the_rate(
    proxy: FaultyProxy, rows: list[Row], expected: ShardOutput, fault: str
) -> None:
    """A server that is asked too much answers a small request, and refuses a large one."""
    proxy.faults.extend([fault] * 3)
    made = HttpCaptioner(config(proxy, max_attempts=1)).process(table(rows[:1]))
    assert (made.rows, made.rejects, len(proxy.seen)) == (expected.rows[:1], [], 4)
    proxy.always = fault
    with pytest.raises(StageError, match=rf"is busy for 0\.05 s: {fault}: fault {fault}\. Start again"):
        HttpCaptioner(config(proxy, patience=0.05)).process(table(rows[:1]))


def test_a_key_is_taken_from_the_environment_alone(
    proxy: FaultyProxy, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPTION_KEY", "secret")
    HttpCaptioner(config(proxy, api_key_variable="CAPTION_KEY")).process(table(rows[:1]))
    HttpCaptioner(config(proxy, api_key_variable="NO_SUCH_KEY")).process(table(rows[:1]))
    assert [headers.get("authorization", headers.get("Authorization")) for _, headers in proxy.seen] == ["Bearer secret", None]


def test_a_wrong_key_or_model_ends_the_job_at_once(proxy: FaultyProxy, rows: list[Row]) -> None:
    for status in ("401", "404"):
        proxy.seen.clear()
        proxy.always = status
        with pytest.raises(StageError, match=rf"answers {status}: fault {status}\. Look at http\.base_url"):
            HttpCaptioner(config(proxy, concurrency=1)).process(table(rows[:1]))
        assert len(proxy.seen) == 1


def test_a_server_that_is_down_ends_the_job_and_nothing_is_lost(
    proxy: FaultyProxy, tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [image_row(number, scene(number)) for number in range(8)]
    dataset = write_images(tmp_path / "data", rows, 2)
    captioner = config(proxy, max_attempts=2, concurrency=1, patience=0.1)
    gone = replace(captioner, http=replace(captioner.http, base_url=f"http://127.0.0.1:{free_port()}/v1"))
    proxy.faults.extend([None] * 5 + ["503"] * 100)  # it breaks down within the third of four shards
    with pytest.raises(StageError, match="503: fault 503"):
        run_caption(dataset, captioner)
    done = captions(dataset, "http")
    assert 0 < len(done) < 4 and refused(dataset, "http") == {}
    run_without_ray(monkeypatch)
    with pytest.raises(StageError, match=r"gave up after 2 attempts at a request: ConnectError.*Start again"):
        run_caption(dataset, gone)
    assert captions(dataset, "http") == done and refused(dataset, "http") == {}
    proxy.faults.clear()
    result = run_caption(dataset, captioner)
    assert result.found_shards >= len(done) and result.num_rows == 8
    run_caption(dataset, replace(CONFIG, name="here", engine="transformers"))
    assert captions(dataset, "http") == captions(dataset, "here")
