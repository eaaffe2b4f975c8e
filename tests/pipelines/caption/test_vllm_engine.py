"""The `vllm` engine for real, against the `transformers` engine on the same weights. `pytest -m vllm` runs these."""

import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pipelines.caption.config import CaptionerConfig, HttpConfig, QualityConfig, SamplingConfig, VllmConfig
from pipelines.caption.run import run_caption
from pipelines.stages.contract import Progress, Resources
from pipelines.workers.models import pretrained
from tests.support.caption_world import BROKEN, TOO_LONG, captions, image_row, refused, scene, write_images
from tests.support.http_server import free_port
from tests.support.http_world import serving

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

DEADLY = "star " * 100
"""Makes a prompt of which `tests.support.deadly` ends the engine's process."""
NUM_IMAGES, ROWS_PER_SHARD = 200, 20
BAD, LONG = 33, 77
"""Places of the image that is broken, and of the one whose prompt is too long."""
SOCKETS = Path(tempfile.gettempdir(), f"vllm-{os.getpid()}")  # the path of a socket must be short
"""Where vLLM's engines put theirs, which they leave behind when they are killed."""
CONFIG = CaptionerConfig(
    name="vllm",
    model="zoo://captioner-a",
    prompt="Describe the image.{caption}",
    engine="vllm",
    dtype="float32",
    context_length=256,
    sampling=SamplingConfig(max_new_tokens=48),
    quality=QualityConfig(same_caption_min=1000),
    vllm=VllmConfig(
        batch_size=8,
        max_concurrent_batches=2,
        engine_args={"enforce_eager": True},
        env={"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_RPC_BASE_PATH": str(SOCKETS)},
    ),
    resources=Resources(num_cpus=2),
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Iterator[str]:
    SOCKETS.mkdir()
    rows = [image_row(number, scene(number)) for number in range(NUM_IMAGES)]
    rows[BAD] = image_row(BAD, BROKEN)
    rows[LONG] = image_row(LONG, scene(LONG), TOO_LONG)
    rows[5] = image_row(5, scene(5), "<image></s>")  # found text may hold what is a token to the model
    yield write_images(tmp_path_factory.mktemp("data"), rows, ROWS_PER_SHARD)
    shutil.rmtree(SOCKETS)


@pytest.mark.parametrize("model", ["zoo://captioner-a", pytest.param("zoo://captioner-b", marks=pytest.mark.slow)])
def test_both_engines_say_the_same_and_a_poisoned_row_costs_itself(dataset: str, model: str) -> None:
    names = [f"{engine}-{model[-1]}" for engine in ("vllm", "transformers")]
    config = replace(CONFIG, name=names[0], model=model)
    result = run_caption(dataset, config)
    run_caption(dataset, replace(config, name=names[1], engine="transformers", batch_size=64))
    ours, theirs = (captions(dataset, name) for name in names)
    assert [[row["id"] for row in rows] for rows in ours.values()] == [[row["id"] for row in rows] for rows in theirs.values()]
    pairs = [pair for shard in ours for pair in zip(ours[shard], theirs[shard], strict=True)]
    same = sum(one == other for one, other in pairs)
    print(f"{model}: {same} of {len(pairs)} rows are equal")
    assert len(pairs) == NUM_IMAGES - 2 and same >= 0.95 * len(pairs)
    expected = {f"id{BAD:04}": "not_an_image", f"id{LONG:04}": "prompt_too_long"}
    assert refused(dataset, names[0]) == refused(dataset, names[1]) == expected
    assert (result.num_rows, result.rejects_by_reason) == (NUM_IMAGES - 2, {"not_an_image": 1, "prompt_too_long": 1})


def test_vllms_server_says_the_same_over_http(dataset: str, tmp_path: Path) -> None:
    """Of the rows that both engines above agree on; the server names what is wrong with the long one."""
    (model, _), port = pretrained(CONFIG.model), free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--dtype", "float32"]
    command += ["--max-model-len", "256", "--enforce-eager", "--generation-config", "vllm", "--port", str(port)]
    with serving(command, port, tmp_path / "log", env=CONFIG.vllm.env) as url:
        http = HttpConfig(base_url=url, concurrency=8, max_attempts=2, backoff=0.1)
        run_caption(dataset, replace(CONFIG, name="http", model=model, engine="http", http=http))
    served, ours = captions(dataset, "http"), captions(dataset, "vllm-a")
    pairs = [pair for shard in ours for pair in zip(served[shard], ours[shard], strict=True)]
    same = sum(one == other for one, other in pairs)
    print(f"http: {same} of {len(pairs)} rows are equal")
    assert len(pairs) == NUM_IMAGES - 2 and same >= 0.95 * len(pairs)
    assert refused(dataset, "http") == refused(dataset, "vllm-a")


def engines() -> list[psutil.Process]:
    """The living processes of vLLM's engines that this process's Ray has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it ended in between; a zombie is one as well
            if any("EngineCore" in part for part in process.cmdline()):
                found.append(process)
    return found


def test_an_engine_and_then_its_actor_killed_in_the_middle_lose_nothing(dataset: str) -> None:
    killed: list[int] = []

    def kill(progress: Progress) -> None:
        if progress.done_shards == 1 and not killed:
            killed.append(engines()[0].pid)
            os.kill(killed[-1], signal.SIGKILL)
        elif progress.done_shards == 6 and len(killed) == 1:
            actor = engines()[0].parent()
            assert actor is not None and actor.name().startswith("ray::")
            killed.append(actor.pid)
            os.kill(killed[-1], signal.SIGKILL)

    slow = replace(CONFIG, vllm=replace(CONFIG.vllm, batch_size=4, max_concurrent_batches=1))
    result = run_caption(dataset, replace(slow, name="killed"), on_progress=kill)
    assert len(killed) == 2 and result.num_shards == NUM_IMAGES / ROWS_PER_SHARD
    assert captions(dataset, "killed") == captions(dataset, "vllm-a")
    assert refused(dataset, "killed") == refused(dataset, "vllm-a")


def test_a_row_that_kills_every_engine_is_refused_and_no_other(dataset: str, tmp_path: Path) -> None:
    """What kills it is a real death: a processor of logits, in the engine's own process, that exits at the row's prompt."""
    rows = [image_row(number, scene(number), DEADLY if number == 13 else None) for number in range(30)]
    uri = write_images(tmp_path, rows, ROWS_PER_SHARD)
    deadly = {"enforce_eager": True, "logits_processors": ["tests.support.deadly:Deadly"]}
    result = run_caption(uri, replace(CONFIG, name="deadly", vllm=replace(CONFIG.vllm, engine_args=deadly)))
    assert result.rejects_by_reason == {"engine_died": 1} and refused(uri, "deadly") == {"id0013": "engine_died"}
    by_id = {row["id"]: row for rows in captions(dataset, "vllm-a").values() for row in rows}
    made = [row for rows in captions(uri, "deadly").values() for row in rows]
    assert [row["id"] for row in made] == [f"id{number:04}" for number in range(30) if number != 13]
    assert all(row == by_id[row["id"]] for row in made if row["id"] != "id0005")  # whose prompt is another there
