"""A stage's overhead: its time compared with the bare loop over the same calls, and its memory as rows grow."""

import tempfile
import time
from collections.abc import Callable
from functools import partial

import pyarrow as pa
from tqdm import tqdm

from jobs.benchmark.config import StageConfig
from jobs.benchmark.memory import MIB, watch_memory
from jobs.benchmark.stand_ins import NoModel, SleepingModel
from jobs.common.ray import RayConfig, start_ray
from pipelines.stages.contract import Resources, ShardWorker, StageResult
from pipelines.stages.run import run_shards
from pipelines.tables.identity import Identity
from pipelines.tables.schema import CAPTIONS, captions_path
from pipelines.tables.table import Table


def benchmark_stage(config: StageConfig) -> None:
    """Print a stage's speed against the bare loop over its model, and its memory with a model that does nothing."""
    rows_per_shard = config.rows_per_shard
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, start_ray(RayConfig(num_cpus=config.num_cpus)):
        print(f"Ray started in {time.monotonic() - start:.1f} s (not counted below)", flush=True)
        if config.rows:
            _compare(folder, config.rows, config.ms_per_row / 1000, rows_per_shard)
        if config.memory_rows:
            print(f"\nno model, shards of {rows_per_shard} rows; peaks in MiB, processes without what they share")
            print(f"{'rows':>9}{'seconds':>9}{'rows/s':>9}{'driver':>8}{'workers':>9}{'object store':>14}", flush=True)
        for count in config.memory_rows:
            source = _make_input(folder, f"no-model-{count}", count, rows_per_shard)
            with watch_memory() as peaks:
                result = _run(source, NoModel)
            print(
                f"{count:>9}{result.seconds:>9.1f}{count / result.seconds:>9.0f}{peaks.driver / MIB:>8.0f}"
                f"{peaks.workers / MIB:>9.0f}{peaks.object_store / MIB:>14.0f}",
                flush=True,
            )


def _compare(folder: str, rows: int, seconds: float, rows_per_shard: int) -> None:
    """Run half of the bare loop before the stage and half after it, so that a busy machine slows both."""
    source = _make_input(folder, "sleeping", rows, rows_per_shard)
    model = SleepingModel(seconds)
    shards = source.list_shards()
    loop_seconds = _time_loop(model, source, shards[: len(shards) // 2])
    result = _run(source, partial(SleepingModel, seconds))
    loop_seconds += _time_loop(model, source, shards[len(shards) // 2 :])
    print(
        f"{rows} rows, {seconds * 1000:g} ms each: bare loop {loop_seconds:.1f} s, stage {result.seconds:.1f} s, "
        f"ratio {loop_seconds / result.seconds:.1%}",
        flush=True,
    )


def _time_loop(model: SleepingModel, source: Table, shards: list[str]) -> float:
    """Seconds for the model's calls alone, without reading."""
    tables = [source.read_shard(shard) for shard in shards]
    start = time.monotonic()
    for table in tqdm(tables, desc="bare loop", leave=False):
        model.process(table)
    return time.monotonic() - start


def _make_input(folder: str, name: str, rows: int, rows_per_shard: int) -> Table:
    table = Table(folder, captions_path(f"{name}-input"), CAPTIONS)
    for number, start in enumerate(range(0, rows, rows_per_shard)):
        ids = [f"{row:064x}" for row in range(start, min(start + rows_per_shard, rows))]
        captions = [
            {"id": row_id, "caption": f"a caption of {row_id}", "num_tokens": 8, "finish_reason": "stop"} for row_id in ids
        ]
        table.write_shard(f"{number:05d}", pa.Table.from_pylist(captions, CAPTIONS))
    return table


def _run(source: Table, make_worker: Callable[[], ShardWorker]) -> StageResult:
    return run_shards(
        Table(source.dataset_uri, source.path.removesuffix("-input"), CAPTIONS),
        Identity("benchmark", {}, {}, {}),
        source.list_shards(),
        read_shard=source.read_shard,
        make_worker=make_worker,
        resources=Resources(),
        max_reject_share=0.0,
    )
