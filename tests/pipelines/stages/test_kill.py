"""Kill anything at any time: after the next start each table is, shard by shard, that of an undisturbed run."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from pipelines.audit.verify import verify_dataset
from pipelines.shapes.drawing import write_folder
from pipelines.storage.files import find_files, read_file, write_file
from pipelines.tables.table import Table
from tests.support.kill_stages import CHEAP, stage_table
from tests.support.kills import Kills, Target, run_with_kills
from tests.support.s3 import BUCKET, FaultyProxy, environment, s3_environment, serve_s3

NUM_IMAGES = 2048
TARGETS: list[Target] = ["driver", "actor", "actor", "raylet", "actor", "actor", "driver", "actor", "raylet", "actor"]
STAGES = ["ingest", "caption", "embed_images", "score", "extract", "embed_captions"]
LARGE = (1024, 1024)  # pixels of the raw images: decoding takes so long that ingest can be struck on the way


def command(stage: str, dataset_uri: str, source: Path) -> list[str]:
    return [sys.executable, "-m", "tests.support.kill_stages", stage, dataset_uri, str(source)]


def contents(table: Table) -> dict[str, tuple[list[str], list[str]]]:
    """By shard: what its rows and its rejects are, in an order of their own."""
    rejects = table.rejects()
    return {
        shard: tuple(sorted(repr(row) for row in one.read_shard(shard).to_pylist()) for one in (table, rejects))  # type: ignore[misc]
        for shard in table.list_shards()
    }


def copy_table(table: Table, copy: Table) -> None:
    for one, other in ((table, copy), (table.rejects(), copy.rejects())):
        for path in find_files(one.uri):
            write_file(f"{other.uri}/{path}", read_file(f"{one.uri}/{path}"))


@pytest.mark.slow
def test_a_cheap_stage_survives_the_death_of_its_driver_and_actors(tmp_path: Path) -> None:
    uri = str(tmp_path / "data")
    table = stage_table("cheap", uri)
    kills = run_with_kills(
        command("cheap", uri, tmp_path),
        ["actor", "driver", "actor"],
        lambda: len(table.list_shards()),
        log=tmp_path / "log",
        seed=0,
    )
    found = {shard: (table.read_shard(shard)["id"], table.rejects().read_shard(shard)["id"]) for shard in table.list_shards()}
    assert {shard: (kept.to_pylist(), refused.to_pylist()) for shard, (kept, refused) in found.items()} == {
        shard: ([row for row in ids if "bad" not in row], [row for row in ids if "bad" in row]) for shard, ids in CHEAP.items()
    }
    manifest = table.require()
    assert manifest.complete and (manifest.num_rows, manifest.num_rejects) == (108, 12)
    assert kills.killed["driver"] == 1 and kills.killed["actor"] >= 1 and kills.starts == 2


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The raw images, with some that are refused, and a dataset on a local disk that no kill disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    source = folder / "raw"
    write_folder(source, 0, NUM_IMAGES)
    for path in source.glob("*.png"):
        Image.open(path).resize(LARGE, Image.Resampling.NEAREST).save(path, compress_level=1)
    for number in range(0, NUM_IMAGES, 200):
        (source / f"{number:09d}x.png").write_bytes(b"no image")
        shutil.copy(source / f"{number:09d}.png", source / f"{number:09d}y.png")
    uri = str(folder / "data")
    for stage in STAGES:
        subprocess.run(command(stage, uri, source), check=True)
    return source, uri


@pytest.fixture(scope="module", params=["local", "s3"])
def disturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """Where datasets go, and the environment to reach it; the S3 spoils one answer in twenty."""
    if request.param == "local":
        yield str(tmp_path_factory.mktemp("disturbed")), {}
        return
    with serve_s3() as endpoint:
        proxy = FaultyProxy(endpoint, share=0.05, faults=("500", "503", "reset", "cut", "slow"))
        with proxy.running(), environment(s3_environment(endpoint)):
            yield f"s3://{BUCKET}", s3_environment(proxy.url)
        assert proxy.spoiled.total() > 10
        print(f"S3 spoiled {dict(proxy.spoiled)} of {proxy.requests.total()} answers")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", STAGES)
def test_ten_kills_change_nothing(
    undisturbed: tuple[Path, str], disturbed: tuple[str, dict[str, str]], stage: str, tmp_path: Path
) -> None:
    source, reference = undisturbed
    root, reach = disturbed
    expected = contents(stage_table(stage, reference))
    targets, total, num_runs = list(TARGETS), Kills(), 0
    while targets:  # a job that is done sooner than it could be killed is begun anew, elsewhere
        uri, num_runs = f"{root}/{stage}-{num_runs}", num_runs + 1
        for made in STAGES[: STAGES.index(stage)]:
            copy_table(stage_table(made, reference), stage_table(made, uri))
        table = stage_table(stage, uri)
        kills = run_with_kills(
            command(stage, uri, source),
            targets,
            lambda table=table: len(table.list_shards()),  # type: ignore[misc]
            log=tmp_path / "log",
            seed=10 * STAGES.index(stage) + num_runs,
            environment=reach,
        )
        found = contents(table)
        assert found == expected
        assert table.require().complete and len(table.rejects().list_shards()) == len(found)
        assert list(verify_dataset(uri)) == []
        del targets[: kills.killed.total()]
        total += kills
    num_rows = sum(len(rows) for rows, _ in expected.values())
    print(
        f"\n{stage} at {root}: killed {dict(total.killed)} in {num_runs} runs with {total.starts} starts, each "
        f"with {num_rows} rows in {len(expected)} shards as undisturbed; {total.seconds:.0f} s, stragglers {total.stragglers}"
    )
