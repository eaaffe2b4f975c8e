"""A folder of hostile images through a whole `ingest`: each ends as the right row or with the right reason; nothing dies."""

import threading
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipelines.ingest.config import IngestConfig
from pipelines.ingest.run import IngestWorker, ShardReader, run_ingest
from pipelines.ingest.sources import find_source, list_parts
from pipelines.tables.schema import IMAGES, IMAGES_PATH, Row
from pipelines.tables.table import Table
from pipelines.workers.images import ImageLimits, decode
from tests.support.hostile_images import Hostile, all_hostile

LIMITS = ImageLimits(max_bytes=4_000_000)
MAX_GROWTH = 200 * 2**20  # bytes; the bombs would unfold into gigabytes


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Hostile]]:
    folder = tmp_path_factory.mktemp("hostile")
    cases = {case.name: case for case in all_hostile()}
    for name, case in cases.items():
        (folder / name).write_bytes(case.content)
    return folder, cases


def check(cases: dict[str, Hostile], rows: list[Row], rejects: list[Row]) -> None:
    kept = {Path(row["source_uri"]).name: row for row in rows}
    refused = {Path(row["source_uri"]).name: row for row in rejects}
    assert kept.keys() | refused.keys() == cases.keys()
    assert len(rows) + len(rejects) == len(cases)
    wrong = [name for name, case in cases.items() if (name in refused) != bool(case.reasons)]
    assert not wrong, [refused.get(name, "kept") for name in wrong]
    for name, row in refused.items():
        assert row["reject_reason"] in cases[name].reasons, row
        assert row["detail"] and (row["id"] or row["reject_reason"] == "too_many_bytes")
    for name, row in kept.items():
        case = cases[name]
        assert (row["width"], row["height"]) == case.size, name
        assert not case.format or row["format"] == case.format, name
        assert row["image_bytes"] == case.content
        assert case.pixels is None or case.pixels(np.asarray(decode(row["image_bytes"]), dtype=np.int64)), name


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore:Corrupt EXIF")
def test_memory_stays_bounded(corpus: tuple[Path, dict[str, Hostile]]) -> None:
    folder, cases = corpus
    assert len(cases) > 100
    source = find_source(str(folder), "auto", max_bytes=LIMITS.max_bytes)
    table = ShardReader(source, lambda shard: list_parts(source))("00000")
    worker, process, done = IngestWorker(LIMITS), psutil.Process(), threading.Event()
    list(worker.decoder.describe([b""]))  # starts the process that decodes
    assert worker.decoder.child is not None
    decoding = psutil.Process(worker.decoder.child.pid)

    def used() -> int:
        return process.memory_info().rss + decoding.memory_info().rss

    before = peak = used()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, used())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        rows, rejects, _ = worker.process(table)
    finally:
        done.set()
        watcher.join()
    assert isinstance(rows, list)
    check(cases, rows, rejects)
    assert decoding.is_running(), "an image ended the process"
    assert peak - before < MAX_GROWTH, f"{(peak - before) / 2**20:.0f} MiB"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore:Corrupt EXIF")
def test_whole_ingest(corpus: tuple[Path, dict[str, Hostile]], tmp_path: Path, local_ray: None) -> None:
    folder, cases = corpus
    config = IngestConfig(source=str(folder), limits=LIMITS, rows_per_shard=60, max_reject_share=0.9)
    result = run_ingest(str(tmp_path), config)
    assert result.num_rows + result.num_rejects == len(cases)
    images = Table(str(tmp_path), IMAGES_PATH, IMAGES)
    shards = images.list_shards()
    assert len(shards) == -(-len(cases) // 60)
    check(
        cases,
        [row for shard in shards for row in images.read_shard(shard).to_pylist()],
        [row for shard in shards for row in images.rejects().read_shard(shard).to_pylist()],
    )
