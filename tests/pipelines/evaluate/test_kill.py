"""A kill in every metric: its actor dies in the middle of a shard, its job stops, and the table is that of a quiet run."""

from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.evaluate import run
from pipelines.evaluate.metric import iter_shards, metric_table
from pipelines.evaluate.pictures import Pictures, sampled_pictures
from pipelines.evaluate.registry import METRICS
from pipelines.stages.contract import Progress
from pipelines.tables.identity import Identity
from pipelines.tables.schema import SAMPLES
from pipelines.tables.table import Table
from tests.pipelines.evaluate.test_run import drawn_rows
from tests.support.dying_metric import DyingMetricWorker
from tests.support.metric_models import tiny_metric
from tests.support.without_ray import run_without_ray

SHARDS, ROWS = 5, 4  # a broken picture in each shard; batches of two
DIES_AT = "2"  # in the second batch of the first shard


class Stopped(Exception):
    """Ends a run from its callback, as the death of its driver would."""


def write_samples(uri: str) -> tuple[Pictures, list[str]]:
    """Pictures of drawn scenes and broken ones, in shards; the prompts are such that every metric takes them."""
    rows, scenes = drawn_rows(SHARDS * ROWS)
    for number, (row, scene) in enumerate(zip(rows, scenes, strict=True)):
        row["prompt"] = f"a photo of a {scene.things[0].color} {scene.things[0].shape}"
        if number % ROWS == 1:
            row["image_bytes"] = row["image_bytes"][:80]
    samples = Table(uri, "samples/night", SAMPLES)
    samples.claim(Identity("sample", {}, {}, {}))
    for number in range(SHARDS):
        samples.write_shard(f"{number:05d}", pa.Table.from_pylist(rows[ROWS * number : ROWS * (number + 1)], SAMPLES))
    return sampled_pictures(uri, "night"), [row["prompt"] for row in rows]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("name", METRICS)
def test_a_metric_whose_actor_and_job_die_gives_an_equal_table(name: str, tmp_path: Path) -> None:
    uri, quiet = str(tmp_path / "data"), str(tmp_path / "quiet")
    pictures, prompts = write_samples(uri)
    config = tiny_metric(name, tmp_path, prompts)
    with pytest.MonkeyPatch.context() as patch:
        run_without_ray(patch)
        whole = run.run_metric(quiet, pictures, name, config)
    died = tmp_path / "died"
    died.mkdir()

    def stop(progress: Progress) -> None:
        if progress.done_shards:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "MetricWorker", partial(DyingMetricWorker, (DIES_AT,), str(died)))
        with pytest.raises(Stopped):
            run.run_metric(uri, pictures, name, config, on_progress=stop)
    assert [path.name for path in died.iterdir()] == [DIES_AT]
    table = metric_table(uri, "night", name)
    for one in (table, table.rejects()):  # it may have been made when the driver was told of the first
        Path(one.shard_uri(f"{SHARDS - 1:05d}")).unlink(missing_ok=True)
    resumed = run.run_metric(uri, pictures, name, config)
    assert resumed.found_shards < SHARDS and whole.found_shards == 0
    assert (resumed.num_rows, resumed.num_rejects) == (whole.num_rows, whole.num_rejects) == (SHARDS * (ROWS - 1), SHARDS)
    assert table.list_shards() == table.rejects().list_shards() == [f"{number:05d}" for number in range(SHARDS)]
    for one, other in ((table, whole.table), (table.rejects(), whole.table.rejects())):
        assert all(shard.equals(same) for shard, same in zip(iter_shards(one), iter_shards(other), strict=True))
    print(f"\n{name}: killed at picture {DIES_AT}, stopped; {resumed.found_shards} of {SHARDS} shards found again; all equal")
