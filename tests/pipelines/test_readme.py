"""The example of pipelines/README.md is a stage: its files, as they stand there, make a table and resume it."""

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ray import cloudpickle

from pipelines.audit.verify import verify_dataset
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.run import run_ingest
from pipelines.shapes.drawing import write_folder
from pipelines.tables.errors import StaleTableError
from pipelines.tables.schema import IMAGE_SCORES, IMAGES, image_scores_path
from pipelines.tables.table import REPORT, Table
from pipelines.workers.images import decode
from tests.support.without_ray import run_without_ray

README = Path(__file__).parents[2] / "pipelines/README.md"
MODULES = ("pipelines.brightness.config", "pipelines.brightness.run", "jobs.brightness")


@pytest.fixture
def modules(tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ModuleType]]:
    """The page's python blocks as the modules that they would be, which Ray's workers get by value."""
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == len(MODULES)
    package = ModuleType("pipelines.brightness")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, package.__name__, package)
    made = []
    for name, block in zip(MODULES, blocks, strict=True):
        file = tmp_path / f"{name}.py"
        file.write_text(block)
        spec = spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        cloudpickle.register_pickle_by_value(module)
        made.append(module)
    yield made
    for module in made:
        cloudpickle.unregister_pickle_by_value(module)


def test_the_example_makes_its_table_and_has_nothing_to_do_then(
    tmp_path: Path, modules: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _, command = modules
    write_folder(tmp_path / "raw", 10_000_900, 5)
    Image.new("RGB", (64, 64), "gray").save(tmp_path / "raw/plain.png")
    uri = str(tmp_path / "data")
    run_ingest(uri, IngestConfig(source=f"{tmp_path}/raw", rows_per_shard=3))

    job = command.BrightnessJob(dataset_uri=uri, brightness=config.BrightnessConfig(side=32))
    result = command.run(job)
    assert (result.num_rows, result.rejects_by_reason, result.num_shards) == (5, {"plain": 1}, 2)
    images, table = Table(uri, "images", IMAGES), Table(uri, image_scores_path("brightness"), IMAGE_SCORES)
    found = {row["id"]: row["score"] for shard in table.list_shards() for row in table.read_shard(shard).to_pylist()}
    for shard in images.list_shards():
        for row in images.read_shard(shard).to_pylist():
            pixels = np.asarray(decode(row["image_bytes"]).convert("L").resize((32, 32))) / 255
            assert found.pop(row["id"], None) == (pytest.approx(pixels.mean()) if np.ptp(pixels) else None)
    assert not found and "brightness" in Path(table.uri, REPORT).read_text()

    run_without_ray(monkeypatch)
    assert command.run(job).was_done
    larger = replace(job, brightness=replace(job.brightness, side=16))
    with pytest.raises(StaleTableError, match=r"config\.side: 32 -> 16"):
        command.run(larger)
    moved = replace(job.brightness, resources=replace(job.brightness.resources, num_actors=2))
    assert command.run(replace(job, brightness=moved)).was_done  # where it runs changes no value
    assert not command.run(replace(larger, on_stale="rebuild")).was_done
    assert list(verify_dataset(uri)) == []
